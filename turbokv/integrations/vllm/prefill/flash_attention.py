# SPDX-License-Identifier: Apache-2.0
"""Prefill of one layer: FlashAttention over fresh keys and values, and over expanded older ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from turbokv.integrations.vllm.attention import scratch
from turbokv.integrations.vllm.attention.layer import (
    AttentionShape,
    AttentionSinks,
    CacheLayer,
    apply_attention_sinks,
)
from turbokv.integrations.vllm.prefill import flashinfer
from turbokv.integrations.vllm.prefill.images import LaterTokens
from turbokv.integrations.vllm.prefill.plan import Group

# Above so many rows one launch for all is worth expanding their fresh tokens as well.
MAX_SINGLE_EXPANSIONS = 4


@dataclass(eq=False)
class PrefillGroup:
    """A :class:`~turbokv.integrations.vllm.prefill.plan.Group` with its tables on the device.

    Attributes
    ----------
    group
        The plan.
    rows
        Of the block table.
    tokens
        Of the step's queries, keys and values.
    cu_q, cu_k
        int32 ``[rows + 1]``: where each row's fresh tokens, and its tokens in the workspace, start.
    begins
        int32 ``[rows]``: the first token of each row in the workspace.
    fresh
        int64: where each fresh token belongs in the workspace; None where rows are few.
    pieces
        Of a chunked row: first token, count, and the int32 table ``[0, count]``.
    planned
        FlashInfer's wrapper, where that path is taken.
    images
        Tokens that see later ones of their image; None where there are none.
    """

    group: Group
    rows: slice
    tokens: slice
    cu_q: Tensor
    cu_k: Tensor
    begins: Tensor
    fresh: Tensor | None = None
    pieces: tuple[tuple[int, int, Tensor], ...] = ()
    planned: Any = None
    images: LaterTokens | None = None


@dataclass(frozen=True)
class Workspace:
    """The size of the scratch memory that prefill needs; the memory is the engine's own.

    Attributes
    ----------
    capacity
        Tokens of expanded keys and values.
    max_num_tokens
        Queries of the largest step.
    dtype, device
        Of the model's activations.
    """

    capacity: int
    max_num_tokens: int
    dtype: torch.dtype
    device: torch.device

    def views(self, shape: AttentionShape) -> list[Tensor]:
        """Return room for expanded keys and values, one partial output and two of its sums.

        Valid until the next call of any layer.
        """
        expanded = ((self.capacity, shape.num_kv_heads, shape.head_dim), self.dtype)
        return scratch.current().views(
            self.device,
            expanded,
            expanded,
            ((self.max_num_tokens, shape.num_qo_heads, shape.head_dim), self.dtype),
            ((2, shape.num_qo_heads, self.max_num_tokens), torch.float32),
        )


@dataclass(frozen=True)
class _Pages:
    """The compressed cache of a layer, and the part of it that a group of rows reads."""

    pages: Tensor
    page_size: int
    block_table: Tensor
    tile_slots: Tensor | None


class Prefill:
    """Attends with groups of prefill rows for one layer, whose implementation owns it.

    Where the layer maps keys, those of pages are expanded as they were mapped, and queries and
    fresh keys that meet them are mapped too. Groups without older tokens attend as they are.

    Parameters
    ----------
    steps
        :mod:`~turbokv.integrations.vllm.attention.steps_cuda` or ``steps_torch``.
    shape
        Of the layer's attention.
    workspace
        How much is expanded at a time.
    sinks
        The layer's, which hold no logits before weights are loaded.
    storage
        Returns the formats and copies of the layer that stores what this one reads.
    reads_cache_only
        Whether fresh tokens are read from pages, too.
    fa_version
        Which FlashAttention serves the layer; 0 on a CPU.
    """

    def __init__(
        self,
        steps: ModuleType,
        shape: AttentionShape,
        workspace: Workspace,
        sinks: AttentionSinks,
        storage: Callable[[], CacheLayer],
        *,
        reads_cache_only: bool,
        fa_version: int,
    ) -> None:
        self.steps = steps
        self.shape = shape
        self.workspace = workspace
        self.sinks = sinks
        self.storage = storage
        self.reads_cache_only = reads_cache_only
        self.fa_version = fa_version

    def reserve(self) -> None:
        """Make the shared workspace as large as this layer will ever need it."""
        self.workspace.views(self.shape)

    def flashinfer(
        self, caches: list[CacheLayer], page_size: int, device: torch.device
    ) -> flashinfer.FlashInferPrefill:
        """Return what plans FlashInfer's prefill for layers of this one's shape."""
        memory = flashinfer.reserve(scratch.current(), device)
        return flashinfer.FlashInferPrefill(caches, self.shape, page_size, memory)

    def run(
        self,
        group: PrefillGroup,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: Tensor,
        page_size: int,
        block_table: Tensor,
        tile_slots: Tensor | None,
        output: Tensor,
        *,
        sees_images: bool = False,
    ) -> None:
        """Attend with the rows of ``group``, writing their part of ``output``.

        Parameters
        ----------
        group
            Rows that attend in one go.
        query, key, value
            Of the whole step: ``[tokens, heads, head_dim]``, float16 or bfloat16.
        pages
            uint8 ``[num_pages, num_kv_heads, page_head_bytes]``.
        page_size
            Tokens of a page.
        block_table
            int32 ``[requests, max_pages]``, of the whole step.
        tile_slots
            int32 ``[num_pages, page_size / 16]``, slots of 16-bit copies, or None.
        output
            As ``query``.
        sees_images
            Whether tokens of an image see the later ones of the same image.
        """
        tokens = group.tokens
        q, out = query[tokens], output[tokens]
        k = v = None
        if not self.reads_cache_only:
            k, v = key[tokens], value[tokens]
        if k is None or not group.group.is_fresh:  # pages take part
            cache = self.storage()
            q = self.steps.map_queries(cache, q).to(out.dtype)
            k = None if k is None else self.steps.map_keys(cache, k).to(out.dtype)
        cached = _Pages(pages, page_size, block_table[group.rows], tile_slots)
        images = group.images if sees_images else None
        # what is merged with another part afterwards must not have the sinks in it yet
        with_sinks = images is None
        lse = self._run_causal(group, q, k, v, cached, out, with_sinks)
        if images is not None:
            if k is None or v is None:
                k, v = self._fresh_from_pages(group, cached)
            self._attend_later(images, q, k, v, out, lse)
            self._apply_sinks(out, lse)

    def _run_causal(
        self,
        group: PrefillGroup,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cached: _Pages,
        out: Tensor,
        with_sinks: bool,
    ) -> Tensor:
        """Attend to a row's tokens up to each query; returns the log-sum-exps without sinks."""
        plan = group.group
        if plan.is_fresh and k is not None and v is not None:
            longest = max(plan.q_lens)
            return self._attend(
                q, k, v, group.cu_q, group.cu_q, longest, None, out, with_sinks=with_sinks
            )
        if group.planned is not None:
            lse = flashinfer.run(
                group.planned, self.storage(), q, cached.pages, cached.tile_slots, out
            )
            if with_sinks:
                self._apply_sinks(out, lse)
            return lse
        if plan.is_chunked:
            lse = self._run_chunked(group, q, k, v, cached, out)
            if with_sinks:
                self._apply_sinks(out, lse)
            return lse
        total = sum(plan.kv_lens)
        all_k, all_v, _, _ = self.workspace.views(self.shape)
        all_k, all_v = all_k[:total], all_v[:total]
        self._expand(group, k, v, cached, all_k, all_v)
        return self._attend(
            q,
            all_k,
            all_v,
            group.cu_q,
            group.cu_k,
            max(plan.q_lens),
            max(plan.kv_lens),
            out,
            with_sinks=with_sinks,
        )

    def _fresh_from_pages(self, group: PrefillGroup, cached: _Pages) -> tuple[Tensor, Tensor]:
        """Expand the fresh tokens of a layer that has no keys and values of its own."""
        plan, shape = group.group, self.shape
        size = (sum(plan.q_lens), shape.num_kv_heads, shape.head_dim)
        k = torch.empty(size, dtype=self.workspace.dtype, device=self.workspace.device)
        v = torch.empty_like(k)
        at = 0
        for row, (q_len, kv_len) in enumerate(zip(plan.q_lens, plan.kv_lens, strict=True)):
            self.steps.expand(
                self.storage(),
                cached.pages,
                cached.page_size,
                cached.block_table[row],
                k[at : at + q_len],
                v[at : at + q_len],
                cached.tile_slots,
                first_token=plan.begins[row] + kv_len - q_len,
            )
            at += q_len
        return k, v

    def _attend_later(
        self, images: LaterTokens, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        """Merge attention to the later tokens of each query's image into ``out`` and ``lse``."""
        causal = out.index_select(0, images.queries)
        causal_lse = lse.index_select(1, images.queries)
        later = torch.empty_like(causal)
        later_lse: Tensor = self.steps.attend(
            q.index_select(0, images.queries),
            k.index_select(0, images.keys),
            v.index_select(0, images.keys),
            images.starts,
            images.starts,
            images.longest,
            images.longest,
            later,
            sm_scale=self.shape.sm_scale,
            causal=True,
            sliding_window=None,
            logits_soft_cap=self.shape.logits_soft_cap,
            sinks=None,
            version=self.fa_version,
        )
        merged, merged_lse = torch.empty_like(causal), torch.empty_like(causal_lse)
        self.steps.merge(merged, merged_lse, later, later_lse, causal, causal_lse)
        out.index_copy_(0, images.queries, merged)
        lse.index_copy_(1, images.queries, merged_lse)

    def _expand(
        self,
        group: PrefillGroup,
        k: Tensor | None,
        v: Tensor | None,
        cached: _Pages,
        all_k: Tensor,
        all_v: Tensor,
    ) -> None:
        """Fill the workspace with each row's tokens in order: older ones, then fresh ones."""
        plan, cache = group.group, self.storage()
        rows = cached.block_table.shape[0]
        if rows > MAX_SINGLE_EXPANSIONS:
            # one launch for all, fresh tokens included; their 16-bit values go on top
            self.steps.expand(
                cache,
                cached.pages,
                cached.page_size,
                cached.block_table,
                all_k,
                all_v,
                cached.tile_slots,
                token_begin=group.begins,
                out_indptr=group.cu_k,
            )
            if k is not None and v is not None and group.fresh is not None:
                all_k.index_copy_(0, group.fresh, k)
                all_v.index_copy_(0, group.fresh, v)
            return
        at = fresh = 0
        for row in range(rows):
            q_len, kv_len = plan.q_lens[row], plan.kv_lens[row]
            older = kv_len if k is None else kv_len - q_len
            if older:
                self.steps.expand(
                    cache,
                    cached.pages,
                    cached.page_size,
                    cached.block_table[row],
                    all_k[at : at + older],
                    all_v[at : at + older],
                    cached.tile_slots,
                    first_token=plan.begins[row],
                )
            if k is not None and v is not None:
                all_k[at + older : at + kv_len] = k[fresh : fresh + q_len]
                all_v[at + older : at + kv_len] = v[fresh : fresh + q_len]
            at, fresh = at + kv_len, fresh + q_len

    def _expand_row(self, cached: _Pages, first: int, out_k: Tensor, out_v: Tensor) -> None:
        """Expand tokens from ``first`` on of a group's only row, as many as ``out_k`` has."""
        self.steps.expand(
            self.storage(),
            cached.pages,
            cached.page_size,
            cached.block_table[0],
            out_k,
            out_v,
            cached.tile_slots,
            first_token=first,
        )

    def _run_chunked(
        self,
        group: PrefillGroup,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cached: _Pages,
        out: Tensor,
    ) -> Tensor:
        """Attend to fresh tokens, then to the older ones of the one row piece by piece.

        Returns the log-sum-exps; sinks are not applied.
        """
        q_len = group.group.q_lens[0]
        context = group.group.context_lens[0]
        room_k, room_v, partial, sums = self.workspace.views(self.shape)
        if k is None or v is None:
            k, v = room_k[:q_len], room_v[:q_len]
            self._expand_row(cached, context, k, v)
        lse = self._attend(q, k, v, group.cu_q, group.cu_q, q_len, None, out, with_sinks=False)
        for turn, (first, count, cu_k) in enumerate(group.pieces):
            piece_k, piece_v = room_k[:count], room_v[:count]
            self._expand_row(cached, first, piece_k, piece_v)
            piece = partial[:q_len]
            piece_lse = self._attend(
                q,
                piece_k,
                piece_v,
                group.cu_q,
                cu_k,
                q_len,
                count,
                piece,
                causal=False,
                with_sinks=False,
            )
            # two buffers in turn: merging reads the sums that it replaces
            heads = self.shape.num_qo_heads
            merged = sums[turn % 2].view(-1)[: heads * q_len].view(heads, q_len)
            self.steps.merge(out, merged, piece, piece_lse, out, lse)
            lse = merged
        return lse

    def _apply_sinks(self, out: Tensor, lse: Tensor) -> None:
        """Let sinks take their share of probabilities that were computed without them."""
        if self.sinks.logits is not None:
            apply_attention_sinks(out, lse, self.sinks.logits)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int | None,
        out: Tensor,
        *,
        causal: bool = True,
        with_sinks: bool = True,
    ) -> Tensor:
        lse: Tensor = self.steps.attend(
            q,
            k,
            v,
            cu_q,
            cu_k,
            max_q,
            max_q if max_k is None else max_k,
            out,
            sm_scale=self.shape.sm_scale,
            causal=causal,
            sliding_window=self.shape.sliding_window if causal else None,
            logits_soft_cap=self.shape.logits_soft_cap,
            sinks=self.sinks.logits if with_sinks else None,
            version=self.fa_version,
        )
        return lse
