# SPDX-License-Identifier: Apache-2.0
"""Patches and what they apply to: BASE, submodules, messages, sizes. Nothing is downloaded."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORKS = ("flashinfer", "vllm")
PATCHES = sorted((ROOT / "patches").glob("*/*.patch"))
MAX_CHANGED_LINES = 80
MAX_PATCHES = 10


def name(path: Path) -> str:
    return path.relative_to(ROOT / "patches").as_posix()


def base(fork: str) -> dict[str, str]:
    lines = (ROOT / "patches" / fork / "BASE").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines if not line.startswith("#"))


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return done.stdout


@pytest.mark.parametrize("fork", FORKS)
def test_base_is_complete(fork: str) -> None:
    fields = base(fork)
    assert re.fullmatch(r"[0-9a-f]{40}", fields["commit"])
    assert re.fullmatch(r"[0-9a-f]{64}", fields["sha256"])
    assert fields["tag"] == f"v{fields['version']}"
    assert fields["version"] in fields["file"]
    assert re.fullmatch(r"turbokv\.\d+", fields["local"])


@pytest.mark.parametrize("fork", FORKS)
def test_the_submodule_is_pinned_at_base(fork: str) -> None:
    path = f"third_party/{fork}"
    mode, commit, *_ = git("ls-files", "--stage", "--", path).split()
    assert (mode, commit) == ("160000", base(fork)["commit"])
    url = git("config", "--file", ".gitmodules", f"submodule.{path}.url").strip()
    assert url == base(fork)["url"]


@pytest.mark.parametrize("fork", FORKS)
def test_a_series_is_short_and_numbered(fork: str) -> None:
    numbers = [int(path.name[:4]) for path in PATCHES if path.parent.name == fork]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 1 <= len(numbers) <= MAX_PATCHES


@pytest.mark.parametrize("path", PATCHES, ids=name)
def test_a_message_says_why(path: Path) -> None:
    message = path.read_text().partition("\ndiff --git ")[0]
    for field in ("Why", "Why not outside", "Class", "Upstream", "Tests"):
        assert re.search(rf"^{field}: \S", message, re.MULTILINE), f"wanted {field}: ..."
    assert re.search(r"^Class: (temporary|compile-only|ours)\b", message, re.MULTILINE)


@pytest.mark.parametrize("path", PATCHES, ids=name)
def test_a_patch_hooks_and_does_not_churn(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("From " + "0" * 40), "wanted --zero-commit"
    message, _, diff = text.partition("\ndiff --git ")
    assert " | " not in message, "wanted --no-stat"
    assert not re.search(r"^-- $", diff, re.MULTILINE), "wanted --no-signature"
    assert "new file mode" not in diff, "new files belong in turbokv/ or shims/"
    assert "deleted file mode" not in diff
    blobs = re.findall(r"^index (\S+) ", diff, re.MULTILINE)
    assert blobs and all(re.fullmatch(r"[0-9a-f]{40}\.\.[0-9a-f]{40}", blob) for blob in blobs)
    changed = re.findall(r"^[+-](?![+-]{2} )", diff, re.MULTILINE)
    assert len(changed) <= MAX_CHANGED_LINES


@pytest.mark.parametrize("fork", FORKS)
def test_each_patch_starts_from_what_the_one_before_left(fork: str) -> None:
    now: dict[str, str] = {}
    for path in (path for path in PATCHES if path.parent.name == fork):
        for file, old, new in re.findall(
            r"^diff --git a/(\S+) b/\S+\nindex (\w+)\.\.(\w+)", path.read_text(), re.MULTILINE
        ):
            assert now.get(file, old) == old
            now[file] = new
