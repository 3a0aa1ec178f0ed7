# SPDX-License-Identifier: Apache-2.0
"""The decode kernel on the CPU: its headers compiled with g++, threads emulated.

A kernel is compiled once for each variant, kept by a digest of all that it is made of, and called
with the arguments of ``turbokv.kernels.cuda.decode`` as CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbokv.core import VectorFormat
from turbokv.kernels.cuda.library import sign_words

HERE = Path(__file__).resolve().parent
INCLUDE = HERE.parents[1] / "turbokv/kernels/cuda/include"
CACHE = Path(tempfile.gettempdir()) / f"turbokv-emulated-{os.getuid()}"
FLAGS = (
    *("-std=c++20", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-x", "c++"),
    # a vector at the wrong address is an error on a GPU and none on x86
    *("-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"),
)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Codebook(ctypes.Structure):
    _fields_ = [
        ("bits", ctypes.c_int32),
        ("frac_bits", ctypes.c_int32),
        ("step", ctypes.c_double),
        ("magnitudes", ctypes.c_int8 * 128),
    ]


class PagedKV(ctypes.Structure):
    _fields_ = [
        ("pages", ctypes.c_void_p),
        ("page_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("page_size", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("page_table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("kv_indptr", ctypes.c_void_p),
        ("kv_lens", ctypes.c_void_p),
        ("kv_last_page_len", ctypes.c_void_p),
        ("tile_slots", ctypes.c_void_p),
        ("window", ctypes.c_void_p),
    ]


class Params(ctypes.Structure):
    _fields_ = [
        ("kv", PagedKV),
        ("q", ctypes.c_void_p),
        ("q_stride_n", ctypes.c_int64),
        ("q_stride_h", ctypes.c_int64),
        ("q_dtype", ctypes.c_int32),
        ("out", ctypes.c_void_p),
        ("out_stride_n", ctypes.c_int64),
        ("out_stride_h", ctypes.c_int64),
        ("out_dtype", ctypes.c_int32),
        ("lse", ctypes.c_void_p),
        ("lse_stride_n", ctypes.c_int64),
        ("qo_indptr", ctypes.c_void_p),
        ("batch_size", ctypes.c_int32),
        ("num_qo_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("max_q_len", ctypes.c_int32),
        ("sm_scale", ctypes.c_float),
        ("logits_soft_cap", ctypes.c_float),
        ("window_left", ctypes.c_int32),
        ("causal", ctypes.c_bool),
        ("sinks", ctypes.c_void_p),
        ("k_offset_rotated", ctypes.c_void_p),
        ("num_segments", ctypes.c_int32),
        ("k_signs", ctypes.c_uint32 * 16),
        ("v_signs", ctypes.c_uint32 * 16),
        ("k_codebook", Codebook),
        ("v_codebook", Codebook),
        ("rotated_query", ctypes.c_bool),
        ("rotated_output", ctypes.c_bool),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
    ]


class Options(ctypes.Structure):
    _fields_ = [("body", ctypes.c_int), ("num_ctas", ctypes.c_int), ("early", ctypes.c_bool)]


class Device(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_int),
        ("multiprocessors", ctypes.c_int),
        ("shared_of_cta", ctypes.c_int),
        ("shared_of_sm", ctypes.c_int),
    ]


H200 = Device(9, 132, 232448, 233472)
SMALL = Device(9, 6, 232448, 233472)  # few CTAs, so that emulation ends


@dataclass(frozen=True)
class Variant:
    """Template arguments of the kernel."""

    head_dim: int
    k_bits: int
    v_bits: int
    columns: int
    copy: str = "bulk_copy_t"
    ctas: int = 1
    uniform2: bool = True

    def defines(self) -> list[str]:
        return [
            f"-DEMULATED_HEAD_DIM={self.head_dim}",
            f"-DEMULATED_K_BITS={self.k_bits}",
            f"-DEMULATED_V_BITS={self.v_bits}",
            f"-DEMULATED_UNIFORM2={str(self.uniform2).lower()}",
            f"-DEMULATED_COLUMNS={self.columns}",
            f"-DEMULATED_COPY={self.copy}",
            f"-DEMULATED_CTAS={self.ctas}",
        ]


def _digest(command: list[str]) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    for path in sorted([*INCLUDE.rglob("*.cuh"), *HERE.rglob("*.[chp]*")]):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


@functools.cache
def load(variant: Variant) -> ctypes.CDLL:
    """Compile a variant, unless that was done before, and load it."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("g++: wanted it on PATH")
    includes = [f"-I{HERE / 'include'}", f"-I{INCLUDE}"]
    sources = [str(HERE / "decode.cpp"), str(HERE / "simt.cpp")]
    command = [compiler, *FLAGS, *variant.defines(), *includes, *sources]
    target = CACHE / f"{_digest(command)}.so"
    if not target.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode or done.stderr.strip():
            raise RuntimeError(f"{variant} does not compile without warnings:\n{done.stderr}")
        fresh.replace(target)
    library = ctypes.CDLL(str(target))
    sizes = (ctypes.c_int * 3)()
    library.turbokv_emulated_sizes(sizes)
    ours = [ctypes.sizeof(each) for each in (Params, Options, Device)]
    if list(sizes) != ours:
        raise RuntimeError(f"structures: the headers' have {list(sizes)} bytes, these {ours}")
    return library


def _codebook(fmt: VectorFormat) -> Codebook:
    book = fmt.codebook
    magnitudes = (ctypes.c_int8 * 128)(*(int(m) for m in book.magnitudes))
    return Codebook(book.bits, book.frac_bits, book.step, magnitudes)


def _signs(fmt: VectorFormat) -> Any:
    words = [int(word) for word in sign_words(fmt.signs)]
    return (ctypes.c_uint32 * 16)(*words, *[0] * (16 - len(words)))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def columns_of(padded_dim: int, rows: int) -> int:
    """Return how many query rows an item takes at once."""
    most = 16 if padded_dim <= 128 else 8 if padded_dim == 256 else 4
    return 4 if rows <= 4 or most == 4 else 8 if rows <= 8 or most == 8 else 16


def params(arguments: dict[str, Any]) -> Params:
    """Return the structure for arguments of ``decode``; it holds no references."""
    a = arguments
    k_format, v_format, pages, q, out = (
        a[name] for name in ("k_format", "v_format", "pages", "q", "out")
    )
    indptr, table, lse = a.get("kv_indptr"), a["kv_indices"], a.get("lse")
    kv = PagedKV(
        pages.data_ptr(),
        pages.stride(0),
        pages.stride(1),
        a["page_size"],
        pages.shape[1],
        k_format.head_dim,
        table.data_ptr(),
        0 if indptr is not None else table.stride(0),
        _pointer(indptr),
        _pointer(a.get("kv_lens")),
        _pointer(a.get("kv_last_page_len")),
        _pointer(a.get("tile_slots")),
        _pointer(a.get("window")),
    )
    scale = a.get("sm_scale")
    offset = a.get("k_offset")
    return Params(
        kv,
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        DTYPES[q.dtype],
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        DTYPES[out.dtype],
        _pointer(lse),
        lse.stride(0) if lse is not None else 0,
        _pointer(a.get("qo_indptr")),
        indptr.shape[0] - 1 if indptr is not None else table.shape[0],
        q.shape[1],
        pages.shape[1],
        k_format.head_dim,
        a.get("max_q_len", 1),
        1 / math.sqrt(k_format.head_dim) if scale is None else scale,
        a.get("logits_soft_cap", 0.0),
        a.get("window_left", -1),
        a.get("causal", True),
        _pointer(a.get("sinks")),
        _pointer(offset),
        0 if offset is None else offset.shape[0],
        _signs(k_format),
        _signs(v_format),
        _codebook(k_format),
        _codebook(v_format),
        a.get("rotated_query", False),
        a.get("rotated_output", False),
        None,
        0,
    )


def decode(
    arguments: dict[str, Any],
    *,
    ctas: int = 1,
    early: bool = False,
    plain: bool = True,
    device: Device = SMALL,
) -> None:
    """Run decode; afterwards the workspace's counters must be zero.

    ``plain`` lets the variant without features run where the launcher has one (``launch.cuh``).
    """
    k_format, v_format = arguments["k_format"], arguments["v_format"]
    p = params(arguments)
    rows = p.max_q_len * (p.num_qo_heads // p.num_kv_heads)
    columns = columns_of(k_format.padded_dim, rows)
    copy = "async_copy_t" if arguments.get("body") == "cp_async" else "bulk_copy_t"
    plain = plain and copy == "bulk_copy_t" and columns <= 8
    books = (k_format.codebook, v_format.codebook)
    uniform2 = all(b.bits != 2 or b.magnitudes[1] == 3 * b.magnitudes[0] for b in books)
    variant = Variant(
        k_format.padded_dim, books[0].bits, books[1].bits, columns, copy, ctas, uniform2
    )
    library = load(variant)
    counters = (p.batch_size * p.num_kv_heads * -(-rows // columns) + 63) // 64 * 64
    grid = arguments.get("num_ctas") or ctas * device.multiprocessors
    partial = columns * k_format.padded_dim + 32
    workspace = torch.zeros(counters + 2 * grid * partial + 4, dtype=torch.float32)
    p.workspace, p.workspace_bytes = workspace.data_ptr(), workspace.numel() * 4
    options = Options(0, arguments.get("num_ctas", 0), early)
    code = library.turbokv_emulate_decode(
        ctypes.byref(p), ctypes.byref(options), ctypes.byref(device), ctypes.c_bool(plain)
    )
    if code:
        raise RuntimeError(f"decode returned {code}")
    if workspace[:counters].view(torch.int32).any():
        raise RuntimeError("counters: wanted zeros after a call")
