# SPDX-License-Identifier: Apache-2.0
"""Two ranks against one, over the same pages split by heads; two GPUs, or vLLM's CPU engine."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import pytest
import torch

from tests.vllm import engine as e
from tests.vllm import models

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
if importlib.util.find_spec("vllm.turbokv_hooks") is None:
    pytest.skip("this vLLM is not the patched one", allow_module_level=True)

CPU = e.on_cpu()
if not CPU and torch.cuda.device_count() < 2:
    pytest.skip("neither vLLM's CPU engine nor two GPUs", allow_module_level=True)
if not CPU:
    pytestmark = pytest.mark.gpu

LONG, TOKENS = (200, 5) if CPU else (1500, 24)
LENGTHS = (LONG, 40, 5, LONG // 2)


def answers(model: str, ranks: int, options: dict[str, Any]) -> list[e.Answer]:
    settings: dict[str, Any] = {"max_model_len": 2 * LONG, "turbokv": options}
    if CPU:
        settings |= {"enforce_eager": True, "block_size": 16, "kv_cache_memory_bytes": 1 << 27}
    if ranks > 1:
        settings |= {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
        if CPU:
            settings["worker_cls"] = "tests.vllm.cpu_worker.Worker"
    with e.engine(model, "tq_k5v3", **settings) as llm:
        return e.ask(llm, e.prompts(LENGTHS, models.VOCAB), TOKENS)


@pytest.mark.parametrize("calibration", ["none", "file", "auto"])
def test_two_ranks_answer_like_one(
    calibration: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank holds one of two KV heads, its offsets and its copies."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = models.make_tiny("biased", tmp_path / "model")
    options: dict[str, Any] = {"window": 32, "sinks": 4, "calibration": calibration}
    if calibration == "file":
        from transformers import AutoModelForCausalLM

        from turbokv.integrations.transformers.calibrate import calibrate

        options["calibration"] = str(tmp_path / "calibration.safetensors")
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        calibrate(loaded.eval(), tokens=2048).save(options["calibration"])
    found = e.compare(answers(model, 2, options), answers(model, 1, options))
    print(found)
    # only sums over ranks round otherwise; other heads' offsets or pages would cost tenths
    assert found.error < 0.02
    assert found.agreed > 0.9
