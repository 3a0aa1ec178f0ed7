# SPDX-License-Identifier: Apache-2.0
"""Store and decompress on the CPU: their headers compiled with g++, threads emulated."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from typing import Any

from torch import Tensor

from tests.emulated.harness import CACHE, DTYPES, FLAGS, HERE, INCLUDE
from turbokv.paged import PagedKVCache

_INTS = (
    *("small", "ctas", "dtype", "rotated"),
    *("page_size", "num_heads", "head_dim", "k_bits", "v_bits", "rows", "first"),
)
_POINTERS = (
    *("pages", "k", "v", "slots", "positions", "table", "tile_slots", "window", "k_offset"),
    *("k_rotated", "v_rotated"),
)


class Call(ctypes.Structure):
    """``call_t`` of pages.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in _INTS),
        ("page_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


@functools.cache
def load(padded_dim: int) -> ctypes.CDLL:
    """Compile both kernels for a head size, unless that was done before, and load them."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("g++: wanted it on PATH")
    includes = [f"-I{HERE / 'include'}", f"-I{INCLUDE}"]
    sources = [HERE / "pages.cpp", HERE / "simt.cpp"]
    command = [compiler, *FLAGS, f"-DEMULATED_HEAD_DIM={padded_dim}", *includes, *map(str, sources)]
    digest = hashlib.sha256("\0".join(command).encode())
    for path in sorted([*INCLUDE.rglob("*.cuh"), *(HERE / "include").rglob("*.*h"), *sources]):
        digest.update(path.read_bytes())
    target = CACHE / f"pages-{digest.hexdigest()[:24]}.so"
    if not target.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode or done.stderr.strip():
            raise RuntimeError(f"head size {padded_dim} does not compile cleanly:\n{done.stderr}")
        fresh.replace(target)
    library = ctypes.CDLL(str(target))
    if library.turbokv_emulated_call_bytes() != ctypes.sizeof(Call):
        raise RuntimeError("call_t: wanted the same fields in pages.cpp and pages.py")
    return library


def run(kernel: str, cache: PagedKVCache, k: Tensor, v: Tensor, **fields: Any) -> None:
    """Run ``store`` from ``k`` and ``v``, or ``decompress`` into them; tensors are contiguous."""
    layout, pages = cache.layout, cache.pages
    values = {name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in fields.items()}
    call = Call(
        page_size=layout.page_size,
        num_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        k_bits=layout.k_bits,
        v_bits=layout.v_bits,
        dtype=DTYPES[k.dtype],
        rows=k.shape[0],
        page_stride=pages.stride(0),
        head_stride=pages.stride(1),
        pages=pages.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        **values,
    )
    getattr(load(cache.codec.padded_dim), f"turbokv_emulate_{kernel}")(ctypes.byref(call))
