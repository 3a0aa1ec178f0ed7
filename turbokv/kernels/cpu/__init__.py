# SPDX-License-Identifier: Apache-2.0
"""The flat codec in C++ for the CPU: the bytes of :mod:`turbokv.core`, several times as fast.

One shared library (:mod:`turbokv.kernels.cpu.build`) is called through its C functions. It holds
kernels for several instruction sets and takes the widest that the processor has; the bytes are the
same for all. Work is spread over ``torch.get_num_threads()`` threads.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from turbokv.core import ScaleRule, VectorFormat
from turbokv.files import check_library
from turbokv.kernels import BackendUnavailableError, arguments
from turbokv.kernels.cpu import build
from turbokv.kernels.cpu.build import LIBRARY

__all__ = [
    "available",
    "compress",
    "decompress",
    "instruction_sets",
    "why_unavailable",
]

REMEDY = "with a C++ compiler, 'python -m turbokv.kernels.cpu' builds them"
# Numbered as dtype_t and scale_rule_t of codec.h.
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_RULES: dict[ScaleRule, int] = {
    "plain": 0,
    "norm_corrected": 1,
    "least_squares": 2,
    "unbiased": 3,
}


_TABLES = ("signs", "magnitudes", "boundaries", "levels")  # all fp32


class _Format(ctypes.Structure):
    """``format_t`` of codec.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("head_dim", "padded_dim", "bits", "rule")),
        *((name, ctypes.c_int32) for name in ("norm_dtype", "is_lattice", "is_mid_tread")),
        *((name, ctypes.c_float) for name in ("normaliser", "scale_factor", "plain_factor")),
        ("inverse_root", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _TABLES),
    ]


class _Matrix(ctypes.Structure):
    """``matrix_t`` of codec.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


@dataclass(eq=False)
class _Prepared:
    """A format as the library reads it, and the tensors that it points into."""

    structure: _Format
    tensors: tuple[Tensor, ...]


@dataclass(eq=False)
class _Library:
    """The loaded library and the names of the instruction sets that run here, fastest last."""

    handle: ctypes.CDLL
    instruction_sets: tuple[str, ...]


# --- the library ----------------------------------------------------------------------------------


def _load() -> _Library:
    return _load_file(LIBRARY)


@functools.cache
def _load_file(path: Path) -> _Library:
    if not path.is_file():
        raise BackendUnavailableError(f"TurboKV's CPU kernels are not built ({REMEDY})")
    try:
        check_library(path)
        handle = ctypes.CDLL(str(path))
        handle.turbokv_cpu_sources.restype = ctypes.c_char_p
        sources = handle.turbokv_cpu_sources().decode()
        handle.turbokv_cpu_instruction_set.restype = ctypes.c_char_p
        compress, decompress = handle.turbokv_cpu_compress, handle.turbokv_cpu_decompress
        is_current = sources == build.sources_digest()
    except (OSError, AttributeError) as error:
        raise BackendUnavailableError(f"{path} does not load ({REMEDY}): {error}") from None
    if not is_current:
        raise BackendUnavailableError(f"{path} is not of the sources beside it; {REMEDY}")
    pointer, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    shared = (pointer, number, pointer, pointer, number, number, pointer, number)
    compress.argtypes = (*shared, integer, integer)
    decompress.argtypes = (*shared, integer, integer, integer)
    compress.restype = decompress.restype = None
    names: list[str] = []
    while (name := handle.turbokv_cpu_instruction_set(len(names))) is not None:
        names.append(name.decode())
    return _Library(handle, tuple(names))


def why_unavailable(device: torch.device | str = "cpu") -> str | None:
    """Return why the kernels cannot run on tensors of ``device``, or None if they can."""
    device = torch.device(device)
    if device.type != "cpu":
        return f"TurboKV's CPU kernels need CPU tensors, got device {device}"
    reason: str | None = _why_not_loaded()
    return reason


# torch.compile need not trace what does not change while a process runs.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_not_loaded() -> str | None:
    try:
        _load()
    except BackendUnavailableError as error:
        return str(error)
    return None


def available(device: torch.device | str = "cpu") -> bool:
    """Return whether the kernels can run on tensors of ``device``."""
    return why_unavailable(device) is None


def instruction_sets() -> tuple[str, ...]:
    """Return the names of the kernels that this processor runs; the last is the one that is used.

    Raises
    ------
    BackendUnavailableError
        If the library is missing or does not load.
    """
    return _load().instruction_sets


# --- arguments ------------------------------------------------------------------------------------

_prepared: weakref.WeakKeyDictionary[VectorFormat, _Prepared] = weakref.WeakKeyDictionary()


def _prepare(fmt: VectorFormat) -> _Prepared:
    known = _prepared.get(fmt)
    if known is not None:
        return known
    book = fmt.codebook
    magnitudes = torch.tensor(book.magnitudes, dtype=torch.float32, device="cpu")
    tensors = (
        fmt.signs.contiguous(),
        magnitudes,
        book.boundaries.contiguous(),
        fmt.levels.contiguous(),
    )
    sizes = (fmt.padded_dim, 1 << (fmt.bits - 1), (1 << (fmt.bits - 1)) - 1, 1 << fmt.bits)
    for name, tensor, size in zip(_TABLES, tensors, sizes, strict=True):
        # read as floats through an address: another dtype or device would be garbage
        arguments.check_plain(tensor, name)
        if (tensor.dtype, tensor.device.type) != (torch.float32, "cpu"):
            wanted, got = "torch.float32 on cpu", f"{tensor.dtype} on {tensor.device}"
            raise TypeError(f"{name}: wanted {wanted}, got {got}")
        if tuple(tensor.shape) != (size,):
            raise ValueError(f"{name}: wanted shape {[size]}, got {list(tensor.shape)}")
    structure = _Format(
        fmt.head_dim,
        fmt.padded_dim,
        fmt.bits,
        _RULES[fmt.scale_rule],
        _DTYPES[fmt.norm_dtype],
        book.is_lattice,
        book.is_mid_tread,
        fmt.normaliser,
        fmt.scale_factor,
        fmt.plain_factor,
        fmt.inverse_root,
        *(each.data_ptr() for each in tensors),
    )
    result = _prepared[fmt] = _Prepared(structure, tensors)
    return result


def _matrix(x: Tensor) -> _Matrix:
    return _Matrix(x.data_ptr(), x.stride(0), x.stride(1), _DTYPES[x.dtype])


def _check(packed: Tensor, norms: Tensor, x: Tensor, fmt: VectorFormat, dim: int, name: str) -> int:
    """Refuse what the library would misread or write past; return the number of vectors."""
    if isinstance(x, Tensor) and x.device.type != "cpu":
        raise ValueError(f"{name}: wanted device cpu, got {x.device}")
    return arguments.check_flat(x, packed, norms, fmt, dim, name)


# --- the codec ------------------------------------------------------------------------------------


def compress(x: Tensor, fmt: VectorFormat, packed: Tensor, norms: Tensor) -> None:
    """Compress ``x`` into ``packed`` and ``norms``; the bytes of :func:`turbokv.core.compress`.

    Parameters
    ----------
    x
        ``[n, head_dim]``, fp32, fp16 or bf16, any strides, on the CPU.
    packed, norms
        Outputs, any strides: uint8 ``[n, packed_dim]`` and ``norm_dtype`` ``[n]``.

    Raises
    ------
    BackendUnavailableError
        If the library is missing or does not load.
    TypeError, ValueError
        If a tensor has another device, shape or dtype.
    """
    _compress(x, fmt, packed, norms, -1)


# torch.compile cannot look into a call by address: its graph breaks here, without a warning.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _compress(
    x: Tensor, fmt: VectorFormat, packed: Tensor, norms: Tensor, instruction_set: int
) -> None:
    library = _load()
    count = _check(packed, norms, x, fmt, fmt.head_dim, "x")
    matrix = _matrix(x)
    library.handle.turbokv_cpu_compress(
        ctypes.addressof(_prepare(fmt).structure),
        count,
        ctypes.addressof(matrix),
        packed.data_ptr(),
        packed.stride(0),
        packed.stride(1),
        norms.data_ptr(),
        norms.stride(0),
        instruction_set % len(library.instruction_sets),
        torch.get_num_threads(),
    )


def decompress(
    packed: Tensor, norms: Tensor, fmt: VectorFormat, out: Tensor, *, rotated: bool = True
) -> None:
    """Decompress into ``out``; the numbers of :func:`turbokv.core.decompress`.

    Parameters
    ----------
    packed, norms
        uint8 ``[n, packed_dim]`` and scales ``[n]``, any strides; a scale's sign bit is a mark.
    out
        ``[n, padded_dim]`` if ``rotated`` else ``[n, head_dim]``: fp32, fp16 or bf16, any strides.

    Raises
    ------
    BackendUnavailableError
        If the library is missing or does not load.
    TypeError, ValueError
        If a tensor has another device, shape or dtype.
    """
    _decompress(packed, norms, fmt, out, rotated, -1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _decompress(
    packed: Tensor,
    norms: Tensor,
    fmt: VectorFormat,
    out: Tensor,
    rotated: bool,
    instruction_set: int,
) -> None:
    library = _load()
    count = _check(packed, norms, out, fmt, fmt.padded_dim if rotated else fmt.head_dim, "out")
    matrix = _matrix(out)
    library.handle.turbokv_cpu_decompress(
        ctypes.addressof(_prepare(fmt).structure),
        count,
        ctypes.addressof(matrix),
        packed.data_ptr(),
        packed.stride(0),
        packed.stride(1),
        norms.data_ptr(),
        norms.stride(0),
        rotated,
        instruction_set % len(library.instruction_sets),
        torch.get_num_threads(),
    )
