# SPDX-License-Identifier: Apache-2.0
"""TurboKVCache against Transformers' own DynamicCache, on tiny random models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer  # noqa: E402

from turbokv import TurboKVCodec  # noqa: E402
from turbokv.calibration import Calibration, Fingerprint, LayerCalibration  # noqa: E402
from turbokv.centring import KeyOffsets, Rotary, rotary_frequencies  # noqa: E402
from turbokv.integrations.transformers import TurboKVCache  # noqa: E402
from turbokv.integrations.transformers.cache import cache_nbytes  # noqa: E402
from turbokv.integrations.transformers.layers import Options, TurboKVLayer  # noqa: E402

HEADS, DIM = 2, 64


def llama(layers: int = 2, **kwargs: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=HEADS * 2 * 32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=512,
        eos_token_id=96,
        pad_token_id=0,
        bos_token_id=1,
        initializer_range=0.4,
        **kwargs,
    )
    return LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()


def layer(window: int = 8, sinks: int = 2, bits: int = 4, **kwargs: object) -> TurboKVLayer:
    return TurboKVLayer(Options(bits, bits, window, sinks, {}), **kwargs)


def tokens(count: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, count, DIM)
    return torch.randn(shape, generator=generator, dtype=torch.float32), torch.randn(
        shape, generator=generator, dtype=torch.float32
    )


# --- one layer ------------------------------------------------------------------------------------


def test_new_tokens_come_back_untouched_and_old_ones_quantised() -> None:
    k, v = tokens(40)
    cache = layer(window=8, sinks=0)
    cache.update(k[:, :, :30], v[:, :, :30])
    keys, values = cache.update(k[:, :, 30:], v[:, :, 30:])
    codec = TurboKVCodec(DIM, 4)
    want_k = codec.decompress_k(*codec.compress_k(k[:, :, :22]))
    want_v = codec.decompress_v(*codec.compress_v(v[:, :, :22]))
    torch.testing.assert_close(keys[:, :, :22], want_k)
    torch.testing.assert_close(values[:, :, :22], want_v)
    # the window holds fp16, the new tokens are what came in
    torch.testing.assert_close(keys[:, :, 22:30], k[:, :, 22:30].half().float(), rtol=0, atol=0)
    assert torch.equal(keys[:, :, 30:], k[:, :, 30:])
    assert torch.equal(values[:, :, 30:], v[:, :, 30:])


@pytest.mark.parametrize("step", [1, 3, 8, 40])
def test_chunking_of_updates_does_not_change_what_is_held(step: int) -> None:
    k, v = tokens(40)
    k, v = k.half(), v.half()
    cache, whole = layer(), layer()
    for start in range(0, 40, step):
        cache.update(k[:, :, start : start + step], v[:, :, start : start + step])
    whole.update(k, v)
    for name, tensor in whole._tensors().items():
        assert torch.equal(tensor, cache._tensors()[name]), name


def test_sinks_are_read_from_their_16_bit_copy() -> None:
    k, v = tokens(40)
    cache = layer(window=8, sinks=4)
    cache.update(k, v)
    keys, values = cache.update(*tokens(1, seed=1))
    assert torch.equal(keys[:, :, :4], k[:, :, :4].half().float())
    assert torch.equal(values[:, :, :4], v[:, :, :4].half().float())
    assert not torch.equal(keys[:, :, 4], k[:, :, 4].half().float())


def test_sinks_follow_left_padding() -> None:
    k, v = tokens(40, batch=2)
    cache = layer(window=8, sinks=3, left_padding=torch.tensor([0, 5]))
    for start in range(0, 40, 4):
        keys, _ = cache.update(k[:, :, start : start + 4], v[:, :, start : start + 4])
    keys, _ = cache.update(*tokens(1, batch=2, seed=1))
    exact = (keys[:, :, :40] == k.half().float()).all(-1).all(1)
    assert exact[0, :32].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert exact[1, :32].nonzero()[:, 0].tolist() == [5, 6, 7]


def test_window_zero_compresses_everything_after_use() -> None:
    cache = layer(window=0, sinks=0)
    k, v = tokens(10)
    keys, _ = cache.update(k, v)
    assert torch.equal(keys, k)
    assert cache._k_recent.shape[2] == 0 and cache._k_packed.shape[2] == 10


def test_held_bytes_are_codes_scales_window_and_sinks_only() -> None:
    cache = layer(window=8, sinks=2)
    for start in range(0, 300, 50):
        cache.update(*tokens(50, seed=start))
    compressed = HEADS * 292 * 2 * (DIM // 2 + 2)
    recent, sinks = HEADS * 8 * 2 * DIM * 2, HEADS * 2 * 2 * DIM * 2
    assert cache.nbytes() == compressed + recent + sinks


def test_crop_keeps_the_prefix_and_the_cache_goes_on() -> None:
    k, v = tokens(60)
    cache = layer(window=8, sinks=2)
    cache.update(k[:, :, :40], v[:, :, :40])
    cache.crop(-3)  # inside the window
    assert cache.get_seq_length() == 37
    cache.crop(20)  # deep: compressed tokens stay compressed
    assert cache.get_seq_length() == 20
    keys, _ = cache.update(k[:, :, 20:60], v[:, :, 20:60])
    assert keys.shape[2] == 60 and torch.equal(keys[:, :, 20:], k[:, :, 20:])
    error = (keys[:, :, :20] - k[:, :, :20]).square().mean()
    assert float(error) < 0.012
    cache.crop(0)
    assert cache.get_seq_length() == 60


def test_crop_to_nothing_and_refill() -> None:
    k, v = tokens(20)
    cache = layer(window=4, sinks=2)
    cache.update(k, v)
    cache.crop(-20)
    assert cache.get_seq_length() == 0
    new_k, new_v = tokens(20, seed=9)
    cache.update(new_k, new_v)
    keys, _ = cache.update(*tokens(1, seed=1))
    # sinks are those of the new text
    assert torch.equal(keys[:, :, :2], new_k[:, :, :2].half().float())


def test_batch_operations_move_whole_sequences() -> None:
    k, v = tokens(30, batch=3)
    cache = layer(window=8, sinks=2, left_padding=torch.tensor([0, 2, 4]))
    cache.update(k, v)
    before, _ = cache._past()
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    after, _ = cache._past()
    assert torch.equal(after, before[[2, 2, 0]]) and cache._padding == [4, 4, 0]
    cache.batch_repeat_interleave(2)
    assert cache._padding == [4, 4, 4, 4, 0, 0]
    cache.batch_select_indices(torch.tensor([False, True, False, False, False, True]))
    final, _ = cache._past()
    assert torch.equal(final, before[[2, 0]])


def test_reset_forgets() -> None:
    cache = layer()
    cache.update(*tokens(30))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0
    k, v = tokens(5, batch=2)
    assert torch.equal(cache.update(k, v)[0], k)


def test_fp32_outliers_saturate_in_the_window() -> None:
    k, v = tokens(4)
    k[0, 0, 1, 0] = 1e6
    cache = layer()
    cache.update(k, v)
    keys, _ = cache.update(*tokens(1))
    assert float(keys[0, 0, 1, 0]) == torch.finfo(torch.float16).max
    assert bool(torch.isfinite(keys).all())


def test_bfloat16_model_keeps_its_dtype() -> None:
    k, v = (x.bfloat16() for x in tokens(30))
    cache = layer()
    cache.update(k, v)
    keys, values = cache.update(*(x.bfloat16() for x in tokens(1)))
    assert keys.dtype == values.dtype == torch.bfloat16
    assert torch.equal(keys[:, :, 22:30], k[:, :, 22:30])


# --- calibration ----------------------------------------------------------------------------------


def calibrated(**parts: object) -> Calibration:
    fingerprint = Fingerprint("x", (0.0,))
    return Calibration(fingerprint, {0: LayerCalibration(**parts), 1: LayerCalibration(**parts)})


def offsets() -> KeyOffsets:
    mu = (
        torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float32) * 4
    )
    return KeyOffsets(mu, Rotary(rotary_frequencies(DIM)))


def test_centred_keys_lose_less() -> None:
    centre = offsets()
    k, v = tokens(600)
    k = k + centre.rotary.rotate(centre.mu[:, None].expand(-1, 600, -1), torch.arange(600))
    errors = []
    for calibration in (None, LayerCalibration(offsets=centre)):
        cache = layer(window=0, sinks=0, calibration=calibration)
        cache.update(k, v)
        errors.append(float((cache._past()[0] - k).square().mean()))
    assert errors[1] < 0.6 * errors[0]


def test_offsets_use_each_sequences_own_positions() -> None:
    centre = offsets()
    k, v = tokens(300, batch=1)
    plain = layer(window=0, sinks=0, calibration=LayerCalibration(offsets=centre))
    plain.update(k, v)
    pad_k, pad_v = tokens(7, seed=5)
    both = layer(
        window=0,
        sinks=0,
        calibration=LayerCalibration(offsets=centre),
        left_padding=torch.tensor([7, 0]),
    )
    padded_k, padded_v = torch.cat([pad_k, k], 2), torch.cat([pad_v, v], 2)
    other_k, other_v = tokens(307, seed=6)
    both.update(torch.cat([padded_k, other_k]), torch.cat([padded_v, other_v]))
    assert torch.equal(both._k_packed[0, :, 7:], plain._k_packed[0])
    torch.testing.assert_close(both._past()[0][0, :, 7:], plain._past()[0][0])


def test_first_position_shifts_the_segments() -> None:
    centre = offsets()
    calibration = LayerCalibration(offsets=centre)
    cache = layer(window=0, sinks=0, calibration=calibration, first_position=1000)
    k, v = tokens(50)
    cache.update(k, v)
    codec = TurboKVCodec(DIM, 4)
    want, _ = codec.compress_k(k, offset=centre.at(1000, 50)[None])
    assert torch.equal(cache._k_packed, want)


def test_channel_scales_and_shift_come_back() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(HEADS, DIM, generator=generator, dtype=torch.float32) * 3 + 0.2
    shift = torch.randn(HEADS, DIM, generator=generator, dtype=torch.float32) * 5
    parts = {"k_scale": scale, "v_scale": scale, "v_shift": shift, "offsets": offsets()}
    cache = layer(window=0, sinks=0, bits=8, calibration=LayerCalibration(**parts))
    k, v = tokens(40)
    cache.update(k * scale[:, None], v * scale[:, None] + shift[:, None])
    keys, values = cache._past()
    torch.testing.assert_close(keys, k * scale[:, None], rtol=0, atol=0.3)
    torch.testing.assert_close(values, v * scale[:, None] + shift[:, None], rtol=0, atol=0.3)


def test_calibration_of_other_shapes_is_refused() -> None:
    wrong = LayerCalibration(v_shift=torch.zeros(HEADS, DIM + 1, dtype=torch.float32))
    cache = layer(calibration=wrong)
    with pytest.raises(ValueError, match=r"v_shift: wanted shape \[2, 64\], got \[2, 65\]"):
        cache.update(*tokens(4))


# --- whole models ---------------------------------------------------------------------------------


def ids_for(batch: int, count: int) -> Tensor:
    return torch.randint(2, 96, (batch, count), generator=torch.Generator().manual_seed(7))


def test_generate_within_the_window_equals_the_uncompressed_cache() -> None:
    model = llama().half().float()  # weights fp16 can hold; activations still round in the window
    ids = ids_for(2, 20)
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    got = model.generate(
        ids, max_new_tokens=12, do_sample=False, past_key_values=TurboKVCache(model.config)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_at_eight_bits_equals_the_uncompressed_cache(beams: int) -> None:
    model = llama()
    ids = ids_for(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    ids[1, :9] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams}
    want = model.generate(ids, attention_mask=mask, **options)
    cache = TurboKVCache(model.config, 8, window=4, sinks=2, attention_mask=mask)
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(got, want)
    assert isinstance(cache.layers[0], TurboKVLayer) and cache.layers[0]._compressed > 30


def test_assisted_generation_crops_the_cache() -> None:
    model, helper = llama(), llama(layers=1)
    ids = ids_for(1, 40)
    want = model.generate(ids, max_new_tokens=16, do_sample=False)
    cache = TurboKVCache(model.config, 8, window=4, sinks=2)
    got = model.generate(
        ids, max_new_tokens=16, do_sample=False, past_key_values=cache, assistant_model=helper
    )
    assert torch.equal(got, want)


def test_gemma_sliding_layers_stay_transformers_own() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=96,
        bos_token_id=1,
    )
    model = Gemma3ForCausalLM._from_config(config, dtype=torch.float32).eval()
    ids = ids_for(2, 60)
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    cache = TurboKVCache(config, 8, window=8)
    got = model.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)
    assert torch.equal(got, want)
    kinds = [type(x) for x in cache.layers]
    assert kinds == [DynamicSlidingWindowLayer, TurboKVLayer] * 2
    assert cache.get_seq_length() == want.shape[1] - 1


def test_measured_bytes_of_a_model_are_a_quarter() -> None:
    model = llama().bfloat16()
    ids = ids_for(1, 2000)
    ours, plain = TurboKVCache(model.config, 4, window=16), DynamicCache(config=model.config)
    with torch.inference_mode():
        for cache in (ours, plain):
            for piece in ids.split(400, dim=1):
                model(piece, past_key_values=cache, use_cache=True)
    ratio = cache_nbytes(plain) / cache_nbytes(ours)
    assert 3.5 < ratio < 3.77  # 3.76 of the codec at head_dim 64, less the window


def test_offloaded_layers_come_back() -> None:
    cache = layer()
    k, v = tokens(30)
    cache.update(k, v)
    cache.offload()
    cache.prefetch()
    assert torch.equal(cache.update(*tokens(1))[0][:, :, 22:30], k[:, :, 22:].half().float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_bits": 1}, "k_bits: wanted 2 to 8, got 1"),
        ({"v_bits": 9}, "v_bits: wanted 2 to 8, got 9"),
        ({"k_bits": 4.0}, "k_bits: wanted an int"),
        ({"window": -1}, "window: wanted 0 or more, got -1"),
        ({"sinks": "4"}, "sinks: wanted an int, got '4'"),
        ({"backend": "rocm"}, "backend: wanted one of"),
        ({"k_scale_rule": "best"}, "scale_rule: wanted one of"),
        ({"attention_mask": [1, 1]}, "attention_mask: wanted a tensor"),
        ({"first_position": -4}, "first_position: wanted 0 or more"),
    ],
)
def test_bad_options_name_the_argument(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        TurboKVCache(llama().config, **options)


def test_padding_of_another_batch_is_refused() -> None:
    cache = layer(left_padding=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="left_padding: wanted one entry per sequence"):
        cache.update(*tokens(4, batch=3))


def test_model_without_full_attention_is_refused() -> None:
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    with pytest.raises(
        ValueError, match="config: wanted a model with layers that attend to the whole"
    ):
        TurboKVCache(config)


# --- what could only be stored wrongly ------------------------------------------------------------


def test_keys_and_values_of_different_lengths_are_refused() -> None:
    k, v = torch.randn(2, HEADS, 5, DIM), torch.randn(2, HEADS, 5, DIM)
    for wrong in (v[:, :, :4], v[:1], v[:, :1], v[0]):
        cache = layer()
        with pytest.raises(ValueError, match="value_states: wanted the batch, heads and tokens"):
            cache.update(k, wrong)
        assert cache.get_seq_length() == 0


def test_gradients_are_refused_not_lost() -> None:
    model = llama()
    cache, ids = TurboKVCache(model.config), torch.arange(6)[None]
    with pytest.raises(ValueError, match=r"gradients.*torch\.no_grad"):
        model(input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 6
    frozen = model.requires_grad_(False)
    frozen(input_ids=ids, past_key_values=TurboKVCache(model.config))


def test_float64_models_are_served_as_float32_models_are() -> None:
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator("cpu").manual_seed(0))
    found = []
    for dtype in (torch.float32, torch.float64):
        model = llama().to(dtype)
        cache = TurboKVCache(model.config, 4, window=4, sinks=2)
        with torch.no_grad():
            model(input_ids=ids[:, :39], past_key_values=cache)
            logits = model(input_ids=ids[:, 39:], past_key_values=cache).logits
        assert logits.dtype == dtype
        found.append(logits.double())
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.01
