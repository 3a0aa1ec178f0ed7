# SPDX-License-Identifier: Apache-2.0
"""Argument checks: each raises naming the argument, what was wanted and what was got."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from turbokv.core import VectorFormat
from turbokv.kernels import arguments
from turbokv.paged import PAGE_BITS, SCALE_BYTES, TILE

HEAD_DIMS = (64, 128, 256)  # padded; above, FlashInfer has FA2 kernels for sm_100 and up only
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INT32 = (torch.int32,)
Shape = tuple[int | None, ...]


def count(value: int, name: str, least: int, most: int = 2**31 - 1) -> int:
    """Return ``value`` if it is an int in that range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted an int, got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name}: wanted {least} to {most}, got {value}")
    return value


def tensor(
    x: Tensor,
    name: str,
    dtypes: tuple[torch.dtype, ...],
    shape: Shape,
    device: torch.device | None = None,
    *,
    packed: bool = False,
) -> None:
    """Raise unless ``x`` is such a tensor (None: any extent) whose last dimension is contiguous.

    With ``packed`` it has to be contiguous throughout.
    """
    arguments.check_plain(x, name)
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: wanted {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if x.ndim != len(shape) or any(w not in (None, n) for w, n in zip(shape, x.shape, strict=True)):
        wanted = ["*" if want is None else want for want in shape]
        raise ValueError(f"{name}: wanted shape {wanted}, got {list(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: wanted device {device}, got {x.device}")
    if packed and not x.is_contiguous():
        raise ValueError(f"{name}: wanted a contiguous tensor, got strides {tuple(x.stride())}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name}: wanted a contiguous last dimension, got strides {tuple(x.stride())}"
        )


def cuda(x: Tensor, name: str) -> None:
    """Raise unless ``x`` is on a CUDA device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: wanted a torch.Tensor, got {type(x).__name__}")
    if x.device.type != "cuda":
        raise ValueError(f"{name}: wanted a CUDA tensor, got device {x.device}")


def heads(num_qo_heads: int, num_kv_heads: int) -> None:
    """Raise unless query heads are a multiple of KV heads."""
    count(num_qo_heads, "num_qo_heads", 1)
    count(num_kv_heads, "num_kv_heads", 1)
    if num_qo_heads % num_kv_heads:
        raise ValueError(
            f"num_qo_heads: wanted a multiple of num_kv_heads {num_kv_heads}, got {num_qo_heads}"
        )


def page_size(value: int) -> None:
    """Raise unless pages are whole tiles."""
    count(value, "page_size", TILE)
    if value % TILE:
        raise ValueError(f"page_size: wanted a multiple of {TILE}, got {value}")


def vector_format(fmt: VectorFormat, name: str, head_dim: int) -> None:
    """Raise unless ``fmt`` is one that pages can hold and this layer can read."""
    if not isinstance(fmt, VectorFormat):
        raise TypeError(f"{name}: wanted a VectorFormat, got {type(fmt).__name__}")
    if fmt.head_dim != head_dim:
        raise ValueError(f"{name}: wanted head_dim {head_dim}, got {fmt.head_dim}")
    if fmt.padded_dim not in HEAD_DIMS:
        raise ValueError(
            f"{name}: wanted head_dim of {HEAD_DIMS[0] // 2 + 1} to {HEAD_DIMS[-1]}, got"
            f" {fmt.head_dim}"
        )
    if fmt.bits not in PAGE_BITS:
        raise ValueError(f"{name}: wanted one of {PAGE_BITS} bits, got {fmt.bits}")
    if not fmt.codebook.is_lattice:
        raise ValueError(f"{name}: wanted integer magnitudes, got {fmt.codebook.magnitudes}")
    if fmt.norm_dtype != torch.float16:
        raise ValueError(f"{name}: wanted norm_dtype torch.float16, got {fmt.norm_dtype}")
    if not 0 <= fmt.codebook.frac_bits <= 20:
        raise ValueError(f"{name}: wanted 0 to 20 frac_bits, got {fmt.codebook.frac_bits}")


def page_head_bytes(k_format: VectorFormat, v_format: VectorFormat, size: int) -> int:
    """Return the bytes of one KV head in a page of ``size`` tokens."""
    return size * (k_format.packed_dim + v_format.packed_dim + 2 * SCALE_BYTES)


def cache(x: Tensor, num_kv_heads: int, head_bytes: int, device: torch.device) -> None:
    """Raise unless ``x`` are pages of that size, every row of which starts at 16 bytes."""
    tensor(x, "paged_kv_cache", (torch.uint8,), (None, num_kv_heads, head_bytes), device)
    strides = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    if any(s % 16 for s in (*strides, x.storage_offset())):
        raise ValueError(
            "paged_kv_cache: wanted strides and a storage offset that are multiples of 16, got"
            f" {tuple(x.stride())} and {x.storage_offset()}"
        )


def copies(
    tile_slots: Tensor | None, window: Tensor | None, pages: Tensor, size: int, padded_dim: int
) -> None:
    """Raise unless the 16-bit copies of tiles are whole: both tensors or neither."""
    if tile_slots is None and window is None:
        return
    if tile_slots is None or window is None:
        names = ("tile_slots", "window")
        missing, other = names if tile_slots is None else names[::-1]
        raise ValueError(f"{missing}: wanted a tensor, as {other} is given, got None")
    shape = (pages.shape[0], size // TILE)
    tensor(tile_slots, "tile_slots", INT32, shape, pages.device, packed=True)
    shape5 = (None, pages.shape[1], 2, TILE, padded_dim)
    tensor(window, "window", (torch.float16,), shape5, pages.device, packed=True)


def mapped(x: Tensor, matrix: Tensor, name: str, num_kv_heads: int) -> Tensor:
    """Return ``x`` times the matrix of each row's KV head, or raise unless the matrices fit."""
    shape = (num_kv_heads, x.shape[2], x.shape[2])
    tensor(matrix, name, (torch.float32,), shape, x.device, packed=True)
    # imported where it is used: pages without maps need no Triton
    from turbokv.kernels.triton_key_map import map_heads

    return map_heads(x, matrix)


def indptr(values: Tensor, name: str, last: int | None = None) -> list[int]:
    """Return a host copy of ``values`` as ints: ascending from 0, and ending in ``last``."""
    tensor(values, name, INT32, (None,))
    host: list[int] = values.tolist()
    if not host or host[0] != 0 or any(a > b for a, b in pairwise(host)):
        raise ValueError(f"{name}: wanted ascending from 0, got {host[:8]}")
    if last is not None and host[-1] > last:
        raise ValueError(f"{name}: wanted {last} at most, got {host[-1]}")
    return host
