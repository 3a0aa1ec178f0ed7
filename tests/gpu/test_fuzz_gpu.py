# SPDX-License-Identifier: Apache-2.0
"""A few hundred hostile problems with seeds of this run; ``fuzz_decode.py`` does thousands."""

from __future__ import annotations

import secrets

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="wanted a CUDA device (pytest -m gpu)"
    ),
]

if torch.cuda.is_available():
    from tests.gpu.fuzz_cases import COMMON, draw
    from tests.gpu.fuzz_decode import Checker

CHUNKS, PROBLEMS = 4, 100


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_problems_that_nobody_has_seen(chunk: int) -> None:
    first, checker = secrets.randbits(40), Checker()
    print(f"seeds {first} to {first + PROBLEMS - 1}")
    for seed in range(first, first + PROBLEMS):
        trial = draw(seed, COMMON, 8, far=False)
        wrong = checker.check(trial)
        again = f"python -m tests.gpu.fuzz_decode --common --seed {seed}"
        assert not wrong, f"{wrong}\n{trial}\nagain: {again}"
