# SPDX-License-Identifier: Apache-2.0
"""One attention layer: stores fresh keys and values compressed, and attends to the pages."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from turbokv.centring import KeyOffsets
from turbokv.integrations.vllm import compat, connectors
from turbokv.integrations.vllm.attention import scratch
from turbokv.integrations.vllm.attention.layer import (
    AttentionShape,
    AttentionSinks,
    CacheLayer,
    head_slice,
    total_copy_bytes,
)
from turbokv.integrations.vllm.attention.metadata import TurboKVMetadata
from turbokv.integrations.vllm.attention.shared_pages import SharedPages
from turbokv.integrations.vllm.limits import SLICE_QUERIES, max_decode_queries, max_step_tokens
from turbokv.integrations.vllm.offsets import file
from turbokv.integrations.vllm.options import NONE, Options
from turbokv.integrations.vllm.prefill import flashinfer
from turbokv.integrations.vllm.prefill.flash_attention import Prefill, Workspace
from turbokv.integrations.vllm.prefill.plan import workspace_floor
from turbokv.window_pool import pool_slots, slots_per_request

logger = init_logger(__name__)


class TurboKVImpl(AttentionImpl[TurboKVMetadata]):  # type: ignore[misc]
    """Attention over compressed pages; arguments as vLLM's ``Attention`` layer gives them."""

    supports_quant_query_input = False
    supports_pcp = False
    can_return_lse_for_decode = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "tq4",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = sorted(name for name, value in kwargs.items() if value is not None)
        if alibi_slopes is not None:
            unknown.append("alibi_slopes")
        if unknown:
            names = ", ".join(unknown)
            raise ValueError(f"{names}: wanted none with kv_cache_dtype={kv_cache_dtype}, got some")
        if attn_type != AttentionType.DECODER:
            raise ValueError(f"attn_type: wanted {AttentionType.DECODER}, got {attn_type}")
        self.vllm_config = get_current_vllm_config()
        self.options = Options.from_config(self.vllm_config.additional_config)
        # vLLM reads these names
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.shape = AttentionShape(
            num_heads,
            self.num_kv_heads,
            head_size,
            self.scale,
            sliding_window,
            float(logits_soft_cap or 0.0),
        )
        self.attention_sinks = AttentionSinks()
        self.cache = CacheLayer.create(kv_cache_dtype, head_size, self.num_kv_heads)
        self.shared_pages: SharedPages | None = None
        # Names and numbers do not tell a drafter's layers: they start from 0 again (a draft model,
        # mtp.layers.0) or go on after the target's (EAGLE). But vLLM loads the target first, and
        # says which model it makes, unless parts of that model have tags of their own.
        self.is_loaded = False
        self.is_draft = compat.makes_drafter() or any(impl.is_loaded for impl in self._impls())
        self._has_decided = False  # whether it is known which offsets, if any, keys have
        self.device = compat.device()
        self.start_bytes = compat.free_at_start()
        self.steps: ModuleType = _steps(self.device)
        fa_version = 0
        self.prefills_in_slices = False
        if self.device.type == "cuda":
            version = compat.flash_attention_version(head_size)
            if version is None:
                self.prefills_in_slices = True
                logger.warning_once(
                    "TurboKV: no FlashAttention here takes head_dim %d: layers of that size prefill"
                    " with the decode kernel, a few queries at a time.",
                    head_size,
                )
                self._check_images()
            fa_version = version or 0
        self.max_num_tokens = max_step_tokens(self.vllm_config)
        capacity = max(
            self.options.workspace_tokens, workspace_floor(self.max_num_tokens, sliding_window)
        )
        self.prefill = Prefill(
            self.steps,
            self.shape,
            Workspace(
                capacity, self.max_num_tokens, self.vllm_config.model_config.dtype, self.device
            ),
            self.attention_sinks,
            self.storage,
            # layers that share another's cache have no keys and values of their own
            reads_cache_only=(
                kv_sharing_target_layer_name is not None or self.options.path == "flash_attn"
            ),
            fa_version=fa_version,
        )

    # --- start-up -----------------------------------------------------------------------------

    def _check_images(self) -> None:
        """Refuse images whose tokens see each other where FlashAttention does not take the layer.

        Raises
        ------
        ValueError
            Unless the model's layers of this kind are causal in images, too (Gemma 4).
        """
        model = self.vllm_config.model_config
        text = model.hf_text_config
        is_causal = (
            self.sliding_window is None
            and getattr(text, "use_bidirectional_attention", None) == "vision"
        )
        if getattr(model, "is_mm_prefix_lm", False) and not is_causal:
            raise ValueError(
                f"head_dim: wanted one that FlashAttention takes here, as tokens of images see each"
                f" other, got {self.head_size}; serve text only (--language-model-only)"
            )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Load kernels and calibration, and allocate 16-bit copies; again after a reload."""
        self.is_loaded = True
        if self.sinks is not None:
            self.attention_sinks.load(self.sinks)
        if self.kv_sharing_target_layer_name is not None:
            return
        self._centre()
        self.steps.prepare(self.cache)
        if self.options.keeps_window and self.cache.copies is None:
            self._make_copies()

    def _centre(self) -> None:
        """Take codebooks and offsets of a file, or room for offsets; offsets after every load."""
        # files and measurements are of the target model's layers
        if self.options.calibration == NONE or self.is_draft:
            return
        if self.options.calibration_file is not None:
            self._calibrate(self.options.calibration_file)
        elif self._is_chunked:
            self._has_decided = True
        elif not self._has_decided:
            # the worker measures offsets when all weights are there; their memory counts as weights
            self.cache.reserve_offsets(self._max_tokens, self.device)
        elif self.cache.offsets is not None:
            self.cache.set_offsets(self.cache.offsets, self._max_tokens, self.device)

    def _calibrate(self, path: str) -> None:
        """Take codebooks, once, and the map and offsets of this layer."""
        name, _ = compat.own_layer(self, self.vllm_config)
        calibration = file.load(path)
        file.check_parts(calibration, self.kv_cache_dtype)
        layer = calibration.layer(compat.layer_index(name))
        if layer is None:
            return
        if not self._has_decided:
            self.cache = CacheLayer.create(
                self.kv_cache_dtype, self.head_size, self.num_kv_heads, layer
            )
            self._has_decided = True
        ranks = compat.tensor_parallel()
        if layer.k_map is not None:
            heads = head_slice(layer.k_map.num_kv_heads, self.num_kv_heads, *ranks)
            self.cache.set_map(layer.k_map.of_heads(heads), self.device)
        if layer.offsets is not None and not self._is_chunked:
            heads = head_slice(layer.offsets.mu.shape[0], self.num_kv_heads, *ranks)
            own = KeyOffsets(layer.offsets.mu[heads], layer.offsets.rotary)
            self.cache.set_offsets(own, self._max_tokens, self.device)

    def take_offsets(self, offsets: KeyOffsets | None) -> None:
        """Take what the worker measured for this layer's heads, or store keys as they are."""
        if self.kv_sharing_target_layer_name is not None or self._is_chunked:
            return
        if offsets is not None:
            self.cache.set_offsets(offsets, self._max_tokens, self.device)
        elif self._has_decided and self.cache.k_offset is not None:
            raise RuntimeError("offsets that pages were written with cannot be dropped")
        else:
            self.cache.drop_offsets()
        self._has_decided = True

    @property
    def _is_chunked(self) -> bool:
        """Whether the layer attends within chunks of a request (Llama 4), which are its requests.

        The kernels count a key's position from the start of its chunk, so that they cannot tell the
        offset of its true position: such a layer stores keys as they are.
        """
        _, layer = compat.own_layer(self, self.vllm_config)
        return getattr(layer, "attention_chunk_size", None) is not None

    @property
    def _max_tokens(self) -> int:
        """The longest request."""
        return int(self.vllm_config.model_config.max_model_len)

    def _make_copies(self) -> None:
        """Allocate the 16-bit copies: as many tiles as all layers together can afford."""
        if not connectors.keeps_window(self.vllm_config):
            logger.warning_once("TurboKV: no 16-bit window, as this KV connector would break it.")
            return
        impls = self._storing()
        made = [impl.cache.copies.shape[0] for impl in impls if impl.cache.copies is not None]
        num_slots = made[0] if made else self._pool_slots(impls)
        if num_slots > 0:
            self.cache.make_copies(num_slots, self.device)

    def _pool_slots(self, impls: list[TurboKVImpl]) -> int:
        """Return the slots of the pool, and say how many there are, or why there are none."""
        # the first layer that was made has seen the memory before any other's weights
        cache_bytes = compat.free_cache_bytes(self.vllm_config, impls[0].start_bytes)
        slot_bytes = total_copy_bytes([impl.cache for impl in impls])
        num_slots = pool_slots(
            cache_bytes,
            slot_bytes,
            self.vllm_config.scheduler_config.max_num_seqs,
            fraction=self.options.window_pool_fraction,
            window=self.options.window,
            sinks=self.options.sinks,
        )
        if num_slots > 0:
            logger.info_once(
                "TurboKV: 16-bit copies of %d tiles of 16 tokens (%.2f GiB).",
                num_slots,
                num_slots * slot_bytes / 2**30,
            )
            return num_slots
        each = slots_per_request(self.options.window, self.options.sinks)
        logger.warning_once(
            "TurboKV: no 16-bit window, although %d tokens and %d sinks were requested: copies for"
            " one request take %.3f GiB, and window_pool_fraction %g of a cache of about %.3f GiB"
            " is less. Raise window_pool_fraction, or give the cache more memory.",
            self.options.window,
            self.options.sinks,
            each * slot_bytes / 2**30,
            self.options.window_pool_fraction,
            cache_bytes / 2**30,
        )
        return 0

    def _impls(self) -> list[TurboKVImpl]:
        """Return the implementations of this class that the engine has so far."""
        context = self.vllm_config.compilation_config.static_forward_context
        impls = [getattr(layer, "impl", None) for layer in context.values()]
        return [impl for impl in impls if isinstance(impl, TurboKVImpl)]

    def _storing(self) -> list[TurboKVImpl]:
        """Return those of them that have pages of their own, in the order of their making."""
        return [impl for impl in self._impls() if impl.kv_sharing_target_layer_name is None]

    @property
    def _decode_name(self) -> str:
        """What the decode kernel's workspace is kept by: batches may share one, shapes may not."""
        return f"decode {self.num_heads} {self.num_kv_heads} {self.head_size}"

    @property
    def copies(self) -> Tensor | None:
        """16-bit copies of this layer's tiles, or of those it shares."""
        return self.storage().copies

    def storage(self) -> CacheLayer:
        """Return the formats and copies of the layer that stores what this one reads."""
        target = self.kv_sharing_target_layer_name
        if target is None:
            return self.cache
        context = self.vllm_config.compilation_config.static_forward_context
        cache: CacheLayer = context[target].impl.cache
        return cache

    def follow(self, layer: Any) -> None:
        """Read the cache of the layer that vLLM let ``layer`` share it with once both were there.

        Gemma 4's drafter is told so only after its weights were loaded.
        """
        target = layer.kv_sharing_target_layer_name
        if target == self.kv_sharing_target_layer_name:
            return
        self.kv_sharing_target_layer_name = target
        self.prefill.reads_cache_only = True
        self.cache.copies = None

    def reserve(self, device: torch.device) -> None:
        """Make shared memory as large as this layer will ever need it."""
        memory = scratch.current()
        self.prefill.reserve()
        scheduler = self.vllm_config.scheduler_config
        graphs = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(int(scheduler.max_num_seqs), int(graphs))
        queries = max_decode_queries(self.vllm_config)
        if self.prefills_in_slices:
            queries = max(queries, SLICE_QUERIES)
            rows += -(-self.max_num_tokens // SLICE_QUERIES)
        needed = self.steps.decode_workspace_bytes(rows, self.num_heads, self.cache, queries)
        if needed:
            memory.keep(self._decode_name, needed, torch.uint8, device)
        if self.cache.k_offset is not None:
            count = max(self.max_num_tokens, rows * queries)
            memory.keep("positions", count, torch.int64, device)
        if self.options.path == "flashinfer" and device.type == "cuda":
            flashinfer.reserve(memory, device)

    # --- a step -------------------------------------------------------------------------------

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Compress fresh keys and values into their slots."""
        positions = tile_slots = None
        metadata = compat.layer_metadata(layer.layer_name)
        if metadata is not None:
            positions, tile_slots = metadata.positions, metadata.tile_slots
        elif self.cache.k_offset is not None:
            # a warm-up without metadata: slots are all -1, but the graph may be replayed later
            positions = scratch.current().keep(
                "positions", self.max_num_tokens, torch.int64, self.device
            )
        count = min(key.shape[0], slot_mapping.shape[0])
        self.steps.store(
            self.cache,
            key[:count],
            value[:count],
            slot_mapping,
            self.cache.pages(kv_cache),
            kv_cache.shape[2],
            positions,
            tile_slots,
            single_tokens=metadata is not None and metadata.is_single_tokens,
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TurboKVMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend, writing to ``output`` ``[tokens, num_heads, head_dim]``."""
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("output_scale, output_block_scale: wanted none, got some")
        if attn_metadata is None:  # profiling: nothing is stored yet, but memory is measured
            self.reserve(query.device)
            return output.fill_(0)
        output = output.view(-1, self.num_heads, self.head_size)
        pages, page_size = self.storage().pages(kv_cache), kv_cache.shape[2]
        md = attn_metadata
        md.complete()
        if md.num_decode_tokens:
            rows, tokens = md.num_decodes, slice(0, md.num_decode_tokens)
            is_plain = md.max_decode_len == 1 and md.num_decode_tokens == rows
            # always given for several queries: in a graph rows may come to have fewer
            starts = None if is_plain else md.query_start_loc[: rows + 1]
            table, lens = md.block_table[:rows], md.seq_lens[:rows]
            self._attend_pages(
                query[tokens],
                pages,
                page_size,
                table,
                lens,
                starts,
                md.max_decode_len,
                md,
                output[tokens],
            )
        sees_images = md.mm_prefix_range is not None
        if md.sliced is not None:
            assert not sees_images  # refused when the layer was made
            part = md.sliced
            self._attend_pages(
                query[part.tokens],
                pages,
                page_size,
                part.block_table,
                part.seq_lens,
                part.qo_indptr,
                SLICE_QUERIES,
                md,
                output[part.tokens],
            )
        for group in md.prefill:
            self.prefill.run(
                group,
                query,
                key,
                value,
                pages,
                page_size,
                md.block_table,
                md.tile_slots,
                output,
                sees_images=sees_images,
            )
        return output

    def _attend_pages(
        self,
        query: Tensor,
        pages: Tensor,
        page_size: int,
        block_table: Tensor,
        seq_lens: Tensor,
        qo_indptr: Tensor | None,
        max_q_len: int,
        md: TurboKVMetadata,
        output: Tensor,
    ) -> None:
        """Attend to compressed pages with the fused kernel."""
        self.steps.decode(
            self.storage(),
            query,
            pages,
            page_size,
            block_table,
            seq_lens,
            qo_indptr,
            max_q_len,
            md.tile_slots,
            output,
            scratch.current().kept(self._decode_name),
            sm_scale=self.shape.sm_scale,
            sliding_window=self.shape.sliding_window,
            logits_soft_cap=self.shape.logits_soft_cap,
            sinks=self.attention_sinks.logits,
            single_tokens=md.is_single_tokens,
        )


def _steps(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from turbokv.integrations.vllm.attention import steps_cuda

        return steps_cuda
    from turbokv.integrations.vllm.attention import steps_torch

    return steps_torch
