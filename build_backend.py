# SPDX-License-Identifier: Apache-2.0
"""Build back end: setuptools, and in the wheel what compilers are there for.

The CUDA kernels need nvcc, the CPU codec a C++ compiler.

Settings of ``pip wheel`` and ``python -m build``, given as ``--config-settings NAME=VALUE``:

``cuda``
    ``auto`` (the default: build the kernels if nvcc is found), ``on`` (fail without nvcc), ``off``.
``archs``
    Architectures separated by commas, or ``release`` (the default).
``jobs``
    Compilers of CUDA at a time.
``cpu``
    The same three for the CPU codec and a C++ compiler.

Wheels with a library are tagged ``py3-none-manylinux_2_N_x86_64``, where N is what the libraries
were found to need; those without are ``py3-none-any``. Editable installs never compile: ``make
cuda`` builds the kernels in place, ``python -m turbokv.kernels.cpu`` the codec. An isolated build
fetches PyTorch for its headers if it will compile kernels; ``--no-build-isolation`` uses the one
that is installed.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 (hooks that are setuptools' own)
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
CUDA, CPU = (Path("turbokv") / "kernels" / name for name in ("cuda", "cpu"))
# The newest symbol versions that a platform tag allows: glibc itself, and the libstdc++ of the
# oldest distribution with that glibc (as in auditwheel's policies).
POLICIES = {
    (2, 28): (3, 4, 25),
    (2, 31): (3, 4, 28),
    (2, 34): (3, 4, 29),
    (2, 35): (3, 4, 30),
    (2, 39): (3, 4, 33),
}
_libraries: dict[Path, Path] = {}  # by package: what was built for the wheel


def _load_compiler(package: Path):
    """Load a package's build.py by its path: importing the package would need PyTorch."""
    name = f"turbokv_{package.name}_build"
    spec = importlib.util.spec_from_file_location(name, ROOT / package / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _wants(settings: dict, name: str, find, require) -> bool:
    """Whether to build a library, by its setting and by whether its compiler is found."""
    choice = settings.get(name, "auto")
    if choice not in ("auto", "on", "off"):
        raise ValueError(f"{name}: wanted auto, on or off, got {choice!r}")
    if choice == "on":
        require()
    return choice == "on" or (choice == "auto" and find() is not None)


def get_requires_for_build_wheel(config_settings=None):
    """Return what building needs in addition to setuptools: PyTorch, if there will be kernels."""
    needs = build_meta.get_requires_for_build_wheel(None)
    cuda = _load_compiler(CUDA)
    if _wants(config_settings or {}, "cuda", cuda.find_nvcc, cuda.require_nvcc):
        needs.append(f"torch>={'.'.join(map(str, cuda.OLDEST_TORCH))}")
    return needs


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Build a wheel, with the libraries that are wanted."""
    settings = dict(config_settings or {})
    cuda, cpu = _load_compiler(CUDA), _load_compiler(CPU)
    _libraries.clear()
    if _wants(settings, "cpu", cpu.find_compiler, cpu.require_compiler):
        _libraries[CPU] = cpu.build_library(ROOT / "build" / "cpu" / cpu.LIBRARY.name)
    if _wants(settings, "cuda", cuda.find_nvcc, cuda.require_nvcc):
        chosen = settings.get("archs", "release")
        archs = cuda.RELEASE_ARCHS if chosen == "release" else chosen.split(",")
        folder = ROOT / "build" / "cuda" / "-".join(archs)
        _libraries[CUDA] = cuda.build_library(
            folder / cuda.LIBRARY.name,
            folder=folder,
            archs=archs,
            jobs=int(settings["jobs"]) if "jobs" in settings else None,
            verbose=True,
        )
    others = {k: v for k, v in settings.items() if k not in ("cpu", "cuda", "archs", "jobs")}
    return build_meta.build_wheel(wheel_directory, others, metadata_directory)


def platform_tag(*libraries: Path) -> str:
    """Return the oldest manylinux tag whose policy allows the symbols that ``libraries`` need.

    Versions are read from their string tables, so a name that is there for another reason could
    make the tag newer than need be, never older.
    """
    content = b"".join(library.read_bytes() for library in libraries)

    def newest(prefix: bytes) -> tuple[int, ...]:
        found = re.findall(rb"\0" + prefix + rb"_(\d+(?:\.\d+)+)(?=\0)", content)
        return max((tuple(map(int, v.split(b"."))) for v in found), default=(0,))

    glibc, libstdcxx = newest(b"GLIBC"), newest(b"GLIBCXX")
    for policy, allowed in POLICIES.items():
        if glibc <= policy and libstdcxx <= allowed:
            return f"manylinux_{policy[0]}_{policy[1]}_{platform.machine()}"
    return f"linux_{platform.machine()}"


class BuildPy(build_py):
    """Puts libraries beside the sources that they were built from."""

    def run(self):
        """Build the Python files, then add the libraries."""
        super().run()
        if self.editable_mode:
            return
        for package in (CPU, CUDA):
            folder = Path(self.build_lib) / package
            for stale in folder.glob("*.so"):  # setuptools keeps its folder between builds
                stale.unlink()
        for package, library in _libraries.items():
            folder = Path(self.build_lib) / package
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(library, folder / library.name)


class KernelDistribution(Distribution):
    """Bound to a platform if there is a library."""

    def has_ext_modules(self):
        """Whether setuptools should lay the wheel out for a platform."""
        return bool(_libraries)


class BdistWheel(bdist_wheel):
    """Tags the wheel: no Python version, and the platform only if there is a library."""

    def get_tag(self):
        """Return the tags of Python, its ABI and the platform."""
        return ("py3", "none", platform_tag(*_libraries.values()) if _libraries else "any")
