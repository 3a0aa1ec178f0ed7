# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's FA2 prefill kernel over compressed pages."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from turbokv.centring import SEGMENT
from turbokv.core import VectorFormat
from turbokv.integrations.flashinfer import checks
from turbokv.integrations.flashinfer.jit import format_words, get_prefill_module
from turbokv.integrations.flashinfer.tables import Batch, Shape, TableBuffers

_INT_WORKSPACE_BYTES = 8 << 20  # as FlashInfer's wrappers


class BatchPrefillWithPagedTurboKVCacheWrapper:
    """Prefill and append attention over compressed pages, planned and run as FlashInfer's own.

    The kernel is FlashInfer's; a tile of K or V is expanded in shared memory where its 16-bit rows
    would have been copied. Queries are rotated before and outputs un-rotated after, within
    :meth:`run`; between, everything is fp16, whatever the dtype of the query.

    Parameters
    ----------
    float_workspace_buffer
        Any dtype, on the CUDA device: partial results of split KV. 128 MiB are enough for up to 7
        query heads of 128 a KV head, on 132 multiprocessors; twice that for 15. Planning raises
        if it is too small.
    use_cuda_graph
        Whether :meth:`run` will be captured: tables then live in the buffers below, and neither the
        batch size nor the number of queries may grow.
    qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf
        int32 ``[batch_size + 1]``, ``[batch_size + 1]``, the most pages there will be, and
        ``[batch_size]``; needed in CUDA graph mode only.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got; so do all methods.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
    ) -> None:
        checks.cuda(float_workspace_buffer, "float_workspace_buffer")
        self._float_workspace = float_workspace_buffer
        self.device = float_workspace_buffer.device
        self._use_cuda_graph = use_cuda_graph
        names = (
            "qo_indptr_buf",
            "paged_kv_indptr_buf",
            "paged_kv_indices_buf",
            "paged_kv_last_page_len_buf",
        )
        buffers = (
            qo_indptr_buf,
            paged_kv_indptr_buf,
            paged_kv_indices_buf,
            paged_kv_last_page_len_buf,
        )
        self._buffers = TableBuffers(names, buffers, self.device, use_cuda_graph)
        self._int_workspace = torch.empty(
            _INT_WORKSPACE_BYTES, dtype=torch.uint8, device=self.device
        )
        self._pinned_int_workspace = torch.empty(
            _INT_WORKSPACE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True
        )
        self._planned: torch.cuda.Event | None = None
        self._max_num_rows: int | None = None
        self._scratch = torch.empty(0, dtype=torch.float16, device=self.device)
        self._lse_scratch = torch.empty(0, dtype=torch.float32, device=self.device)
        self._shape: Shape | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether :meth:`run` may be captured."""
        return self._use_cuda_graph

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        k_format: VectorFormat,
        v_format: VectorFormat,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        non_blocking: bool = True,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Divide the work of a batch among thread blocks, for any number of runs.

        Parameters
        ----------
        qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
            int32 ``[batch_size + 1]``, ``[batch_size + 1]``, ``[paged_kv_indptr[-1]]`` or more, and
            ``[batch_size]``, as in FlashInfer, on any device; those on a GPU are copied to the
            host, which synchronises. A request's queries are its newest tokens.
        num_qo_heads, num_kv_heads, head_dim, page_size
            Shape; ``num_qo_heads`` a multiple of ``num_kv_heads``, ``page_size`` one of 16.
        k_format, v_format
            What fixes the bytes of pages (:meth:`TurboKVCodec.vector_format`); head sizes 33 to
            256.
        causal
            Whether a query sees no token after its own.
        sm_scale
            Multiplies scores; default ``1 / sqrt(head_dim)``.
        window_left
            How many tokens before its own a query sees (-1: all).
        logits_soft_cap
            If positive, scores become ``cap * tanh(score / cap)``.
        non_blocking
            Whether copies to the device may still run when this returns.
        fixed_split_size, disable_split_kv
            Pages a split, or none at all: results then do not depend on the rest of the batch.

        Notes
        -----
        Allocates fp16 scratch of the size of the rotated queries, and keeps it. The first call for
        a head size and pair of widths builds its module, unless it is cached or shipped. Waits
        until the device has read the plan before. Not to be captured in a CUDA graph.
        """
        shape = Shape.create(
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            k_format,
            v_format,
            window_left,
            logits_soft_cap,
            sm_scale,
        )
        tables = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        batch = Batch.read(*tables, page_size)
        if causal:
            batch.check_causal()
        if fixed_split_size is not None:
            checks.count(fixed_split_size, "fixed_split_size", 1)
        # The splits of a window are laid out for queries that see no token after their own.
        wide = window_left >= 0 and not causal
        if self._use_cuda_graph and (wide or disable_split_kv):
            # without splits FlashInfer's kernels would run blocks that no request was planned for
            name = "causal" if wide else "disable_split_kv"
            raise ValueError(
                f"{name}: wanted {wide} in CUDA graph mode, as KV has to be split, got {not wide}"
            )
        num_rows = sum(batch.qo_lens)
        rows = num_rows
        if self._use_cuda_graph:
            if self._max_num_rows is None:
                self._max_num_rows = num_rows
            rows = self._max_num_rows
            if num_rows > rows:
                raise ValueError(
                    f"qo_indptr: wanted at most the {rows} queries of the first plan in CUDA graph"
                    f" mode, got {num_rows}"
                )
        self._tables = self._buffers.fill(tables, non_blocking)
        self._reserve(rows, shape)
        self._module: Any = get_prefill_module(
            shape.padded_dim, k_format.bits, v_format.bits, shape.logits_soft_cap > 0
        )
        self._formats = (format_words(k_format), format_words(v_format))
        self._causal = bool(causal)
        self._num_rows, self._max_kv_len = num_rows, max(batch.kv_lens, default=0)
        self._shape = shape
        if self._planned is not None:  # the device may not have read the last plan yet
            self._planned.synchronize()
        self._plan_info = self._module.plan(
            self._float_workspace,
            self._int_workspace,
            self._pinned_int_workspace,
            qo_indptr.cpu(),
            paged_kv_indptr.cpu(),
            rows,
            len(batch.qo_lens),
            num_qo_heads,
            num_kv_heads,
            page_size,
            self._use_cuda_graph,
            window_left,
            -1 if fixed_split_size is None else fixed_split_size,
            disable_split_kv or wide,
        )
        self._planned = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._planned.record(torch.cuda.current_stream(self.device))

    def _reserve(self, rows: int, shape: Shape) -> None:
        """Have scratch for that many queries; captured graphs keep what they were given."""
        vectors = rows * shape.num_qo_heads
        if self._scratch.numel() < vectors * shape.padded_dim:
            self._scratch = self._scratch.new_empty(vectors * shape.padded_dim)
        if self._lse_scratch.numel() < vectors:
            self._lse_scratch = self._lse_scratch.new_empty(vectors)

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor,
        *,
        k_offset: Tensor | None = None,
        q_matrix: Tensor | None = None,
        tile_slots: Tensor | None = None,
        window: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend to the pages of the planned batch.

        Parameters
        ----------
        q
            ``[qo_indptr[-1], num_qo_heads, head_dim]``, float16, bfloat16 or float32, last
            dimension contiguous; in CUDA graph mode rows past ``qo_indptr[-1]`` are left alone.
        paged_kv_cache
            uint8 ``[num_pages, num_kv_heads, page_head_bytes]``, 16-byte aligned, other strides
            multiples of 16: the bytes of ``FORMAT.md``.
        k_offset
            float32 ``[num_segments, num_kv_heads, padded_dim]``, contiguous: offsets of centred
            keys in rotated space, for every 256 tokens.
        q_matrix
            float32 ``[num_kv_heads, head_dim, head_dim]``, contiguous: of pages with mapped keys,
            queries are multiplied by it as rows (``KeyMap.inverse``) by one more launch.
        tile_slots, window
            int32 ``[num_pages, page_size // 16]`` and float16 ``[num_slots, num_kv_heads, 2, 16,
            padded_dim]``, contiguous: 16-bit copies that are read instead of codes.
        out, lse
            Outputs to write, of the shape of ``q`` in any of its dtypes, and float32 ``[nnz,
            num_qo_heads]``; last dimension contiguous. Allocated if absent.
        return_lse
            Whether to return the log-sum-exp (base 2) as well.
        enable_pdl
            Whether the attention kernel may start before the one before it has ended.

        Returns
        -------
        Tensor or tuple
            ``out``, or ``(out, lse)``. A query that sees no token gets zeros, and minus infinity.

        Notes
        -----
        Allocates what is absent and does not synchronise. Values of ``tile_slots`` are not checked.
        """
        if self._shape is None:
            raise RuntimeError("plan() has to be called before run()")
        shape, most = self._shape, self._num_rows
        heads, padded_dim = shape.num_qo_heads, shape.padded_dim
        checks.tensor(q, "q", checks.FLOATS, (None, heads, shape.head_dim), self.device)
        if self._use_cuda_graph and self._max_num_rows is not None:
            most = self._max_num_rows
        if not self._num_rows <= q.shape[0] <= most:
            wanted = self._num_rows if most == self._num_rows else f"{self._num_rows} to {most}"
            raise ValueError(f"q: wanted {wanted} tokens, as planned, got {q.shape[0]}")
        if q_matrix is not None:
            q = checks.mapped(q, q_matrix, "q_matrix", shape.num_kv_heads)
        checks.cache(paged_kv_cache, shape.num_kv_heads, shape.page_head_bytes, self.device)
        checks.copies(tile_slots, window, paged_kv_cache, shape.page_size, padded_dim)
        if k_offset is not None:
            row = (None, shape.num_kv_heads, padded_dim)
            checks.tensor(k_offset, "k_offset", (torch.float32,), row, self.device, packed=True)
            segments = -(-self._max_kv_len // SEGMENT)
            if k_offset.shape[0] < segments:
                raise ValueError(f"k_offset: wanted {segments} segments, got {k_offset.shape[0]}")
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=self.device)
        else:
            checks.tensor(out, "out", checks.FLOATS, tuple(q.shape), self.device)
        if lse is not None:
            checks.tensor(lse, "lse", (torch.float32,), tuple(q.shape[:2]), self.device)
        elif return_lse:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=self.device)
        self._module.run(
            self._float_workspace,
            self._int_workspace,
            self._plan_info,
            q,
            paged_kv_cache,
            *self._tables,
            out,
            lse,
            self._scratch,
            self._lse_scratch,
            shape.page_size,
            self._causal,
            shape.window_left,
            shape.sm_scale,
            shape.logits_soft_cap,
            *self._formats,
            k_offset,
            tile_slots,
            window,
            enable_pdl,
        )
        return (out, lse) if return_lse and lse is not None else out

    run_return_lse = functools.partialmethod(run, return_lse=True)
