# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding over compressed pages: every kind of drafter, on both model runners.

Answers must be those of a 16-bit cache whatever is drafted. That a drafter reads its own cache
rightly shows only in what is accepted, so there are drafters that draft what the target would say.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
import torch

from tests.vllm import drafters, models
from tests.vllm import engine as e

if (reason := e.why_no_engine()) is not None:
    pytest.skip(reason, allow_module_level=True)
from tests.vllm.test_engine import (
    BARE,
    CPU,
    KV,
    LONG,
    TOKENS,
    both_runners,
    close,
    folder,  # noqa: F401 (a fixture)
    gpu_only,
    reference_of,
    run,
    runner,  # noqa: F401 (a fixture)
)

if not CPU:
    pytestmark = pytest.mark.gpu

WINDOW = {"window": 128, "sinks": 4}
LENGTHS = (LONG // 2, 40, 65, 130)


def accepted(llm: Any) -> float:
    """Return the share of drafted tokens that were accepted so far."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    drafted = found["vllm:spec_decode_num_draft_tokens"].value
    return float(found["vllm:spec_decode_num_accepted_tokens"].value / drafted)


def head(kind: str, parent: pathlib.Path, count: int, seed: int = 0) -> tuple[str, dict[str, Any]]:
    """Return a target and the configuration of its head; of another ``seed``, a head of another."""
    place = parent / kind
    place.mkdir(exist_ok=True)
    if kind == "eagle":
        model, drafter = drafters.make_eagle(place, seed)
    else:
        model = drafter = drafters.make_mtp(place, seed)
    return model, {"method": kind, "model": drafter, "num_speculative_tokens": count}


def drafter_layers(llm: Any) -> dict[str, Any]:
    """Return the implementations of all attention layers that drafters have."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {
        name: layer.impl
        for name, layer in layers.items()
        if getattr(getattr(layer, "impl", None), "is_draft", False)
    }


@both_runners
@pytest.mark.parametrize("is_own", [True, False], ids=["its own model drafts", "another one does"])
def test_a_draft_model(is_own: bool, folder: pathlib.Path) -> None:  # noqa: F811
    model = models.make_tiny("dense", folder / "dense")
    draft = model if is_own else models.make_tiny("dense", folder / "draft", seed=1)
    requests, wanted = reference_of(model, LENGTHS, 4, 0, 3 * TOKENS)
    config = {"method": "draft_model", "model": draft, "num_speculative_tokens": 3}
    with run(model, speculative_config=config, disable_log_stats=False) as llm:
        assert list(drafter_layers(llm)) == [
            f"draft_model.model.layers.{i}.self_attn.attn" for i in range(4)
        ]
        close(e.ask(llm, requests, 3 * TOKENS), wanted)
        share = accepted(llm)
        print(f"{share:.2f} of the drafts accepted")
        assert share > 0.7 if is_own else share < 0.5


@both_runners
def test_a_draft_model_with_prefix_hits_and_a_window(folder: pathlib.Path) -> None:  # noqa: F811
    model = models.make_tiny("dense", folder / "dense")
    requests, wanted = reference_of(model, LENGTHS, 4, 0, 3 * TOKENS)
    config = {"method": "draft_model", "model": model, "num_speculative_tokens": 15}
    settings = {"enable_prefix_caching": True, "disable_log_stats": False}
    with run(model, turbokv=WINDOW, speculative_config=config, **settings) as llm:
        for _ in range(2):
            close(e.ask(llm, requests, 3 * TOKENS), wanted)
        assert accepted(llm) > 0.7


@both_runners
@pytest.mark.parametrize("window", [BARE, WINDOW], ids=["bare", "window"])
@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_heads_draft_what_their_target_says(
    kind: str,
    window: dict[str, Any],
    folder: pathlib.Path,  # noqa: F811
) -> None:
    model, config = head(kind, folder, 3)
    requests, wanted = reference_of(model, LENGTHS, 4, 0, 3 * TOKENS)
    settings = {"enable_prefix_caching": True, "disable_log_stats": False}
    with run(model, turbokv=window, speculative_config=config, **settings) as llm:
        assert len(drafter_layers(llm)) == 1
        for turn in ("cold", "prefix hits"):
            close(e.ask(llm, requests, 3 * TOKENS), wanted)
            share = accepted(llm)
            print(f"{turn}: {share:.2f} of the drafts accepted")
            assert share > 0.7
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        maps = {layer.impl.shared_pages for layer in layers}
    # the head's copies lie in the pool that the target's map is about
    assert window == BARE or (len(maps) == 1 and maps.pop().window is not None)


@both_runners
@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_rejected_heads_leave_no_trace(kind: str, folder: pathlib.Path) -> None:  # noqa: F811
    model, config = head(kind, folder, 3, seed=1)
    requests, wanted = reference_of(model, LENGTHS, 4, 0, 3 * TOKENS)
    with run(model, turbokv=WINDOW, speculative_config=config, disable_log_stats=False) as llm:
        close(e.ask_in_turn(llm, requests, (0, 2, 3, 5), 3 * TOKENS), wanted)
        assert accepted(llm) < 0.5


@pytest.mark.parametrize("kind", ["draft_model", "eagle", "mtp"])
def test_a_calibration_file_is_the_targets_alone(
    kind: str,
    folder: pathlib.Path,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    from transformers import AutoModelForCausalLM

    from turbokv.integrations.transformers.calibrate import calibrate

    if kind == "draft_model":
        model = models.make_tiny("dense", folder / "dense")
        config: dict[str, Any] = {"method": kind, "model": model, "num_speculative_tokens": 3}
    else:
        model, config = head(kind, folder, 3)
    file = tmp_path / "calibration.safetensors"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = calibrate(loaded.eval(), tokens=2048)
    # of more layers than the target has: a head that is numbered after it would find one, too
    dataclasses.replace(found, layers={i: found.layers[0] for i in range(8)}).save(file)
    options = {**BARE, "calibration": str(file)}
    with run(model, turbokv=options, speculative_config=config) as llm:
        drafts = drafter_layers(llm)
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        centred = {name for name, x in layers.items() if x.impl.cache.k_offset is not None}
        others = set(layers) - set(drafts)
    assert drafts
    assert centred == others


@gpu_only
@both_runners
@pytest.mark.parametrize("count", [1, 3])
def test_an_mtp_layer_on_a_hybrid(count: int, folder: pathlib.Path) -> None:  # noqa: F811
    """Beside the 16-bit cache with the same drafts: linear layers sum rows in another order."""
    model = drafters.make_hybrid(folder / "hybrid_mtp")
    requests, wanted = reference_of(model, (LONG, 40, 5, LONG // 2, 130), 0, 0, 3 * TOKENS)
    config = {"method": "mtp", "model": model, "num_speculative_tokens": count}
    found = {}
    for dtype in ("auto", KV):
        for name, speculative in (("alone", None), (f"{count} drafted", config)):
            with run(model, dtype, speculative_config=speculative) as llm:
                if dtype == KV and speculative is not None:
                    assert list(drafter_layers(llm)) == ["mtp.layers.0.self_attn.attn"]
                answers = e.ask(llm, requests, 3 * TOKENS)
            found[dtype, name] = e.compare(answers, wanted)
            print(dtype, name, found[dtype, name])
    drafted = f"{count} drafted"
    rounding = found["auto", drafted].error
    assert found[KV, drafted].error < found[KV, "alone"].error + max(2 * rounding, 0.02)


# Last, and once on a CPU: vLLM's CPU engine scans all modules when it starts and stops at one of
# Numba's, which this imports.
@both_runners
@pytest.mark.parametrize("count", [15] if CPU else [3, 15])
def test_n_grams_with_rejected_drafts(count: int, folder: pathlib.Path) -> None:  # noqa: F811
    model = models.make_tiny("dense", folder / "dense")
    requests, wanted = reference_of(model, LENGTHS, 4, 0, 3 * TOKENS)
    looked_up = {"method": "ngram", "num_speculative_tokens": count, "prompt_lookup_max": 2}
    with run(model, speculative_config=looked_up) as llm:
        close(e.ask(llm, requests, 3 * TOKENS), wanted)
