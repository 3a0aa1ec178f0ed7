# SPDX-License-Identifier: Apache-2.0
"""The command line: turbokv demo | eval | calibrate | plan | serve | doctor."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from turbokv.files import check_writable
from turbokv.presets import PRESETS

if TYPE_CHECKING:
    from torch import Tensor

    from turbokv.calibration import Calibration
    from turbokv.integrations.transformers.models import LoadedModel

app = typer.Typer(
    help="KV caches of language models at 2 to 5 bits a number.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

ModelOption = Annotated[
    pathlib.Path | None,
    typer.Option("--model", help="Local Transformers folder or GGUF file; default SmolLM2-135M."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
WindowOption = Annotated[int, typer.Option(min=0, help="Newest tokens kept in 16 bits.")]
SinksOption = Annotated[int, typer.Option(min=0, help="First tokens kept in 16 bits.")]
DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1 ...")]
DtypeOption = Annotated[str, typer.Option(help="Compute dtype: float32, bfloat16, float16.")]
_DTYPES = ("float32", "bfloat16", "float16")
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves PyTorch's choice.")]


def _print_json(value: object) -> None:
    typer.echo(json.dumps(_json(value), indent=2, allow_nan=False, default=str))


def _json(value: object) -> object:
    """Return ``value`` for JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(entry) for entry in value]
    return value


def _show(found: RenderableType) -> None:
    """Print a result wide enough that no figure is cut, whatever the terminal's width is."""
    wide = console.options.update(max_width=10_000)
    parts = found.renderables if isinstance(found, Group) else [found]
    tables = [part for part in parts if isinstance(part, Table)]
    needed = [Measurement.get(console, wide, table).maximum for table in tables]
    # a console of its own: print's width is never more than the console's
    Console(width=max(console.width, *needed)).print(found)


def _progress() -> Progress:
    """Progress on stderr, so that stdout stays the result."""
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=errors
    )


def _check_compute(dtype: str, device: str, threads: int) -> None:
    """Refuse what no model could run with; the import of PyTorch that a user waits for."""
    # Nothing here may reach for the network: every model is a local path.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from turbokv.codec import usable_device

    if dtype not in _DTYPES:
        raise ValueError(f"dtype: wanted {' or '.join(_DTYPES)}, got {dtype!r}")
    if usable_device(device).type == "meta":
        raise ValueError(f"device: wanted one that can compute, got {device!r}")
    try:
        from turbokv.integrations.transformers import models  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            "transformers: wanted the extra 'turbokv-cache[transformers]',"
            f" got no module {error.name!r}"
        ) from error
    if threads:
        torch.set_num_threads(threads)


def _load(path: pathlib.Path | None, dtype: str, device: str) -> LoadedModel:
    """Load a model; everything else that was asked for has been checked."""
    import torch

    from turbokv.integrations.transformers import models

    with _progress() as progress:
        progress.add_task(f"loading {path or 'SmolLM2-135M-Instruct'}")
        return models.load_model(path, dtype=getattr(torch, dtype), device=device)


def _read_calibration(path: str | pathlib.Path | None) -> Calibration | None:
    """Read a file before the model is loaded; whose it is can only be checked after."""
    if path is None or path in ("auto", "none"):
        return None
    from turbokv.calibration import Calibration

    return Calibration.load(path)


def _print_version(wanted: bool) -> None:
    if wanted:
        from turbokv import __version__

        typer.echo(f"turbokv {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """KV caches of language models at 2 to 5 bits a number."""


@app.command()
def demo(
    model: ModelOption = None,
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits a number, K and V.")] = 4,
    k_bits: Annotated[int | None, typer.Option(min=2, max=8, help="Bits of K.")] = None,
    v_bits: Annotated[int | None, typer.Option(min=2, max=8, help="Bits of V.")] = None,
    window: WindowOption = 128,
    sinks: SinksOption = 4,
    calibration: Annotated[
        str, typer.Option(help="Offsets of centred keys: auto, none or a file of `calibrate`.")
    ] = "auto",
    prompt: Annotated[str | None, typer.Option(help="The user's message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer a chat message with and without a compressed cache, side by side."""
    _check_compute(dtype, device, threads)
    _read_calibration(calibration)
    loaded = _load(model, dtype, device)
    from turbokv.integrations.transformers import report
    from turbokv.integrations.transformers.demo import run_demo

    with _progress() as progress:
        progress.add_task("answering twice")
        result = run_demo(
            loaded,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            k_bits=k_bits or bits,
            v_bits=v_bits or bits,
            window=window,
            sinks=sinks,
            calibration=calibration,
        )
    if as_json:
        _print_json(result.to_dict())
        return
    settings = f"K{k_bits or bits}V{v_bits or bits}, window {window}, sinks {sinks}"
    for table in report.demo_tables(result, dtype, settings):
        console.print(table)


def _counts(text: str, name: str, least: int) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: wanted a comma list of numbers, got {text!r}") from None
    if min(found) < least:
        raise ValueError(f"{name}: wanted {least} or more, got {min(found)}")
    return found


def _names(text: str, default: tuple[str, ...]) -> list[str]:
    if text == "all":
        return list(default)
    if text == "none":
        return []
    return [name.strip() for name in text.split(",") if name.strip()]


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


@app.command("eval")
def evaluate(
    model: ModelOption = None,
    text: Annotated[
        str, typer.Option(help="'topics' (Python's help), 'code' (its sources) or a file.")
    ] = "topics",
    calibration_text: Annotated[
        str | None,
        typer.Option(help="Text to centre keys with; default the far end of --text."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=128, help="Tokens of a passage.")] = 1024,
    passages: Annotated[
        int, typer.Option(min=1, help="Separate passages, spread evenly over the text.")
    ] = 4,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens a forward pass.")] = 64,
    presets: Annotated[
        str, typer.Option(help="Comma list such as tq_k5v3+w+centred; short; all; none.")
    ] = "short",
    rivals: Annotated[str, typer.Option(help="Comma list of vLLM's caches; all; none.")] = "all",
    window: WindowOption = 128,
    sinks: SinksOption = 4,
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
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Score presets and vLLM's caches on a text against full precision, in one run.

    Figures are means over the scored tokens of all passages, with one standard error over passages.
    """
    _check_compute(dtype, device, threads)
    from turbokv.integrations.transformers import evaluate as ev
    from turbokv.integrations.transformers import report
    from turbokv.integrations.transformers.models import fingerprint

    ours = list(ev.SHORT_PRESETS) if presets == "short" else _names(presets, ev.PRESETS)
    theirs = _names(rivals, ev.RIVALS)
    unknown = sorted(set(theirs) - set(ev.RIVALS))
    if unknown:
        raise ValueError(f"rivals: wanted some of {list(ev.RIVALS)}, got {unknown}")
    if not ours and not theirs:
        raise ValueError("presets: wanted some, as rivals are 'none', got none")
    parsed = [ev.Preset.parse(name, window, sinks) for name in ours]
    ours, wanted = [preset.name for preset in parsed], {preset.calibration for preset in parsed}
    contexts = _counts(needle_contexts, "needle_contexts", ev.LEAST_NEEDLE_CONTEXT)
    if chunk >= tokens:
        raise ValueError(f"chunk: wanted fewer than the {tokens} tokens of a passage, got {chunk}")
    own_text = ev.read_text(text)
    other_text = ev.read_text(calibration_text) if calibration_text else None
    given = _read_calibration(calibration)
    if plot is not None:
        report.check_plot(plot)
    loaded = _load(model, dtype, device)
    if given is not None:
        given.check_model(fingerprint(loaded.model, loaded.name))
    reserve = 4096 if {"centred", "mapped"} & wanted and given is None and other_text is None else 0
    sample = ev.sample_text(loaded.tokenizer, own_text, tokens, passages, reserve)
    held_out = sample.held_out if other_text is None else ev.encode(loaded.tokenizer, other_text)
    with _progress() as progress:
        task = progress.add_task("calibrating")
        calibrations = _measured(loaded, wanted, given, held_out, sample.bos)
        rows = ev.score_table(
            loaded.model,
            sample.ids.to(loaded.device),
            [*theirs, *ours],
            calibrations,
            chunk=chunk,
            window=window,
            sinks=sinks,
            first_position=first_position,
            progress=lambda what: progress.update(task, description=f"scored {what}"),
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
                progress=lambda what: progress.update(task, description=what),
            )
    title = (
        f"{loaded.name}, {text}, {passages} x {tokens} tokens in chunks of {chunk}, first position"
        f" {first_position}, window {window}, sinks {sinks}, {dtype} on {device}"
    )
    # shown before the plot is drawn, which may fail
    if as_json:
        _print_json(
            {
                "title": title,
                "starts": sample.starts,
                "rows": [dataclasses.asdict(row) for row in rows],
                "needle": [dataclasses.asdict(cell) for cell in cells],
            }
        )
    else:
        console.print(report.quality_table(rows, title))
        if cells:
            console.print(report.needle_table(cells))
    if plot is not None:
        report.plot_quality(rows, plot, title)
        if not as_json:
            console.print(f"plot written to {plot}")


@app.command()
def calibrate(
    output: Annotated[pathlib.Path, typer.Argument(help="File to write (.safetensors).")],
    model: ModelOption = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="'topics', 'code' or a file; several times for several texts, each its share of"
            " --tokens. Without it random token ids are run."
        ),
    ] = None,
    parts: Annotated[
        str,
        typer.Option(
            help="Comma list: offsets, k_map, k_scale, v_scale, v_shift, k_codebook, v_codebook."
        ),
    ] = "offsets",
    k_bits: Annotated[int, typer.Option(min=2, max=8, help="For codebooks.")] = 4,
    v_bits: Annotated[int | None, typer.Option(min=2, max=8, help="For codebooks.")] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to run.")] = 8192,
    context: Annotated[int, typer.Option(min=16, help="Tokens a forward pass.")] = 1024,
    longest: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest context that k_map is for; default the model's to 32768."
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure a model's calibration (centred and mapped keys) and write it to a file."""
    check_writable(output, "output")
    _check_compute(dtype, device, threads)
    from turbokv.integrations.transformers.calibrate import calibrate as measure
    from turbokv.integrations.transformers.calibrate import check_parts
    from turbokv.integrations.transformers.evaluate import encode, read_text
    from turbokv.integrations.transformers.models import leading_token

    chosen = check_parts(tuple(part.strip() for part in parts.split(",")))
    own_texts = [read_text(name) for name in text or ()]
    loaded = _load(model, dtype, device)
    ids = [encode(loaded.tokenizer, own) for own in own_texts] or None
    with _progress() as progress:
        task = progress.add_task("running the model")
        result = measure(
            loaded.model,
            ids,
            parts=chosen,
            k_bits=k_bits,
            v_bits=v_bits,
            context=context,
            tokens=tokens,
            bos=leading_token(loaded.tokenizer),
            longest=longest,
            name=loaded.name,
            progress=lambda done, total: progress.update(
                task, description=f"ran {min(done, total)} of {total} tokens"
            ),
        )
    result.save(output)
    weakness = result.weakness(k_bits)
    if weakness is not None:
        errors.print(f"[yellow]turbokv:[/yellow] {weakness}", highlight=False)
    centred = sum(layer.offsets is not None for layer in result.layers.values())
    mapped = sum(layer.k_map is not None for layer in result.layers.values())
    size = output.stat().st_size
    if as_json:
        _print_json(
            {
                "output": output,
                "bytes": size,
                "layers": len(result.layers),
                "centred_layers": centred,
                "mapped_layers": mapped,
                "source": result.source,
                "fingerprint": result.fingerprint.config_sha256,
            }
        )
        return
    console.print(
        f"{output}: {len(result.layers)} layers, {centred} with centred keys, {mapped} with mapped"
        f" ones, from {result.source['tokens']} tokens of {result.source['from']};"
        f" {size / 1e6:.2f} MB"
    )


@app.command()
def plan(
    model: Annotated[
        pathlib.Path, typer.Argument(help="A config.json, or a model folder that holds one.")
    ],
    gpu_memory: Annotated[float, typer.Option(help="GiB of memory of one GPU.")] = 80.0,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 32_768,
    utilisation: Annotated[float, typer.Option(help="Share of the memory to use.")] = 0.9,
    weight_bits: Annotated[
        int | None, typer.Option(help="16, 8 or 4 for linear layers; default the checkpoint's.")
    ] = None,
    reserve: Annotated[float, typer.Option(help="GiB for activations and graphs.")] = 2.0,
    recent_fraction: Annotated[
        float, typer.Option(help="Share of the cache for 16-bit copies of the newest tokens.")
    ] = 0.02,
    presets: Annotated[str, typer.Option(help="Comma list such as tq4,tq_k5v3; or all.")] = "all",
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share every layer.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Stages of layers, each on GPUs of its own.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
    model_type: Annotated[
        str | None, typer.Option(help="A known type that an unknown model is built like.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say how many tokens and sequences fit a GPU at bf16, fp8 and each preset."""
    from turbokv import plan as planner
    from turbokv import plan_report

    result = planner.plan(
        model,
        gpu_memory=gpu_memory,
        context=context,
        utilisation=utilisation,
        weight_bits=weight_bits,
        activation_reserve=reserve,
        recent_fraction=recent_fraction,
        presets=_names(presets, tuple(PRESETS)),
        tensor_parallel=tp,
        pipeline_parallel=pp,
        data_parallel=dp,
        model_type=model_type,
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        _show(plan_report.render(result))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder, or a name on the Hugging Face hub.")],
    preset: Annotated[
        str, typer.Option(help="Widths of K and V: tq4, tq3, tq2, tq_k5v3 ...")
    ] = "tq4",
    path: Annotated[
        str | None, typer.Option(help="Prefill: native_tq, flash_attn or flashinfer.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Newest tokens kept in 16 bits.")] = None,
    sinks: Annotated[int | None, typer.Option(help="First tokens kept in 16 bits.")] = None,
    window_pool_fraction: Annotated[
        float | None, typer.Option(help="Share of the cache for 16-bit copies.")
    ] = None,
    skip_layers: Annotated[
        str | None, typer.Option(help="Comma list of layers left in 16 bits.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="How keys are centred: auto, weights, none or a file of `calibrate`."),
    ] = None,
) -> None:
    """Serve a model over the OpenAI API, its KV cache compressed; further options go to vLLM."""
    from turbokv.integrations.vllm import serve as server

    options = {
        "path": path,
        "window": window,
        "sinks": sinks,
        "window_pool_fraction": window_pool_fraction,
        "skip_layers": None if skip_layers is None else _names(skip_layers, ()),
        "calibration": calibration,
    }
    server.run(server.arguments(model, preset, options, context.args))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can run, and what to do about what it cannot."""
    from turbokv import doctor as checks

    found = checks.diagnose()
    if as_json:
        _print_json([check.to_dict() for check in found])
    else:
        console.print(checks.render(found), soft_wrap=True)


def main() -> None:
    """Run the command line; a mistake of the user prints one sentence and exits with 2."""
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        errors.print(f"[red]turbokv:[/red] {error}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
