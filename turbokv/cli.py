# SPDX-License-Identifier: Apache-2.0
"""The command line: turbokv demo | eval | tasks | calibrate | plan | serve | doctor."""

from __future__ import annotations

import pathlib
import sys
from typing import Annotated

import typer

from turbokv import cli_options as common
from turbokv.cli_eval import evaluate
from turbokv.cli_tasks import tasks
from turbokv.files import check_writable
from turbokv.presets import PRESETS, preset_name
from turbokv.window_pool import FRACTION

app = typer.Typer(
    help="KV caches of language models at 2 to 5 bits per number.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    """KV caches of language models at 2 to 5 bits per number."""


@app.command()
def demo(
    model: common.ModelOption = None,
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits per number, K and V.")] = 4,
    k_bits: Annotated[int | None, typer.Option(min=2, max=8, help="Bits of K.")] = None,
    v_bits: Annotated[int | None, typer.Option(min=2, max=8, help="Bits of V.")] = None,
    window: common.WindowOption = 128,
    sinks: common.SinksOption = 4,
    calibration: Annotated[
        str, typer.Option(help="Offsets of centred keys: auto, none or a file of `calibrate`.")
    ] = "auto",
    prompt: Annotated[str | None, typer.Option(help="The user's message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 80,
    dtype: common.DtypeOption = "float32",
    device: common.DeviceOption = "cpu",
    threads: common.ThreadsOption = 0,
    as_json: common.JsonOption = False,
) -> None:
    """Answer a chat message with and without a compressed cache, side by side."""
    common.check_compute(dtype, device, threads)
    common.read_calibration(calibration)
    from turbokv.integrations.transformers import demo_report
    from turbokv.integrations.transformers.demo import run_demo

    loaded = common.load(model, dtype, device)
    widths = (k_bits or bits, v_bits or bits)
    with common.time_left() as progress:
        result = run_demo(
            loaded,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            progress=progress,
            k_bits=widths[0],
            v_bits=widths[1],
            window=window,
            sinks=sinks,
            calibration=calibration,
        )
    if as_json:
        common.print_json(result.to_dict())
        return
    settings = f"{preset_name(*widths)}, window {window}, sinks {sinks}"
    common.console.print(demo_report.render(result, dtype, settings, widths))


app.command("eval")(evaluate)
app.command("tasks")(tasks)


@app.command()
def calibrate(
    output: Annotated[pathlib.Path, typer.Argument(help="File to write (.safetensors).")],
    model: common.ModelOption = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="prose, dialogue, code, topics or a file; several times for several texts, each"
            " its share of --tokens. Without it random token ids are run."
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
    dtype: common.DtypeOption = "float32",
    device: common.DeviceOption = "cpu",
    threads: common.ThreadsOption = 0,
    as_json: common.JsonOption = False,
) -> None:
    """Measure a model's calibration (centred and mapped keys) and write it to a file."""
    check_writable(output, "output")
    common.check_compute(dtype, device, threads)
    from turbokv.integrations.transformers.calibrate import calibrate as measure
    from turbokv.integrations.transformers.calibrate import check_parts
    from turbokv.integrations.transformers.models import leading_token
    from turbokv.integrations.transformers.texts import encode, read_text

    chosen = check_parts(tuple(part.strip() for part in parts.split(",")))
    own_texts = [read_text(name) for name in text or ()]
    loaded = common.load(model, dtype, device)
    ids = [encode(loaded.tokenizer, own) for own in own_texts] or None
    with common.time_left() as progress:
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
            progress=lambda done, total: progress("running the model", min(done, total), total),
        )
    result.save(output)
    weakness = result.weakness(k_bits)
    if weakness is not None:
        common.errors.print(f"[yellow]turbokv:[/yellow] {weakness}", highlight=False)
    centred = sum(layer.offsets is not None for layer in result.layers.values())
    mapped = sum(layer.k_map is not None for layer in result.layers.values())
    size = output.stat().st_size
    if as_json:
        common.print_json(
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
    common.console.print(
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
        float, typer.Option(help="Most of the cache for 16-bit copies of the newest tokens.")
    ] = FRACTION,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Running requests that the copies are for.")
    ] = 256,
    presets: Annotated[str, typer.Option(help="Comma list such as tq4,tq_k5v3; or all.")] = "all",
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share every layer.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Stages of layers, each on its own GPUs.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
    model_type: Annotated[
        str | None, typer.Option(help="A known type that an unknown model is built like.")
    ] = None,
    as_json: common.JsonOption = False,
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
        max_num_seqs=max_num_seqs,
        presets=common.names(presets, tuple(PRESETS)),
        tensor_parallel=tp,
        pipeline_parallel=pp,
        data_parallel=dp,
        model_type=model_type,
    )
    if as_json:
        common.print_json(result.to_dict())
    else:
        common.show(plan_report.render(result))


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
        "skip_layers": None if skip_layers is None else common.names(skip_layers, ()),
        "calibration": calibration,
    }
    server.run(server.arguments(model, preset, options, context.args))


@app.command()
def doctor(as_json: common.JsonOption = False) -> None:
    """Say what this machine can run, and what to do about what it cannot."""
    from turbokv import doctor as checks

    found = checks.diagnose()
    if as_json:
        common.print_json([check.to_dict() for check in found])
    else:
        common.console.print(checks.render(found), soft_wrap=True)


def main() -> None:
    """Run the command line; a mistake of the user prints one sentence and exits with 2."""
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        common.errors.print(f"[red]turbokv:[/red] {error}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
