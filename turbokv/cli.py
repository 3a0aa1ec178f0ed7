# SPDX-License-Identifier: Apache-2.0
"""The command line: turbokv demo | eval | calibrate | plan | serve | doctor."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
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
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves PyTorch's choice.")]


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


def _progress() -> Progress:
    """Progress on stderr, so that stdout stays the result."""
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=errors
    )


def _load(path: pathlib.Path | None, dtype: str, device: str, threads: int = 0) -> LoadedModel:
    """Load a model; the one import of PyTorch and Transformers that a user waits for."""
    # Nothing here may reach for the network: every model is a local path.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    try:
        from turbokv.integrations.transformers import models
    except ModuleNotFoundError as error:
        raise ValueError(
            "transformers: wanted the extra 'turbokv-cache[transformers]',"
            f" got no module {error.name!r}"
        ) from error
    chosen = getattr(torch, dtype, None)
    if chosen not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: wanted float32, bfloat16 or float16, got {dtype!r}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: wanted a device that PyTorch can use, got {device!r}")
    if threads:
        torch.set_num_threads(threads)
    with _progress() as progress:
        progress.add_task(f"loading {path or 'SmolLM2-135M-Instruct'}")
        return models.load_model(path, dtype=chosen, device=device)


def _calibration(loaded: LoadedModel, path: pathlib.Path | None) -> Calibration | None:
    if path is None:
        return None
    from turbokv.calibration import Calibration
    from turbokv.integrations.transformers.models import fingerprint

    return Calibration.load(path, fingerprint=fingerprint(loaded.model, loaded.name))


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
    loaded = _load(model, dtype, device, threads)
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
    name = f"K{k_bits or bits}V{v_bits or bits}, window {window}, sinks {sinks}"
    answers = Table.grid(expand=True, padding=(0, 1))
    answers.add_row(
        Panel(result.full.text, title=f"{dtype} cache"),
        Panel(result.compressed.text, title=f"TurboKV {name}"),
    )
    console.print(answers)
    table = Table(title=f"{result.model}, {result.prompt_tokens} prompt tokens")
    table.add_column("")
    table.add_column(f"{dtype} cache", justify="right")
    table.add_column("TurboKV", justify="right")
    full, ours = result.full, result.compressed
    table.add_row(
        "cache held (measured), bytes",
        f"{full.cache_bytes:,}",
        f"{ours.cache_bytes:,} ({result.bytes_ratio:.2f}x less)",
    )
    table.add_row(
        "decode, tokens/s", f"{full.tokens_per_second:.1f}", f"{ours.tokens_per_second:.1f}"
    )
    table.add_row(
        "first token, s",
        f"{full.seconds_to_first_token:.2f}",
        f"{ours.seconds_to_first_token:.2f}",
    )
    table.add_row("tokens agreeing", f"{full.tokens}", f"{result.agreeing_tokens}")
    table.add_row("same top token, given the answer", "", f"{result.top1:.1%}")
    table.add_row("KL a token, given the answer", "0", f"{result.kl:.5f}")
    console.print(table)


def _names(text: str, default: tuple[str, ...]) -> list[str]:
    if text == "all":
        return list(default)
    if text == "none":
        return []
    return [name.strip() for name in text.split(",") if name.strip()]


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
        str, typer.Option(help="Comma list such as k5v3+w+centred; short; all; none.")
    ] = "short",
    rivals: Annotated[str, typer.Option(help="Comma list of vLLM's caches; all; none.")] = "all",
    window: WindowOption = 128,
    sinks: SinksOption = 4,
    first_position: Annotated[
        int, typer.Option(min=0, help="Position of the first token (tests long contexts).")
    ] = 0,
    calibration: Annotated[
        pathlib.Path | None, typer.Option(help="Use this file for +centred.")
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
    loaded = _load(model, dtype, device, threads)
    from turbokv.integrations.transformers import evaluate as ev
    from turbokv.integrations.transformers.calibrate import calibrate as measure
    from turbokv.integrations.transformers.calibration_choice import auto_calibration

    ours = list(ev.SHORT_PRESETS) if presets == "short" else _names(presets, ev.PRESETS)
    theirs = _names(rivals, ev.RIVALS)
    unknown = sorted(set(theirs) - set(ev.RIVALS))
    if unknown:
        raise ValueError(f"rivals: wanted some of {list(ev.RIVALS)}, got {unknown}")
    wanted = {ev.Preset.parse(name, window, sinks).calibration for name in ours}
    own_text = ev.read_text(text)
    reserve = 4096 if "centred" in wanted and calibration is None and not calibration_text else 0
    sample = ev.sample_text(loaded.tokenizer, own_text, tokens, passages, reserve)
    held_out = sample.held_out
    calibrations: dict[str, Any] = {}
    with _progress() as progress:
        task = progress.add_task("calibrating")
        given = _calibration(loaded, calibration)
        if given is not None:
            calibrations["centred"] = given
        elif "centred" in wanted:
            if calibration_text:
                held_out = ev.encode(loaded.tokenizer, ev.read_text(calibration_text))
            calibrations["centred"] = measure(
                loaded.model,
                held_out.to(loaded.device),
                tokens=4096,
                bos=sample.bos,
                name=loaded.name,
            )
        if "random" in wanted:  # what engines take when they are given nothing
            calibrations["random"] = auto_calibration(loaded.model)
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
                contexts=[int(c) for c in needle_contexts.split(",")],
                window=window,
                sinks=sinks,
                progress=lambda what: progress.update(task, description=what),
            )
    title = (
        f"{loaded.name}, {text}, {passages} x {tokens} tokens in chunks of {chunk}, first position"
        f" {first_position}, window {window}, sinks {sinks}, {dtype} on {device}"
    )
    if plot is not None:
        try:
            ev.plot_quality(rows, plot, title)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"plot: wanted the extra 'turbokv-cache[plots]', got no module {error.name!r}"
            ) from error
    if as_json:
        _print_json(
            {
                "title": title,
                "starts": sample.starts,
                "rows": [dataclasses.asdict(row) for row in rows],
                "needle": [dataclasses.asdict(cell) for cell in cells],
            }
        )
        return
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
    console.print(table)
    if cells:
        console.print(_needle_table(cells))
    if plot is not None:
        console.print(f"plot written to {plot}")


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f"±{error:.{digits}f}")


def _needle_table(cells: list[Any]) -> Table:
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


@app.command()
def calibrate(
    output: Annotated[pathlib.Path, typer.Argument(help="File to write (.safetensors).")],
    model: ModelOption = None,
    text: Annotated[
        str | None,
        typer.Option(help="'topics', 'code' or a file; without it random token ids are run."),
    ] = None,
    parts: Annotated[
        str,
        typer.Option(
            help="Comma list: offsets, k_scale, v_scale, v_shift, k_codebook, v_codebook."
        ),
    ] = "offsets",
    k_bits: Annotated[int, typer.Option(min=2, max=8, help="For codebooks.")] = 4,
    v_bits: Annotated[int | None, typer.Option(min=2, max=8, help="For codebooks.")] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to run.")] = 8192,
    context: Annotated[int, typer.Option(min=16, help="Tokens a forward pass.")] = 1024,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure a model's calibration (centred keys) and write it to a file."""
    loaded = _load(model, dtype, device, threads)
    from turbokv.integrations.transformers.calibrate import calibrate as measure
    from turbokv.integrations.transformers.evaluate import encode, read_text
    from turbokv.integrations.transformers.models import leading_token

    ids = None
    if text is not None:
        ids = encode(loaded.tokenizer, read_text(text))
    with _progress() as progress:
        task = progress.add_task("running the model")
        result = measure(
            loaded.model,
            ids,
            parts=tuple(p.strip() for p in parts.split(",")),
            k_bits=k_bits,
            v_bits=v_bits,
            context=context,
            tokens=tokens,
            bos=leading_token(loaded.tokenizer),
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
    if as_json:
        _print_json(
            {
                "output": output,
                "layers": len(result.layers),
                "centred_layers": centred,
                "source": result.source,
                "fingerprint": result.fingerprint.config_sha256,
            }
        )
        return
    console.print(
        f"{output}: {len(result.layers)} layers, {centred} with centred keys,"
        f" from {result.source['tokens']} tokens of {result.source['from']}"
    )


@app.command()
def plan(
    model: Annotated[
        pathlib.Path, typer.Argument(help="A config.json, or a model folder that holds one.")
    ],
    gpu_memory: Annotated[float, typer.Option(help="GiB of GPU memory for the model.")] = 80.0,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 32_768,
    utilisation: Annotated[float, typer.Option(help="Share of the memory to use.")] = 0.9,
    weight_bits: Annotated[
        int | None, typer.Option(help="16, 8 or 4 for linear layers; default the checkpoint's.")
    ] = None,
    reserve: Annotated[float, typer.Option(help="GiB for activations and graphs.")] = 2.0,
    recent_fraction: Annotated[
        float, typer.Option(help="Share of the cache for 16-bit copies of the newest tokens.")
    ] = 0.02,
    presets: Annotated[str, typer.Option(help="Comma list such as k4v4,k5v3; or all.")] = "all",
    as_json: JsonOption = False,
) -> None:
    """Say how many tokens and sequences fit a GPU at bf16, fp8 and each preset."""
    from turbokv import plan as planner

    result = planner.plan(
        model,
        gpu_memory=gpu_memory,
        context=context,
        utilisation=utilisation,
        weight_bits=weight_bits,
        activation_reserve=reserve,
        recent_fraction=recent_fraction,
        presets=_names(presets, planner.PRESETS),
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        console.print(planner.render(result))


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
        str | None, typer.Option(help="File written by `turbokv calibrate`.")
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
        console.print(checks.render(found))


def main() -> None:
    """Run the command line; a mistake of the user prints one sentence and exits with 2."""
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError) as error:
        errors.print(f"[red]turbokv:[/red] {error}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
