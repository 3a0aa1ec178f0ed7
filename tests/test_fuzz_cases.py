# SPDX-License-Identifier: Apache-2.0
"""The fuzz of decode, tried on the CPU: its answers are right, and it finds planted faults."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import ref
from tests.gpu import fuzz_decode
from tests.gpu.fuzz_cases import COMMON, Problem, Trial, draw
from turbokv.paged import PagedKVCache

# Drawn anew by every process, so no part of a test's name: parallel workers compare names.
SEEDS = [random.SystemRandom().randrange(1 << 40) for _ in range(12)]


def plain_decode(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Answer as the plain paged cache reads pages, with the attention of ``tests/ref.py``."""
    t = problem.trial
    num_pages, heads = problem.pages.shape[0], t.num_kv_heads
    cache = PagedKVCache(problem.codec, num_pages, heads, t.page_size, pages=problem.pages)
    row = 0
    for i, (length, q_len) in enumerate(zip(t.lens, t.q_lens, strict=True)):
        rows = slice(row, row + q_len)
        row += q_len
        if not q_len:
            continue
        pages = problem.table[i, : problem.counts[i]]
        k_packed, k_norms, v_packed, v_norms = cache.gather_packed(pages, length)
        k = problem.codec.decompress_k_raw(k_packed, k_norms.abs()).double()
        v = problem.codec.decompress_v_raw(v_packed, v_norms).double()
        position = torch.arange(length)
        if problem.k_offset is not None:
            offset = problem.k_offset.double()[position // 256]
            k = k + offset * (~torch.signbit(k_norms))[..., None]
        if problem.window is not None and length:
            page = pages.long()[position // t.page_size]
            slot = problem.tile_slots[page, position % t.page_size // 16].long()
            kept = slot >= 0
            k[kept] = problem.window[slot[kept], :, 0, position[kept] % 16].double()
            v[kept] = problem.window[slot[kept], :, 1, position[kept] % 16].double()
        q = problem.q[rows].double()
        if not t.rotated_query:
            q = problem.codec.rotate_query(q.float()).double()
        scale, cap = t.head_dim**-0.5, t.logits_soft_cap
        arrays = (x.numpy() for x in (q, k, v))
        found, found_lse = ref.attention(*arrays, scale, t.causal, cap, t.window_left)
        result, total = torch.from_numpy(found), torch.from_numpy(found_lse) * math.log(2)
        if problem.sinks is not None:
            with_sink = torch.logaddexp(total, problem.sinks.double())
            result *= torch.exp(total - with_sink.clamp(min=-1e300))[..., None]
            total = with_sink
        if not t.rotated_output:
            result = problem.codec.unrotate_output(result.float()).double()
        out[rows], lse[rows] = result.to(out.dtype), total.float() / math.log(2)


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch) -> Callable[..., fuzz_decode.Checker]:
    """Return a maker of checkers on the CPU; what it is given changes arguments or results."""

    def make(before: Any = None, after: Any = None) -> fuzz_decode.Checker:
        current: list[Problem] = []

        class Remembered(Problem):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                current[:] = [self]

        def decode(arguments: dict[str, Any]) -> None:
            out, lse = arguments["out"], arguments["lse"]
            if before:
                before(current[0])
            plain_decode(current[0], out, lse)
            if after:
                after(current[0], out, lse)

        monkeypatch.setattr(fuzz_decode, "Problem", Remembered)
        monkeypatch.setattr(fuzz_decode.harness, "decode", decode)
        return fuzz_decode.Checker(device="cpu")

    return make


def small(seed: int, **changes: Any) -> Trial:
    """Return a trial that the CPU answers in little time."""
    trial = draw(seed, COMMON, 8, far=False)
    values = vars(trial) | {"lens": tuple(min(n, 150) for n in trial.lens[:3])}
    values["q_lens"] = tuple(min(n, m) for n, m in zip(trial.q_lens, values["lens"], strict=False))
    if not sum(values["q_lens"]):
        values["q_lens"] = (1,) * len(values["lens"])
    return Trial(**(values | changes))


@pytest.mark.parametrize("index", range(len(SEEDS)))
def test_the_plain_cache_passes(index: int, checker: Callable[..., fuzz_decode.Checker]) -> None:
    print(f"seed {SEEDS[index]}")  # shown if this fails
    trial = small(SEEDS[index])
    assert checker().check(trial) == "", trial


PLAIN = {
    "keys": "usual",
    "values": "usual",
    "bad": "",
    "bad_query": "",
    "kept": 0.0,
    "query": 0.01,
    "sinks": "",
}
PLAIN |= {"lens": (150, 40), "q_lens": (1, 1), "window_left": -1, "logits_soft_cap": 0.0}


def test_faults_are_found(checker: Callable[..., fuzz_decode.Checker]) -> None:
    """Each fault in turn, on a few trials."""

    def drop_a_token(problem: Problem) -> None:
        scales = problem._scales(problem.content)
        scales[0, 0, :, 3, 1] = 0
        problem.pages[problem.ids] = problem.content

    def swap_pages(problem: Problem) -> None:
        problem.table[0, 0] = problem.table[1, 0]

    def leave_a_row(problem: Problem, out: Tensor, lse: Tensor) -> None:
        out[0] = fuzz_decode.GUARD

    def write_beyond(problem: Problem, out: Tensor, lse: Tensor) -> None:
        out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(7)

    def shift_lse(problem: Problem, out: Tensor, lse: Tensor) -> None:
        lse += 0.01

    def turn_a_coordinate(problem: Problem, out: Tensor, lse: Tensor) -> None:
        out[1, 0, out[1, 0].abs().argmax()] *= -1

    for seed in SEEDS[:4]:
        trial = small(seed, **PLAIN)
        assert checker().check(trial) == ""
        for before in (drop_a_token, swap_pages):
            assert checker(before=before).check(trial), before.__name__
        for after in (leave_a_row, write_beyond, shift_lse, turn_a_coordinate):
            assert checker(after=after).check(trial), after.__name__


def test_a_nan_must_be_shown_and_stay_where_it_is(
    checker: Callable[..., fuzz_decode.Checker],
) -> None:
    trial = small(SEEDS[0], **PLAIN | {"bad": "nan", "num_kv_heads": 2, "lens": (60, 60)})

    def hide(problem: Problem, out: Tensor, lse: Tensor) -> None:
        out.nan_to_num_()

    def spread(problem: Problem, out: Tensor, lse: Tensor) -> None:
        out.fill_(math.nan)

    assert "NaN" in checker(after=hide).check(trial)
    assert "row is wrong" in checker(after=spread).check(trial)


def test_levels_and_places_cover_a_tile() -> None:
    for dim in (64, 512):
        for bits in ref.BOOKS:
            for role in ("k", "v"):
                places = ref.bit_places(dim, role, bits).ravel()
                assert np.array_equal(np.sort(places), np.arange(16 * dim * bits))
