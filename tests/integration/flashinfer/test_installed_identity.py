# SPDX-License-Identifier: Apache-2.0
"""An installed FlashInfer that was built with other headers than turbokv's is refused."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENGINES = {
    "flashinfer": ("flashinfer-python", "from flashinfer.turbokv import gen_turbokv_modules"),
    "vllm": ("vllm", "import vllm.turbokv_hooks"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("edited", [None, "kernels/cuda/include/turbokv/types.cuh", "FORMAT.md"])
def test_an_engine_takes_the_turbokv_it_was_built_with(
    engine: str, edited: str | None, tmp_path: Path
) -> None:
    distribution, statement = ENGINES[engine]
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{engine} is not installed")
    if "+turbokv" not in version:
        pytest.skip(f"{engine} {version} is upstream's")
    spec = importlib.util.find_spec("turbokv")
    assert spec is not None and spec.submodule_search_locations
    package = tmp_path / "turbokv"
    shutil.copytree(spec.submodule_search_locations[0], package)
    if edited is not None:
        with (package / edited).open("a") as file:
            file.write("\n")
    done = subprocess.run(
        [sys.executable, "-c", statement],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
    )
    if edited is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert "BuildMismatchError" in done.stderr and "make build-all" in done.stderr
