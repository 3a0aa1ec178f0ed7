# SPDX-License-Identifier: Apache-2.0
"""Cache dtypes and options, without vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from turbokv.integrations.vllm import CACHE_DTYPES, cache_widths, hooks, slot_bytes
from turbokv.integrations.vllm.options import Options
from turbokv.paged import PageLayout
from turbokv.presets import PRESETS


def options(**values: Any) -> Options:
    return Options.from_config({"turbokv": values, "another plugin": 1})


def test_cache_dtypes_are_the_presets_of_plan() -> None:
    assert set(CACHE_DTYPES) == set(PRESETS)


@pytest.mark.parametrize("name", CACHE_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_slots_fill_a_page_of_any_size(name: str, head_dim: int) -> None:
    k_bits, v_bits = cache_widths(name)
    for page_size in (16, 2032):
        layout = PageLayout(head_dim, k_bits, v_bits, page_size, 3)
        assert 3 * page_size * slot_bytes(name, head_dim) == layout.page_bytes
        assert layout.page_head_bytes % 16 == 0


def test_a_shape_can_be_asked_for_without_a_real_head() -> None:
    assert slot_bytes("tq4", 1) > 0


def test_other_dtypes_are_not_ours() -> None:
    assert not hooks.is_turbokv("fp8")
    assert not hooks.is_turbokv(None)
    with pytest.raises(ValueError, match=r"kv_cache_dtype: wanted one of .*, got 'tq9'"):
        cache_widths("tq9")


def test_options_have_defaults_and_leave_other_plugins_alone() -> None:
    assert Options.from_config({}) == Options.from_config(None) == options() == Options()
    assert Options.from_config({"other": {"path": 1}}) == Options()


def test_options_are_read() -> None:
    found = options(path="flash_attn", window=0, sinks=0, skip_layers=[0, "3", "sliding_window"])
    assert found.path == "flash_attn"
    assert not found.keeps_window
    assert found.skip_layers == ("0", "3", "sliding_window")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windows": 1}, r"additional_config\['turbokv'\]: wanted .*, got \['windows'\]"),
        ({"path": "fast"}, "turbokv.path: wanted one of .*, got 'fast'"),
        ({"decode": "slow"}, "turbokv.decode: wanted one of .*, got 'slow'"),
        ({"window": -1}, "turbokv.window: wanted 0 or more, got -1"),
        ({"window": 1.5}, "turbokv.window: wanted an integer, got 1.5"),
        ({"sinks": 17}, "turbokv.sinks: wanted at most 16, got 17"),
        ({"window_pool_fraction": 0.9}, "turbokv.window_pool_fraction: wanted 0 to 0.5, got 0.9"),
        ({"window_pool_fraction": "2%"}, "wanted a number, got '2%'"),
        ({"recompute_window": 1}, "turbokv.recompute_window: wanted true or false, got 1"),
        ({"workspace_tokens": 100}, "turbokv.workspace_tokens: wanted a multiple of 16, got 100"),
        ({"skip_layers": "3"}, "turbokv.skip_layers: wanted a list .*, got '3'"),
        ({"skip_layers": ["full"]}, "turbokv.skip_layers: wanted a list .*, got 'full'"),
        ({"calibration": "/nowhere/at all"}, "turbokv.calibration: wanted a file"),
        ({"calibration": None}, "turbokv.calibration: wanted 'auto', 'weights', 'none' or a file"),
    ],
)
def test_bad_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        options(**values)


def test_options_must_be_a_mapping() -> None:
    with pytest.raises(TypeError, match="wanted a mapping, got 3"):
        Options.from_config({"turbokv": 3})


def test_a_calibration_file_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert options(calibration=str(file)).calibration_file == str(file)
    assert options().calibration == "auto"
    for word in ("auto", "weights", "none"):
        assert options(calibration=word).calibration_file is None
