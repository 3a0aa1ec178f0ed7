#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build the wheels of TurboKV and of the patched engines from one source.

    build_forks.py all | turbokv | flashinfer | vllm     wheels to dist/
    build_forks.py check                                  apply all patches to fresh copies of BASE
    build_forks.py edit FORK                              a repository with a commit for each patch
    build_forks.py refresh FORK                           write that repository's commits as patches

A fork is upstream at BASE, plus ``patches/``, ``shims/`` and turbokv's headers; see
``patches/README.md``. What is up to date is not built again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from forks.base import ROOT, Fork, ForkError, apply_patches, download, unpack
from forks.wheels import (
    build_flashinfer,
    build_turbokv,
    build_vllm,
    has_kernels,
    inputs_digest,
    turbokv_digest,
)

FORKS = ("flashinfer", "vllm")
_IDENTITY = ("-c", "user.name=TurboKV maintainers", "-c", "user.email=maintainers@turbokv.invalid")
_FORMAT = ("--zero-commit", "--full-index", "--no-signature", "--no-stat", "--quiet", "-N")


def build(name: str, dist: Path, root: Path, archs: str, jobs: int) -> Path:
    """Build one wheel unless it is there and nothing that decides it has changed."""
    begin = time.monotonic()
    folder = root / "build" / "forks" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    fork = None if name == "turbokv" else Fork.load(name, root)
    digest = turbokv_digest(root, archs) if fork is None else inputs_digest(fork)
    stamp = folder.with_suffix(".stamp")
    if stamp.is_file():
        built, was, bytes_ = stamp.read_text().split()
        wheel = dist / built
        if was == digest and wheel.is_file() and wheel.stat().st_size == int(bytes_):
            print(f"{built}: up to date")
            return wheel
    print(f"{name}: building", flush=True)
    if fork is None:
        wheel = build_turbokv(root, dist, archs, jobs)
    else:
        wheel = {"flashinfer": build_flashinfer, "vllm": build_vllm}[name](fork, dist)
    size = wheel.stat().st_size
    stamp.write_text(f"{wheel.name} {digest} {size}\n")
    print(f"{wheel.name}: {size / 1e6:.1f} MB, {time.monotonic() - begin:.0f} s")
    if fork is None and not has_kernels(wheel):
        reason = "as asked" if archs == "off" else "nvcc is missing (CUDA toolkit 13)"
        print(f"turbokv: without CUDA kernels, {reason}: vLLM does not serve with this wheel")
    return wheel


def check(names: Sequence[str] = FORKS, root: Path = ROOT) -> None:
    """Apply every patch to a fresh copy of its base."""
    for name in names:
        fork = Fork.load(name, root)
        fork.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=fork.folder) as scratch:
            unpack(fork, Path(scratch) / "source")
            apply_patches(fork, Path(scratch) / "source")
        print(f"{name}: {len(fork.patches)} patches apply to {fork.fields['tag']}")


def _git(folder: Path, *arguments: str, **environment: str) -> str:
    command = ["git", *_IDENTITY, *arguments]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise ForkError(f"git {arguments[0]} in {folder}:\n{done.stderr.strip()}")
    return done.stdout


def edit(name: str, root: Path = ROOT) -> Path:
    """Make a repository of the base, tagged ``base``, with a commit for each patch on top."""
    fork = Fork.load(name, root)
    repository = fork.folder / "repository"
    if repository.exists():
        raise ForkError(f"{repository} is there already: refresh from it, or remove it")
    if fork.fields["file"].endswith(".whl"):
        repository.mkdir(parents=True)
        with zipfile.ZipFile(download(fork)) as wheel:
            members = [n for n in wheel.namelist() if n.endswith(".py") and ".dist-info/" not in n]
            wheel.extractall(repository, members)
    else:
        unpack(fork, repository)
    _git(repository, "init", "--quiet")
    _git(repository, "add", "--all", "--force")
    _git(repository, "commit", "--quiet", "--message", f"{fork.fields['tag']}")
    _git(repository, "tag", "base")
    try:
        _git(repository, "am", "--quiet", *(str(patch.resolve()) for patch in fork.patches))
    except ForkError as error:
        raise ForkError(
            f"{error}\nIn {repository}: git apply --reject the patch that git am names, mend the"
            " files, git add them, git am --continue; then make patches-refresh."
        ) from None
    print(f"{repository.relative_to(root)}: {len(fork.patches)} commits on the tag base")
    return repository


def refresh(name: str, root: Path = ROOT) -> None:
    """Replace a fork's patches by the commits of the repository that :func:`edit` made."""
    fork = Fork.load(name, root)
    repository = fork.folder / "repository"
    if not (repository / ".git").is_dir():
        raise ForkError(f"{repository} is not there: make patches-edit FORK={name}")
    with tempfile.TemporaryDirectory() as scratch:
        _git(repository, "format-patch", *_FORMAT, "--output-directory", scratch, "base")
        made = sorted(Path(scratch).glob("*.patch"))
        if not made:
            raise ForkError(f"{repository}: wanted commits after the tag base, got none")
        for old in fork.patches:
            old.unlink()
        for patch in made:
            shutil.copyfile(patch, root / "patches" / name / patch.name)
    check([name], root)


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("all", "turbokv", *FORKS, "check", "edit", "refresh"))
    parser.add_argument("fork", nargs="?", choices=FORKS, help="for edit and refresh")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where wheels go")
    parser.add_argument(
        "--archs",
        default="90a",
        help="of turbokv's kernels if nvcc is found: numbers separated by commas, release, or off",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    args = parser.parse_args()
    if (args.fork is None) == (args.what in ("edit", "refresh")):
        parser.error("edit and refresh take a fork, and nothing else does")
    try:
        if args.what == "check":
            check()
        elif args.what == "edit":
            edit(args.fork)
        elif args.what == "refresh":
            refresh(args.fork)
        else:
            args.dist.mkdir(parents=True, exist_ok=True)
            for name in ("turbokv", *FORKS):
                if args.what in ("all", name):
                    build(name, args.dist, ROOT, args.archs, args.jobs)
    except ForkError as error:
        print(f"build_forks.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
