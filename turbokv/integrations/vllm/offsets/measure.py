# SPDX-License-Identifier: Apache-2.0
"""Mean keys of the model that vLLM has loaded, from random token ids, before any page exists.

The model runs without compilation and without attention metadata; for as long as it does, each of
our layers' ``forward`` is a function of this module, which sees keys as they would be stored. Every
rank runs the same tokens and keeps the means of its own heads.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbokv.calibrate_static import (
    AUTO_CONTEXT,
    AUTO_TOKENS,
    SKIP_TOKENS,
    StaticCalibrator,
    config_bos,
    random_ids,
    split_text,
)
from turbokv.centring import PROBE_TOKENS, Rotary, matching_rotary, no_rotary
from turbokv.integrations.vllm import compat
from turbokv.integrations.vllm.offsets import rotary

# Called as (query, key, value), each [tokens, heads, head_dim]; returns what attention gives.
Observer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Measured:
    """What one layer's keys share.

    Attributes
    ----------
    rotary
        The layer's embedding, which was seen to hold.
    mean
        fp32 ``[heads, head_dim]``, before rotary embedding.
    spread
        fp32 ``[heads]``: mean squared distance from ``mean``.
    """

    rotary: Rotary
    mean: Tensor
    spread: Tensor


def why_not(model: Any, vllm_config: Any, impls: Mapping[str, Any]) -> str | None:
    """Return why ``model`` cannot be run by itself, or None if it can."""
    parallel, model_config = vllm_config.parallel_config, vllm_config.model_config
    if parallel.pipeline_parallel_size > 1:
        return "stages of a pipeline have only a part of the model"
    if parallel.data_parallel_size > 1:
        return "data-parallel ranks run in step with each other"
    if vllm_config.lora_config is not None:
        return "LoRA layers need an adapter for every token"
    if getattr(model_config, "uses_mrope", False):
        return "positions have several dimensions"
    others = [name for name in compat.cached_layers(model, vllm_config) if name not in impls]
    if others:
        return f"{others[0]} keeps its state in another way"
    return None


def run(model: Any, vllm_config: Any, impls: Mapping[str, Any]) -> dict[str, Measured]:
    """Run the model and return what the keys of its layers share.

    Parameters
    ----------
    model
        vLLM's, with its weights.
    vllm_config
        The engine's.
    impls
        Our implementations by the names of their layers.

    Returns
    -------
    dict
        By layer. Layers that share another's cache, that the model does not call, or whose rotary
        embedding is none of the model's tables are absent.
    """
    text = vllm_config.model_config.hf_text_config
    limit = min(
        AUTO_CONTEXT,
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.model_config.max_model_len,
    )
    rotaries = _probe(model, vllm_config, impls, min(limit, PROBE_TOKENS))
    statics = StaticCalibrator()
    indices = {name: index for index, name in enumerate(rotaries)}
    ids = random_ids(text, AUTO_TOKENS)
    fresh: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        impl = impls[name]
        target = impl.kv_sharing_target_layer_name
        if target is not None:
            key, value = fresh[target]
        else:
            fresh[name] = key, value
        if name in indices:
            keys = key[SKIP_TOKENS:].transpose(0, 1).float()
            places = torch.arange(SKIP_TOKENS, key.shape[0], dtype=torch.int64, device="cpu")
            turned = rotaries[name].rotate(keys, places, inverse=True)
            statics.update(indices[name], k_pre=turned)
        return _attention(query, key, value, impl)

    for piece in split_text(ids, limit, config_bos(text)):
        fresh.clear()
        _forward(model, vllm_config, impls, piece[0], watch)
    found: dict[str, Measured] = {}
    for name, index in indices.items():
        found[name] = Measured(rotaries[name], statics.k_mean(index), statics.k_spread(index))
    return found


def _probe(model: Any, vllm_config: Any, impls: Mapping[str, Any], count: int) -> dict[str, Rotary]:
    """Find how each layer embeds positions, by one token at all of them.

    Attention is left out (each token answers with its own value), so that all tokens stay the same
    but for their positions.
    """
    candidates = [no_rotary()]
    for plain in rotary.of_model(model):
        candidates += [plain, Rotary(plain.inv_freq, not plain.interleaved)]
    token = min(1000, vllm_config.model_config.hf_text_config.vocab_size - 1)
    found: dict[str, Rotary] = {}
    fresh: dict[str, Tensor] = {}

    def watch(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        target = impls[name].kv_sharing_target_layer_name
        if target is not None:  # has no keys and values of its own
            value = fresh[target]
        else:
            fresh[name] = value
            match = matching_rotary(key.transpose(0, 1), candidates)
            if match is not None:
                found[name] = match
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    ids = torch.full((count,), token, dtype=torch.int64, device="cpu")
    _forward(model, vllm_config, impls, ids, watch)
    return found


def _forward(
    model: Any,
    vllm_config: Any,
    impls: Mapping[str, Any],
    ids: Tensor,
    watch: Callable[[str, Tensor, Tensor, Tensor], Tensor],
) -> None:
    """Run ``ids`` ``[tokens]`` at positions 0, 1, ... with ``watch`` in the place of attention."""
    device = compat.device()
    positions = torch.arange(ids.shape[0], dtype=torch.int64, device=device)
    with _watched(impls, watch), compat.plain_forward(vllm_config, ids.shape[0]):
        # vLLM's runners hold ids in 32 bits
        model(
            input_ids=ids.to(device=device, dtype=torch.int32),
            positions=positions,
            intermediate_tensors=None,
            inputs_embeds=None,
        )


@contextlib.contextmanager
def _watched(
    impls: Mapping[str, Any], watch: Callable[[str, Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Let ``watch`` answer for the layers for a while."""

    def forward(
        observer: Observer,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        output.copy_(observer(query, key, value).reshape(output.shape))
        return output

    for name, impl in impls.items():
        impl.forward = functools.partial(forward, functools.partial(watch, name))
    try:
        yield
    finally:
        for impl in impls.values():
            del impl.forward


def _attention(query: Tensor, key: Tensor, value: Tensor, impl: Any) -> Tensor:
    """Attend causally within one text, in fp32: ``[tokens, num_heads, head_dim]``."""
    shape = impl.shape
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.float().transpose(0, 1) for x in (query, key, value))
    scores = (q @ k.repeat_interleave(group, 0).transpose(1, 2)) * shape.sm_scale
    if shape.logits_soft_cap > 0:
        scores = shape.logits_soft_cap * torch.tanh(scores / shape.logits_soft_cap)
    at = torch.arange(query.shape[0], dtype=torch.int64, device=query.device)
    behind = at[:, None] - at
    hidden = behind < 0
    if shape.sliding_window is not None:
        hidden |= behind >= shape.sliding_window
    scores.masked_fill_(hidden, -math.inf)
    if impl.sinks is not None:
        sinks = impl.sinks.detach().float()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[0]]
    return torch.matmul(weights, v.repeat_interleave(group, 0)).transpose(0, 1)
