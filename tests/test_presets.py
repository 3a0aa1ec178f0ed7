# SPDX-License-Identifier: Apache-2.0
"""One name for each preset, and what else is taken for it."""

from __future__ import annotations

import pytest

from turbokv.presets import PRESETS, preset_name, preset_widths


@pytest.mark.parametrize("name", PRESETS)
def test_every_spelling_is_taken_and_one_is_shown(name: str) -> None:
    k_bits, v_bits = PRESETS[name]
    pair = f"k{k_bits}v{v_bits}"
    for spelling in (name, pair, pair.upper(), f"tq_{pair}"):
        assert preset_widths(spelling) == (k_bits, v_bits)
    assert preset_name(k_bits, v_bits) == name


@pytest.mark.parametrize("name", ["", "4", "tq", "tq9", "k9v9", "k4", "tq4 ", "fp8", "tqk4v4"])
def test_another_word_is_none(name: str) -> None:
    assert preset_widths(name) is None


def test_what_is_no_word_is_none() -> None:
    assert preset_widths(None) is None
