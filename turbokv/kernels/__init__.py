# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: CUDA > Triton > C++ > PyTorch, explicit and queryable.

``auto`` takes the first backend that can run on the tensors' device. A backend asked for by name
runs or raises :class:`BackendUnavailableError`; nothing falls back behind the caller's back.

The CUDA kernels work on pages: store, decompress, decode, and page tables
(:mod:`turbokv.kernels.cuda`). The flat codec has Triton kernels on the GPU and compiled C++
(:mod:`turbokv.kernels.cpu`) on the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from turbokv import core
from turbokv.kernels import arguments

Backend = Literal["auto", "cuda", "triton", "cpp", "torch"]
# What is to run: the flat codec (compress, decompress), or something on pages.
Operation = Literal["codec", "pages"]


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


def check_backend(backend: str) -> Backend:
    """Return ``backend`` if it is one of the known names, else raise ValueError."""
    for name in get_args(Backend):
        if backend == name:
            return name  # type: ignore[no-any-return]
    raise ValueError(f"backend: wanted one of {get_args(Backend)}, got {backend!r}")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_is_interpreted() -> bool:
    """Whether Triton's own switch ``TRITON_INTERPRET=1`` is set, which runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_unavailable(
    backend: Backend, device: torch.device | str, operation: Operation = "codec"
) -> str | None:
    """Return why ``backend`` cannot run on ``device``, or None if it can.

    Parameters
    ----------
    backend
        ``cuda``, ``triton``, ``cpp`` or ``torch`` (``auto`` always runs).
    device
        Where the tensors are.
    operation
        ``codec``, or ``pages``: what the CUDA kernels cover.
    """
    device = torch.device(device)
    if backend == "cuda":
        from turbokv.kernels import cuda

        reason = cuda.why_unavailable(device)
        if reason is None and operation == "codec":
            return (
                "TurboKV's CUDA kernels cover store, decompress and decode of pages, and page"
                " metadata, not the flat codec (use 'triton')"
            )
        return reason
    if backend == "cpp":
        from turbokv.kernels import cpu

        if operation != "codec":
            return "TurboKV's CPU kernels cover the flat codec, not pages"
        missing: str | None = cpu.why_unavailable(device)
        return missing
    if backend == "triton":
        if not _triton_installed():
            return "triton is not installed (pip install 'turbokv-cache[triton]')"
        if device.type == "cuda" or (device.type == "cpu" and triton_is_interpreted()):
            return None
        return (
            f"Triton needs CUDA tensors, got device {device}"
            " (set TRITON_INTERPRET=1 before the first import of triton to interpret on the CPU)"
        )
    return None


def available_backends(device: torch.device | str, operation: Operation = "codec") -> list[Backend]:
    """Return the backends that can run ``operation`` on ``device``, fastest first."""
    names: tuple[Backend, ...] = ("cuda", "triton", "cpp", "torch")
    return [name for name in names if why_unavailable(name, device, operation) is None]


def resolve_backend(
    backend: Backend, device: torch.device | str, operation: Operation = "codec"
) -> Backend:
    """Return the backend that will run ``operation`` on ``device``.

    Parameters
    ----------
    backend
        A name, or ``auto`` for the first of CUDA, Triton, C++, PyTorch that can run. The
        interpreter is a test tool, so ``auto`` never chooses it.
    device
        Where the tensors are.
    operation
        ``codec`` or ``pages`` (:func:`why_unavailable`).

    Raises
    ------
    BackendUnavailableError
        If a backend asked for by name cannot run.
    """
    check_backend(backend)
    device = torch.device(device)
    if backend != "auto":
        reason = why_unavailable(backend, device, operation)
        if reason is not None:
            raise BackendUnavailableError(f"backend={backend!r} cannot run: {reason}")
        return backend
    if device.type == "cuda" and not triton_is_interpreted():
        return available_backends(device, operation)[0]
    return "cpp" if why_unavailable("cpp", device, operation) is None else "torch"


def _module(backend: Backend, device: torch.device) -> ModuleType:
    chosen = resolve_backend(backend, device)
    if chosen == "triton":
        from turbokv.kernels import triton_kernels

        return triton_kernels
    if chosen == "cpp":
        from turbokv.kernels import cpu

        return cpu
    return core


def compress(
    x: Tensor, fmt: core.VectorFormat, packed: Tensor, norms: Tensor, backend: Backend = "auto"
) -> None:
    """Compress ``x`` ``[n, head_dim]`` into ``packed`` and ``norms``; see :func:`core.compress`."""
    arguments.check_plain(packed, "packed")
    arguments.check_plain(norms, "norms")
    _module(backend, x.device).compress(arguments.plain(x), fmt, packed, norms)


def decompress(
    packed: Tensor,
    norms: Tensor,
    fmt: core.VectorFormat,
    out: Tensor,
    *,
    rotated: bool,
    backend: Backend = "auto",
) -> None:
    """Decompress into ``out``, in rotated or original space; see :func:`core.decompress`."""
    arguments.check_plain(out, "out")
    _module(backend, packed.device).decompress(
        arguments.plain(packed), arguments.plain(norms), fmt, out, rotated=rotated
    )
