# SPDX-License-Identifier: Apache-2.0
"""A run with another cache dtype is the same whether our plugin is installed or not."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.vllm import engine as e
from tests.vllm import models
from turbokv.integrations.vllm import plugin

if (reason := e.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

CPU = e.on_cpu()
if plugin.is_patched():
    pytest.skip("this vLLM needs no plugin", allow_module_level=True)
if not CPU and not torch.cuda.is_available():
    pytest.skip("neither vLLM's CPU engine nor a GPU", allow_module_level=True)
if not CPU:
    pytestmark = pytest.mark.gpu

ROOT = pathlib.Path(__file__).parents[2]


def run(model: str, plugins: str | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_model_len": 512, "enforce_eager": True}
    if CPU:
        settings |= {"block_size": e.CPU_BLOCK, "kv_cache_memory_bytes": 1 << 27}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("VLLM_PLUGINS", None)
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    command = [sys.executable, "-m", "tests.vllm.answers", model, "auto", json.dumps(settings)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kind", ["dense", "mixed"])
def test_sixteen_bits_are_as_without_the_plugin(kind: str, tmp_path: pathlib.Path) -> None:
    model = models.make_tiny(kind, tmp_path / kind)
    with_plugin, without = run(model, None), run(model, "")
    assert with_plugin == without
    assert not any("turbokv" in backend for backend in with_plugin["backends"])
