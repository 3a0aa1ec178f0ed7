# SPDX-License-Identifier: Apache-2.0
"""Compile the CPU codec: one shared library, with kernels for every instruction set it may meet.

Standard library only, so that a build back end can load this file by its path. The library knows
neither Python nor PyTorch: one build serves every version of both, on every processor of its
architecture.

``CXX``, ``CXXFLAGS`` and ``LDFLAGS`` are read as setuptools reads them. Flags that decide the bytes
come last and win.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "libturbokv_cpu.so"
SOURCES = ("codec.h", "codec.cpp", "kernels.cpp")

# FORMAT.md wants one rounding an operation. -fno-math-errno and -fno-trapping-math change no number
# and let loops become vector code. -Wno-psabi: wide vectors are passed to inlined functions only.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-fast-math",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)
_LINK_FLAGS = ("-shared", "-pthread")
# Which kernels are compiled, and the flags that their processors allow.
_KERNELS: dict[str, tuple[str, ...]] = {"baseline": ()}
_X86_KERNELS: dict[str, tuple[str, ...]] = {"avx2": ("-mavx2",)}


class BuildError(RuntimeError):
    """A compiler is missing or failed; the message holds what it printed."""


def find_compiler() -> list[str] | None:
    """Return the C++ compiler as a command: ``CXX`` if that is set, else what is on the path."""
    if os.environ.get("CXX", "").strip():
        return shlex.split(os.environ["CXX"])
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return None if found is None else [found]


def require_compiler() -> list[str]:
    """Return the C++ compiler as a command, or raise BuildError saying what to do."""
    compiler = find_compiler()
    if compiler is None or shutil.which(compiler[0]) is None:
        raise BuildError(
            "CXX: wanted a C++ compiler there or c++, g++ or clang++ on PATH,"
            f" got {'none' if compiler is None else shlex.join(compiler)}"
        )
    return compiler


def sources_digest() -> str:
    """Return a SHA-256 over the C++ sources, names and contents."""
    digest = hashlib.sha256()
    for name in SOURCES:
        content = (HERE / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        raise BuildError(f"failed ({done.returncode}): {shlex.join(command)}\n{done.stdout}")
    if done.stdout.strip():
        print(done.stdout.rstrip(), file=sys.stderr)


def build_library(
    target: Path = LIBRARY, *, machine: str | None = None, extra: Sequence[str] = ()
) -> Path:
    """Compile the library.

    Parameters
    ----------
    target
        The library to write; replaced in one step.
    machine
        What it is compiled for, if that is not this machine, as ``platform.machine()`` names it.
    extra
        More flags for the compiler.

    Returns
    -------
    Path
        ``target``.

    Raises
    ------
    BuildError
        If there is no C++ compiler, or it fails.
    """
    compiler = require_compiler()
    machine = platform.machine() if machine is None else machine
    kernels = _KERNELS | (_X86_KERNELS if machine.lower() in ("x86_64", "amd64") else {})
    own = shlex.split(os.environ.get("CXXFLAGS", ""))
    base = [*compiler, *own, *_FLAGS, *extra]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="turbokv-cpu-") as name:
        folder = Path(name)
        codec, linked = folder / "codec.o", folder / LIBRARY.name
        digest = f'-DTURBOKV_CPU_SOURCES="{sources_digest()}"'
        commands = [[*base, digest, "-c", str(HERE / "codec.cpp"), "-o", str(codec)]]
        objects = [str(codec)]
        for kernel, flags in kernels.items():
            objects.append(str(folder / f"{kernel}.o"))
            source = [f"-DTURBOKV_KERNELS={kernel}", "-c", str(HERE / "kernels.cpp")]
            commands.append([*base, *flags, *source, "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for future in [pool.submit(_run, command) for command in commands]:
                future.result()
        ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
        _run([*compiler, *own, *extra, *objects, *ldflags, *_LINK_FLAGS, "-o", str(linked)])
        # a process that has the old file loaded keeps it
        fresh = target.with_suffix(f".{os.getpid()}.new")
        try:
            shutil.copyfile(linked, fresh)
            os.replace(fresh, target)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the library from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m turbokv.kernels.cpu", description="Compile TurboKV's CPU kernels."
    )
    parser.add_argument("--output", type=Path, default=LIBRARY, help="default: in the package")
    chosen = parser.parse_args(arguments)
    try:
        print(build_library(chosen.output))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
