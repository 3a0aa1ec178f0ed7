#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Test the three layers: codec and headers, FlashInfer's wheel, vLLM's wheel.

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


@dataclass
class Layer:
    """One of the three, and what came of it."""

    name: str
    python: Path
    folder: Path
    arguments: list[str]
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
    environment = dict(os.environ, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2"))
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
    parser.add_argument("--layer", choices=("codec", "flashinfer", "vllm"), help="only this one")
    args, more = parser.parse_known_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    here = Path(sys.executable)
    python = here if args.installed else install(args.dist)
    # A GPU host may have turbokv on its path only, with the library that make cuda put there.
    copy = ROOT if args.installed else copy_tests()
    engines = ["tests/integration/flashinfer", f"--ignore={NEEDS_SOURCES}"]
    layers = {
        "codec": Layer(
            "codec and headers, forks",
            here,
            ROOT,
            [*SOURCES, "--ignore=tests/integration/flashinfer", NEEDS_SOURCES],
        ),
        "flashinfer": Layer("FlashInfer, installed", python, copy, engines),
        "vllm": Layer("vLLM, installed", python, copy, ["tests/vllm"]),
    }
    chosen = [layers[args.layer]] if args.layer else list(layers.values())
    device = has_device(python)
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
        for marks in (own, "gpu") if device else (own,):
            run(layer, marks, more)
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
