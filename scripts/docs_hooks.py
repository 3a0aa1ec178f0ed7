# SPDX-License-Identifier: Apache-2.0
"""For mkdocs: references in docstrings, written for Sphinx, become plain names."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|ref):<code>(~?)([^<]*)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Return a page whose references are names, the last part alone where ``~`` says that."""

    def plain(match: re.Match[str]) -> str:
        name = match[2].rpartition(".")[2] if match[1] else match[2].lstrip(".")
        return f"<code>{name}</code>"

    return _ROLE.sub(plain, html)
