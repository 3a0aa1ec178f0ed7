# SPDX-License-Identifier: Apache-2.0
"""The wheels of ``make build-all``: what is in them, and that they belong together."""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import json
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

import pytest

from turbokv.integrations import build_identity
from turbokv.integrations.vllm import CACHE_DTYPES
from turbokv.kernels.cuda import build

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from forks import base, wheels  # noqa: E402

pytestmark = pytest.mark.integration
DIST = Path(os.environ.get("TURBOKV_DIST", ROOT / "dist"))
PACKAGES = {"turbokv": "turbokv_cache", "flashinfer": "flashinfer_python", "vllm": "vllm"}


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def wheel_path(package: str) -> Path:
    found = list(DIST.glob(f"{PACKAGES[package]}-*.whl"))
    assert len(found) == 1, f"wanted one wheel of {package} in dist/ (make build-all), got {found}"
    return found[0]


@pytest.fixture
def wheel(package: str) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel_path(package)) as opened:
        yield opened


def metadata(package: str) -> dict[str, list[str]]:
    with zipfile.ZipFile(wheel_path(package)) as opened:
        (name,) = [n for n in opened.namelist() if n.endswith(".dist-info/METADATA")]
        message = HeaderParser().parsestr(opened.read(name).decode())
    return {key: message.get_all(key) or [] for key in message}


def test_the_record_lists_every_file_with_its_hash(wheel: zipfile.ZipFile) -> None:
    (record,) = [n for n in wheel.namelist() if n.endswith(".dist-info/RECORD")]
    rows = {row[0]: row[1:] for row in csv.reader(wheel.read(record).decode().splitlines())}
    assert sorted(rows) == sorted(wheel.namelist())
    for name, (wanted, size) in rows.items():
        if name == record:
            assert (wanted, size) == ("", "")
            continue
        content = wheel.read(name)
        got = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        assert (f"sha256={got}", str(len(content))) == (wanted, size), name


def test_it_carries_this_build(wheel: zipfile.ZipFile, package: str) -> None:
    text = wheel.read(f"{package}/{build_identity.FILE}").decode()
    assert text == build_identity.render(build_identity.identity(ROOT / "turbokv"))
    ast.parse(text)


def test_the_file_name_says_the_version(package: str) -> None:
    assert wheel_path(package).name.split("-")[1] == metadata(package)["Version"][0]


def test_forks_require_exactly_this_turbokv() -> None:
    (version,) = metadata("turbokv")["Version"]
    assert version == build_identity.wheel_version(build_identity.identity(ROOT / "turbokv"))
    for fork in ("flashinfer", "vllm"):
        found = [r for r in metadata(fork)["Requires-Dist"] if r.startswith("turbokv")]
        assert found == [f"turbokv-cache=={version}"]


def test_vllm_requires_exactly_this_flashinfer() -> None:
    found = [r for r in metadata("vllm")["Requires-Dist"] if r.startswith("flashinfer")]
    assert found == [f"flashinfer-python=={metadata('flashinfer')['Version'][0]}"]


def test_vllm_differs_from_upstream_by_patches_shims_and_version_alone() -> None:
    fork = base.Fork.load("vllm", ROOT)
    allowed = {*base.patched_paths(fork), *wheels.overlay(fork), f"vllm/{build_identity.FILE}"}
    allowed |= {"vllm/_version.py"}

    def contents(path: Path) -> dict[str, tuple[int, int, int]]:
        with zipfile.ZipFile(path) as opened:
            return {
                re.sub(r"^vllm-[^/]+\.dist-info/", "info/", i.filename): (
                    i.CRC,
                    i.file_size,
                    i.external_attr,
                )
                for i in opened.infolist()
            }

    ours, theirs = contents(wheel_path("vllm")), contents(base.download(fork))
    assert set(theirs) <= set(ours)
    differing = {name for name in ours if ours[name] != theirs.get(name)}
    assert differing == allowed | {"info/METADATA", "info/RECORD"}


def test_flashinfer_differs_from_upstream_by_patches_shims_and_our_sources_alone() -> None:
    fork = base.Fork.load("flashinfer", ROOT)

    def place(name: str) -> str | None:
        """Where a file of the source tree lies in the wheel."""
        if name.startswith(("include/", "csrc/")):
            return f"flashinfer/data/{name}"
        return name if name.startswith("flashinfer/") and name.endswith(".py") else None

    allowed = {place(name) for name in (*base.patched_paths(fork), *wheels.overlay(fork))} - {None}
    allowed |= {f"flashinfer/{build_identity.FILE}", "flashinfer/_build_meta.py"}
    with zipfile.ZipFile(wheel_path("flashinfer")) as opened:
        ours = {
            name: hashlib.sha256(opened.read(name)).digest()
            for name in opened.namelist()
            if name.startswith(("flashinfer/data/include/", "flashinfer/data/csrc/"))
            or (name.startswith("flashinfer/") and name.endswith(".py") and "/data/" not in name)
        }
    theirs = {}
    with tarfile.open(base.download(fork)) as archive:
        for member in archive:
            target = place(member.name.partition("/")[2])
            file = archive.extractfile(member) if target is not None and member.isfile() else None
            if target is not None and file is not None:
                theirs[target] = hashlib.sha256(file.read()).digest()
    assert {name for name in theirs if name not in ours} == set()
    assert {name for name in ours if ours[name] != theirs.get(name)} == allowed


def test_flashinfer_holds_our_headers_as_they_are() -> None:
    with zipfile.ZipFile(wheel_path("flashinfer")) as opened:
        for folder in wheels.header_folders(ROOT):
            for path in folder.rglob("*.cuh"):
                name = f"flashinfer/data/include/{path.relative_to(folder).as_posix()}"
                assert opened.read(name) == path.read_bytes(), name


def test_turbokv_holds_what_its_hashes_cover() -> None:
    with zipfile.ZipFile(wheel_path("turbokv")) as opened:
        for folder in ("kernels/cuda/include", "integrations/flashinfer"):
            for path in (ROOT / "turbokv" / folder).rglob("*"):
                if path.suffix in (".cuh", ".cu", ".jinja"):
                    name = path.relative_to(ROOT).as_posix()
                    assert opened.read(name) == path.read_bytes(), name


def test_the_kernels_are_those_of_every_preset() -> None:
    """A server needs no compiler for any cache dtype at head sizes up to 256."""
    if not wheels.has_kernels(wheel_path("turbokv")):
        pytest.skip("this wheel was built without nvcc")
    name = f"turbokv/kernels/cuda/{build.LIBRARY.name}"
    with zipfile.ZipFile(wheel_path("turbokv")) as opened:
        found = re.search(rb'\{"archs": .*?\]\]\}', opened.read(name))
    assert found is not None
    built = {build.Variant(*each) for each in json.loads(found[0])["variants"]}
    wanted = {
        build.Variant("decode", dim, *widths)
        for dim in (64, 128, 256)
        for widths in CACHE_DTYPES.values()
    }
    wanted |= {
        build.Variant(kind, dim) for kind in ("store", "decompress") for dim in (64, 128, 256)
    }
    assert wanted <= built


def test_turbokvs_wheel_is_small_enough_to_download() -> None:
    assert wheel_path("turbokv").stat().st_size < 60e6


def test_no_wheel_names_the_machine_that_built_it(wheel: zipfile.ZipFile, package: str) -> None:
    needle = str(ROOT).encode()
    ours = [
        name
        for name in wheel.namelist()
        if "turbokv" in name or "dist-info" in name or name.endswith("_build_meta.py")
    ]
    assert [name for name in ours if needle in wheel.read(name)] == []
