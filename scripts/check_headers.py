#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compile every public header alone: with nvcc for given architectures, and with g++ without CUDA.

A header that needs another one to be included first, or that warns, fails. Headers may include CUDA
and the standard library only.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

INCLUDE = pathlib.Path(__file__).resolve().parent.parent / "turbokv/kernels/cuda/include"
# Headers of kernels only, which mean nothing without CUDA; and all in folders.
DEVICE_ONLY = (
    "decode.cuh",
    "expand.cuh",
    "launch.cuh",
    "ptx.cuh",
    "tile_rows.cuh",
)
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
_CUDA = re.compile(r"cuda[a-z0-9_]*\.h")
_STANDARD = re.compile(r"[a-z_]+")
_INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.MULTILINE)
_HOST_FLAGS = ("-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++")


def headers() -> list[pathlib.Path]:
    """Return the public headers, sorted."""
    return sorted((INCLUDE / "turbokv").rglob("*.cuh"))


def name_of(header: pathlib.Path) -> str:
    """Return how a header is included, without ``turbokv/``."""
    return header.relative_to(INCLUDE / "turbokv").as_posix()


def foreign_includes() -> list[str]:
    """Return ``header: include`` of everything that is neither CUDA's, the standard's nor ours."""
    found = []
    for header in headers():
        for name in _INCLUDE.findall(header.read_text()):
            own = name.startswith("turbokv/") and (INCLUDE / name).is_file()
            if not (own or _CUDA.fullmatch(name) or _STANDARD.fullmatch(name)):
                found.append(f"{name_of(header)}: {name}")
    return found


def _run(command: Sequence[str], what: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode or "warning" in output:
        raise RuntimeError(f"{what} does not compile alone without warnings:\n{output}")


def check_host() -> None:
    """Compile each header that the host can use with g++, without CUDA's headers."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("g++: wanted it on PATH")
    for header in headers():
        name = name_of(header)
        if "/" not in name and name not in DEVICE_ONLY:
            # from standard input: compiled as a main file, a header would warn of its own guard
            line = f"#include <turbokv/{name}>\n"
            command = [compiler, *_HOST_FLAGS, f"-I{INCLUDE}", "-"]
            result = subprocess.run(command, input=line, capture_output=True, text=True)
            if result.returncode or result.stderr:
                raise RuntimeError(f"{name} does not compile alone:\n{result.stderr}")


def check_device(archs: Sequence[str], *, device_only: bool = False) -> None:
    """Compile each header with nvcc for each architecture, one process at a time.

    ``device_only`` leaves the host's half out, which takes most of the time; one architecture then.
    """
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise RuntimeError("nvcc: wanted it on PATH")
    if device_only:
        (arch,) = archs
        targets = ["-ptx", f"-arch={arch}"]
    else:
        # like the build: the half for the host ignores `#pragma unroll`
        targets = ["-c", "-Xcompiler=-Wall,-Wno-unknown-pragmas"]
        targets += [f"-gencode=arch=compute_{a.removeprefix('sm_')},code={a}" for a in archs]
    with tempfile.TemporaryDirectory() as folder:
        for header in headers():
            source = pathlib.Path(folder) / f"{header.stem}.cu"
            source.write_text(f"#include <turbokv/{name_of(header)}>\n")
            command = [compiler, "-std=c++17", *targets, f"-I{INCLUDE}"]
            command += [str(source), "-o", f"{folder}/{header.stem}.out"]
            _run(command, f"{name_of(header)} ({', '.join(archs)})")


def main() -> None:
    """Check includes, then compile with g++, then with nvcc unless ``--host-only``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--archs", default=",".join(ARCHS), help="comma-separated, e.g. sm_90a")
    parser.add_argument("--host-only", action="store_true", help="do not run nvcc")
    args = parser.parse_args()
    try:
        foreign = foreign_includes()
        if foreign:
            raise RuntimeError("headers include CUDA and the standard only:\n" + "\n".join(foreign))
        check_host()
        if not args.host_only:
            check_device(args.archs.split(","))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
