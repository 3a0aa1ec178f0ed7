# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity in decode, emulated: they reach the rows that see them, and no others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.gpu.decode_cases import DEVICE
from tests.gpu.fuzz_cases import COMMON, Arena, Problem, Trial, draw
from tests.gpu.fuzz_decode import Checker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or DEVICE != "cpu", reason="wanted g++, and no CUDA device"
    ),
]

PLAIN: dict[str, Any] = dict(
    num_kv_heads=2,
    page_size=16,
    q_dtype=torch.float32,
    out_dtype=torch.float32,
    causal=True,
    logits_soft_cap=0.0,
    window_left=-1,
    sinks="",
    centred=False,
    kept=0.0,
    keys="usual",
    values="usual",
    bad="",
    bad_query="",
    query=0.01,
    indptr=False,
    strided=False,
    rotated_output=False,
    rotated_query=False,
    body="auto",
    num_ctas=0,
)
# products by integers in pairs and quads, of four and eight rows, and by halves of all; copies
SHAPES: dict[str, dict[str, Any]] = {
    "k4v4": dict(group_size=2),
    "k3v3": dict(k_bits=3, v_bits=3, group_size=2),
    "k2v2, eight rows": dict(k_bits=2, v_bits=2, group_size=4),
    "k4v4, eight rows": dict(group_size=4),
    "k5v4, sixteen rows": dict(k_bits=5, group_size=8),
    "k5v3 of 256, eight rows, cp.async": dict(
        head_dim=256, k_bits=5, v_bits=3, group_size=4, body="cp_async"
    ),
}


def trial(shape: str, **changes: Any) -> Trial:
    plain = replace(draw(7, COMMON, 8, far=False), head_dim=128, k_bits=4, v_bits=4, **PLAIN)
    return replace(plain, **SHAPES[shape] | changes)


def in_a_value(like: Trial) -> Trial:
    """Return the trial with the first seed that puts what is bad into a value, not a key."""
    for seed in range(like.seed, like.seed + 50):
        found = replace(like, seed=seed)
        if Problem(found, Arena("cpu", False)).bad_place[-1] == 1:
            return found
    raise AssertionError("no seed of 50")


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_value_that_all_rows_see(shape: str, bad: str) -> None:
    for kept in (0.0, 1.0):
        seen = trial(shape, lens=(200, 30), q_lens=(1, 1), causal=False, kept=kept, bad=bad)
        assert not Checker("cpu").check(in_a_value(seen)), seen


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_value_that_some_rows_see(shape: str, bad: str) -> None:
    """Of two queries one may not see a token: the last for the first, the oldest for the last."""
    for kept, causal in ((0.0, True), (0.0, False), (1.0, True), (1.0, False)):
        sizes = dict(lens=(2,) * 9, q_lens=(2,) * 9, causal=causal, window_left=0)
        some = in_a_value(trial(shape, kept=kept, bad=bad, **sizes))
        assert not Checker("cpu").check(some), some


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_query(shape: str, bad: str) -> None:
    for changes in ({}, {"centred": True, "kept": 0.5, "logits_soft_cap": 30.0}):
        asked = trial(shape, lens=(90, 30), q_lens=(2, 1), bad_query=bad, **changes)
        for rotated in (False, True):
            assert not Checker("cpu").check(replace(asked, rotated_query=rotated)), asked


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_query_that_sees_no_token(shape: str, bad: str) -> None:
    """Its output is zero and its LSE the sink's, whatever it is."""
    for changes in ({}, {"sinks": "usual"}, {"centred": True, "kept": 1.0}):
        asked = trial(shape, lens=(0, 0, 0), q_lens=(1, 1, 1), bad_query=bad, **changes)
        assert not Checker("cpu").check(asked), asked
