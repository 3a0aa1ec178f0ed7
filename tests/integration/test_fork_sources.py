# SPDX-License-Identifier: Apache-2.0
"""Sources of a fork, on a small upstream of the test's own: what is verified, and what is said."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from forks import base  # noqa: E402

FILE = "tool-1.0/tool/lines.py"
LINES = [f"line_{i} = {i}\n" for i in range(60)]


@dataclass
class Upstream:
    """A repository with one fork, ``flashinfer``, of a package of one file."""

    root: Path

    @property
    def fork(self) -> base.Fork:
        return base.Fork.load("flashinfer", self.root)

    @property
    def downloads(self) -> Path:
        return self.root / "build/forks/downloads"

    def write(self, lines: list[str]) -> None:
        """Make the sdist."""
        source = self.root / "made" / FILE
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("".join(lines))
        self.downloads.mkdir(parents=True, exist_ok=True)
        with tarfile.open(self.downloads / "tool-1.0.tar.gz", "w:gz") as archive:
            archive.add(self.root / "made/tool-1.0", "tool-1.0")
        self.set("sha256", base.sha256(self.downloads / "tool-1.0.tar.gz"))

    def set(self, name: str, value: str) -> None:
        """Change a line of BASE."""
        path = self.root / "patches/flashinfer/BASE"
        lines = [line for line in path.read_text().splitlines() if not line.startswith(name)]
        order = ("url", "tag", "commit", "package", "version", "local", "file", "sha256")
        lines = sorted([*lines, f"{name}: {value}"], key=lambda x: order.index(x.split(":")[0]))
        path.write_text("\n".join(lines) + "\n")

    def patch(self, *changed: int) -> Path:
        """Write a patch that changes some lines of what :meth:`write` was given first."""
        new = [line.replace("=", "= 100 +") if i in changed else line for i, line in self._lines()]
        repository = self.root / "repository"
        git = ["git", "-C", str(repository), "-c", "user.name=t", "-c", "user.email=t@t.invalid"]
        path = repository / "tool/lines.py"
        if not repository.exists():
            path.parent.mkdir(parents=True)
            subprocess.run([*git, "init", "--quiet"], check=True)
            path.write_text("".join(LINES))
            subprocess.run([*git, "add", "."], check=True)
            subprocess.run([*git, "commit", "--quiet", "-m", "base"], check=True)
        path.write_text("".join(new))
        subprocess.run([*git, "commit", "--quiet", "-a", "-m", "Hook"], check=True)
        options = ["--zero-commit", "--full-index", "--no-signature", "--no-stat", "--quiet"]
        folder = self.root / "patches/flashinfer"
        subprocess.run([*git, "format-patch", "-1", *options, "-o", str(folder)], check=True)
        return next(folder.glob("*.patch"))

    @staticmethod
    def _lines() -> list[tuple[int, str]]:
        return list(enumerate(LINES))


@pytest.fixture
def upstream(tmp_path: Path) -> Upstream:
    folder = tmp_path / "patches/flashinfer"
    folder.mkdir(parents=True)
    (folder / "BASE").write_text(
        f"# a comment\nurl: none\ntag: v1.0\ncommit: {'1' * 40}\npackage: turbokv-no-such-package\n"
        "version: 1.0\nlocal: turbokv.1\nfile: tool-1.0.tar.gz\nsha256: none\n"
    )
    lines = (folder / "BASE").read_text().splitlines()
    (folder / "BASE").write_text("\n".join(lines[1:]) + "\n")
    made = Upstream(tmp_path)
    made.write(LINES)
    return made


def applied(upstream: Upstream) -> str:
    tree = upstream.root / "tree"
    base.unpack(upstream.fork, tree)
    base.apply_patches(upstream.fork, tree)
    return (tree / "tool/lines.py").read_text()


def test_a_patch_is_applied_to_a_copy(upstream: Upstream) -> None:
    upstream.patch(3)
    assert "line_3 = 100 + 3\n" in applied(upstream)


def test_patches_apply_inside_another_repository(upstream: Upstream) -> None:
    subprocess.run(["git", "init", "--quiet", str(upstream.root)], check=True)
    upstream.patch(3)
    assert "line_3 = 100 + 3\n" in applied(upstream)


def test_another_file_than_base_names_is_refused(upstream: Upstream) -> None:
    upstream.set("sha256", "0" * 64)
    with pytest.raises(base.ForkError, match=r"tool-1.0.tar.gz: wanted sha256 0{64}, got \w{64}"):
        applied(upstream)


def test_a_base_that_lacks_a_line_is_refused(upstream: Upstream) -> None:
    path = upstream.root / "patches/flashinfer/BASE"
    path.write_text(path.read_text().replace("tag: v1.0\n", ""))
    with pytest.raises(base.ForkError, match="wanted the lines url, tag"):
        applied(upstream)


def test_a_patch_that_does_not_fit_names_its_hunks(upstream: Upstream) -> None:
    upstream.patch(5, 40)
    changed = list(LINES)
    changed[41] = "other = 1\n"
    upstream.write(changed)
    with pytest.raises(base.ForkError) as error:
        applied(upstream)
    text = str(error.value)
    assert "0001-Hook.patch does not fit turbokv-no-such-package 1.0" in text
    assert "tool/lines.py: wanted blob" in text
    assert "Hunk #1 applied cleanly" in text and "Rejected hunk #2" in text
    assert "make patches-edit FORK=flashinfer" in text


def test_a_patch_is_never_applied_elsewhere_than_it_was_made_for(upstream: Upstream) -> None:
    """With an offset it would fit, and that is how a hunk ends up in another function."""
    upstream.patch(40)
    upstream.write(["first = 1\n", *LINES])
    with pytest.raises(base.ForkError, match="wanted blob"):
        applied(upstream)


def test_a_patch_that_was_edited_by_hand_is_refused(upstream: Upstream) -> None:
    path = upstream.patch(5)
    path.write_text(path.read_text().replace("100 + 5", "200 + 5"))
    with pytest.raises(base.ForkError, match="edited by hand"):
        applied(upstream)


def test_without_a_network_the_way_out_is_named(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    (upstream.downloads / "tool-1.0.tar.gz").unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(base.ForkError) as error:
        applied(upstream)
    text = str(error.value)
    assert "did not give tool-1.0.tar.gz" in text
    assert "build/forks/downloads" in text and "third_party/flashinfer" in text
    assert not (upstream.downloads / "tool-1.0.tar.gz").exists()


def checkout(upstream: Upstream) -> str:
    """Check out a submodule, and return its commit."""
    path = upstream.root / "third_party/flashinfer"
    git = ["git", "-C", str(path), "-c", "user.name=t", "-c", "user.email=t@t.invalid"]
    (path / "tool").mkdir(parents=True)
    (path / "tool/lines.py").write_text("".join(LINES))
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "base"], check=True)
    done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_submodule_is_used_instead_of_the_index(upstream: Upstream) -> None:
    upstream.set("commit", checkout(upstream))
    (upstream.downloads / "tool-1.0.tar.gz").unlink()
    upstream.patch(7)
    assert "line_7 = 100 + 7\n" in applied(upstream)
    assert "100" not in (upstream.root / "third_party/flashinfer/tool/lines.py").read_text()


def test_a_submodule_at_another_commit_is_refused(upstream: Upstream) -> None:
    head = checkout(upstream)
    with pytest.raises(base.ForkError, match=rf"wanted commit 1{{40}} \(BASE\),\s+got {head}"):
        applied(upstream)


def test_a_submodule_with_changes_is_refused(upstream: Upstream) -> None:
    upstream.set("commit", checkout(upstream))
    (upstream.root / "third_party/flashinfer/tool/lines.py").write_text("other\n")
    with pytest.raises(
        base.ForkError, match=r"third_party/flashinfer: wanted no changes, got\s+M tool/lines"
    ):
        applied(upstream)
