# SPDX-License-Identifier: Apache-2.0
"""Page tables as attention kernels read them, from the block table and lengths a scheduler keeps.

One launch on the GPU, without scratch memory and without a synchronisation, for any batch size, so
that the step of a server that builds them can be part of its CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbokv import kernels
from turbokv.kernels import arguments

_INT32_MAX = 2**31 - 1


def compute_page_metadata(
    seq_lens: Tensor,
    block_table: Tensor,
    page_size: int,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_len: Tensor,
    backend: kernels.Backend = "auto",
) -> None:
    """Flatten a block table into page indices, one run of pages per request.

    Parameters
    ----------
    seq_lens
        Tokens of each request, ``[batch_size]``. Zero and negative lengths have no pages. Lengths
        beyond ``max_pages * page_size`` count as that many tokens: the block table names no more
        pages, and finding out on the host would need a synchronisation.
    block_table
        Pages of each request in order, ``[batch_size, max_pages]``. Entries past a request's length
        are not read. Rows may be further apart than they are wide; a narrower view of a wide table
        bounds ``kv_indices``.
    page_size
        Tokens per page, at least 1.
    kv_indptr
        Output ``[batch_size + 1]``: request ``i`` owns ``kv_indices[kv_indptr[i]:kv_indptr[i +
        1]]``.
    kv_indices
        Output ``[capacity]``, at least ``batch_size * max_pages``, which no lengths can overflow.
        Entries past ``kv_indptr[batch_size]`` are left untouched.
    kv_last_page_len
        Output ``[batch_size]``: tokens in the last page, ``page_size`` if it is exactly full, 0 for
        a request without pages.
    backend
        ``auto``, ``cuda``, ``triton`` or ``torch`` (:func:`turbokv.kernels.resolve_backend`).
        ``auto`` is CUDA, else Triton, on the GPU, and PyTorch on the CPU.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got.
    BackendUnavailableError
        If a backend asked for by name cannot run here.

    Notes
    -----
    All tensors are int32, on one device, contiguous but for ``block_table``'s rows, and outputs do
    not overlap inputs. CUDA and Triton neither allocate nor synchronise and may be captured in a
    CUDA graph; replays read the lengths and the table of that moment. ``backend="torch"`` on the
    GPU allocates and synchronises.

    Examples
    --------
    >>> lens = torch.tensor([5, 0, 4], dtype=torch.int32)
    >>> table = torch.tensor([[7, 3], [0, 0], [9, 0]], dtype=torch.int32)
    >>> indptr, indices, last = (torch.zeros(n, dtype=torch.int32) for n in (4, 6, 3))
    >>> compute_page_metadata(lens, table, 4, indptr, indices, last)
    >>> indptr.tolist(), indices.tolist(), last.tolist()
    ([0, 2, 2, 3], [7, 3, 9, 0, 0, 0], [1, 0, 4])
    """
    _check(seq_lens, block_table, page_size, kv_indptr, kv_indices, kv_last_page_len)
    arguments = (seq_lens, block_table, page_size, kv_indptr, kv_indices, kv_last_page_len)
    chosen = kernels.resolve_backend(backend, seq_lens.device, "pages")
    if chosen == "cuda":
        from turbokv.kernels import cuda

        cuda.page_metadata(*arguments)
    elif chosen == "triton":
        from turbokv.kernels import triton_page_metadata

        triton_page_metadata.page_metadata(*arguments)
    else:
        _page_metadata(*arguments)


def _page_metadata(
    seq_lens: Tensor,
    block_table: Tensor,
    page_size: int,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_len: Tensor,
) -> None:
    """Run in plain PyTorch (arguments are already checked)."""
    max_pages = block_table.shape[1]
    lengths = seq_lens.long().clamp(0, max_pages * page_size)
    pages = (lengths + page_size - 1) // page_size
    kv_indptr[0] = 0
    kv_indptr[1:] = pages.cumsum(0)
    kv_last_page_len[:] = lengths - (pages - 1).clamp(min=0) * page_size
    page = torch.arange(max_pages, dtype=torch.int64, device=block_table.device)
    live = page < pages[:, None]
    flat = block_table[live]
    kv_indices[: flat.numel()] = flat


def _check(
    seq_lens: Tensor,
    block_table: Tensor,
    page_size: int,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_len: Tensor,
) -> None:
    if isinstance(page_size, bool) or not isinstance(page_size, int):
        raise TypeError(f"page_size: wanted an int, got {page_size!r}")
    if not 1 <= page_size <= _INT32_MAX:
        raise ValueError(f"page_size: wanted 1 to {_INT32_MAX}, got {page_size}")
    dims = {
        "seq_lens": (seq_lens, 1),
        "block_table": (block_table, 2),
        "kv_indptr": (kv_indptr, 1),
        "kv_indices": (kv_indices, 1),
        "kv_last_page_len": (kv_last_page_len, 1),
    }
    for name, (tensor, ndim) in dims.items():
        arguments.check_plain(tensor, name)
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}: wanted torch.int32, got {tensor.dtype}")
        if tensor.ndim != ndim:
            raise ValueError(f"{name}: wanted {ndim} dimensions, got shape {list(tensor.shape)}")
        if tensor.device != seq_lens.device:
            raise ValueError(
                f"{name}: wanted device {seq_lens.device}, as seq_lens, got {tensor.device}"
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: wanted a contiguous last dimension, got strides {tensor.stride()}"
            )
    batch_size, max_pages = seq_lens.shape[0], block_table.shape[1]
    for name, tensor, size in (
        ("block_table", block_table, batch_size),
        ("kv_indptr", kv_indptr, batch_size + 1),
        ("kv_last_page_len", kv_last_page_len, batch_size),
    ):
        if tensor.shape[0] != size:
            raise ValueError(
                f"{name}: wanted {size} along dimension 0 for {batch_size} requests,"
                f" got shape {list(tensor.shape)}"
            )
    most = batch_size * max_pages
    if most > _INT32_MAX:
        raise ValueError(
            f"block_table: wanted at most {_INT32_MAX} entries, since offsets are int32,"
            f" got shape {list(block_table.shape)}"
        )
    if kv_indices.shape[0] < most:
        raise ValueError(
            f"kv_indices: wanted at least {most} elements (batch_size * max_pages),"
            f" got {kv_indices.shape[0]}"
        )
