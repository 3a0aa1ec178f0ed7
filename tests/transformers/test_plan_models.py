# SPDX-License-Identifier: Apache-2.0
"""Plans against the models that Transformers builds: parameters, and what their caches hold."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import CONFIG_MAPPING, AutoModel

from tests.transformers.tiny_models import DECODERS, INSIDE, NEEDED, build, published, shrunk
from turbokv.model_config import ModelConfig, layer_groups
from turbokv.model_families import ENCODER_DECODERS, ENCODERS, FAMILIES, RECURRENT
from turbokv.model_modules import modules
from turbokv.plan import plan


@pytest.mark.parametrize("family", sorted(DECODERS.keys() - INSIDE))
def test_parameters_are_within_a_percent_of_the_model(family: str) -> None:
    config = CONFIG_MAPPING[DECODERS[family]](**NEEDED.get(family, {}))
    model = build(config, "meta")
    count = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    for raw in (config.to_dict(), published(config)):
        found = plan(raw, gpu_memory=10_000).weights
        assert found.source.startswith("estimated")
        assert found.num_params == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize("family", sorted(INSIDE))
def test_decoders_inside_models_that_see_are_counted(family: str) -> None:
    config = CONFIG_MAPPING[DECODERS[family]]()
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    headless = {**config.to_dict(), "tie_word_embeddings": True}
    assert plan(headless, gpu_memory=10_000).weights.num_params == pytest.approx(count, rel=0.01)


def held(cache: Any) -> Counter[tuple[int, int, int]]:
    """Return how many layers of a cache hold keys and values of which sizes."""
    found: Counter[tuple[int, int, int]] = Counter()
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and keys.numel():
            found[keys.shape[1], keys.shape[3], values.shape[3]] += 1
    return found


@pytest.mark.parametrize("family", sorted(DECODERS.keys() - INSIDE))
def test_layers_hold_what_the_model_caches(family: str) -> None:
    config = shrunk(family)
    model = build(config, "cpu")
    ids = torch.arange(24, dtype=torch.int64)[None] + 3
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    groups = layer_groups(ModelConfig(published(config)))
    wanted: Counter[tuple[int, int, int]] = Counter()
    for group in groups:
        if group.kind in ("full", "sliding"):
            wanted[group.num_kv_heads, group.k_dim, group.v_dim] += group.num_layers
    if all(group.kind != "latent" for group in groups):
        assert held(cache) == wanted
    else:  # Transformers caches what is expanded, engines the latent vector
        assert sum(held(cache).values()) == sum(group.num_layers for group in groups)
    if family != "gpt_neo":  # Transformers keeps the tokens that its windows no longer see
        windows = {x.sliding_window for x in cache.layers if getattr(x, "is_sliding", False)}
        assert {group.window for group in groups if group.kind == "sliding"} == windows


RECURRENT_PARTS = {f for f, facts in FAMILIES.items() if facts.linear != "gated_delta"}
RECURRENT_PARTS |= {"olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next"}
OWN_CACHE = {"minimax"}


@pytest.mark.parametrize("family", sorted(RECURRENT_PARTS - OWN_CACHE))
def test_recurrent_states_have_the_model_s_size(family: str) -> None:
    config = shrunk(family)
    if family == "lfm2":
        config.layer_types = ["conv", "full_attention"] * 4
    group = next(g for g in layer_groups(ModelConfig(published(config))) if g.kind == "linear")
    model = build(config, "cpu")
    with torch.no_grad():
        ids = torch.arange(24, dtype=torch.int64)[None] + 3
        cache = model(input_ids=ids, use_cache=True).past_key_values
    held = [x for x in cache.layers if getattr(x, "conv_states", {0: None})[0] is not None]
    assert len(held) == group.num_layers
    conv, state = held[0].conv_states[0], held[0].recurrent_states[0]
    # the newest input of a convolution comes with the next token
    inputs = conv.numel() // conv.shape[-1] * (conv.shape[-1] - 1) * 2
    numbers = 0 if state is None else state.numel()
    assert group.state_bytes in {inputs + numbers * width for width in (2, 4)}


# --- kinds of models that are refused -------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "what"),
    [
        *((name, "an encoder") for name in sorted(ENCODERS)),
        *((name, "an encoder-decoder model") for name in sorted(ENCODER_DECODERS)),
        *((name, "a model without attention") for name in sorted(RECURRENT)),
        ("novel", "which is not"),
    ],
)
def test_other_models_are_refused_by_name(family: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"model_type: wanted a decoder .*, got {family}, {what}"):
        plan({"model_type": family, "hidden_size": 64})


def test_an_encoder_decoder_is_known_by_its_config() -> None:
    with pytest.raises(ValueError, match="got novel, an encoder-decoder model"):
        plan({"model_type": "novel", "is_encoder_decoder": True})


def test_every_causal_model_of_transformers_is_planned_or_refused() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    planned = 0
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if name.removesuffix("_text") in FAMILIES:
            planned += 1
            continue
        with pytest.raises(ValueError, match="model_type: wanted a decoder"):
            plan({"model_type": name, "hidden_size": 64})
    assert planned > 80


def test_ties_are_transformers_own() -> None:
    wrong = []
    for family in sorted(DECODERS.keys() - INSIDE):
        name = DECODERS[family]
        config = CONFIG_MAPPING[name](**NEEDED.get(family, {}))
        if ModelConfig({"model_type": name}).tied != bool(config.tie_word_embeddings):
            wrong.append(family)
    assert wrong == []


def test_modules_name_every_parameter_once() -> None:
    config = CONFIG_MAPPING["qwen3_moe"]()
    names = [module.name for module in modules(ModelConfig(config.to_dict()))]
    assert len(names) == len(set(names))
