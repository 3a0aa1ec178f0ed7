# SPDX-License-Identifier: Apache-2.0
"""Build back end: setuptools, and the CUDA kernels in the wheel where nvcc is present.

Settings of ``pip wheel`` and ``python -m build``, given as ``--config-settings NAME=VALUE``:

``cuda``
    ``auto`` (the default: build the kernels if nvcc is found), ``on`` (fail without nvcc), ``off``.
``archs``
    Architectures separated by commas, or ``release`` (the default).
``jobs``
    Compilers at a time.

Wheels with kernels are tagged ``py3-none-manylinux_2_N_x86_64``, where N is what the library was
found to need; those without are ``py3-none-any``. Editable installs never compile: ``make cuda``
builds the kernels in place. An isolated build fetches PyTorch for its headers if it will compile;
``--no-build-isolation`` uses the one that is installed.
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
PACKAGE = Path("turbokv") / "kernels" / "cuda"
# The newest symbol versions that a platform tag allows: glibc itself, and the libstdc++ of the
# oldest distribution with that glibc (as in auditwheel's policies).
POLICIES = {
    (2, 28): (3, 4, 25),
    (2, 31): (3, 4, 28),
    (2, 34): (3, 4, 29),
    (2, 35): (3, 4, 30),
    (2, 39): (3, 4, 33),
}
_library: Path | None = None


def _load_compiler():
    """Load build.py by its path: importing the package would need PyTorch."""
    spec = importlib.util.spec_from_file_location("turbokv_cuda_build", ROOT / PACKAGE / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _wants_cuda(settings: dict, compiler) -> bool:
    choice = settings.get("cuda", "auto")
    if choice not in ("auto", "on", "off"):
        raise ValueError(f"cuda: wanted auto, on or off, got {choice!r}")
    if choice == "on":
        compiler.require_nvcc()
    return choice == "on" or (choice == "auto" and compiler.find_nvcc() is not None)


def get_requires_for_build_wheel(config_settings=None):
    """Return what building needs besides setuptools: PyTorch, if there will be kernels."""
    needs = build_meta.get_requires_for_build_wheel(None)
    if _wants_cuda(config_settings or {}, compiler := _load_compiler()):
        needs.append(f"torch>={'.'.join(map(str, compiler.OLDEST_TORCH))}")
    return needs


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Build a wheel, with the CUDA kernels if they are wanted."""
    global _library
    settings = dict(config_settings or {})
    compiler = _load_compiler()
    _library = None
    if _wants_cuda(settings, compiler):
        chosen = settings.get("archs", "release")
        archs = compiler.RELEASE_ARCHS if chosen == "release" else chosen.split(",")
        folder = ROOT / "build" / "cuda" / "-".join(archs)
        _library = compiler.build_library(
            folder / compiler.LIBRARY.name,
            folder=folder,
            archs=archs,
            jobs=int(settings["jobs"]) if "jobs" in settings else None,
            verbose=True,
        )
    others = {k: v for k, v in settings.items() if k not in ("cuda", "archs", "jobs")}
    return build_meta.build_wheel(wheel_directory, others, metadata_directory)


def platform_tag(library: Path) -> str:
    """Return the oldest manylinux tag whose policy allows the symbols that ``library`` needs.

    Versions are read from its string table, so a name that is there for another reason could make
    the tag newer than need be, never older.
    """
    content = library.read_bytes()

    def newest(prefix: bytes) -> tuple[int, ...]:
        found = re.findall(rb"\0" + prefix + rb"_(\d+(?:\.\d+)+)(?=\0)", content)
        return max((tuple(map(int, v.split(b"."))) for v in found), default=(0,))

    glibc, libstdcxx = newest(b"GLIBC"), newest(b"GLIBCXX")
    for policy, allowed in POLICIES.items():
        if glibc <= policy and libstdcxx <= allowed:
            return f"manylinux_{policy[0]}_{policy[1]}_{platform.machine()}"
    return f"linux_{platform.machine()}"


class BuildPy(build_py):
    """Puts the library beside the sources that it was built from."""

    def run(self):
        """Build the Python files, then add the library."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / PACKAGE
        for stale in folder.glob("*.so"):  # setuptools keeps its folder between builds
            stale.unlink()
        if _library is not None:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_library, folder / _library.name)


class KernelDistribution(Distribution):
    """Bound to a platform if there is a library."""

    def has_ext_modules(self):
        """Whether setuptools should lay the wheel out for a platform."""
        return _library is not None


class BdistWheel(bdist_wheel):
    """Tags the wheel: no Python version, and the platform only if there is a library."""

    def get_tag(self):
        """Return the tags of Python, its ABI and the platform."""
        return ("py3", "none", "any" if _library is None else platform_tag(_library))
