#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fail if a document names a path that does not exist, or a text uses words readers stumble on.

Checked are the targets of relative links, with their anchors, and words in backticks that start
with one of the repository's folders (globs must match something). Fenced code is not checked. Words
are checked in documents and in the Python of the package and its scripts; a spelling checker and
this short list are no editor, so read a text aloud once.
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


UNITS = "bits|bytes|tokens|numbers|instructions|vectors|CTAs|cycles|nats|KL"
THINGS = "number|token|vector|second|lane|warp|multiprocessor|sequence|request|head|layer|page|tile"
MOST_README = 200
# What is refused, and what a reader would expect instead.
WORDS = {
    rf"\b(?:{UNITS}) an? (?:{THINGS})\b(?! (?:may|holds|takes))": "'per' in place of 'a'",
    r"\bsays? so\b": "what it says, or 'reports it'",
    r"\bwith a sentence\b": "'with a reason'",
    r"\b(?:is|are|was|were) brought\b": "'is copied' or 'is loaded'",
    r"\bbesides\b": "'also' or 'in addition to'",
    r"\b(?:utili[sz]e[sd]?|leverag(?:e[sd]?|ing)|seamless(?:ly)?|blazing(?:ly)?)\b": "a plain word",
    r"\bin order to\b": "'to'",
    r"(?-i:\bK[2-8]V[2-8]\b)": "the preset's name, such as tq_k5v3",
}
# Logs of what was said at the time.
EXEMPT = ("CHANGELOG.md", "docs/log/")


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


def stumbles(name: str, text: str) -> Iterator[str]:
    """Yield the places of a text with words that are refused, and what to write instead."""
    for pattern, instead in WORDS.items():
        for match in re.finditer(pattern, text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{name}:{line}: wanted {instead}, got {match[0]!r}"


def is_read(name: str) -> bool:
    """Whether a file's words are checked."""
    if name == "scripts/check_docs.py" or name.startswith(EXEMPT):
        return False
    return name.endswith(".md") or (
        name.endswith(".py") and name.startswith(("turbokv", "scripts"))
    )


def main() -> int:
    """Print what is wrong and return 1 if there is anything."""
    files = listed_files()
    folders = {name.split("/")[0] for name in files if "/" in name}
    dead = [
        f"{name}: no such path: {target}"
        for name in files
        if name.endswith(".md")
        for target in dead_paths(ROOT / name, folders)
    ]
    dead += [
        place
        for name in files
        if is_read(name)
        for place in stumbles(name, (ROOT / name).read_text(encoding="utf-8"))
    ]
    readme = len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    if readme > MOST_README:
        dead.append(f"README.md: wanted at most {MOST_README} lines, got {readme}")
    print("\n".join(dead) if dead else "documents: no dead paths, no words to stumble on")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
