# SPDX-License-Identifier: Apache-2.0
"""The fused decode kernel under FlashInfer's conventions: plan, run, buffers of a CUDA graph."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from turbokv.core import VectorFormat
from turbokv.integrations.flashinfer import checks
from turbokv.integrations.flashinfer.tables import Batch, Shape, TableBuffers
from turbokv.kernels.cuda import ops


class BatchDecodeWithPagedTurboKVCacheWrapper:
    """Decode attention over compressed pages, one query a request.

    One launch rotates the query, attends, combines splits and un-rotates the output. It divides
    its work itself, so that :meth:`plan` only copies tables.

    Parameters
    ----------
    float_workspace_buffer
        Any dtype, on the CUDA device; says the device, as FlashInfer's wrappers take one. Partial
        results are kept in memory of the wrapper's own, which has to be zero at first.
    use_cuda_graph
        Whether :meth:`run` will be captured: tables then live in the buffers below, and the batch
        size may not change.
    paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
        int32 ``[batch_size + 1]``, the most pages there will be, and ``[batch_size]``; needed in
        CUDA graph mode only.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got; so do all methods.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:
        checks.cuda(float_workspace_buffer, "float_workspace_buffer")
        self.device = float_workspace_buffer.device
        self._use_cuda_graph = use_cuda_graph
        names = (
            "paged_kv_indptr_buffer",
            "paged_kv_indices_buffer",
            "paged_kv_last_page_len_buffer",
        )
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        self._buffers = TableBuffers(names, buffers, self.device, use_cuda_graph)
        self._workspace = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._shape: Shape | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether :meth:`run` may be captured."""
        return self._use_cuda_graph

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        k_format: VectorFormat,
        v_format: VectorFormat,
        *,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        """Take the tables of a batch, for any number of runs.

        Parameters
        ----------
        indptr, indices, last_page_len
            int32 ``[batch_size + 1]``, ``[indptr[-1]]`` or more, and ``[batch_size]``, as in
            FlashInfer, on any device; those on a GPU are copied to the host, which synchronises.
        num_qo_heads, num_kv_heads, head_dim, page_size
            Shape; ``num_qo_heads`` a multiple of ``num_kv_heads``, ``page_size`` one of 16.
        k_format, v_format
            What fixes the bytes of pages (:meth:`TurboKVCodec.vector_format`).
        sm_scale
            Multiplies scores; default ``1 / sqrt(head_dim)``.
        window_left
            How many tokens before its own a query sees (-1: all).
        logits_soft_cap
            If positive, scores become ``cap * tanh(score / cap)``.
        non_blocking
            Whether copies to the device may still run when this returns.

        Notes
        -----
        Not to be captured in a CUDA graph. Makes the kernel ready, so that :meth:`run` may be.
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
        tables = (indptr, indices, last_page_len)
        batch = Batch.read(None, *tables, page_size)
        self._tables = self._buffers.fill(tables, non_blocking)
        ops.prepare("decode", k_format, v_format)
        self._batch_size = len(batch.kv_lens)
        needed = ops.decode_workspace_bytes(
            self._batch_size, num_qo_heads, num_kv_heads, head_dim, device=self.device
        )
        if self._workspace.shape[0] < needed:
            self._workspace = torch.zeros(needed, dtype=torch.uint8, device=self.device)
        self._shape = shape

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor,
        *,
        k_offset: Tensor | None = None,
        q_matrix: Tensor | None = None,
        tile_slots: Tensor | None = None,
        window: Tensor | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend to the pages of the planned batch.

        Parameters
        ----------
        q
            ``[batch_size, num_qo_heads, head_dim]``, float16, bfloat16 or float32, last dimension
            contiguous.
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
            16-bit copies that are read instead of codes, as :func:`append_paged_turbokv_cache`
            wrote them.
        sinks
            float32 ``[num_qo_heads]``: logit (natural units) of a token without value, for each
            head.
        out, lse
            Outputs to write, of the shape of ``q`` in any of its dtypes, and float32 ``[batch_size,
            num_qo_heads]``; last dimension contiguous. Allocated if absent.
        return_lse
            Whether to return the log-sum-exp (base 2) as well.

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
        shape = self._shape
        rows = (self._batch_size, shape.num_qo_heads)
        checks.tensor(q, "q", checks.FLOATS, (*rows, shape.head_dim), self.device)
        if q_matrix is not None:
            q = checks.mapped(q, q_matrix, "q_matrix", shape.num_kv_heads)
        checks.cache(paged_kv_cache, shape.num_kv_heads, shape.page_head_bytes, self.device)
        if lse is None and return_lse:
            lse = torch.empty(rows, dtype=torch.float32, device=self.device)
        indptr, indices, last_page_len = self._tables
        out = ops.decode(
            q,
            paged_kv_cache,
            shape.k_format,
            shape.v_format,
            shape.page_size,
            indices,
            kv_indptr=indptr,
            kv_last_page_len=last_page_len,
            sm_scale=shape.sm_scale,
            window_left=shape.window_left,
            logits_soft_cap=shape.logits_soft_cap,
            sinks=sinks,
            out=out,
            lse=lse,
            tile_slots=tile_slots,
            window=window,
            k_offset=k_offset,
            workspace=self._workspace,
        )
        return (out, lse) if return_lse and lse is not None else out

    run_return_lse = functools.partialmethod(run, return_lse=True)
