# SPDX-License-Identifier: Apache-2.0
"""Measure a calibration on a Transformers model, from text or from random token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from turbokv.calibrate_online import LATTICE_BITS, OnlineCalibrator
from turbokv.calibrate_static import SKIP_TOKENS, StaticCalibrator, random_ids, split_text
from turbokv.calibration import Calibration, LayerCalibration
from turbokv.centring import PROBE_TOKENS, KeyOffsets, Rotary, matching_rotary, no_rotary
from turbokv.codec import TurboKVCodec
from turbokv.integrations.transformers.layers import DEFAULT_SINKS, DEFAULT_WINDOW, sees_everything
from turbokv.integrations.transformers.models import fingerprint
from turbokv.key_map import MAX_SHIFTED, KeyMap, KeyMapCalibrator

_CAPTURE = "turbokv_capture"
PARTS = ("offsets", "k_map", "k_scale", "v_scale", "v_shift", "k_codebook", "v_codebook")
_LEAST_TOKENS = 64


def _layers_of(cache: DynamicCache, config: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    for index, layer in enumerate(cache.layers):
        if sees_everything(layer, config) and layer.is_initialized:
            yield index, layer.keys, layer.values


def find_rotary(model: Any) -> dict[int, Rotary]:
    """Find how each full-attention layer embeds positions, by trying.

    A text of one repeated token gives every layer the same key before rotary embedding at every
    position (attention over equal values returns that value), so ``k(p) = R(p) k(0)`` must hold for
    the right rotary. Candidates are the model's own ``inv_freq`` buffers, in both pair orders, and
    no rotary at all.

    Returns
    -------
    dict
        Rotary by layer. Layers where no candidate holds, and multi-dimensional or length-dependent
        rotary embeddings, are absent: their keys are not centred.
    """
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    described = str(parameters)
    if any(word in described for word in ("mrope", "dynamic", "longrope")):
        return {}
    candidates = [no_rotary()]
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            inv_freq = buffer.detach().to("cpu", torch.float64)
            candidates += [Rotary(inv_freq), Rotary(inv_freq, interleaved=True)]
    token = min(1000, config.vocab_size - 1)
    ids = torch.full((1, PROBE_TOKENS), token, dtype=torch.int64, device=model.device)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        _body(model)(input_ids=ids, past_key_values=cache, use_cache=True)
    found: dict[int, Rotary] = {}
    for index, keys, _ in _layers_of(cache, model.config):
        rotary = matching_rotary(keys[0], candidates)
        if rotary is not None:
            found[index] = rotary
    return found


# Called with the layer's index, its query, key and value as attention gets them, and its options.
_Observer = Callable[[int, Tensor, Tensor, Tensor, dict[str, Any]], None]


@contextmanager
def _observed(model: Any, observer: _Observer) -> Iterator[None]:
    """Have ``observer`` called before every attention of the model."""
    previous = model.config._attn_implementation
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def capture(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        observer(module.layer_idx, query.detach(), key.detach(), value.detach(), kwargs)
        return inner(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(_CAPTURE, capture)
    AttentionMaskInterface.register(_CAPTURE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(_CAPTURE)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def random_tokens(model: Any, count: int, seed: int = 0) -> Tensor:
    """Return random token ids ``[1, count]``: the data-free calibration text."""
    text = model.config.get_text_config(decoder=True)
    return random_ids(text, count, seed).to(model.device)


def check_parts(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``parts`` if :func:`calibrate` can measure them all, else raise ValueError."""
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts: wanted some of {PARTS}, got {parts}")
    if "k_map" in parts and ("offsets" not in parts or "k_scale" in parts):
        raise ValueError(f"parts: wanted offsets and no k_scale beside k_map, got {parts}")
    return parts


def _body(model: Any) -> Any:
    """Return the model without its head: logits of a text would take more memory than the rest."""
    return getattr(model, "base_model", model)


@torch.inference_mode()
def calibrate(
    model: Any,
    ids: Tensor | Sequence[Tensor] | None = None,
    *,
    parts: tuple[str, ...] = ("offsets",),
    k_bits: int = 4,
    v_bits: int | None = None,
    context: int = 1024,
    tokens: int = 8192,
    bos: int | None = None,
    longest: int | None = None,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure a calibration.

    Parameters
    ----------
    model
        A Transformers causal language model.
    ids
        int64 ``[1, tokens]`` of a text, or several such; None takes random token ids.
    parts
        What to measure: ``offsets`` (centred keys), ``k_map`` (mapped keys, needs ``offsets``),
        ``k_scale``, ``v_scale``, ``v_shift``, ``k_codebook``, ``v_codebook``. Only the first two
        are known to help; ``turbokv eval`` judges.
    k_bits, v_bits
        Widths that codebooks are made for.
    context
        Tokens per forward pass; positions start at 0 in each.
    tokens
        Most tokens to read, of several texts an equal share of each.
    bos
        Put before every piece of ``context`` tokens: what the model's tokenizer begins a text with
        (:func:`turbokv.integrations.transformers.models.leading_token`), if it does.
    longest
        Context in tokens that ``k_map`` is made for; default the model's longest, and at most
        32768 (:func:`turbokv.key_map.shifted_mean`).
    name
        The model's name, for messages.
    progress
        Called with tokens done and tokens in all.

    Raises
    ------
    ValueError
        For unknown parts, a text shorter than 64 tokens, or for ``k_map`` a ``context`` that fits
        into the window and sinks which caches keep in 16 bits.
    """
    check_parts(parts)
    if "k_map" in parts and context <= DEFAULT_WINDOW + DEFAULT_SINKS:
        raise ValueError(
            f"context: wanted more than {DEFAULT_WINDOW + DEFAULT_SINKS} tokens for k_map, as fewer"
            f" are not compressed, got {context}"
        )
    source = "random token ids" if ids is None else "text"
    texts = _texts(random_tokens(model, tokens) if ids is None else ids, tokens, model.device)
    v_bits = k_bits if v_bits is None else v_bits
    rotaries = find_rotary(model) if "offsets" in parts else {}
    statics = StaticCalibrator()
    pieces = [piece for text in texts for piece in split_text(text, context, bos)]
    if not rotaries and not set(parts) - {"offsets", "k_map"}:
        pieces = []  # nothing to measure where no layer's rotary embedding is known
    for number, piece in enumerate(pieces):
        for index, k, v, q in _forward(model, piece, with_queries="k_scale" in parts):
            named = {"k": k, "v": v}
            if q is not None:
                named["q"] = q
            if index in rotaries:
                positions = torch.arange(
                    SKIP_TOKENS, SKIP_TOKENS + k.shape[1], dtype=torch.int64, device="cpu"
                )
                named["k_pre"] = rotaries[index].rotate(k.float(), positions, inverse=True)
            statics.update(index, **named)
        if progress is not None:
            progress((number + 1) * context, len(pieces) * context)
    layers: dict[int, LayerCalibration] = {}
    for index in statics.layers():
        offsets = None
        if index in rotaries:
            offsets = KeyOffsets(statics.k_mean(index), rotaries[index])
        layers[index] = LayerCalibration(
            offsets=offsets,
            k_spread=None if offsets is None else statics.k_spread(index),
            k_scale=statics.k_scale(index) if "k_scale" in parts else None,
            v_scale=statics.v_scale(index) if "v_scale" in parts else None,
            v_shift=statics.v_shift(index) if "v_shift" in parts else None,
        )
    if "k_map" in parts:
        layers = _with_maps(model, pieces, layers, rotaries, longest)
    if {"k_codebook", "v_codebook"} & set(parts):
        layers = _with_codebooks(model, pieces, layers, parts, k_bits, v_bits)
    return Calibration(
        fingerprint(model, name),
        layers,
        {
            "tokens": sum(text.shape[1] for text in texts),
            "texts": len(texts),
            "from": source,
            "context": context,
            "parts": list(parts),
        },
    )


def _texts(ids: Tensor | Sequence[Tensor], tokens: int, device: torch.device) -> list[Tensor]:
    """Return the texts to read, each its share of ``tokens``, on ``device``."""
    texts = [ids] if isinstance(ids, Tensor) else list(ids)
    if not texts:
        raise ValueError("ids: wanted at least one text, got none")
    for text in texts:
        if text.ndim != 2 or text.shape[0] != 1 or text.shape[1] < _LEAST_TOKENS:
            raise ValueError(
                f"ids: wanted shape [1, {_LEAST_TOKENS} or more], got {list(text.shape)}"
            )
    share = max(tokens // len(texts), _LEAST_TOKENS)
    return [text[:, :share].to(device) for text in texts]


def _forward(
    model: Any, piece: Tensor, *, with_queries: bool = False
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """Run one text; yield each layer's K, V and grouped Q, ``[heads, tokens, dim]``, sans sinks."""
    cache = DynamicCache(config=model.config)
    queries: dict[int, Tensor] = {}

    def keep(index: int, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
        queries[index] = q

    if with_queries:
        with _observed(model, keep):
            _body(model)(input_ids=piece, past_key_values=cache, use_cache=True)
    else:
        _body(model)(input_ids=piece, past_key_values=cache, use_cache=True)
    for index, keys, values in _layers_of(cache, model.config):
        k, v = keys[0, :, SKIP_TOKENS:], values[0, :, SKIP_TOKENS:]
        q = None
        if with_queries:
            raw = queries[index][0, :, SKIP_TOKENS:]
            q = raw.reshape(k.shape[0], -1, raw.shape[-1])
        yield index, k, v, q


def _with_maps(
    model: Any,
    pieces: list[Tensor],
    layers: dict[int, LayerCalibration],
    rotaries: dict[int, Rotary],
    longest: int | None,
) -> dict[int, LayerCalibration]:
    """Measure maps of centred keys, of layers that compress and whose rotary embedding is known."""
    found = KeyMapCalibrator(DEFAULT_WINDOW, DEFAULT_SINKS)
    maps: dict[int, KeyMap] = {}
    if longest is None:
        text = model.config.get_text_config(decoder=True)
        longest = min(getattr(text, "max_position_embeddings", MAX_SHIFTED), MAX_SHIFTED)

    def observe(index: int, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
        layer = layers.get(index)
        if layer is None or layer.offsets is None:
            return
        offset = layer.offsets.to(k.device).at(0, k.shape[2])
        settings: dict[str, Any] = {
            "sm_scale": options.get("scaling") or k.shape[-1] ** -0.5,
            "logits_soft_cap": options.get("softcap") or 0.0,
            "sinks": options.get("s_aux"),
        }
        if maps:
            judged = (index, maps[index], rotaries[index], longest)
            found.judge(*judged, q[0], k[0], v[0], offset, **settings)
        else:
            found.update(index, q[0], k[0], v[0], offset, **settings)

    def run() -> None:
        with _observed(model, observe):
            for piece in pieces:
                _body(model)(input_ids=piece, use_cache=False)

    run()
    missing = [i for i, kept in layers.items() if kept.offsets and i not in found.layers()]
    if missing:
        raise ValueError(
            f"ids: wanted texts of more than {DEFAULT_WINDOW + DEFAULT_SINKS} tokens for k_map, and"
            " a model whose attention goes through Transformers' interface, but layers"
            f" {missing} saw nothing that counts"
        )
    for index, layer in layers.items():
        if layer.offsets:
            maps[index] = found.key_map(index, rotaries[index], longest)
    run()  # again: a map is judged by the pairs that it was made from
    return {
        index: replace(layer, k_map=found.accepted(index, maps[index])) if layer.offsets else layer
        for index, layer in layers.items()
    }


def _with_codebooks(
    model: Any,
    pieces: list[Tensor],
    layers: dict[int, LayerCalibration],
    parts: tuple[str, ...],
    k_bits: int,
    v_bits: int,
) -> dict[int, LayerCalibration]:
    """Fit codebooks to what is left after the other parts have been applied."""
    calibrators: dict[int, OnlineCalibrator] = {}
    for piece in pieces:
        for index, k, v, _ in _forward(model, piece):
            layer = layers[index] = layers[index].to(k.device)
            if index not in calibrators:
                codec = TurboKVCodec(k.shape[-1], k_bits, v_bits, device=k.device)
                calibrators[index] = OnlineCalibrator(codec)
            k, v = layer.fold_k(k.float()), layer.fold_v(v.float())
            if layer.offsets is not None:
                k = k - layer.scale_offset(layer.offsets.at(SKIP_TOKENS, k.shape[1]))
            calibrators[index].collect(index, k, v)
    for index, calibrator in calibrators.items():
        books: dict[str, Any] = {}
        if "k_codebook" in parts and k_bits in LATTICE_BITS:
            books["k_codebook"] = calibrator.codebook(index, "k")
        if "v_codebook" in parts and v_bits in LATTICE_BITS:
            books["v_codebook"] = calibrator.codebook(index, "v")
        layers[index] = replace(layers[index], **books)
    return layers
