#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write what the README takes from elsewhere: its list of models, and its picture.

    python scripts/readme.py            # rewrite both
    python scripts/readme.py --check    # fail unless both are those of their sources

The models are those of ``docs/model-zoo.md``, the picture shows the README's own table of caches.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ZOO = ROOT / "docs" / "model-zoo.md"
PICTURE = ROOT / "docs" / "summary.png"
MODELS = re.compile(r"(<!-- models: start -->\n).*?(<!-- models: end -->)", re.DOTALL)
CACHE = re.compile(r"^\| `(\w+)` \|(.+)\|$", re.MULTILINE)
TITLES = (
    "tokens that fit\n(more is better)",
    "tokens/s, cache full\n(more is better)",
    "divergence (KL), fp8 is 1\n(less is better)",
)
COLUMNS = (0, 2, 3)
COLOURS = ("#9aa5ad", "#9aa5ad", "#00897b", "#00695c")


def models(zoo: str) -> str:
    """Return the README's sentences about models, from the zoo's table."""
    names: dict[str, list[str]] = {"yes": [], "refused": [], "not here": []}
    for name, state in re.findall(r"^\| `(\w+?)(?:For\w+|LMHeadModel)` \| ([\w ]+?) \|", zoo, re.M):
        names[state].append(name)
    served, refused, unknown = (", ".join(names[key]) for key in ("yes", "refused", "not here"))
    return (
        f"Served by vLLM in tiny random models, with answers as close to a 16-bit cache's as the"
        f" widths allow: {served}.\n\nRefused with a reason, in that size: {refused}. Not decided"
        f" on a CPU: {unknown}.\n\n"
    )


def with_models(text: str) -> str:
    """Return the README with the zoo's models."""
    found, count = MODELS.subn(
        lambda match: match[1] + models(ZOO.read_text("utf-8")) + match[2], text
    )
    if count != 1:
        raise ValueError(f"README.md: wanted one place for models, got {count}")
    return found


def caches(text: str) -> dict[str, list[str]]:
    """Return the figures of the README's table of caches, by name."""
    return {
        name: [cell.strip() for cell in cells.split("|")]
        for name, cells in CACHE.findall(text.split("[end:figures]")[0])
    }


def digest(text: str) -> str:
    """Return what the picture carries, so that a check knows which table it shows."""
    return hashlib.sha256(repr((caches(text), TITLES)).encode()).hexdigest()


def draw(text: str) -> None:
    """Draw the table of caches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = caches(text)
    figure, panels = pyplot.subplots(1, len(COLUMNS), figsize=(9, 2.6), constrained_layout=True)
    for panel, column, title in zip(panels, COLUMNS, TITLES, strict=True):
        cells = [row[column] for row in found.values()]
        values = [float(cell.replace(",", "")) for cell in cells]
        bars = panel.barh(list(found), values, color=COLOURS)
        panel.bar_label(bars, cells, padding=3, fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.invert_yaxis()
        panel.set_xlim(0, max(values) * 1.3)
        panel.set_xticks([])
        for side in ("top", "right", "bottom"):
            panel.spines[side].set_visible(False)
    figure.savefig(PICTURE, dpi=150, metadata={"Source": digest(text)})
    pyplot.close(figure)


def main() -> int:
    """Rewrite, or check and return 1 if something is old."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    text = README.read_text("utf-8")
    wanted = with_models(text)
    is_drawn = PICTURE.exists() and digest(wanted).encode() in PICTURE.read_bytes()
    if check:
        old = [name for name, ok in ((README, text == wanted), (PICTURE, is_drawn)) if not ok]
        for path in old:
            print(f"{path.relative_to(ROOT)}: wanted what scripts/readme.py writes, got another")
        return 1 if old else 0
    README.write_text(wanted, "utf-8")
    draw(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
