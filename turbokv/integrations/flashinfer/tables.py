# SPDX-License-Identifier: Apache-2.0
"""What both wrappers keep between plan and run: the workspace, and the tables of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from turbokv.core import VectorFormat
from turbokv.integrations.flashinfer import checks


@dataclass(frozen=True)
class Batch:
    """A batch as the host sees it, checked.

    Attributes
    ----------
    qo_lens, kv_lens
        Query and KV tokens of each request.
    num_indices
        Pages of all requests together.
    """

    qo_lens: list[int]
    kv_lens: list[int]
    num_indices: int

    @classmethod
    def read(
        cls,
        qo_indptr: Tensor | None,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_last_page_len: Tensor,
        page_size: int,
    ) -> Batch:
        """Copy the tables to the host and check their values; no ``qo_indptr``: a query each."""
        checks.tensor(kv_indices, "paged_kv_indices", checks.INT32, (None,))
        starts = checks.indptr(kv_indptr, "paged_kv_indptr", kv_indices.shape[0])
        size = len(starts) - 1
        checks.tensor(kv_last_page_len, "paged_kv_last_page_len", checks.INT32, (size,))
        queries = [1] * size
        if qo_indptr is not None:
            qo_starts = checks.indptr(qo_indptr, "qo_indptr")
            if len(qo_starts) != size + 1:
                raise ValueError(f"qo_indptr: wanted {size + 1} elements, got {len(qo_starts)}")
            queries = [b - a for a, b in pairwise(qo_starts)]
        lens = []
        for (a, b), last in zip(pairwise(starts), kv_last_page_len.tolist(), strict=True):
            if a < b and not 1 <= last <= page_size:
                raise ValueError(
                    f"paged_kv_last_page_len: wanted 1 to page_size {page_size}, got {last}"
                )
            lens.append((b - a - 1) * page_size + last if a < b else 0)
        return cls(queries, lens, starts[-1])

    def check_causal(self) -> None:
        """Raise if a request has more queries than tokens: a query's own token is among them."""
        for i, (queries, tokens) in enumerate(zip(self.qo_lens, self.kv_lens, strict=True)):
            if 0 < tokens < queries:
                raise ValueError(
                    f"qo_indptr: wanted at most {tokens} queries of request {i}, its KV tokens, as"
                    f" causal is true, got {queries}"
                )


@dataclass(frozen=True)
class Shape:
    """What a plan fixes beside the batch."""

    num_qo_heads: int
    num_kv_heads: int
    page_size: int
    k_format: VectorFormat
    v_format: VectorFormat
    window_left: int
    logits_soft_cap: float
    sm_scale: float

    @classmethod
    def create(
        cls,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        k_format: VectorFormat,
        v_format: VectorFormat,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float | None,
    ) -> Shape:
        """Check the arguments, and fill in what is None."""
        checks.heads(num_qo_heads, num_kv_heads)
        checks.count(head_dim, "head_dim", 1)
        checks.page_size(page_size)
        checks.vector_format(k_format, "k_format", head_dim)
        checks.vector_format(v_format, "v_format", head_dim)
        checks.count(window_left, "window_left", -1)
        cap = 0.0 if logits_soft_cap is None else float(logits_soft_cap)
        if not cap >= 0:
            raise ValueError(f"logits_soft_cap: wanted 0 or more, got {logits_soft_cap}")
        scale = head_dim**-0.5 if sm_scale is None else float(sm_scale)
        return cls(
            num_qo_heads, num_kv_heads, page_size, k_format, v_format, window_left, cap, scale
        )

    @property
    def head_dim(self) -> int:
        """Elements of a vector."""
        return self.k_format.head_dim

    @property
    def padded_dim(self) -> int:
        """Coordinates stored of a vector."""
        return self.k_format.padded_dim

    @property
    def page_head_bytes(self) -> int:
        """Bytes of one KV head in a page."""
        return checks.page_head_bytes(self.k_format, self.v_format, self.page_size)


class TableBuffers:
    """Device copies of a batch's tables: allocated at each plan, or the user's in graph mode.

    Parameters
    ----------
    names
        The user's arguments, for messages, in the order of ``buffers``.
    buffers
        int32 tensors whose memory a captured graph reads, or all None.
    device
        Where tables belong.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        buffers: tuple[Tensor | None, ...],
        device: torch.device,
        use_cuda_graph: bool,
    ) -> None:
        self.fixed: tuple[Tensor, ...] | None = None
        self.names = names
        if use_cuda_graph:
            for name, buffer in zip(names, buffers, strict=True):
                if buffer is None:
                    raise ValueError(f"{name}: wanted a tensor in CUDA graph mode, got None")
                checks.tensor(buffer, name, checks.INT32, (None,), device, packed=True)
            self.fixed = tuple(b for b in buffers if b is not None)
        self.device = device

    def fill(self, tables: tuple[Tensor, ...], non_blocking: bool) -> tuple[Tensor, ...]:
        """Return ``tables`` on the device; in graph mode in the user's buffers."""
        if self.fixed is None:
            return tuple(x.to(self.device, non_blocking=non_blocking) for x in tables)
        for name, buffer, x in zip(self.names, self.fixed, tables, strict=True):
            # indices may be fewer than at capture; all else has the size of the batch
            if x.shape[0] > buffer.shape[0] or ("indices" not in name and x.shape != buffer.shape):
                raise ValueError(
                    f"{name}: wanted room for {x.shape[0]} elements, a batch of the size that the"
                    f" graph was captured with, got {buffer.shape[0]}"
                )
        for buffer, x in zip(self.fixed, tables, strict=True):
            buffer[: x.shape[0]].copy_(x, non_blocking=non_blocking)
        return self.fixed
