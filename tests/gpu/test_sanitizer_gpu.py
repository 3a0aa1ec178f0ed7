# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer finds nothing in our kernels."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="wanted a CUDA device (pytest -m gpu)"
    ),
    pytest.mark.skipif(SANITIZER is None, reason="wanted compute-sanitizer on the path"),
]
OURS = ("DecodeKernel", "StoreKernel", "DecompressPagesKernel")


def sanitize(tool: str, *options: str) -> str:
    command = [str(SANITIZER), "--tool", tool, "--print-limit", "20", *options]
    command += [sys.executable, "-m", "tests.gpu.sanitized_cases"]
    # each tensor an allocation of its own, or what lies beyond one would be another's
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550
    )
    output = done.stdout + done.stderr
    assert "all cases ran" in output, output[-3000:]
    return output


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(tool: str) -> None:
    # PyTorch's own kernels would take most of the time
    output = sanitize(tool, *(word for name in OURS for word in ("--kernel-name", f"kns={name}")))
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    assert summary is not None, output[-3000:]
    assert summary[1] == "0", output[-3000:]


def test_nothing_is_read_before_it_is_written() -> None:
    # of all kernels, as those that write have to be seen; PyTorch's are not ours to judge
    output = sanitize("initcheck")
    found = [line for line in output.splitlines() if re.search(rf" at .*({'|'.join(OURS)})", line)]
    assert not found, "\n".join(found)
