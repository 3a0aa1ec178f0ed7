#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Bring the Python files of released vLLMs, and what they import, into ``build/stock-vllm``.

    python scripts/stock_vllm.py 0.28.0 0.32.0 0.33.0

``tests/vllm/test_platform.py`` asks them what they make of our cache dtypes, without a GPU and so
without vLLM's libraries: of a wheel of 330 MB it keeps 15 MB. One environment, ``venv``, serves
all: it holds what their configuration imports and sees the packages of the Python that runs this,
PyTorch among them. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tests" / "vllm" / "stock_requirements.txt"
# vLLM names one wheel for all Pythons, of CUDA's default version.
PLATFORM = ["--python-version", "3.12", "--platform", "manylinux_2_28_x86_64"]
_LARGEST = 3 << 20
_PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet"]


def fetch(version: str, folder: Path) -> None:
    """Unpack the small files of vLLM's wheel into ``folder``, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        part = Path(made)
        words = ["download", "--no-deps", "--only-binary=:all:", "--dest", made, *PLATFORM]
        subprocess.run([sys.executable, *_PIP, *words, f"vllm=={version}"], check=True)
        (wheel,) = part.glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for item in archive.infolist():
                if item.file_size <= _LARGEST and not item.filename.endswith(".so"):
                    archive.extract(item, part / "files")
        os.rename(part / "files", folder)


def make_environment(folder: Path) -> None:
    """Make the environment, again when its requirements changed."""
    stamp, wanted = folder / "requirements.txt", REQUIREMENTS.read_text()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    (Path(site.stdout.strip()) / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([str(python), *_PIP, "install", "-r", str(REQUIREMENTS)], check=True)
    stamp.write_text(wanted)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", help="released versions, such as 0.33.0")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "stock-vllm")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for version in args.versions:
        if not (args.out / version).is_dir():
            print(f"fetching the Python files of vLLM {version}", flush=True)
            fetch(version, args.out / version)
    make_environment(args.out / "venv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
