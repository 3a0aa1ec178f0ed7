# SPDX-License-Identifier: Apache-2.0
"""The fuzz of decode with emulated kernels: seeds that failed once, and fresh ones."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.decode_cases import DEVICE
from tests.gpu.fuzz_cases import COMMON, draw
from tests.gpu.fuzz_decode import Checker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or DEVICE != "cpu", reason="wanted g++, and no CUDA device"
    ),
]

FAILED_ONCE = {
    303764861225: "a NaN V scale among integer products read as a large probability",
    303764859198: "an infinite V scale spoilt queries that may not see it",
    # small scores of huge keys, which a bound relative to scores allowed too little
    303764857212: "LSE of one to sixteen tokens, 2 bits, keys of 10^4",
    303764857233: "LSE of a single token",
    303764859216: "LSE under a soft cap, huge sinks",
    303764863227: "LSE of rising keys, split in parts",
    # queries that are not finite, in requests of no token: whose output is zero
    139337553831: "integer products, huge sinks",
    139337559484: "centred keys, one CTA",
    139337557819: "halves of head size 256",
}


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_a_seed_that_failed_once(seed: int) -> None:
    trial = draw(seed, COMMON, 8, far=False)
    assert not Checker("cpu").check(trial), (FAILED_ONCE[seed], trial)


def test_seeds_that_nobody_has_seen() -> None:
    checker = Checker("cpu")  # its memory passes from one problem to the next
    first = random.SystemRandom().randrange(1 << 40)
    for seed in range(first, first + 6):
        print(f"seed {seed}")  # shown if this fails
        trial = draw(seed, COMMON, 8, far=False)
        assert not checker.check(trial), trial


def test_the_command_repeats_a_seed_without_a_gpu() -> None:
    command = ["-m", "tests.gpu.fuzz_decode", "--common", "--emulated", "--seed", "303764857233"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert "1 problems, 0 failures" in done.stdout
