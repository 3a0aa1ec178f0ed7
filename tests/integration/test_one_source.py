# SPDX-License-Identifier: Apache-2.0
"""One source: a header edited once is in every wheel, on a scratch copy of the repository."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from turbokv.integrations import build_identity

ROOT = Path(__file__).parents[2]
HEADER = "kernels/cuda/include/turbokv/paged_kv.cuh"
CONSTANT = r"(constexpr int kTokensPerSegment = )256;"

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def build(root: Path) -> str:
    """Build all wheels of a copy, kernels left out, and return what was printed."""
    command = [sys.executable, "scripts/build_forks.py", "all", "--archs", "off"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed() -> str:
    """Return what the running Python has; FlashInfer's back end would add to it."""
    command = [sys.executable, "-m", "pip", "list", "--format=freeze"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def digests(root: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in root.glob("dist/*.whl")}


def one(root: Path, name: str) -> zipfile.ZipFile:
    (path,) = root.glob(f"dist/{name}-*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files, and what was downloaded already."""
    copy = tmp_path_factory.mktemp("scratch")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    kept = copy / "build/forks/downloads"
    kept.mkdir(parents=True)
    for path in (ROOT / "build/forks/downloads").glob("*.*"):
        if path.is_file():
            os.symlink(path, kept / path.name)
    return copy


def test_an_edited_constant_reaches_every_wheel_and_builds_repeat(copy: Path) -> None:
    packages = installed()
    build(copy)
    assert installed() == packages
    before = build_identity.identity(copy / "turbokv")
    first = digests(copy)
    assert len(first) == 3

    # nothing changed: nothing is built
    assert build(copy).count("up to date") == 3
    assert digests(copy) == first

    # from nothing: the same bytes
    shutil.rmtree(copy / "dist")
    for path in (copy / "build/forks").iterdir():
        if path.name != "downloads":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    build(copy)
    assert digests(copy) == first

    # one edit
    header = copy / "turbokv" / HEADER
    text, count = re.subn(CONSTANT, r"\g<1>512;", header.read_text())
    assert count == 1
    header.write_text(text)
    assert "up to date" not in build(copy)

    after = build_identity.identity(copy / "turbokv")
    version = build_identity.wheel_version(after)
    assert after["HEADERS_SHA256"] != before["HEADERS_SHA256"]
    with one(copy, "flashinfer_python") as wheel:
        name = "flashinfer/data/include/turbokv/paged_kv.cuh"
        assert b"kTokensPerSegment = 512;" in wheel.read(name)
    with one(copy, "turbokv_cache") as wheel:
        assert b"kTokensPerSegment = 512;" in wheel.read(f"turbokv/{HEADER}")
    for package, name in (
        ("turbokv", "turbokv_cache"),
        ("flashinfer", "flashinfer_python"),
        ("vllm", "vllm"),
    ):
        with one(copy, name) as wheel:
            assert wheel.read(f"{package}/{build_identity.FILE}").decode() == build_identity.render(
                after
            )
            if package != "turbokv":
                (info,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
                assert f"\nRequires-Dist: turbokv-cache=={version}\n" in wheel.read(info).decode()


@pytest.mark.parametrize("fork", ["flashinfer", "vllm"])
def test_patches_that_are_refreshed_stay_as_they_are(fork: str, copy: Path) -> None:
    folder = copy / "patches" / fork
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for what in ("edit", "refresh"):
        command = [sys.executable, "scripts/build_forks.py", what, fork]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
