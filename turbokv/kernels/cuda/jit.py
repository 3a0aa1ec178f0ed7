# SPDX-License-Identifier: Apache-2.0
"""Variants that the library lacks, compiled when they are first needed and kept in a cache.

The cache lies in ``turbokv/kernels`` of the user's cache folder (``XDG_CACHE_HOME``, else
``~/.cache``), one folder for each state of the headers, compiler and architectures; it can be
deleted at any time. Processes that need the same variant at once wait for one of them to compile
it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from turbokv.kernels.cuda import build
from turbokv.kernels.cuda.build import Variant

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return where compiled variants are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "turbokv" / "kernels"


def compile_variant(variant: Variant, archs: Sequence[str]) -> Path:
    """Return the library of ``variant``, compiling it unless it is in the cache.

    Parameters
    ----------
    variant, archs
        What to compile, and for which architectures, e.g. ``("90a",)``.

    Raises
    ------
    build.BuildError
        If it is not in the cache and nvcc is missing or fails.
    """
    nvcc = build.find_nvcc()
    if nvcc is None:
        raise build.BuildError(
            f"nvcc is not found, and only variants of head sizes {build.DIMS} and widths"
            f" {', '.join(f'K{k}V{v}' for k, v in build.PAIRS)} are compiled ahead of time; install"
            " the CUDA toolkit 13 (CUDA_HOME or PATH)"
        )
    state = [build.nvcc_version(nvcc), build.sources_digest(), *archs]
    folder = cache_folder() / hashlib.sha256("\0".join(state).encode()).hexdigest()[:32]
    target = folder / f"{variant.name}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{variant.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():  # another process may have compiled it meanwhile
            _log.info("compiling %s for %s into %s", variant.name, " ".join(archs), folder)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                fresh = Path(scratch) / target.name
                build.build_variant(fresh, variant, archs)
                with fresh.open("rb+") as file:  # on the disk before its name is
                    os.fsync(file.fileno())
                os.replace(fresh, target)
    return target
