# SPDX-License-Identifier: Apache-2.0
"""A minute of the soak on vLLM's CPU engine, and what the soak looks with."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm import engine as e

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

if (reason := e.why_no_engine()) is not None:
    pytest.skip(reason, allow_module_level=True)
if not e.on_cpu():
    pytest.skip("scripts/accept_gpu.py runs it on a GPU", allow_module_level=True)

import _soak_poison  # noqa: E402
import _soak_traffic  # noqa: E402
import soak  # noqa: E402
import vllm  # noqa: E402
from packaging.version import Version  # noqa: E402

from turbokv.integrations.vllm.window.pool import RecentWindow  # noqa: E402


@pytest.mark.slow
def test_a_minute_of_everything_keeps_the_promise(tmp_path: pathlib.Path) -> None:
    """In a process of its own, as what drafts n-grams leaves compiled code behind."""
    said = tmp_path / "soak.json"
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--seconds", "60"]
    if Version(vllm.__version__) < Version("0.33"):
        # its CPU engine adds an adapter to requests that asked for none; canaries show it
        command += ["--adapters", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [*command, "--json", str(said)], capture_output=True, text=True, env=environment
    )
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads(said.read_text())
    assert all(line["kept"] for line in found["promise"])
    assert min(found["poisoned"].values()) > 0


# --- what it looks with must be able to fail ------------------------------------------------------


def window() -> RecentWindow:
    made = RecentWindow(8, 32, 6, 32, 4, "cpu")
    table = torch.tensor([[1, 2, 3]], dtype=torch.int32)
    lens = torch.tensor([70], dtype=torch.int32)
    made.refresh(table, lens, lens)
    assert _soak_poison.slots_amiss(made) == []
    assert int((made.tile_slots >= 0).sum()) == 4
    return made


def test_a_slot_that_nobody_holds_is_seen() -> None:
    leaked = window()
    leaked.tile_slots[1, 0] = -1
    assert _soak_poison.slots_amiss(leaked) == ["4 slots are held, 3 tiles have one"]


def test_two_tiles_of_one_slot_are_seen() -> None:
    shared = window()
    shared.tile_slots[5, 1] = shared.tile_slots[1, 0]
    assert "5 tiles share 4 slots" in _soak_poison.slots_amiss(shared)[0]


def test_slots_of_other_tiles_are_seen() -> None:
    moved = window()
    slot = int(moved.tile_slots[1, 0])
    moved.tile_slots[1, 0], moved.tile_slots[5, 1] = -1, slot
    assert _soak_poison.slots_amiss(moved) == ["slots name other tiles than those that name them"]


def report(**changed: Any) -> dict[str, Any]:
    did = {
        "cancelled": 1,
        "preempted": 1,
        "cached tokens": 1,
        "lora": 1,
        "reloads": 1,
        "drafts accepted": 1,
        "loaded blocks": 1,
    }
    return {
        "before and after": [0.001, 0.0],
        "error alone": 0.01,
        "error under load": 0.011,
        "memory": [1 << 30] * 6,
        "problems": [],
        "leaks": {"blocks": 0, "requests": 0},
        "did": did,
        **changed,
    }


PLAN = soak.Plan(1, 2, "tiny", "tq4", "MemoryConnector", "ngram", 2, 64, 6, 64, 9, 32, 0)


@pytest.mark.parametrize(
    ("changed", "broken"),
    [
        ({}, []),
        ({"problems": ["soak3: log-probabilities {1: nan}"]}, ["no error"]),
        ({"leaks": {"blocks": 1, "requests": 0}}, ["nothing leaks"]),
        ({"before and after": [0.0, 0.003]}, ["canaries after as before, within 0.002 nats"]),
        ({"error under load": 0.0117}, ["under load within 1.15 of the error alone"]),
        ({"memory": [i << 26 for i in range(16, 22)]}, ["memory is flat"]),
        ({"did": {"cancelled": 3}}, ["everything happened"]),
    ],
)
def test_each_line_of_the_promise_can_be_broken(changed: dict[str, Any], broken: list[str]) -> None:
    lines = soak.verdict(PLAN, report(**changed), True)
    assert [what for what, _, kept in lines if not kept] == broken


def test_a_log_probability_that_is_nan_is_seen() -> None:
    traffic = _soak_traffic.Traffic.__new__(_soak_traffic.Traffic)
    traffic.streams = {"a": _soak_traffic.Stream("a", None)}
    traffic.problems = []
    step = {7: SimpleNamespace(logprob=float("nan"))}
    found = SimpleNamespace(token_ids=[7], logprobs=[step], finish_reason=None)
    output = SimpleNamespace(request_id="a", outputs=[found], finished=False)
    traffic._take(output)
    assert traffic.problems == ["a: log-probabilities {7: nan}"]
