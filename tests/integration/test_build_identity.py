# SPDX-License-Identifier: Apache-2.0
"""Builds know each other: the hashes of a build, and what happens to a fork that met another."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from turbokv.integrations import build_identity

PACKAGE = Path(build_identity.__file__).parents[1]
HEADER = Path("kernels/cuda/include/turbokv/types.cuh")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of what the hashes cover."""
    copy = tmp_path / "package"
    for folder in ("kernels/cuda/include", "integrations/flashinfer"):
        shutil.copytree(PACKAGE / folder, copy / folder)
    for file in ("FORMAT.md", "__init__.py"):
        shutil.copyfile(PACKAGE / file, copy / file)
    return copy


def test_the_distributions_name_is_the_same_everywhere() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'\nname = "{build_identity.DISTRIBUTION}"' in text


def test_a_copy_has_the_same_identity(package: Path) -> None:
    assert build_identity.identity(package) == build_identity.identity()


@pytest.mark.parametrize(
    "name",
    [
        HEADER,
        Path("integrations/flashinfer/include/turbokv/flashinfer/kv_tile_loader.cuh"),
        Path("integrations/flashinfer/csrc/turbokv_batch_prefill_config.jinja"),
    ],
)
def test_any_change_of_what_forks_compile_is_another_build(package: Path, name: Path) -> None:
    before = build_identity.identity(package)
    (package / name).write_text((package / name).read_text() + "\n")
    after = build_identity.identity(package)
    assert after["HEADERS_SHA256"] != before["HEADERS_SHA256"]
    assert build_identity.wheel_version(after) != build_identity.wheel_version(before)


def test_a_header_under_another_name_is_another_build(package: Path) -> None:
    (package / HEADER).rename(package / HEADER.with_name("kinds.cuh"))
    assert build_identity.headers_sha256(package) != build_identity.headers_sha256()


def test_another_format_is_another_build(package: Path) -> None:
    (package / "FORMAT.md").write_text("version 3\n")
    assert build_identity.format_sha256(package) != build_identity.format_sha256()
    fields = build_identity.identity(package)
    assert build_identity.wheel_version(fields) != build_identity.wheel_version(
        build_identity.identity()
    )


def test_what_forks_do_not_compile_does_not_count(package: Path) -> None:
    (package / "kernels/cuda/include/README.md").write_text("other words\n")
    assert build_identity.identity(package) == build_identity.identity()


@pytest.fixture
def fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install an empty engine, with a version and perhaps the file of a build."""

    def install(version: str, text: str | None) -> Path:
        site = tmp_path / "site"
        info = site / f"engine_dist-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: engine-dist\nVersion: {version}\n"
        )
        (site / "engine").mkdir()
        (site / "engine" / "__init__.py").write_text("raise AssertionError('it is imported')\n")
        if text is not None:
            (site / "engine" / build_identity.FILE).write_text(text)
        monkeypatch.syspath_prepend(str(site))
        assert importlib.util.find_spec("engine") is not None
        return site

    return install


def test_a_fork_of_this_build_is_taken(fork: Callable[..., Path]) -> None:
    fork("1.0+turbokv.1", build_identity.render(build_identity.identity()))
    build_identity.check("engine", "engine-dist")


@pytest.mark.parametrize("field", ["TURBOKV_VERSION", "HEADERS_SHA256", "FORMAT_SHA256"])
def test_a_fork_of_another_build_is_refused(field: str, fork: Callable[..., Path]) -> None:
    ours = build_identity.identity()
    fork("1.0+turbokv.1", build_identity.render({**ours, field: "f" * 64}))
    with pytest.raises(
        build_identity.BuildMismatchError,
        match=f"engine-dist 1.0.*{field} there is {'f' * 16}, here {ours[field][:16]}.*build-all",
    ):
        build_identity.check("engine", "engine-dist")


def test_a_fork_that_lost_its_record_is_refused(fork: Callable[..., Path]) -> None:
    fork("1.0+turbokv.1", None)
    with pytest.raises(build_identity.BuildMismatchError, match=f"wanted {build_identity.FILE}"):
        build_identity.check("engine", "engine-dist")


def test_upstream_with_hooks_put_on_by_hand_has_nothing_to_compare(
    fork: Callable[..., Path],
) -> None:
    fork("1.0", None)
    build_identity.check("engine", "engine-dist")


def test_an_engine_that_is_not_installed_has_nothing_to_compare() -> None:
    build_identity.check("engine_that_is_not_there", "engine-that-is-not-there")
