# SPDX-License-Identifier: Apache-2.0
"""TurboKVCache in a tiny model of every family: near the uncompressed cache, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from transformers import DynamicCache
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from tests.transformers.tiny_models import DECODERS, INSIDE, build, shrunk
from turbokv.integrations.transformers import TurboKVCache
from turbokv.integrations.transformers.calibrate import calibrate
from turbokv.integrations.transformers.layers import TurboKVHybridLayer

# Every layer slides in these tiny models, as in the published ones with windows.
SLIDING = {"ministral", "ministral3", "mistral", "mixtral", "phi3", "phimoe", "starcoder2"}
INDEXED = {"deepseek_v32", "glm_moe_dsa"}
OWN_CACHE = {"minimax"}  # Transformers itself takes no other cache for it
SERVED = DECODERS.keys() - INSIDE - SLIDING - INDEXED - OWN_CACHE


def log_probabilities(model: Any, ids: Tensor, cache: Cache) -> Tensor:
    rows = []
    with torch.no_grad():
        for start, end in ((0, 40), (40, 48), (48, 49), (49, 60)):
            piece = ids[:, start:end]
            rows.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
    return torch.log_softmax(torch.cat(rows, dim=1).double(), dim=-1)


def random_ids() -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(3, 200, (2, 60), generator=generator)


def divergence(model: Any, config: Any, make: Callable[[], TurboKVCache]) -> float:
    """KL per token from the uncompressed cache, once tokens are compressed."""
    full = log_probabilities(model, random_ids(), DynamicCache(config=config))
    cache = make()
    ours = log_probabilities(model, random_ids(), cache)
    held = [layer for layer in cache.compressed_layers() if layer.is_initialized]
    assert held and all(layer._compressed == 60 for layer in held)
    assert torch.equal(full[:, :40], ours[:, :40])  # new tokens meet each other as they are
    return float((full.exp() * (full - ours)).sum(-1)[:, 40:].mean())


@pytest.mark.parametrize("family", sorted(SERVED))
def test_eight_bits_are_near_the_uncompressed_cache(family: str) -> None:
    torch.manual_seed(0)
    config = shrunk(family)
    model = build(config, "cpu")
    options: dict[str, Any] = {"window": 0, "sinks": 0, "calibration": "none"}
    assert divergence(model, config, lambda: TurboKVCache(config, 8, **options)) < 0.01


@pytest.mark.parametrize("family", sorted(SLIDING))
def test_bounded_layers_need_no_compression(family: str) -> None:
    with pytest.raises(ValueError, match=r"wanted a model with layers that attend .* bounded"):
        TurboKVCache(shrunk(family), calibration="none")


@pytest.mark.parametrize("family", sorted(SLIDING))
def test_a_window_that_no_context_exceeds_is_compressed(family: str) -> None:
    torch.manual_seed(0)
    config = shrunk(family)
    config.sliding_window = 2 * config.max_position_embeddings
    model = build(config, "cpu")
    options: dict[str, Any] = {"window": 0, "sinks": 0, "calibration": "none"}
    assert divergence(model, config, lambda: TurboKVCache(config, 8, **options)) < 0.01
    assert sorted(calibrate(model, tokens=128, context=64).layers) == list(range(8))


@pytest.mark.parametrize("family", sorted(INDEXED))
def test_a_sparse_index_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="whose sparse index TurboKV does not keep"):
        TurboKVCache(shrunk(family), calibration="none")


@pytest.mark.parametrize("family", ["falcon_h1", "zamba2"])
def test_states_beside_attention_are_reordered_repeated_counted_and_forgotten(family: str) -> None:
    torch.manual_seed(0)
    config = shrunk(family)
    model = build(config, "cpu")
    cache = TurboKVCache(config, 8, window=8, sinks=2, calibration="none")
    ids = random_ids()
    first = log_probabilities(model, ids, cache)
    hybrids = [layer for layer in cache.layers if isinstance(layer, TurboKVHybridLayer)]
    assert hybrids
    for layer in hybrids:
        states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
        assert layer.nbytes() > sum(state.nbytes for state in states) > 0
    more = torch.full((2, 1), 7, dtype=torch.int64)
    turned, doubled = torch.tensor([1, 0]), torch.tensor([0, 0, 1, 1])
    with torch.no_grad():
        kept = TurboKVCache(config, 8, window=8, sinks=2, calibration="none")
        log_probabilities(model, ids, kept)
        want = model(input_ids=more, past_key_values=kept, use_cache=True).logits
        cache.reorder_cache(turned)
        got = model(input_ids=more, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(got, want[turned], rtol=1e-4, atol=1e-4)
    for layer in cache.layers:
        if isinstance(layer, TurboKVHybridLayer):
            before = layer.conv_states[0].clone()
            layer.batch_repeat_interleave(2)
            assert torch.equal(layer.conv_states[0], before[doubled])
            assert layer._k_packed.shape[0] == 4
    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = TurboKVCache(config, 8, window=8, sinks=2, calibration="none")
    assert torch.equal(log_probabilities(model, ids, fresh), first)
    assert any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in fresh.layers)


@pytest.mark.parametrize("family", ["falcon_h1", "zamba2"])
def test_generate_and_calibrate_hybrids(family: str) -> None:
    torch.manual_seed(0)
    config = shrunk(family)
    model = build(config, "cpu")
    ids = random_ids()[:1, :40]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cache = TurboKVCache(model, 8, window=4)
    found = model.generate(ids, past_key_values=cache, **options)
    want = model.generate(ids, past_key_values=DynamicCache(config=config), **options)
    assert torch.equal(found, want)
    assert cache.calibration is not None
    # Zamba2's attention follows recurrent layers, whose states make the keys of a repeated token
    # differ: its rotary embedding is not recognised, and its keys stay as they are
    assert bool(cache.calibration.layers) == (family == "falcon_h1")
