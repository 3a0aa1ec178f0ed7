# SPDX-License-Identifier: Apache-2.0
"""``turbokv eval``: how far presets and rivals are from full precision."""

from __future__ import annotations

import itertools
import pathlib
from typing import TYPE_CHECKING, Annotated

import typer

from turbokv import cli_options as common

if TYPE_CHECKING:
    from torch import Tensor

    from turbokv.calibration import Calibration
    from turbokv.integrations.transformers.models import LoadedModel


def _measured(
    loaded: LoadedModel,
    wanted: set[str],
    given: Calibration | None,
    held_out: Tensor,
    bos: int | None,
) -> dict[str, Calibration]:
    """Return the calibrations that presets want, by name: given, or measured now."""
    from turbokv.integrations.transformers.calibrate import calibrate as measure
    from turbokv.integrations.transformers.calibration_choice import auto_calibration

    found: dict[str, Calibration] = {}
    whole = given
    if whole is None and {"centred", "mapped"} & wanted:
        whole = measure(
            loaded.model,
            held_out.to(loaded.device),
            parts=("offsets", "k_map") if "mapped" in wanted else ("offsets",),
            tokens=4096,
            bos=bos,
            name=loaded.name,
        )
    if whole is not None:
        is_mapped = any(layer.k_map is not None for layer in whole.layers.values())
        if "mapped" in wanted and not is_mapped and whole.layers:
            raise ValueError("calibration: wanted a file with k_map for +mapped, got one without")
        found["mapped"] = whole
        found["centred"] = whole.without("k_map")
    if "random" in wanted:  # what engines take when they are given nothing
        found["random"] = auto_calibration(loaded.model)
    return found


def evaluate(
    model: common.ModelOption = None,
    text: Annotated[
        str,
        typer.Option(help="Comma list of prose, dialogue, code, topics (Python's help) or files."),
    ] = "prose,dialogue,code",
    calibration_text: Annotated[
        str,
        typer.Option(help="Text to centre keys with. If it is scored too, its far end is used."),
    ] = "topics",
    tokens: Annotated[int, typer.Option(min=128, help="Tokens of a passage.")] = 1024,
    passages: Annotated[
        int, typer.Option(min=1, help="Separate passages of each text, spread evenly over it.")
    ] = 3,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens a forward pass.")] = 64,
    score_every: Annotated[
        int, typer.Option(min=1, help="Score one token in N, which saves the memory of logits.")
    ] = 1,
    presets: Annotated[
        str, typer.Option(help="Comma list such as tq_k5v3+w+centred; short; all; none.")
    ] = "short",
    rivals: Annotated[
        str,
        typer.Option(help="Comma list such as fp8,fp8+w (emulates a window); short; all; none."),
    ] = "short",
    window: common.WindowOption = 128,
    sinks: common.SinksOption = 4,
    first_position: Annotated[
        int, typer.Option(min=0, help="Position of the first token (tests long contexts).")
    ] = 0,
    calibration: Annotated[
        pathlib.Path | None, typer.Option(help="Use this file for +centred and +mapped.")
    ] = None,
    needle: Annotated[bool, typer.Option(help="Also run the needle grid.")] = False,
    needle_contexts: Annotated[str, typer.Option(help="Comma list of tokens.")] = "512,1024,2048",
    plot: Annotated[
        pathlib.Path | None, typer.Option(help="Write KL against bits as a PNG.")
    ] = None,
    dtype: common.DtypeOption = "float32",
    device: common.DeviceOption = "cpu",
    threads: common.ThreadsOption = 0,
    as_json: common.JsonOption = False,
) -> None:
    """Score presets and vLLM's caches on several texts against full precision, in one run.

    Figures are means over the scored tokens of all passages, with one standard error over passages.
    """
    common.check_compute(dtype, device, threads)
    from turbokv.integrations.transformers import evaluate as ev
    from turbokv.integrations.transformers import report, texts
    from turbokv.integrations.transformers.models import fingerprint

    ours = list(ev.SHORT_PRESETS) if presets == "short" else common.names(presets, ev.PRESETS)
    theirs = list(ev.SHORT_RIVALS) if rivals == "short" else common.names(rivals, ev.RIVALS)
    ev.check_rivals(theirs)
    if not ours and not theirs:
        raise ValueError("presets: wanted some, as rivals are 'none', got none")
    parsed = [ev.Preset.parse(name, window, sinks) for name in ours]
    ours, wanted = [preset.name for preset in parsed], {preset.calibration for preset in parsed}
    contexts = common.counts(needle_contexts, "needle_contexts", ev.LEAST_NEEDLE_CONTEXT)
    if chunk >= tokens:
        raise ValueError(f"chunk: wanted fewer than the {tokens} tokens of a passage, got {chunk}")
    if score_every > chunk:
        raise ValueError(f"score_every: wanted at most the {chunk} of chunk, got {score_every}")
    read = texts.read_texts(common.names(text, texts.KINDS))
    other_text = texts.read_text(calibration_text)
    given = common.read_calibration(calibration)
    if plot is not None:
        report.check_plot(plot)
    loaded = common.load(model, dtype, device)
    if given is not None:
        given.check_model(fingerprint(loaded.model, loaded.name))
    centring = bool({"centred", "mapped"} & wanted) and given is None
    samples, held_out, bos = texts.sample_texts(
        loaded.tokenizer, read, tokens, passages, (calibration_text, other_text), centring
    )
    # every cache takes a chunk before the next one: so many steps, each about as long
    steps, total = itertools.count(1), len(samples) * passages * -(-tokens // chunk)
    with common.time_left() as progress:
        progress("calibrating", 0, 0)
        calibrations = _measured(loaded, wanted, given, held_out, bos)
        tables, rows = ev.score_tables(
            loaded.model,
            {kind: sample.ids.to(loaded.device) for kind, sample in samples.items()},
            [*theirs, *ours],
            calibrations,
            chunk=chunk,
            window=window,
            sinks=sinks,
            first_position=first_position,
            score_every=score_every,
            progress=lambda _: progress("scoring", next(steps), total),
        )
        cells = []
        if needle:
            cells = ev.needle_grid(
                loaded.model,
                loaded.tokenizer,
                ["full", *theirs, *ours],
                calibrations,
                contexts=contexts,
                window=window,
                sinks=sinks,
                progress=lambda what: progress(what, 0, 0),
            )
    title = (
        f"{loaded.name}, {', '.join(read)}, {passages} x {tokens} tokens of each in chunks of"
        f" {chunk}{'' if score_every == 1 else f', one in {score_every} scored'}, first position"
        f" {first_position}, window {window}, sinks {sinks}, {dtype} on {device}"
    )
    # shown before the plot is drawn, which may fail
    if as_json:
        common.print_json(report.scores_json(title, samples, tables, rows, cells, bos))
    else:
        for table in report.quality_tables(tables, rows, title):
            common.show(table)
        if cells:
            common.show(report.needle_table(cells))
    if plot is not None:
        report.plot_quality(rows, plot, title)
        if not as_json:
            common.console.print(f"plot written to {plot}")
