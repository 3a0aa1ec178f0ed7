# SPDX-License-Identifier: Apache-2.0
"""What the evaluation shows: tables for a terminal, and a plot."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from turbokv.files import check_writable, written_whole
from turbokv.integrations.transformers.evaluate import Needle, Preset, Row
from turbokv.integrations.transformers.texts import Sample


def quality_table(rows: Sequence[Row], title: str) -> Table:
    """Return the scores of presets and rivals, most bits first."""
    passages = len(rows[0].passages)
    spread = "± one standard error over passages" if passages > 1 else "one passage: spread unknown"
    # in a narrow terminal names fold; a figure is never cut, hence no room for frames
    table = Table(title=title, caption=spread, box=SIMPLE_HEAD, padding=0)
    table.add_column("cache", overflow="fold")
    for heading in ("bits", "KL", "x fp8", "x int4", "1-TV", "top-1", "ppl"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda r: (-r.bits, r.kl)):
        table.add_row(
            f"[dim]{row.name}[/dim]" if row.rival else row.name,
            f"{row.bits:.2f}",
            _with_error(row.kl, row.kl_error, 5),
            _with_error(row.kl_over_fp8, row.kl_over_fp8_error, 2),
            _with_error(row.kl_over_int4, row.kl_over_int4_error, 2),
            f"{row.one_minus_tv:.4f}",
            f"{row.top1:.4f}",
            f"{row.perplexity_ratio:.4f}",
        )
    return table


def quality_tables(
    tables: Mapping[str, Sequence[Row]], rows: Sequence[Row], title: str
) -> list[Table]:
    """Return the scores over all texts, and KL over fp8's (or KL) by text if there are several."""
    if len(tables) == 1:
        return [quality_table(rows, title)]
    has_fp8 = any(row.name == "fp8" for row in rows)
    table = Table(
        title=f"{'KL over that of fp8' if has_fp8 else 'KL'} by text, lower is better",
        caption="± one standard error over passages",
        box=SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("cache", overflow="fold")
    for kind in tables:
        table.add_column(kind, justify="right", no_wrap=True)
    by_kind = [{row.name: row for row in of_kind} for of_kind in tables.values()]
    for row in sorted(rows, key=lambda r: (-r.bits, r.kl)):
        found = [of_kind[row.name] for of_kind in by_kind]
        cells = [
            _with_error(one.kl_over_fp8, one.kl_over_fp8_error, 2)
            if has_fp8
            else _with_error(one.kl, one.kl_error, 5)
            for one in found
        ]
        table.add_row(f"[dim]{row.name}[/dim]" if row.rival else row.name, *cells)
    return [quality_table(rows, title), table]


def scores_json(
    title: str,
    samples: Mapping[str, Sample],
    tables: Mapping[str, Sequence[Row]],
    rows: Sequence[Row],
    cells: Sequence[Needle],
    bos: int | None,
) -> dict[str, Any]:
    """Return what ``turbokv eval --json`` prints: ``rows`` are over the passages of all texts."""
    return {
        "title": title,
        "bos": bos,
        "rows": [asdict(row) for row in rows],
        "texts": {
            kind: {"starts": samples[kind].starts, "rows": [asdict(row) for row in of_kind]}
            for kind, of_kind in tables.items()
        },
        "needle": [asdict(cell) for cell in cells],
    }


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f"±{error:.{digits}f}")


def needle_table(cells: Sequence[Needle]) -> Table:
    """Return how often each cache gave the planted code back, by context."""
    table = Table(title="needle: codes repeated / depths tried (log-probability a token)")
    contexts = sorted({cell.context for cell in cells})
    table.add_column("cache")
    for context in contexts:
        table.add_column(str(context), justify="right")
    for name in dict.fromkeys(cell.name for cell in cells):
        columns = []
        for context in contexts:
            mine = [c for c in cells if c.name == name and c.context == context]
            mean = sum(c.log_probability for c in mine) / len(mine)
            columns.append(f"{sum(c.found for c in mine)}/{len(mine)} ({mean:.2f})")
        table.add_row(name, *columns)
    return table


def check_plot(path: str | pathlib.Path) -> None:
    """Raise ValueError unless a plot can be drawn and written there."""
    check_writable(path, "plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "plot: wanted the extra 'turbokv-cache[plots]', got no module 'matplotlib'"
        )


def plot_quality(rows: Sequence[Row], path: str | pathlib.Path, title: str) -> None:
    """Draw KL against bits per number (log scale) as a PNG; needs matplotlib."""
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), constrained_layout=True)
    ours = [(row, Preset.parse(row.name)) for row in rows if not row.rival]
    groups = {
        "TurboKV, nothing kept": ([r for r, p in ours if not p.window], "o"),
        "TurboKV, window and sinks": (
            [r for r, p in ours if p.window and p.calibration == "none"],
            "s",
        ),
        "TurboKV, and centred keys": ([r for r, p in ours if p.calibration == "centred"], "D"),
        "TurboKV, and mapped keys": ([r for r, p in ours if p.calibration == "mapped"], "*"),
        "TurboKV, centred without text": ([r for r, p in ours if p.calibration == "random"], "P"),
        "vLLM's caches": ([r for r in rows if r.rival], "x"),
    }
    for label, (group, marker) in groups.items():
        if not group:
            continue
        axes.scatter([r.bits for r in group], [r.kl for r in group], marker=marker, label=label)
        for row in group:
            name = row.name if row.rival else row.name.split("+")[0]
            axes.annotate(
                name, (row.bits, row.kl), textcoords="offset points", xytext=(5, 3), fontsize=7
            )
    axes.set_yscale("log")
    axes.set_xlabel("stored bits per number (codes and scales)")
    axes.set_ylabel("KL to full precision, nats per token")
    axes.set_title(title, fontsize=9, wrap=True)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    try:
        with written_whole(path, "plot") as fresh:
            figure.savefig(fresh, dpi=130, format="png")
    finally:
        pyplot.close(figure)
