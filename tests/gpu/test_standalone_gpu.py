# SPDX-License-Identifier: Apache-2.0
"""The example outside PyTorch: compiled for this device, run, and its own checks pass."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="wanted a CUDA device"),
]

if torch.cuda.is_available():
    from turbokv.kernels.cuda import build


def test_the_example_checks_itself(tmp_path: Path) -> None:
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("wanted nvcc in CUDA_HOME/bin or on PATH")
    major, minor = torch.cuda.get_device_capability()
    arch = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    source, program = build.HERE / "examples" / "standalone.cu", tmp_path / "standalone"
    target = f"arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, "-std=c++17", "-O2", "-gencode", target, f"-I{build.INCLUDE}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert done.stdout.endswith("ok\n")
