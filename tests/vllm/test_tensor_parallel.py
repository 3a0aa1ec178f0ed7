# SPDX-License-Identifier: Apache-2.0
"""Two ranks, or two stages, against one: pages split by heads or layers; two GPUs, or a CPU."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch

from tests.vllm import engine as e
from tests.vllm import models
from turbokv.integrations.vllm import plugin

if (reason := e.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

CPU = e.on_cpu()
if not CPU and torch.cuda.device_count() < 2:
    pytest.skip("neither vLLM's CPU engine nor two GPUs", allow_module_level=True)
if not CPU:
    pytestmark = pytest.mark.gpu

LONG, TOKENS = (200, 5) if CPU else (1500, 24)
LENGTHS = (LONG, 40, 5, LONG // 2)


def answers(model: str, split: str | None, options: dict[str, Any]) -> list[e.Answer]:
    settings: dict[str, Any] = {"max_model_len": 2 * LONG, "turbokv": options}
    if CPU:
        settings |= {
            "enforce_eager": True,
            "block_size": e.CPU_BLOCK,
            "kv_cache_memory_bytes": 1 << 27,
        }
    if split is not None:
        settings |= {split: 2, "distributed_executor_backend": "mp"}
        if CPU and plugin.is_patched():
            settings["worker_cls"] = "tests.vllm.cpu_worker.Worker"
    with e.engine(model, "tq_k5v3", **settings) as llm:
        return e.ask(llm, e.prompts(LENGTHS, models.VOCAB), TOKENS)


@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
@pytest.mark.parametrize("calibration", ["none", "file", "auto"])
def test_two_processes_answer_like_one(
    split: str, calibration: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank holds one of two KV heads, a stage two of four layers; offsets, maps, copies, too."""
    if CPU and split == "pipeline_parallel_size":
        pytest.skip("vLLM's CPU engine gives its second stage nothing to start from")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = models.make_tiny("biased", tmp_path / "model")
    options: dict[str, Any] = {"window": 32, "sinks": 4, "calibration": calibration}
    if calibration == "file":
        from transformers import AutoModelForCausalLM

        from turbokv.integrations.transformers.calibrate import calibrate

        options["calibration"] = str(tmp_path / "calibration.safetensors")
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        parts = ("offsets", "k_map")
        calibrate(loaded.eval(), tokens=2048, parts=parts).save(options["calibration"])
    found = e.compare(answers(model, split, options), answers(model, None, options))
    print(found)
    # only sums over ranks round otherwise; other heads' offsets, maps or pages would cost tenths
    assert found.error < 0.02
    assert found.agreed > 0.9
