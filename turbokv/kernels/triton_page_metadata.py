# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of :mod:`turbokv.page_metadata`: block table and lengths to flat page indices.

Mapping: program ``(i, j)`` owns requests ``i * ROWS`` and up, and of each of them the pages ``j *
PAGES``, ``(j + gridDim.y) * PAGES``, ... Each program sums the page counts of all requests before
its own for itself. That repeats work (the square of the batch over ROWS, 0.4 MB of cached reads at
1,024 requests) but needs no second launch, no scratch memory and no order among programs, so any
batch fits a CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from turbokv.kernels.triton_kernels import INTERPRETED, device_guard

# The interpreter pays per program, a GPU is idle with too few of them.
_ROWS = 128 if INTERPRETED else 8
_PAGES = 128
_PREFIX_CHUNK = 1024
_MAX_GRID_Y = 256


@triton.jit
def _count_pages(length, page_size, max_pages):
    """Return ``ceil(length / page_size)``, from 0 to ``max_pages``, without overflow."""
    return tl.where(length > 0, tl.minimum((length - 1) // page_size + 1, max_pages), 0)


@triton.jit
def _page_metadata_kernel(
    seq_lens_ptr,
    block_table_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    kv_last_page_len_ptr,
    batch_size,
    max_pages,
    block_table_stride,
    page_size,
    ROWS: tl.constexpr,
    PAGES: tl.constexpr,
    PREFIX_CHUNK: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    length = tl.load(seq_lens_ptr + row, mask=row < batch_size, other=0)
    pages = _count_pages(length, page_size, max_pages)
    first_page = tl.program_id(1) * PAGES
    most_pages = tl.max(pages, 0)
    if (first_page == 0) | (first_page < most_pages):
        before = 0
        start = 0
        # `while`, because the interpreter's `range` fails on tensors with NumPy 2.4
        while start < first_row:
            earlier = start + tl.arange(0, PREFIX_CHUNK)
            lengths = tl.load(seq_lens_ptr + earlier, mask=earlier < first_row, other=0)
            before += tl.sum(_count_pages(lengths, page_size, max_pages), 0)
            start += PREFIX_CHUNK
        end = before + tl.cumsum(pages, 0)
        if first_page == 0:
            tl.store(kv_indptr_ptr, 0, mask=first_row == 0)
            tl.store(kv_indptr_ptr + row + 1, end, mask=row < batch_size)
            last = tl.minimum(length - (pages - 1) * page_size, page_size)
            last = tl.where(pages > 0, last, 0)
            tl.store(kv_last_page_len_ptr + row, last, mask=row < batch_size)
        # 64-bit rows: a wide block table holds more than 2**31 entries
        source = block_table_ptr + row.to(tl.int64)[:, None] * block_table_stride
        target = kv_indices_ptr + (end - pages).to(tl.int64)[:, None]
        while first_page < most_pages:
            page = first_page + tl.arange(0, PAGES)[None, :]
            live = page < pages[:, None]
            tl.store(target + page, tl.load(source + page, mask=live, other=0), mask=live)
            first_page += PAGES * tl.num_programs(1)


def page_metadata(
    seq_lens: Tensor,
    block_table: Tensor,
    page_size: int,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_len: Tensor,
) -> None:
    """Launch the kernel once; arguments are those of :func:`compute_page_metadata`, checked."""
    batch_size, max_pages = block_table.shape
    grid = (
        max(1, triton.cdiv(batch_size, _ROWS)),
        min(_MAX_GRID_Y, max(1, triton.cdiv(max_pages, _PAGES))),
    )
    with device_guard(seq_lens.device):
        _page_metadata_kernel[grid](
            seq_lens,
            block_table,
            kv_indptr,
            kv_indices,
            kv_last_page_len,
            batch_size,
            max_pages,
            block_table.stride(0),
            page_size,
            ROWS=_ROWS,
            PAGES=_PAGES,
            PREFIX_CHUNK=_PREFIX_CHUNK,
        )
