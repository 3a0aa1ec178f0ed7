# SPDX-License-Identifier: Apache-2.0
"""Sizes of pages in models whose layers differ, so that vLLM's one pool of blocks wastes little.

- Two head sizes (Gemma 4): the bytes of a token are rounded up to where pages divide
  (:func:`choose_slots`); else vLLM pads the smaller page to the larger.
- Attention beside linear layers: vLLM makes an attention page as large as a layer's state, which
  takes thousands of compressed tokens, and prefixes are found in steps of a page.
  :func:`align_hybrid` lets a block hold several states beside each other where this vLLM packs
  pages of different sizes, so that a step is at most twice that of a 16-bit cache.

Both run in the worker, when layers are made and before vLLM asks for their specs.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from turbokv.engine_pages import plain_hybrid_block
from turbokv.integrations.vllm import compat, dtypes
from turbokv.page_sizes import TokenBytes, divisible_head_bytes, hybrid_block_size

logger = logging.getLogger("vllm.turbokv")

# By cache dtype, KV heads of this rank and head size; only what is rounded up.
_slots: dict[tuple[str, int, int], int] = {}
_packs: list[bool] = []


def slot_bytes(cache_dtype: str, num_kv_heads: int, head_dim: int) -> int:
    """Return the bytes of a token and head in a page of this engine, padding included."""
    plain = dtypes.slot_bytes(cache_dtype, head_dim)
    return _slots.get((cache_dtype, num_kv_heads, head_dim), plain)


def packs_blocks() -> bool:
    """Whether blocks of this engine hold pages of different sizes beside each other."""
    return bool(_packs)


def _attention_layers(vllm_config: Any) -> list[Any]:
    """Return the layers that have pages of their own."""
    context = vllm_config.compilation_config.static_forward_context
    return [
        layer
        for layer in context.values()
        if hasattr(layer, "kv_cache_dtype")
        and hasattr(layer, "head_size")
        and getattr(layer, "kv_sharing_target_layer_name", None) is None
    ]


def choose_slots(vllm_config: Any) -> None:
    """Round the bytes of a token up to where pages of all layers divide."""
    _slots.clear()
    _packs.clear()
    dtype = vllm_config.cache_config.cache_dtype
    if dtype not in dtypes.CACHE_DTYPES:
        return
    counts: dict[tuple[int, int], int] = {}
    for layer in _attention_layers(vllm_config):
        if layer.kv_cache_dtype == dtype:
            shape = (int(layer.num_kv_heads), int(layer.head_size))
            counts[shape] = counts.get(shape, 0) + 1
    if vllm_config.cache_config.kv_cache_dtype_skip_layers:
        # layers in 16 bits are padded to a multiple of what the model's largest layer would take
        model = vllm_config.model_config
        heads = int(model.get_num_kv_heads(vllm_config.parallel_config))
        counts.setdefault((heads, int(model.get_head_size())), 1)
    if len(counts) < 2:
        return
    kinds = [
        TokenBytes(heads, dtypes.slot_bytes(dtype, dim), count)
        for (heads, dim), count in counts.items()
    ]
    for (heads, dim), kind, size in zip(counts, kinds, divisible_head_bytes(kinds), strict=True):
        if size != kind.head_bytes:
            _slots[dtype, heads, dim] = size
            logger.info(
                "TurboKV: tokens of layers with %d heads of %d take %d bytes per head, not"
                " %d, so that pages divide.",
                heads,
                dim,
                size,
                kind.head_bytes,
            )


# --- attention beside linear layers ---------------------------------------------------------------


def align_hybrid(vllm_config: Any) -> bool:
    """Choose the block size of a hybrid model; returns whether vLLM's own way is not needed.

    False where a block cannot hold pages of different sizes: another layout is asked for, or
    attention layers differ among themselves.
    """
    cache = vllm_config.cache_config
    layers = _attention_layers(vllm_config)
    shapes = {(layer.num_kv_heads, layer.head_size, layer.kv_cache_dtype) for layer in layers}
    plain = all(
        getattr(layer, "sliding_window", None) is None
        and getattr(layer, "attention_chunk_size", None) is None
        for layer in layers
    )
    state_bytes = _state_bytes(vllm_config)
    if (
        len(shapes) != 1
        or not plain
        or not state_bytes
        or vllm_config.kv_transfer_config is not None  # has a layout of its own
        or not compat.packs_states()
    ):
        return False
    heads, dim, dtype = shapes.pop()
    aligned = cache.mamba_cache_mode == "align"
    step = math.lcm(cache.block_size, _checkpoint_alignment(vllm_config) if aligned else 1)
    limit = 2 * plain_hybrid_block(state_bytes, 4 * heads * dim)
    if aligned:  # vLLM computes a block in one step
        limit = min(limit, int(vllm_config.scheduler_config.max_num_batched_tokens))
    token_bytes = len(layers) * heads * slot_bytes(dtype, heads, dim)
    cache.block_size = hybrid_block_size(
        token_bytes, state_bytes, _num_states(vllm_config), limit, step
    )
    if aligned:
        cache.mamba_block_size = cache.block_size
    _packs.append(True)
    return True


def say_step(vllm_config: Any) -> None:
    """Say in which steps prefixes of a hybrid model are found."""
    cache = vllm_config.cache_config
    layers = _attention_layers(vllm_config)
    if not cache.enable_prefix_caching or not layers:
        return
    plain = plain_hybrid_block(
        _state_bytes(vllm_config), 4 * layers[0].num_kv_heads * layers[0].head_size
    )
    logger.info(
        "TurboKV: prefixes are found in steps of %d tokens, the size of a block that a linear"
        " layer's state fits in (%d with a 16-bit cache).",
        cache.block_size,
        plain,
    )


def _state_bytes(vllm_config: Any) -> int:
    """Return the bytes of a linear layer's state, as vLLM computes them."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.kv_cache_interface import MambaSpec

    model = vllm_config.model_config
    cls, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    if hasattr(cls, "get_mamba_specs_from_config"):  # states of several sizes
        return 0
    spec = MambaSpec(
        shapes=cls.get_mamba_state_shape_from_config(vllm_config),
        dtypes=cls.get_mamba_state_dtype_from_config(vllm_config),
        block_size=-1,
    )
    return int(spec.page_size_bytes)


def _num_states(vllm_config: Any) -> int:
    """Return how many linear layers there are, from the layers or, before any, from the model."""
    context = vllm_config.compilation_config.static_forward_context
    made = sum(hasattr(layer, "get_state_shape") for layer in context.values())
    if made:
        return made
    kinds = getattr(vllm_config.model_config.hf_text_config, "layer_types", None) or ()
    return max(1, sum("full" not in kind for kind in kinds))


def _checkpoint_alignment(vllm_config: Any) -> int:
    """Return what vLLM 0.33 wants blocks to be multiples of for states saved in a prefill."""
    from vllm.model_executor.layers.mamba import abstract

    get = getattr(abstract, "get_mamba_prefill_checkpoint_alignment", None)
    return 1 if get is None else int(get(vllm_config) or 1)
