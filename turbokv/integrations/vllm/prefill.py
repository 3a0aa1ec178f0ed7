# SPDX-License-Identifier: Apache-2.0
"""Prefill of one layer: FlashAttention over fresh keys and values, and over expanded older ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from turbokv.integrations.vllm import flashinfer_prefill, scratch
from turbokv.integrations.vllm.layer import CacheLayer
from turbokv.integrations.vllm.metadata import (
    MAX_SINGLE_EXPANSIONS,
    PrefillGroup,
    TurboKVMetadata,
)


class PrefillSteps(ABC):
    """The part of a layer's implementation that attends to groups of prefill rows.

    Attributes
    ----------
    kernels
        :mod:`kernels_cuda` or :mod:`kernels_torch`.
    capacity
        Tokens that the workspace holds expanded.
    reads_cache_only
        Whether fresh tokens are read from pages, too.
    """

    kernels: ModuleType
    vllm_config: Any
    device: torch.device
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None
    logits_soft_cap: float
    fa_version: int
    capacity: int
    max_num_tokens: int
    reads_cache_only: bool
    _sinks_float: Tensor | None

    @abstractmethod
    def storage(self) -> CacheLayer:
        """Return the formats and copies of the layer that stores what this one reads."""

    def workspace(self, memory: scratch.Scratch, tokens: int) -> list[Tensor]:
        """Return room for expanded keys and values, and for one partial output and its sums."""
        dtype = self.vllm_config.model_config.dtype
        expanded = ((tokens, self.num_kv_heads, self.head_size), dtype)
        return memory.views(
            self.device,
            expanded,
            expanded,
            ((self.max_num_tokens, self.num_heads, self.head_size), dtype),
            ((2, self.num_heads, self.max_num_tokens), torch.float32),
        )

    def prefill(
        self,
        group: PrefillGroup,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: Tensor,
        page_size: int,
        md: TurboKVMetadata,
        output: Tensor,
    ) -> None:
        """Attend with the rows of ``group``, writing their part of ``output``."""
        plan, tokens = group.group, group.tokens
        q, out = query[tokens], output[tokens]
        k = v = None
        if not self.reads_cache_only:
            k, v = key[tokens], value[tokens]
            if plan.is_fresh:
                self._attend(q, k, v, group.cu_q, group.cu_q, max(plan.q_lens), None, out)
                return
        if group.planned is not None:
            lse = flashinfer_prefill.run(
                group.planned, self.storage(), q, pages, md.tile_slots, out
            )
            self._apply_sinks(out, lse)
            return
        table = md.block_table[group.rows]
        args = (pages, page_size, table, md.tile_slots)
        if plan.is_chunked:
            self._prefill_chunked(group, q, k, v, args, out)
            return
        total = sum(plan.kv_lens)
        all_k, all_v, _, _ = self.workspace(scratch.current(), self.capacity)
        all_k, all_v = all_k[:total], all_v[:total]
        self._expand(group, k, v, args, all_k, all_v)
        self._attend(
            q, all_k, all_v, group.cu_q, group.cu_k, max(plan.q_lens), max(plan.kv_lens), out
        )

    def _expand(
        self,
        group: PrefillGroup,
        k: Tensor | None,
        v: Tensor | None,
        args: tuple[Tensor, int, Tensor, Tensor | None],
        all_k: Tensor,
        all_v: Tensor,
    ) -> None:
        """Fill the workspace with each row's tokens in order: older ones, then fresh ones."""
        pages, page_size, table, tile_slots = args
        plan, cache = group.group, self.storage()
        rows = table.shape[0]
        if rows > MAX_SINGLE_EXPANSIONS:
            # one launch for all, fresh tokens included; their 16-bit values go on top
            self.kernels.expand(
                cache,
                pages,
                page_size,
                table,
                all_k,
                all_v,
                tile_slots,
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
                self.kernels.expand(
                    cache,
                    pages,
                    page_size,
                    table[row],
                    all_k[at : at + older],
                    all_v[at : at + older],
                    tile_slots,
                    first_token=plan.begins[row],
                )
            if k is not None and v is not None:
                all_k[at + older : at + kv_len] = k[fresh : fresh + q_len]
                all_v[at + older : at + kv_len] = v[fresh : fresh + q_len]
            at, fresh = at + kv_len, fresh + q_len

    def _prefill_chunked(
        self,
        group: PrefillGroup,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        args: tuple[Tensor, int, Tensor, Tensor | None],
        out: Tensor,
    ) -> None:
        """Attend to fresh tokens, then to the older ones of the one row piece by piece."""
        pages, page_size, table, tile_slots = args
        q_len, cache = group.group.q_lens[0], self.storage()
        context = group.group.context_lens[0]
        room_k, room_v, partial, sums = self.workspace(scratch.current(), self.capacity)
        if k is None or v is None:
            k, v = room_k[:q_len], room_v[:q_len]
            self.kernels.expand(
                cache, pages, page_size, table[0], k, v, tile_slots, first_token=context
            )
        lse = self._attend(q, k, v, group.cu_q, group.cu_q, q_len, None, out, with_sinks=False)
        for turn, (first, count, cu_k) in enumerate(group.pieces):
            piece_k, piece_v = room_k[:count], room_v[:count]
            self.kernels.expand(
                cache, pages, page_size, table[0], piece_k, piece_v, tile_slots, first_token=first
            )
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
            merged = sums[turn % 2].view(-1)[: self.num_heads * q_len].view(self.num_heads, q_len)
            self.kernels.merge(out, merged, piece, piece_lse, out, lse)
            lse = merged
        self._apply_sinks(out, lse)

    def _apply_sinks(self, out: Tensor, lse: Tensor) -> None:
        """Let sinks take their share of probabilities that were computed without them."""
        if self._sinks_float is not None:
            share = torch.sigmoid(lse - self._sinks_float[:, None]).t()[..., None]
            out.mul_(share.to(out.dtype))

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
        lse: Tensor = self.kernels.attend(
            q,
            k,
            v,
            cu_q,
            cu_k,
            max_q,
            max_q if max_k is None else max_k,
            out,
            sm_scale=self.scale,
            causal=causal,
            sliding_window=self.sliding_window if causal else None,
            logits_soft_cap=self.logits_soft_cap,
            sinks=self._sinks_float if with_sinks else None,
            version=self.fa_version,
        )
        return lse
