# SPDX-License-Identifier: Apache-2.0
"""Make the table of docs/results/quality.md: caches, models and kinds of text, a run a model.

Scores are kept in FOLDER after every passage, so that a run that was stopped goes on where it was;
``--table`` shows what is there. Two models of 0.1 to 0.3 billion parameters take hours of a core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import torch

from turbokv.files import written_whole
from turbokv.integrations.transformers import evaluate as ev
from turbokv.integrations.transformers import texts
from turbokv.integrations.transformers.calibrate import calibrate
from turbokv.integrations.transformers.calibration_choice import auto_calibration
from turbokv.integrations.transformers.models import NAMED, load_model
from turbokv.integrations.transformers.quality import Divergence

CACHES = (
    *ev.SHORT_RIVALS,
    "tq4",
    "tq4+w",
    "tq_k5v3+w",
    "tq4+w+random",
    "tq_k5v3+w+random",
    "tq4+w+mapped",
    "tq3+w+mapped",
    "tq2+w+mapped",
)
CALIBRATION_TOKENS = 4096
Scores = dict[str, dict[str, list[dict[str, Any]]]]  # by kind of text and cache, one a passage


def settings_of(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Return what the scores of a file must have in common."""
    names = ("caches", "texts", "tokens", "chunk", "passages", "window", "sinks", "score_every")
    chosen: dict[str, Any] = {name: getattr(args, name) for name in names}
    return {"model": model, **chosen}


def score(args: argparse.Namespace, model: str) -> None:
    """Score what is missing of one model, passage by passage and the kinds of text in turn."""
    path = args.folder / f"{model}.json"
    settings = settings_of(args, model)
    scores: Scores = {kind: {name: [] for name in args.caches} for kind in args.texts}
    if path.is_file():
        found = json.loads(path.read_text())
        if found["settings"] != settings:
            raise ValueError(f"folder: wanted scores of {settings}, got {found['settings']}")
        scores = found["scores"]
    loaded = load_model(model)
    vocabulary = loaded.model.config.get_text_config(decoder=True).vocab_size
    print(f"{model}: vocabulary of {vocabulary}", flush=True)
    helps = texts.sample_text(
        loaded.tokenizer, texts.read_text("topics"), 1024, 1, CALIBRATION_TOKENS
    )
    print(f"{model}: passages begin with token {helps.bos}", flush=True)
    whole = calibrate(
        loaded.model,
        helps.held_out,
        parts=("offsets", "k_map"),
        tokens=CALIBRATION_TOKENS,
        bos=helps.bos,
        name=model,
    )
    calibrations = {
        "mapped": whole,
        "centred": whole.without("k_map"),
        "random": auto_calibration(loaded.model),
    }
    samples = {
        kind: texts.sample_text(
            loaded.tokenizer, texts.read_text(kind), args.tokens, args.passages
        ).ids
        for kind in args.texts
    }
    for number in range(args.passages):
        for kind, ids in samples.items():
            if len(scores[kind][args.caches[0]]) > number:
                continue
            rows = ev.score_table(
                loaded.model,
                ids[number : number + 1],
                args.caches,
                calibrations,
                chunk=args.chunk,
                window=args.window,
                sinks=args.sinks,
                score_every=args.score_every,
            )
            for row in rows:
                scores[kind][row.name].append(dataclasses.asdict(row.passages[0]))
            with written_whole(path, "folder") as fresh:
                fresh.write_text(json.dumps({"settings": settings, "scores": scores}))
            print(f"{model}: {kind} {number + 1} of {args.passages}", flush=True)


def rows_of(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, dict[str, ev.Row]]]:
    """Return a model's settings, and its rows by kind of text and cache."""
    found = json.loads(path.read_text())
    tables = {}
    for kind, scores in found["scores"].items():
        passages = {
            name: [Divergence(**one) for one in of_one] for name, of_one in scores.items() if of_one
        }
        # bits do not depend on the model but for scales, a few hundredths: those of 128 are shown
        tables[kind] = {row.name: row for row in ev.table_of(passages, head_dim=128)}
    return found["settings"], tables


def markdown(paths: list[pathlib.Path]) -> str:
    """Return the table: KL over fp8's of the same passages, with one standard error."""
    tables = {path.stem: rows_of(path)[1] for path in paths}
    columns = [(model, kind) for model, kinds in tables.items() for kind in kinds]
    lines = [
        "| cache | bits | " + " | ".join(f"{model}, {kind}" for model, kind in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    names = dict.fromkeys(name for model, kind in columns for name in tables[model][kind])
    for name in names:
        cells = []
        for model, kind in columns:
            row = tables[model][kind][name]
            if name == "fp8":
                cells.append(f"1 (KL {_spread(row.kl, row.kl_error, 5)})")
            else:
                cells.append(_spread(row.kl_over_fp8, row.kl_over_fp8_error, 2))
        bits = tables[columns[0][0]][columns[0][1]][name].bits
        shown = f"vLLM `{name}`" if ev.is_rival(name) else f"`{name}`"
        lines.append(f"| {shown} | {bits:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(value: float | None, error: float | None, digits: int) -> str:
    """Return a figure with its standard error, which one passage has not."""
    shown = "" if value is None else f"{value:.{digits}f}"
    return shown if error is None else f"{shown} ± {error:.{digits}f}"


def plot(paths: list[pathlib.Path], target: pathlib.Path) -> None:
    """Draw KL over fp8's by cache, a panel a model, with one standard error; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(paths), figsize=(5.5 * len(paths), 5), sharey=True, squeeze=False, layout="tight"
    )
    for axes, path in zip(panels[0], paths, strict=True):
        _, tables = rows_of(path)
        names = list(next(iter(tables.values())))[::-1]
        for shift, (kind, rows) in enumerate(tables.items()):
            heights = [index + 0.22 * (shift - 1) for index in range(len(names))]
            axes.errorbar(
                [rows[name].kl_over_fp8 for name in names],
                heights,
                xerr=[rows[name].kl_over_fp8_error or 0 for name in names],
                fmt="osD^"[shift % 4],
                markersize=4,
                label=kind,
            )
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("KL over that of fp8, lower is better")
        axes.set_title(path.stem)
        axes.grid(True, which="both", axis="x", alpha=0.25)
        axes.legend(fontsize=8)
    with written_whole(target, "plot") as fresh:
        figure.savefig(fresh, dpi=110, format="png")
    pyplot.close(figure)


def main() -> None:
    """Score, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="where scores are kept")
    parser.add_argument("--models", default=",".join(NAMED), help="names or GGUF files")
    parser.add_argument("--texts", default=",".join(texts.KINDS))
    parser.add_argument("--caches", default=",".join(CACHES))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--score-every", type=int, default=1, help="tokens between scored ones")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="score nothing")
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    args.texts, args.caches = args.texts.split(","), args.caches.split(",")
    models = args.models.split(",")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for model in models:
            score(args, model)
    paths = [args.folder / f"{model}.json" for model in models]
    print(markdown(paths))
    if args.plot is not None:
        plot(paths, args.plot)


if __name__ == "__main__":
    main()
