# SPDX-License-Identifier: Apache-2.0
"""Appending to compressed pages with FlashInfer's tables."""

from __future__ import annotations

import torch
from torch import Tensor

from turbokv.core import VectorFormat
from turbokv.integrations.flashinfer import checks
from turbokv.kernels.cuda import ops


def append_paged_turbokv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    page_size: int,
    k_format: VectorFormat,
    v_format: VectorFormat,
    *,
    k_offset: Tensor | None = None,
    k_matrix: Tensor | None = None,
    tile_slots: Tensor | None = None,
    window: Tensor | None = None,
) -> None:
    """Compress new tokens and write them to their requests' pages; no other byte changes.

    Parameters
    ----------
    append_key, append_value
        ``[nnz, num_kv_heads, head_dim]``, float16, bfloat16 or float32 (both the same), last
        dimension contiguous.
    batch_indices, positions
        int32 ``[nnz]``, as ``flashinfer.get_batch_indices_positions`` returns them: the request of
        each token, or -1 to skip it, and its position there.
    paged_kv_cache
        uint8 ``[num_pages, num_kv_heads, page_head_bytes]``, 16-byte aligned, other strides
        multiples of 16. Written.
    kv_indices, kv_indptr
        int32: the pages of request ``b`` are ``kv_indices[kv_indptr[b]:kv_indptr[b + 1]]``; they
        have room for the new tokens.
    page_size
        Tokens per page, a multiple of 16.
    k_format, v_format
        What fixes the bytes (:meth:`TurboKVCodec.vector_format`).
    k_offset
        float32 ``[num_segments, num_kv_heads, head_dim]``, contiguous: subtracted from keys, for
        every 256 positions, where that makes them shorter. In original space, unlike what the
        wrappers take; with ``k_matrix`` mapped as keys are.
    k_matrix
        float32 ``[num_kv_heads, head_dim, head_dim]``, contiguous: keys, as rows, are multiplied by
        it (``KeyMap.matrix.mT``). Readers then take ``q_matrix``.
    tile_slots, window
        int32 ``[num_pages, page_size // 16]`` and float16 ``[num_slots, num_kv_heads, 2, 16,
        padded_dim]``, contiguous: tokens of a tile with a slot are written there too.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got.

    Notes
    -----
    Allocates the slots, 8 bytes per token, and mapped keys, and does not synchronise. May be
    captured in a CUDA graph after a first call. Values of index tensors are not checked.
    """
    checks.page_size(page_size)
    checks.tensor(append_key, "append_key", checks.FLOATS, (None, None, None))
    nnz, device, shape = append_key.shape[0], append_key.device, tuple(append_key.shape)
    checks.tensor(append_value, "append_value", (append_key.dtype,), shape, device)
    checks.tensor(batch_indices, "batch_indices", checks.INT32, (nnz,), device)
    checks.tensor(positions, "positions", checks.INT32, (nnz,), device)
    checks.tensor(kv_indices, "kv_indices", checks.INT32, (None,), device)
    checks.tensor(kv_indptr, "kv_indptr", checks.INT32, (None,), device)
    checks.vector_format(k_format, "k_format", append_key.shape[2])
    checks.vector_format(v_format, "v_format", append_key.shape[2])
    head_bytes = checks.page_head_bytes(k_format, v_format, page_size)
    checks.cache(paged_kv_cache, append_key.shape[1], head_bytes, device)
    if k_matrix is not None:
        append_key = checks.mapped(append_key, k_matrix, "k_matrix", append_key.shape[1])
    entry = kv_indptr[batch_indices.clamp(min=0).long()] + positions // page_size
    slots = kv_indices[entry.long()].long() * page_size + positions % page_size
    ops.store(
        append_key,
        append_value,
        torch.where(batch_indices < 0, -1, slots),
        paged_kv_cache,
        k_format,
        v_format,
        page_size,
        positions=positions.long() if k_offset is not None else None,
        k_offset=k_offset,
        tile_slots=tile_slots,
        window=window,
    )
