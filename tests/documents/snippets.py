# SPDX-License-Identifier: Apache-2.0
"""The code blocks of documents, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
ASSIGNMENT = re.compile(r"\w+=.*", re.DOTALL)
# Blocks of these need something that a CPU test has not.
ELSEWHERE = {'device="cuda"': "a GPU", "import flashinfer": "a GPU", "import openai": "a server"}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def needs(self) -> str | None:
        """What running it needs besides a CPU, or None."""
        found = [need for word, need in ELSEWHERE.items() if word in self.text]
        if "from openai" in self.text:
            found.append("a server")
        return found[0] if found else None


def pages() -> list[Path]:
    """Return the documents whose blocks are checked."""
    log = ROOT / "docs" / "log"
    found = [path for path in (ROOT / "docs").rglob("*.md") if log not in path.parents]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(found)]


def blocks(*languages: str) -> list[Block]:
    """Return all blocks, or those of some languages."""
    found = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            page = str(path.relative_to(ROOT))
            block = Block(page, line, match[2].strip(), match[3])
            if not languages or block.language in languages:
                found.append(block)
    return found


def commands(block: Block) -> list[list[str]]:
    """Return the commands of a shell block as words, without comments and assignments."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and ASSIGNMENT.fullmatch(words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


def inline_commands(first: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """Return commands within sentences, with the page that they stand on."""
    found = []
    for path in pages():
        prose = FENCE.sub("", path.read_text(encoding="utf-8"))
        for match in INLINE.finditer(prose):
            text = " ".join(match[1].split())
            if text.startswith(tuple(f"{word} " for word in first)):
                words = [w for w in shlex.split(text) if not ASSIGNMENT.fullmatch(w)]
                found.append((str(path.relative_to(ROOT)), words))
    return found
