# SPDX-License-Identifier: Apache-2.0
"""A GPU that another process uses too: the 16-bit window stays."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None or not torch.cuda.is_available():
    pytest.skip("needs vLLM and a GPU", allow_module_level=True)

from tests.vllm import engine as e
from tests.vllm import models

pytestmark = pytest.mark.gpu
HOLD = """
import sys, torch
held = torch.zeros(int(float(sys.argv[1]) * 2**30), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("held", flush=True)
sys.stdin.readline()
"""


def slots(model: str) -> int:
    """Return the slots of a started engine's pool."""
    total = torch.cuda.get_device_properties(0).total_memory
    settings: dict[str, Any] = {
        "kv_cache_memory_bytes": None,
        "gpu_memory_utilization": 16 * 2**30 / total,
        "max_model_len": 1024,
        "turbokv": {"window": 128, "sinks": 4},
    }
    with e.engine(model, "tq4", **settings) as llm:
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        copies = [layer.impl.cache.copies for layer in context.values() if hasattr(layer, "impl")]
        return 0 if copies[0] is None else int(copies[0].shape[0])


def test_what_others_hold_takes_no_slots(tmp_path: pathlib.Path) -> None:
    model = models.make_tiny("dense", tmp_path / "dense")
    alone = slots(model)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, "40"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "held"
        beside = slots(model)
    finally:
        other.communicate("\n")
    print(alone, beside)
    assert alone > 0
    assert abs(beside - alone) <= 0.05 * alone
