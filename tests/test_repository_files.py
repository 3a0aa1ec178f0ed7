# SPDX-License-Identifier: Apache-2.0
"""Files that services read: valid, and in agreement with what the project says elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
YAML_FILES = sorted(
    path
    for pattern in (
        ".github/**/*.yml",
        "examples/**/*.yml",
        ".pre-commit-config.yaml",
        "CITATION.cff",
        "compose.yaml",
        "mkdocs.yml",
    )
    for path in ROOT.glob(pattern)
)


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_a_file_is_a_mapping(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_what_compose_mounts_is_there() -> None:
    mounts = [
        volume.split(":")[0]
        for service in read("compose.yaml")["services"].values()
        for volume in service.get("volumes", [])
    ]
    mounts = [mount for mount in mounts if mount.startswith("./")]
    assert len(mounts) == 4
    for mount in mounts:
        assert (ROOT / mount).exists(), mount


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    found = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages(read("mkdocs.yml")["nav"])) == sorted(found)


def test_hooks_have_the_versions_of_the_tools_of_lint() -> None:
    found = {
        hook["id"].split("-check")[0].split("-format")[0]: repository["rev"].lstrip("v")
        for repository in read(".pre-commit-config.yaml")["repos"]
        if repository["repo"] != "local"
        for hook in repository["hooks"]
    }
    assert set(found) == {"ruff", "clang", "codespell"}
    for name, version in found.items():
        tool = "clang-format" if name == "clang" else name
        assert f'"{tool}=={version}"' in PYPROJECT


def test_workflows_run_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    words = []
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        words += re.findall(r"run: make ([a-z-]+)", path.read_text(encoding="utf-8"))
    assert words
    for word in words:
        assert re.search(rf"^{word}:.*## ", makefile, re.MULTILINE), word
