# SPDX-License-Identifier: Apache-2.0
"""What every layer of a group needs to know about a step, built once for all of them."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from turbokv.integrations.vllm.attention import scratch
from turbokv.integrations.vllm.attention.shared_pages import shared_pages
from turbokv.integrations.vllm.limits import (
    MAX_DECODE_QUERIES,
    SLICE_QUERIES,
    extra_draft_tokens,
    max_step_tokens,
)
from turbokv.integrations.vllm.options import Options
from turbokv.integrations.vllm.prefill.flash_attention import MAX_SINGLE_EXPANSIONS, PrefillGroup
from turbokv.integrations.vllm.prefill.images import (
    LaterTokens,
    Ranges,
    reversed_tokens,
    spans,
)
from turbokv.integrations.vllm.prefill.plan import Group, chunks, plan, slices, workspace_floor
from turbokv.integrations.vllm.window import metrics
from turbokv.integrations.vllm.window.pool import RecentWindow


@dataclass(eq=False)
class SlicedPrefill:
    """Prefill rows as many short rows, for heads that FlashAttention does not take.

    Attributes
    ----------
    tokens
        Of the step's queries.
    block_table, seq_lens, qo_indptr
        int32, of the short rows: pages, tokens that the last query sees, and where queries start.
    """

    tokens: slice
    block_table: Tensor
    seq_lens: Tensor
    qo_indptr: Tensor


@dataclass(eq=False)
class TurboKVMetadata(AttentionMetadata):  # type: ignore[misc]
    """A step's metadata; decodes come first.

    Attributes
    ----------
    num_decodes, num_decode_tokens, max_decode_len
        Rows for the decode kernel, their queries, and the most of any row.
    num_tokens
        Queries of the step, padding of CUDA graphs included.
    seq_lens, block_table, query_start_loc
        As vLLM keeps them on the device, at fixed addresses.
    positions
        int64, logical position of each query; None unless keys are centred.
    tile_slots
        int32 ``[num_pages, page_size / 16]``, slots of 16-bit copies, or None.
    prefill
        What the decode kernel does not take.
    sliced
        The same as rows that it does take, for heads that FlashAttention does not.
    mm_prefix_range
        First and last position of images whose tokens see each other, by row; None where there are
        none. vLLM's name: Gemma 4 sets it to None for layers that are causal in images, too.
    plan_prefill
        Fills ``prefill`` or ``sliced``; None if they are filled, or nothing is prefilled.
    """

    num_decodes: int
    num_decode_tokens: int
    max_decode_len: int
    num_tokens: int
    seq_lens: Tensor
    block_table: Tensor
    query_start_loc: Tensor
    positions: Tensor | None = None
    tile_slots: Tensor | None = None
    prefill: tuple[PrefillGroup, ...] = field(default=())
    sliced: SlicedPrefill | None = None
    mm_prefix_range: Ranges | None = None
    plan_prefill: Callable[[TurboKVMetadata], None] | None = None

    def __post_init__(self) -> None:
        """Take integers of any kind: virtual batches of chunked attention carry NumPy's."""
        for name in ("num_decodes", "num_decode_tokens", "max_decode_len", "num_tokens"):
            setattr(self, name, operator.index(getattr(self, name)))

    @property
    def is_single_tokens(self) -> bool:
        """Whether every request of the step has one token, for the decode kernel."""
        rest = self.prefill or self.sliced is not None or self.plan_prefill is not None
        return self.max_decode_len == 1 and not rest

    def complete(self) -> None:
        """Plan what was put off until a layer attends: not all metadata is ever used."""
        if self.plan_prefill is not None:
            plan_prefill, self.plan_prefill = self.plan_prefill, None
            plan_prefill(self)


class TurboKVMetadataBuilder(AttentionMetadataBuilder[TurboKVMetadata]):  # type: ignore[misc]
    """Builds :class:`TurboKVMetadata`; one for each group of layers that share pages and shape.

    Calls of ``build`` neither synchronise nor depend on what layers hold, but for the 16-bit
    window's map, which is refreshed here, outside graphs. A draft model's layers wait for the
    device when they prefill, since only it knows their lengths, see :meth:`_lengths`.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.options = Options.from_config(vllm_config.additional_config)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.page_size = int(kv_cache_spec.block_size)
        self.sliding_window: int | None = getattr(kv_cache_spec, "sliding_window", None)
        self.max_num_tokens = max_step_tokens(vllm_config)
        self.capacity = max(
            self.options.workspace_tokens,
            workspace_floor(self.max_num_tokens, self.sliding_window),
        )
        self.extra_draft_tokens = extra_draft_tokens(vllm_config)
        self._flashinfer: Any = None
        layers = self._layers()
        for layer in layers:
            layer.impl.follow(layer)
        self.is_draft = all(layer.impl.is_draft for layer in layers)
        self.is_sliced = any(layer.impl.prefills_in_slices for layer in layers)
        # Layers that read another's pages may have a builder of their own, with other queries in a
        # step (fast prefill): what is about storing is the storing layers' builder's.
        stored = [layer for layer in layers if layer.impl.kv_sharing_target_layer_name is None]
        self.stores = bool(stored)
        self.is_centred = any(layer.impl.cache.k_offset is not None for layer in stored)
        for layer in layers:
            layer.impl.reserve(device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Run decodes and uniform verification in full graphs, unless decode decompresses."""
        if Options.from_config(vllm_config.additional_config).decode == "decompress":
            return AttentionCGSupport.NEVER
        return cls._cudagraph_support

    def _layers(self) -> list[Any]:
        context = self.vllm_config.compilation_config.static_forward_context
        return [context[name] for name in self.layer_names]

    def _storing_layers(self) -> list[Any]:
        """Return the layers whose caches this builder's layers read: mostly themselves."""
        context = self.vllm_config.compilation_config.static_forward_context
        names = [
            layer.impl.kv_sharing_target_layer_name or name
            for name, layer in zip(self.layer_names, self._layers(), strict=True)
        ]
        return [context[name] for name in dict.fromkeys(names)]

    # --- a step -------------------------------------------------------------------------------

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> TurboKVMetadata:
        """Build for a capture: as a step, but the window's map stays as it is."""
        metadata = self._build(common_attn_metadata, refresh=False)
        # short rows make the capture's warm-up fast; replays read the real lengths
        metadata.seq_lens.fill_(max(metadata.max_decode_len, 1))
        return metadata

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TurboKVMetadata:
        """Build the metadata of a step (vLLM calls this by keyword)."""
        return self._build(common_attn_metadata, refresh=True)

    def _build(self, cam: CommonAttentionMetadata, *, refresh: bool) -> TurboKVMetadata:
        if cam.causal is not True:
            raise ValueError(f"causal: wanted True, got {cam.causal!r}")
        assert self.reorder_batch_threshold is not None
        # In a drafter's first pass rows are those of the step that was just verified, rejected
        # drafts and all, and longer by what else it reads. Rows of verification stay decodes:
        # only the device knows how many tokens they really have.
        extra = self.extra_draft_tokens if self.is_draft else 0
        most = min(self.reorder_batch_threshold + extra, MAX_DECODE_QUERIES)
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            cam, decode_threshold=most
        )
        if self.options.decode == "decompress":
            num_decodes, num_prefills, num_decode_tokens = 0, cam.num_reqs, 0
        ranges, first_row = self._images(cam)
        if first_row < num_decodes:  # the end of an image, as short as a row of drafts
            num_decodes, num_prefills = first_row, cam.num_reqs - first_row
            num_decode_tokens = int(cam.query_start_loc_cpu[first_row])
        max_decode_len = cam.max_query_len
        if num_prefills:
            starts = cam.query_start_loc_cpu[: num_decodes + 1]
            max_decode_len = int(starts.diff().max()) if num_decodes else 0
        metadata = TurboKVMetadata(
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            max_decode_len=max_decode_len,
            num_tokens=cam.num_actual_tokens,
            seq_lens=cam.seq_lens,
            block_table=cam.block_table_tensor,
            query_start_loc=cam.query_start_loc,
            mm_prefix_range=ranges,
        )
        if num_prefills:
            metadata.plan_prefill = functools.partial(self._plan_prefill, cam, num_decodes)
            # a drafter's lengths are the device's, and much of its metadata is never used
            if not extra:
                metadata.complete()
        if self.is_centred:
            metadata.positions = self._positions(cam)
        metadata.tile_slots = self._tile_slots(cam, refresh)
        return metadata

    def _images(self, cam: CommonAttentionMetadata) -> tuple[Ranges | None, int]:
        """Return the images of which the step has tokens, if any, and the first row with one."""
        ranges = getattr(cam, "mm_req_doc_ranges", None)
        if not ranges or not any(ranges.values()):
            return None, cam.num_reqs
        _, q_lens, seq_lens = self._lengths(cam, 0)
        found = spans(ranges, 0, q_lens, seq_lens)
        if not found:
            return None, cam.num_reqs
        return ranges, min(row for row, _, _ in found)

    def _later_tokens(
        self, ranges: Ranges, group: Group, first_row: int, cu_q: list[int]
    ) -> LaterTokens | None:
        """Put on the device which of a group's tokens see later ones; None if none do."""
        seq_lens = [b + kv for b, kv in zip(group.begins, group.kv_lens, strict=True)]
        found = spans(ranges, first_row, group.q_lens, seq_lens)
        if not found:
            return None
        queries, keys, starts = reversed_tokens(found, cu_q)
        table = self._upload([*queries, *keys], torch.int64)
        return LaterTokens(
            queries=table[: len(queries)],
            keys=table[len(queries) :],
            starts=self._upload(starts, torch.int32),
            longest=max(b - a for a, b in itertools.pairwise(starts)),
        )

    def _plan_prefill(
        self, cam: CommonAttentionMetadata, num_decodes: int, metadata: TurboKVMetadata
    ) -> None:
        if self.is_sliced:
            metadata.sliced = self._slices(cam, num_decodes)
        else:
            metadata.prefill = self._prefill(cam, num_decodes)
        if metadata.mm_prefix_range is not None:
            for part in metadata.prefill:
                part.images = self._later_tokens(
                    metadata.mm_prefix_range,
                    part.group,
                    part.rows.start,
                    _cumulative(part.group.q_lens),
                )

    def _slices(self, cam: CommonAttentionMetadata, num_decodes: int) -> SlicedPrefill:
        starts, q_lens, seq_lens = self._lengths(cam, num_decodes)
        rows, queries, lens = slices(q_lens, seq_lens, SLICE_QUERIES)
        table = self._upload([*_cumulative(queries), *lens, *rows], torch.int32)
        count = len(rows)
        return SlicedPrefill(
            tokens=slice(starts[0], starts[-1]),
            block_table=cam.block_table_tensor[num_decodes:].index_select(0, table[-count:]),
            seq_lens=table[count + 1 : 2 * count + 1],
            qo_indptr=table[: count + 1],
        )

    def _lengths(
        self, cam: CommonAttentionMetadata, num_decodes: int
    ) -> tuple[list[int], list[int], list[int]]:
        """Return where prefill rows start among the step's queries, their queries and tokens.

        Of rows that are prefill vLLM's bound is exact, by its own promise. It does not hold in the
        first pass of a draft model: rows are longer there by the tokens that the model reads
        as well, and whether the bound is too depends on the version and the runner. The device has
        the true lengths, so they are asked for, which waits for the target model's step.
        """
        starts = cam.query_start_loc_cpu[num_decodes : cam.num_reqs + 1].tolist()
        q_lens = [b - a for a, b in itertools.pairwise(starts)]
        lens = cam.seq_lens_cpu_upper_bound
        if lens is None or (self.is_draft and self.extra_draft_tokens):
            lens = cam.seq_lens.cpu()
        return starts, q_lens, lens[num_decodes : cam.num_reqs].tolist()

    def _prefill(self, cam: CommonAttentionMetadata, num_decodes: int) -> tuple[PrefillGroup, ...]:
        starts, q_lens, seq_lens = self._lengths(cam, num_decodes)
        if self.options.path != "flashinfer":
            groups = plan(q_lens, seq_lens, self.capacity, self.sliding_window)
            return tuple(self._on_device(group, starts, num_decodes) for group in groups)
        # nothing is expanded, so nothing has to be cut
        found = tuple(
            self._on_device(group, starts, num_decodes)
            for group in plan(q_lens, seq_lens, max(self.capacity, sum(seq_lens)))
        )
        if self._flashinfer is None:
            self._flashinfer = self._layers()[0].impl.prefill.flashinfer(
                [layer.impl.storage() for layer in self._layers()], self.page_size, self.device
            )
        self._flashinfer.start_step()
        for group in found:
            if not group.group.is_fresh:
                table = cam.block_table_tensor[group.rows]
                group.planned = self._flashinfer.plan(group.group, table)
        return found

    def _on_device(self, group: Group, starts: list[int], num_decodes: int) -> PrefillGroup:
        cu_q, cu_k = _cumulative(group.q_lens), _cumulative(group.kv_lens)
        rows = group.last - group.first
        pieces = chunks(group.context_lens[0], self.capacity) if group.is_chunked else ()
        flat = [*cu_q, *cu_k, *group.begins]
        for _, count in pieces:
            flat += [0, count]
        table = self._upload(flat, torch.int32)
        fresh = None
        if rows > MAX_SINGLE_EXPANSIONS and not group.is_fresh:
            ends = cu_k[1:]
            at = [
                torch.arange(end - q_len, end, dtype=torch.int64, device="cpu")
                for end, q_len in zip(ends, group.q_lens, strict=True)
            ]
            fresh = self._upload(torch.cat(at), torch.int64)
        after = 2 * (rows + 1) + rows
        return PrefillGroup(
            group=group,
            rows=slice(num_decodes + group.first, num_decodes + group.last),
            tokens=slice(starts[group.first], starts[group.last]),
            cu_q=table[: rows + 1],
            cu_k=table[rows + 1 : 2 * (rows + 1)],
            begins=table[2 * (rows + 1) : after],
            fresh=fresh,
            pieces=tuple(
                (first, count, table[after + 2 * i : after + 2 * i + 2])
                for i, (first, count) in enumerate(pieces)
            ),
        )

    def _upload(self, values: list[int] | Tensor, dtype: torch.dtype) -> Tensor:
        host = torch.as_tensor(values, dtype=dtype, device="cpu")
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def _positions(self, cam: CommonAttentionMetadata) -> Tensor:
        """Write the logical position of each query to the buffer that graphs read."""
        count = cam.num_actual_tokens
        buffer = scratch.current().keep("positions", self.max_num_tokens, torch.int64, self.device)
        known = getattr(cam, "positions", None)
        if known is not None and known.ndim == 1 and known.shape[0] >= count:
            # One copy for nine small kernels. Not used in place: a graph reads one address.
            buffer[:count].copy_(known[:count])
            return buffer
        token = torch.arange(count, dtype=torch.int64, device=self.device)
        starts = cam.query_start_loc[: cam.num_reqs + 1]
        row = torch.searchsorted(starts[1:], token, right=True, out_int32=True)
        row.clamp_(max=cam.num_reqs - 1)  # padding, which is stored nowhere
        first = cam.seq_lens[: cam.num_reqs] - starts.diff() - starts[:-1]
        torch.add(token, first[row], out=buffer[:count]).clamp_(min=0)
        return buffer

    # --- 16-bit window ------------------------------------------------------------------------

    def _tile_slots(self, cam: CommonAttentionMetadata, refresh: bool) -> Tensor | None:
        layers = self._layers()
        copies = layers[0].impl.copies
        if copies is None:
            return None
        shared = shared_pages(self._storing_layers())
        if shared.window is None:
            shared.window = RecentWindow(
                layers[0].kv_cache.shape[0],
                self.page_size,
                copies.shape[0],
                self.options.window,
                self.options.sinks,
                self.device,
            )
            metrics.watch(shared.window)
        # Where target and drafter share the map, it follows the target's steps alone: drafts in a
        # tile that is not there yet are read compressed, and no tile leaves before its time.
        if refresh and self.stores and not (self.is_draft and shared.has_target_layers):
            reqs = cam.num_reqs
            query_lens = cam.query_start_loc[: reqs + 1].diff()
            shared.window.refresh(cam.block_table_tensor[:reqs], cam.seq_lens[:reqs], query_lens)
        return shared.window.tile_slots


def _cumulative(lengths: Sequence[int]) -> list[int]:
    total = [0]
    for length in lengths:
        total.append(total[-1] + length)
    return total
