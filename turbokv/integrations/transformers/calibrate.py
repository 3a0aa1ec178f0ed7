# SPDX-License-Identifier: Apache-2.0
"""Measure a calibration on a Transformers model, from text or from random token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from turbokv.integrations.transformers.layers import sees_everything
from turbokv.integrations.transformers.models import fingerprint

_CAPTURE = "turbokv_capture_queries"
PARTS = ("offsets", "k_scale", "v_scale", "v_shift", "k_codebook", "v_codebook")


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


@contextmanager
def _captured_queries(model: Any) -> Iterator[list[Tensor]]:
    """Collect the query of every attention call, ``[batch, num_qo_heads, tokens, head_dim]``."""
    queries: list[Tensor] = []
    previous = model.config._attn_implementation
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def capture(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        queries.append(query.detach())
        return inner(module, query, *args, **kwargs)

    AttentionInterface.register(_CAPTURE, capture)
    AttentionMaskInterface.register(_CAPTURE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(_CAPTURE)
    try:
        yield queries
    finally:
        model.set_attn_implementation(previous)


def random_tokens(model: Any, count: int, seed: int = 0) -> Tensor:
    """Return random token ids ``[1, count]``: the data-free calibration text."""
    text = model.config.get_text_config(decoder=True)
    return random_ids(text, count, seed).to(model.device)


def check_parts(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``parts`` if :func:`calibrate` knows them all, else raise ValueError."""
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts: wanted some of {PARTS}, got {parts}")
    return parts


def _body(model: Any) -> Any:
    """Return the model without its head: logits of a text would take more memory than the rest."""
    return getattr(model, "base_model", model)


@torch.inference_mode()
def calibrate(
    model: Any,
    ids: Tensor | None = None,
    *,
    parts: tuple[str, ...] = ("offsets",),
    k_bits: int = 4,
    v_bits: int | None = None,
    context: int = 1024,
    tokens: int = 8192,
    bos: int | None = None,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure a calibration.

    Parameters
    ----------
    model
        A Transformers causal language model.
    ids
        int64 ``[1, tokens]`` of text; None takes random token ids.
    parts
        What to measure: ``offsets`` (centred keys), ``k_scale``, ``v_scale``, ``v_shift``,
        ``k_codebook``, ``v_codebook``. Only ``offsets`` is known to help; ``turbokv eval`` judges.
    k_bits, v_bits
        Widths that codebooks are made for.
    context
        Tokens per forward pass; positions start at 0 in each.
    tokens
        Most tokens to read.
    bos
        Put before every piece of ``context`` tokens: what the model's tokenizer begins a text with
        (:func:`turbokv.integrations.transformers.models.leading_token`), if it does.
    name
        The model's name, for messages.
    progress
        Called with tokens done and tokens in all.

    Raises
    ------
    ValueError
        For unknown parts, or a text shorter than 64 tokens.
    """
    check_parts(parts)
    source = "random token ids" if ids is None else "text"
    if ids is None:
        ids = random_tokens(model, tokens)
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 64:
        raise ValueError(f"ids: wanted shape [1, 64 or more], got {list(ids.shape)}")
    ids = ids[:, :tokens].to(model.device)
    v_bits = k_bits if v_bits is None else v_bits
    rotaries = find_rotary(model) if "offsets" in parts else {}
    statics = StaticCalibrator()
    pieces = split_text(ids, context, bos)
    if not rotaries and set(parts) == {"offsets"}:
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
    if {"k_codebook", "v_codebook"} & set(parts):
        layers = _with_codebooks(model, pieces, layers, parts, k_bits, v_bits)
    return Calibration(
        fingerprint(model, name),
        layers,
        {"tokens": int(ids.shape[1]), "from": source, "context": context, "parts": list(parts)},
    )


def _forward(
    model: Any, piece: Tensor, *, with_queries: bool = False
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """Run one text; yield each layer's K, V and grouped Q, ``[heads, tokens, dim]``, sans sinks."""
    cache = DynamicCache(config=model.config)
    queries: list[Tensor] = []
    if with_queries:
        with _captured_queries(model) as queries:
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
