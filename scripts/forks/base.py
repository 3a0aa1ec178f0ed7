# SPDX-License-Identifier: Apache-2.0
"""Sources of a fork: what ``patches/<fork>/BASE`` names, verified, and the patches on top."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_FIELDS = ("url", "tag", "commit", "package", "version", "local", "file", "sha256")
_INDEX = re.compile(
    r"^diff --git a/(?P<path>\S+) b/\S+\n(?:new file mode \d+\n)?"
    r"index (?P<old>[0-9a-f]{40})\.\.(?P<new>[0-9a-f]{40})",
    re.MULTILINE,
)
_NONE = "0" * 40


class ForkError(RuntimeError):
    """A fork cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Fork:
    """A fork: its name, its BASE, and where the repository that describes it lies.

    Attributes
    ----------
    name
        ``flashinfer`` or ``vllm``.
    root
        The repository; another one than this file's in tests.
    fields
        What BASE says.
    """

    name: str
    root: Path
    fields: dict[str, str]

    @classmethod
    def load(cls, name: str, root: Path = ROOT) -> Fork:
        """Read ``patches/<name>/BASE``."""
        path = root / "patches" / name / "BASE"
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        fields = {key: value.strip() for key, _, value in (line.partition(": ") for line in lines)}
        if tuple(fields) != _FIELDS:
            raise ForkError(f"{path}: wanted the lines {', '.join(_FIELDS)}, got {list(fields)}")
        return cls(name, root, fields)

    @property
    def version(self) -> str:
        """The fork's own version."""
        return f"{self.fields['version']}+{self.fields['local']}"

    @property
    def patches(self) -> list[Path]:
        """The patches, in order."""
        return sorted((self.root / "patches" / self.name).glob("[0-9]*.patch"))

    @property
    def shims(self) -> Path:
        """Files that forward to turbokv, laid over the fork's tree."""
        return self.root / "shims" / self.name

    @property
    def submodule(self) -> Path:
        """Where upstream's repository lies if it is checked out."""
        return self.root / "third_party" / self.name

    @property
    def folder(self) -> Path:
        """Where this fork is built."""
        return self.root / "build" / "forks" / self.name


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def blob_hash(content: bytes) -> str:
    """Return git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# --- upstream's files -----------------------------------------------------------------------------


def download(fork: Fork) -> Path:
    """Return BASE's file from the package index, kept under ``build/`` and verified each time."""
    folder = fork.root / "build" / "forks" / "downloads"
    path = folder / fork.fields["file"]
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _pip_download(fork, Path(scratch))
            (Path(scratch) / path.name).replace(path)
    got = sha256(path)
    if got != fork.fields["sha256"]:
        raise ForkError(
            f"{fork.name}: {path.name}: wanted sha256 {fork.fields['sha256']}, got {got}. Remove"
            f" {path.relative_to(fork.root)} and try again; if it stays so, the index serves"
            f" another file than patches/{fork.name}/BASE was made for."
        )
    return path


def _pip_download(fork: Fork, folder: Path) -> None:
    name = fork.fields["file"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    command += [str(folder), "--disable-pip-version-check"]
    if name.endswith(".whl"):
        tags = name.removesuffix(".whl").split("-")
        command += ["--only-binary=:all:", f"--platform={tags[-1]}", "--python-version=3.12"]
    else:
        # of this package alone: what builds it may come as wheels
        command += [f"--no-binary={fork.fields['package']}"]
    command.append(f"{fork.fields['package']}=={fork.fields['version']}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (folder / name).is_file():
        raise ForkError(
            f"{fork.name}: the package index did not give {name}. Without a network, put the file"
            f" into build/forks/downloads, or check out third_party/{fork.name}.\n"
            + done.stderr.strip()[-2000:]
        )


def is_checked_out(fork: Fork) -> bool:
    """Whether the submodule has files; raise unless they are exactly BASE's commit."""
    if not (fork.submodule / ".git").exists():
        return False

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(fork.submodule), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    where = f"{fork.name}: third_party/{fork.name}"
    if (head := git("rev-parse", "HEAD")) != fork.fields["commit"]:
        raise ForkError(
            f"{where}: wanted commit {fork.fields['commit']} (BASE), got {head}. Run git submodule"
            f" update --init --recursive --checkout third_party/{fork.name}."
        )
    if any(line.startswith("-") for line in git("submodule", "status").splitlines()):
        raise ForkError(
            f"{where}: wanted its own submodules checked out too. Run git submodule update --init"
            f" --recursive --checkout third_party/{fork.name}."
        )
    if changes := git("status", "--porcelain"):
        raise ForkError(
            f"{where}: wanted no changes, got\n{changes}\nPatches are made elsewhere:"
            f" make patches-edit FORK={fork.name}."
        )
    return True


def patched_paths(fork: Fork) -> list[str]:
    """Return the upstream files that the patches change, in order of first appearance."""
    seen: dict[str, None] = {}
    for patch in fork.patches:
        for match in _INDEX.finditer(patch.read_text()):
            if match["old"] != _NONE:
                seen[match["path"]] = None
    return list(seen)


def unpack(fork: Fork, target: Path) -> None:
    """Lay out the sources in an empty folder: all of an sdist, or what is patched of a wheel."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if fork.fields["file"].endswith(".whl"):
        _unpack_patched(fork, target)
    elif is_checked_out(fork):
        command = ["git", "-C", str(fork.submodule), "ls-files", "--recurse-submodules", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(fork.submodule / name, target / name, follow_symlinks=False)
    else:
        with tarfile.open(download(fork)) as archive:
            archive.extractall(target.parent / "sdist", filter="data")
        top = next((target.parent / "sdist").iterdir())
        shutil.rmtree(target)
        top.rename(target)
        shutil.rmtree(target.parent / "sdist")


def _unpack_patched(fork: Fork, target: Path) -> None:
    """Take the files from the submodule if it is there: the wheel's are equal, or are refused."""
    checked_out = is_checked_out(fork)
    with zipfile.ZipFile(download(fork)) as wheel:
        for path in patched_paths(fork):
            content = (fork.submodule / path).read_bytes() if checked_out else wheel.read(path)
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(content)


# --- patches --------------------------------------------------------------------------------------


def apply_patches(fork: Fork, tree: Path) -> None:
    """Apply every patch strictly: to the very blobs it was made for, no fuzz.

    Raises
    ------
    ForkError
        Naming the patch, the file, the hunks that do not fit, and what to do.
    """
    for patch in fork.patches:
        text = patch.read_text()
        changed = list(_INDEX.finditer(text))
        if len(changed) != len(re.findall(r"^diff --git ", text, re.MULTILINE)):
            raise ForkError(
                f"{patch.name}: wanted full blob hashes (git format-patch --full-index)"
            )
        other = [match for match in changed if _blob(tree / match["path"]) != match["old"]]
        if other or _git_apply(patch, tree).returncode:
            # Hunk by hunk, to say which do not fit; the tree is of no use any more.
            hunks = _git_apply(patch, tree, "--reject", "--verbose").stderr.strip()
            what = "".join(
                f"{match['path']}: wanted blob {match['old'][:12]}, got"
                f" {_blob(tree / match['path'])[:12]}\n"
                for match in other
            )
            raise ForkError(
                f"{fork.name}: {patch.name} does not fit {fork.fields['package']}"
                f" {fork.fields['version']}:\n{what}{hunks}\n{_advice(fork)}"
            )
        for match in changed:
            if _blob(tree / match["path"]) != match["new"]:
                raise ForkError(
                    f"{fork.name}: {patch.name}: {match['path']}: wanted blob {match['new'][:12]}"
                    f" after it, got {_blob(tree / match['path'])[:12]}: was it edited by hand?"
                    f" {_advice(fork)}"
                )


def _blob(path: Path) -> str:
    return blob_hash(path.read_bytes()) if path.is_file() else _NONE


def _git_apply(patch: Path, tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # The tree may lie inside another repository, which must not take part.
    environment = dict(os.environ, GIT_CEILING_DIRECTORIES=str(tree.parent.resolve()))
    command = ["git", "apply", "--whitespace=nowarn", *options, str(patch.resolve())]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def _advice(fork: Fork) -> str:
    return (
        f"To rebase: make patches-edit FORK={fork.name}, mend the commits in"
        f" build/forks/{fork.name}/repository, make patches-refresh FORK={fork.name}"
        " (CONTRIBUTING.md, To rebase a fork)."
    )
