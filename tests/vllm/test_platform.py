# SPDX-License-Identifier: Apache-2.0
"""What vLLM makes of our dtypes, on a pretended H100: no GPU, no weights.

Asked are the vLLM that is installed here, the patched one or a released one, and the released ones
whose Python files ``make stock-vllm`` has brought.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vllm import asked
from tests.vllm.asked import VLLM, ask, describe, refused

# Names of the spec of full attention: with our patch, and in released versions.
FULL = {"TQFullAttentionSpec", "FullAttentionSpec"}
pytestmark = pytest.mark.slow

ALL = [*asked.installed(), *asked.fetched()]
if not ALL:
    pytest.skip(asked.MISSING, allow_module_level=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    from tests.vllm.models import TINY, tiny_config

    folder = tmp_path_factory.mktemp("configs")
    for kind in TINY:
        tiny_config(kind).save_pretrained(folder / kind)
        path = folder / kind / "config.json"
        names = {"mixed": "Gemma3ForCausalLM", "hybrid": "Qwen3NextForCausalLM"}
        config = json.loads(path.read_text())
        config |= {
            "architectures": [names.get(kind, "Qwen3ForCausalLM")],
            "dtype": "bfloat16",
        }
        path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session", params=ALL, ids=lambda vllm: vllm.version)
def vllm(request: pytest.FixtureRequest) -> Iterator[VLLM]:
    with asked.running(request.param) as made:
        yield made


def test_the_dtype_chooses_the_backend(vllm: VLLM, models: pathlib.Path) -> None:
    found = describe(vllm, models / "dense", "tq4")
    assert set(found["backends"]) == {"TURBOKV"}
    assert found["pages"] == [2 * 64 * 132]
    assert found["shapes"] == [[[2, 64, 132], "torch.uint8"]]
    assert found["graphs"] == "UNIFORM_BATCH"
    # two decodes, and a prefill of 32 tokens after 32 older ones
    assert found["steps"] == [[2, 2, 1, [[32]]]]


def test_a_page_has_the_size_that_the_user_names(vllm: VLLM, models: pathlib.Path) -> None:
    assert describe(vllm, models / "dense", "tq4")["block_size"] == 64
    assert describe(vllm, models / "dense", "tq4", block_size=16)["pages"] == [2 * 16 * 132]


def test_without_compilation(vllm: VLLM, models: pathlib.Path) -> None:
    assert set(describe(vllm, models / "dense", "tq4", enforce_eager=True)["backends"]) == {
        "TURBOKV"
    }
    without = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    found = describe(vllm, models / "dense", "tq4", compilation_config=without)
    assert set(found["backends"]) == {"TURBOKV"}


def test_widths_of_keys_and_values_differ(vllm: VLLM, models: pathlib.Path) -> None:
    assert describe(vllm, models / "dense", "tq_k5v3")["pages"] == [2 * 64 * 132]
    assert describe(vllm, models / "dense", "tq_k4v2")["pages"] == [2 * 64 * 100]
    assert describe(vllm, models / "dense", "tq_k8v4")["pages"] == [2 * 64 * 196]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("dense", "auto"), ("mixed", "auto"), ("hybrid", "auto"), ("dense", "fp8")]
)
def test_other_dtypes_are_as_without_us(
    kind: str, dtype: str, vllm: VLLM, models: pathlib.Path
) -> None:
    found = describe(vllm, models / kind, dtype)
    assert "TURBOKV" not in found["backends"]
    if vllm.is_patched:
        return
    without = ask(vllm, models / kind, dtype, {}, "no plugin")
    assert "plugin was not loaded" in without["why_not"]
    assert found == without["found"]


def test_a_head_that_is_no_power_of_two_is_padded(vllm: VLLM, models: pathlib.Path) -> None:
    assert describe(vllm, models / "head96", "tq4")["pages"] == [2 * 64 * 132]


def test_sliding_windows_and_full_attention_share_pages(vllm: VLLM, models: pathlib.Path) -> None:
    found = describe(vllm, models / "mixed", "tq4")
    assert set(found["backends"]) == {"TURBOKV"}
    names = {name for name, _ in found["groups"]}
    assert names - FULL == {"SlidingWindowSpec"}
    assert len(names & FULL) == 1
    assert found["group_pages"] == [2 * 64 * 132]
    assert found["slots"] == [132]


def test_without_the_hybrid_manager_windows_are_full_specs(
    vllm: VLLM, models: pathlib.Path
) -> None:
    found = describe(vllm, models / "mixed", "tq4", disable_hybrid_kv_cache_manager=True)
    names = {name for name, _ in found["groups"]}
    assert names <= {*FULL, "UniformTypeKVCacheSpecs"}
    assert found["shapes"] == [[[2, 64, 132], "torch.uint8"]]


@pytest.mark.parametrize("skip", [["sliding_window"], [1], [0, 4]])
def test_skipped_layers_get_another_backend(
    skip: list[Any], vllm: VLLM, models: pathlib.Path
) -> None:
    options = {"turbokv": {"skip_layers": skip}}
    found = describe(vllm, models / "mixed", "tq4", additional_config=options)
    kinds = (["sliding"] * 2 + ["full"]) * 2
    for i, (kind, backend) in enumerate(zip(kinds, found["backends"], strict=True)):
        is_skipped = i in skip or (skip == ["sliding_window"] and kind == "sliding")
        assert backend == ("FLASH_ATTN" if is_skipped else "TURBOKV")
    # as if all layers were ours, whichever comes first
    assert found["pages"] == [2 * 64 * 132]
    assert found["slots"] == [132, 512]


def test_a_full_layer_among_sliding_ones_is_not_skipped(vllm: VLLM, models: pathlib.Path) -> None:
    options = {"turbokv": {"skip_layers": [2]}}
    message = refused(vllm, models / "mixed", "tq4", additional_config=options)
    assert "skip_layers: wanted sliding-window layers only" in message


@pytest.mark.parametrize(("dtype", "slot"), [("tq4", 260), ("tq2", 132)])
def test_hybrid_models_have_compressed_pages(
    dtype: str, slot: int, vllm: VLLM, models: pathlib.Path
) -> None:
    found = describe(vllm, models / "hybrid", dtype)
    assert found["block_size"] % 16 == 0
    assert found["slots"] == [slot]
    # two KV heads; states have pages of this size as well, or of their own where vLLM packs them
    assert found["block_size"] * 2 * slot in found["group_pages"]
    assert found["backends"] == ["TURBOKV"]


def test_a_backend_by_name_is_checked(vllm: VLLM, models: pathlib.Path) -> None:
    assert (
        "TURBOKV"
        in describe(vllm, models / "dense", "tq4", attention_backend="TURBOKV")["backends"]
    )
    message = refused(vllm, models / "dense", "tq4", attention_backend="FLASH_ATTN")
    assert "attention_backend: wanted TURBOKV or none, got FLASH_ATTN" in message


def test_unknown_options_stop_the_start(vllm: VLLM, models: pathlib.Path) -> None:
    message = refused(vllm, models / "dense", "tq4", additional_config={"turbokv": {"windows": 3}})
    assert "additional_config['turbokv']" in message
    assert "got ['windows']" in message


def test_flashinfer_is_asked_for_before_it_is_needed(vllm: VLLM, models: pathlib.Path) -> None:
    if importlib.util.find_spec("flashinfer") is not None:
        pytest.skip("FlashInfer is installed")
    options = {"turbokv": {"path": "flashinfer"}}
    message = refused(vllm, models / "dense", "tq4", additional_config=options)
    assert "needs the patched FlashInfer" in message


# --- released versions ----------------------------------------------------------------------------


@pytest.fixture
def released(vllm: VLLM) -> VLLM:
    if vllm.is_patched:
        pytest.skip("of released versions")
    return vllm


@pytest.mark.parametrize(
    ("dtype", "draft", "slots"),
    [
        ("tq4", None, [132]),
        ("tq4", "tq2", [68, 132]),
        ("tq_k5v3", "tq_k8v4", [132, 196]),
        ("tq4", "bfloat16", [132, 512]),
        ("auto", "tq4", [132, 512]),
    ],
)
def test_a_drafter_may_have_another_cache_dtype(
    dtype: str, draft: str | None, slots: list[int], released: VLLM, models: pathlib.Path
) -> None:
    model = str(models / "dense")
    config = {"method": "draft_model", "model": model, "num_speculative_tokens": 3}
    if draft is not None:
        config["kv_cache_dtype"] = draft
    found = describe(released, models / "dense", dtype, speculative_config=config)
    dtypes = [dtype] * 4 + [draft or dtype] * 4
    assert found["dtypes"] == dtypes
    assert [name == "TURBOKV" for name in found["backends"]] == [
        name.startswith("tq") for name in dtypes
    ]
    assert found["slots"] == slots
    # whatever shares an allocation: each layer's own page has its own shape
    ours = [shape[-1] for shape, kind in found["shapes"] if kind == "torch.uint8"]
    assert sorted(ours) == [slot for slot in slots if slot != 512]
    assert found["is_dense_in_pages"]


def test_the_backend_is_not_for_other_dtypes(released: VLLM, models: pathlib.Path) -> None:
    message = refused(released, models / "dense", "auto", attention_backend="TURBOKV")
    assert "kv_cache_dtype not supported" in message


def test_a_vllm_that_lacks_a_feature_is_refused(released: VLLM, models: pathlib.Path) -> None:
    world = "no customize_spec"
    answer = ask(released, models / "dense", "tq4", {}, world)
    assert "tq4" in answer["error"]  # no such dtype, says vLLM
    assert "wanted vLLM 0.28 to 0.33" in answer["why_not"]
    assert "lacks vllm.v1.attention.backend.AttentionBackend.customize_spec" in answer["why_not"]


def test_a_registration_that_fails_midway_stops_our_dtypes_only(
    released: VLLM, models: pathlib.Path
) -> None:
    answer = ask(released, models / "dense", "tq4", {}, "failure")
    assert "TurboKV is not registered with this vLLM: RuntimeError: pretended" in answer["error"]
    other = ask(released, models / "dense", "auto", {}, "failure")
    assert set(other["found"]["backends"]) == {"FLASH_ATTN"}
