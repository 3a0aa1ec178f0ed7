# SPDX-License-Identifier: Apache-2.0
"""Measuring a calibration on tiny random models."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from turbokv.centring import rotary_frequencies
from turbokv.integrations.transformers import TurboKVCache
from turbokv.integrations.transformers.calibrate import (
    PARTS,
    calibrate,
    find_rotary,
)
from turbokv.integrations.transformers.models import fingerprint
from turbokv.integrations.transformers.quality import compare

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**kwargs: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(
        LlamaConfig(**{**SMALL, "head_dim": 32, **kwargs}), dtype=torch.float32
    ).eval()


def test_rotary_of_llama_is_found() -> None:
    model = llama(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    found = find_rotary(model)
    assert sorted(found) == [0, 1] and not found[0].interleaved
    want = rotary_frequencies(32, theta=5000.0)
    torch.testing.assert_close(found[1].inv_freq, want, rtol=1e-6, atol=0)


def test_interleaved_rotary_is_found() -> None:
    torch.manual_seed(0)
    found = find_rotary(
        CohereForCausalLM._from_config(CohereConfig(**SMALL), dtype=torch.float32).eval()
    )
    assert sorted(found) == [0, 1] and found[0].interleaved and found[0].rotary_dim == 16


def test_layers_without_rotary_are_found() -> None:
    torch.manual_seed(0)
    config = SmolLM3Config(**{**SMALL, "num_hidden_layers": 3}, no_rope_layers=[1, 0, 1])
    found = find_rotary(SmolLM3ForCausalLM._from_config(config, dtype=torch.float32).eval())
    assert [found[i].rotary_dim for i in range(3)] == [16, 0, 16]


def test_length_dependent_rotary_is_left_alone() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = llama(rope_parameters=rope, max_position_embeddings=128)
    assert find_rotary(model) == {}
    assert calibrate(model, tokens=128).layers == {}
    with pytest.MonkeyPatch.context() as patch:  # and is not run for nothing
        patch.setattr(type(model.model), "forward", None)
        assert calibrate(model, tokens=128).layers == {}


def test_mean_key_is_the_pre_rotary_mean() -> None:
    model = llama()
    ids = torch.randint(3, 97, (1, 200))
    got = calibrate(model, ids, context=100)
    keys = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda _m, _i, out: keys.append(out[0].view(-1, 2, 32)[4:])
    )
    with torch.inference_mode():
        for piece in torch.split(ids, 100, dim=1):
            model(piece)
    hook.remove()
    offsets = got.layers[0].offsets
    assert offsets is not None
    torch.testing.assert_close(offsets.mu, torch.cat(keys).mean(0), rtol=0, atol=1e-5)


def test_every_part_can_be_measured_and_used_in_a_cache() -> None:
    model = llama()
    parts = tuple(part for part in PARTS if part != "k_map")  # which excludes k_scale
    got = calibrate(model, tokens=1200, context=300, parts=parts, k_bits=4, v_bits=3)
    assert got.source["from"] == "random token ids"
    assert got.fingerprint == fingerprint(model)
    assert model.config._attn_implementation == "sdpa"  # put back after capturing queries
    for layer in got.layers.values():
        parts = [layer.offsets, layer.k_scale, layer.v_scale, layer.v_shift]
        assert all(part is not None for part in (*parts, layer.k_codebook, layer.v_codebook))
    ids = torch.randint(3, 97, (1, 200))
    scores = compare(
        model,
        ids,
        {
            "all": lambda: TurboKVCache(model.config, 4, 3, window=0, sinks=0, calibration=got),
            "none": lambda: TurboKVCache(model.config, 4, 3, window=0, sinks=0),
        },
        chunk=50,
    )
    assert 0 < scores["all"].kl < 2 * scores["none"].kl


def peaked(seed: int = 0) -> LlamaForCausalLM:
    """A model whose heads care for some channels far more than for others, as trained ones do."""
    model = llama(initializer_range=0.3, max_position_embeddings=2048)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            for name, spread in (("q_proj", 1.5), ("k_proj", 1.5)):
                weight = getattr(layer.self_attn, name).weight
                rows = torch.randn(weight.shape[0], 1, generator=generator, dtype=torch.float32)
                rows *= spread
                weight.mul_(rows.exp() / rows.exp().square().mean().sqrt())
    return model


def test_mapped_keys_diverge_less_than_centred_ones() -> None:
    model = peaked()
    ids = torch.randint(3, 97, (2, 2000), generator=torch.Generator().manual_seed(1))
    got = calibrate(model, ids[:1], context=400, parts=("offsets", "k_map"))
    assert all(layer.k_map is not None for layer in got.layers.values())
    assert got.source["parts"] == ["offsets", "k_map"]

    def cache(calibration: object) -> TurboKVCache:
        return TurboKVCache(model.config, 3, 8, calibration=calibration)  # type: ignore[arg-type]

    scores = compare(
        model,
        ids[1:, :600],
        {"mapped": lambda: cache(got), "centred": lambda: cache(got.without("k_map"))},
        chunk=100,
    )
    assert 0 < scores["mapped"].kl < 0.7 * scores["centred"].kl


def test_window_and_sinks_hold_unmapped_keys() -> None:
    """What is kept in 16 bits comes back to the bit, and what was compressed near enough."""
    model = peaked()
    got = calibrate(model, tokens=800, context=400, parts=("offsets", "k_map"))
    cache = TurboKVCache(model.config, 5, 4, window=16, sinks=4, calibration=got)
    k, v = (torch.randn(1, 2, 60, 32, dtype=torch.float32).half().float() for _ in range(2))
    cache.layers[0].update(k, v)
    keys, _ = cache.layers[0].update(k[:, :, :1], v[:, :, :1])
    assert torch.equal(keys[:, :, :4], k[:, :, :4])
    assert torch.equal(keys[:, :, 44:60], k[:, :, 44:])
    error = (keys[:, :, 4:44] - k[:, :, 4:44]).norm() / k[:, :, 4:44].norm()
    assert 0.01 < float(error) < 1
    # in mapped space the error is the codec's
    key_map = got.layers[0].k_map
    assert key_map is not None
    a, b = (key_map.map_keys(x[:, :, 4:44]) for x in (keys, k))
    assert float((a - b).norm() / b.norm()) < 0.06


def test_several_texts_share_the_tokens() -> None:
    model = llama()
    seen: list[tuple[int, ...]] = []
    hook = model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    texts = [torch.randint(3, 97, (1, n)) for n in (500, 90)]
    got = calibrate(model, texts, context=100, tokens=400)
    hook.remove()
    assert got.source["tokens"] == 200 + 90 and got.source["texts"] == 2
    assert seen[1:] == [(1, 100), (1, 100), (1, 90)]  # after the probe of rotary embeddings


def test_only_layers_that_see_everything_are_mapped() -> None:
    """Gemma 3's windows are bounded and stay as they are; its scale of scores is its own."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **{**SMALL, "num_hidden_layers": 4},
        head_dim=32,
        sliding_window=64,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    model = Gemma3ForCausalLM._from_config(config, dtype=torch.float32).eval()
    got = calibrate(model, tokens=400, context=200, parts=("offsets", "k_map"))
    assert sorted(got.layers) == [1, 3]
    assert all(layer.k_map is not None for layer in got.layers.values())


def test_texts_that_end_within_the_window_give_no_map() -> None:
    with pytest.raises(
        ValueError, match=r"ids: wanted texts of more than 132 tokens.*\[0, 1\] saw"
    ):
        calibrate(llama(), torch.full((1, 100), 5), context=300, parts=("offsets", "k_map"))


def test_maps_are_made_for_the_context_asked_for() -> None:
    model = peaked()
    ids = torch.randint(3, 97, (1, 600))
    near, far, own = (
        calibrate(model, ids, context=300, parts=("offsets", "k_map"), longest=longest)
        for longest in (1, 2048, None)
    )
    matrices = [c.layers[0].k_map.matrix for c in (near, far, own)]  # type: ignore[union-attr]
    assert torch.equal(matrices[1], matrices[2])  # 2048 is the model's own
    assert not torch.allclose(matrices[0], matrices[1], atol=1e-2)


def test_spread_is_the_distance_from_the_mean_key() -> None:
    model = llama()
    got = calibrate(model, torch.randint(3, 97, (1, 100)), context=100)
    layer = got.layers[0]
    assert layer.offsets is not None and layer.k_spread is not None
    share = layer.share_left()
    assert share is not None and 0 <= share < 0.5
    assert calibrate(model, tokens=100, parts=("v_shift",)).layers[0].share_left() is None


def test_bad_arguments_are_named() -> None:
    model = llama()
    with pytest.raises(ValueError, match="parts: wanted some of"):
        calibrate(model, parts=("mean",))
    for parts in (("k_map",), ("offsets", "k_map", "k_scale")):
        with pytest.raises(ValueError, match="parts: wanted offsets and no k_scale beside k_map"):
            calibrate(model, parts=parts)
    with pytest.raises(ValueError, match="context: wanted more than 132 tokens for k_map"):
        calibrate(model, parts=("offsets", "k_map"), context=128)
    with pytest.raises(ValueError, match="ids: wanted at least one text, got none"):
        calibrate(model, [])
    with pytest.raises(ValueError, match=r"ids: wanted shape \[1, 64 or more\], got \[1, 10\]"):
        calibrate(model, torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids: wanted shape \[1, more than 64\]"):
        compare(model, torch.zeros(1, 64, dtype=torch.int64), {})
    got = calibrate(model, tokens=200, parts=("k_codebook",), k_bits=3)
    with pytest.raises(ValueError, match="k_bits: wanted 3"):
        TurboKVCache(model.config, 4, calibration=got)
