# SPDX-License-Identifier: Apache-2.0
"""The vLLMs that can be asked without a GPU (:mod:`tests.vllm.fake_cuda`), and how."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.vllm import entry_point
from tests.vllm.fake_cuda import END

ROOT = pathlib.Path(__file__).parents[2]
STOCK = ROOT / "build" / "stock-vllm"
MISSING = "no vLLM for CUDA is installed or fetched (make stock-vllm)"


@dataclass
class VLLM:
    """One vLLM: its Python, what comes first on its path, and the process that is asked."""

    version: str
    python: str
    folder: pathlib.Path | None
    is_patched: bool = False
    processes: list[subprocess.Popen[str]] = field(default_factory=list)


def installed() -> list[VLLM]:
    """Return the vLLM of this Python, if it is one for CUDA."""
    if importlib.util.find_spec("vllm") is None:
        return []
    if importlib.util.find_spec("vllm._C_stable_libtorch") is None:
        return []  # the one for CPUs
    is_patched = importlib.util.find_spec("vllm.turbokv_hooks") is not None
    return [VLLM("installed", sys.executable, None, is_patched)]


def fetched() -> list[VLLM]:
    """Return those whose Python files are there."""
    python = STOCK / "venv" / "bin" / "python"
    folders = sorted(folder for folder in STOCK.glob("[0-9]*") if (folder / "vllm").is_dir())
    return [VLLM(folder.name, str(python), folder) for folder in folders]


@contextlib.contextmanager
def running(vllm: VLLM) -> Iterator[VLLM]:
    """Keep the process of a vLLM, since importing it takes most of the time."""
    with tempfile.TemporaryDirectory() as made:
        own = [str(ROOT), str(entry_point.write(pathlib.Path(made)))]
        if vllm.folder is None:
            own += sys.path
        else:
            own.insert(0, str(vllm.folder))
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": os.pathsep.join(own),
        }
        for name in ("TRITON_INTERPRET", "VLLM_PLUGINS", "VLLM_TARGET_DEVICE"):
            environment.pop(name, None)
        vllm.processes.append(
            subprocess.Popen(
                [vllm.python, str(ROOT / "tests/vllm/fake_cuda.py")],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        try:
            yield vllm
        finally:
            vllm.processes.pop().communicate()


def ask(
    vllm: VLLM, folder: pathlib.Path, dtype: str, arguments: dict[str, Any], world: str = "plugin"
) -> dict[str, Any]:
    (process,) = vllm.processes
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([world, str(folder), dtype, arguments]) + "\n")
    process.stdin.flush()
    answer: dict[str, Any] | None = None
    for line in process.stdout:  # libraries may print, too
        if line.strip() == END:
            break
        if line.startswith(('{"found"', '{"error"')):
            answer = json.loads(line)
    if answer is None:
        raise RuntimeError(f"no answer; the process: {process.poll()}")
    return answer


def describe(vllm: VLLM, folder: pathlib.Path, dtype: str, **arguments: Any) -> Any:
    answer = ask(vllm, folder, dtype, arguments)
    assert "found" in answer, answer
    return answer["found"]


def refused(vllm: VLLM, folder: pathlib.Path, dtype: str, **arguments: Any) -> str:
    answer = ask(vllm, folder, dtype, arguments)
    assert "error" in answer, answer
    return str(answer["error"])
