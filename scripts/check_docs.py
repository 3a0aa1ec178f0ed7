#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fail if a Markdown file names a path of this repository that does not exist.

Checked are the targets of relative links, with their anchors, and words in backticks that start
with one of the repository's folders (globs must match something). Fenced code is not checked.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([\w./*-]+)`")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def listed_files() -> list[str]:
    """Return the files that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in out.splitlines() if (ROOT / name).exists()]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of a document's headings."""
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in HEADING.findall(FENCE.sub("", text))
    }


def dead_paths(document: pathlib.Path, folders: set[str]) -> Iterator[str]:
    """Yield what ``document`` refers to and the repository does not hold."""
    text = document.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    for target in LINK.findall(prose):
        if re.match(r"[a-z]+:", target):  # another site
            continue
        path, _, anchor = target.partition("#")
        found = document.parent / path if path else document
        has_anchors = bool(anchor) and found.suffix == ".md"
        if not found.exists() or (has_anchors and anchor not in anchors(found.read_text("utf-8"))):
            yield target
    for word in CODE.findall(prose):
        if "/" in word and word.split("/")[0] in folders and not any(ROOT.glob(word.rstrip("/"))):
            yield word


def main() -> int:
    """Print the dead paths and return 1 if there are any."""
    files = listed_files()
    folders = {name.split("/")[0] for name in files if "/" in name}
    dead = [
        f"{name}: no such path: {target}"
        for name in files
        if name.endswith(".md")
        for target in dead_paths(ROOT / name, folders)
    ]
    print("\n".join(dead) if dead else "documents: no dead paths")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
