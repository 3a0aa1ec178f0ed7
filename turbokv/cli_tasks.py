# SPDX-License-Identifier: Apache-2.0
"""``turbokv tasks``: what answers are worth with a compressed cache, by lm-evaluation-harness."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

from turbokv import cli_options as common
from turbokv.files import check_writable, written_whole


def tasks(
    model: common.ModelOption = None,
    tasks: Annotated[
        str,
        typer.Option(help="Comma list: retrieval, recall and names of lm-evaluation-harness; all."),
    ] = "all",
    presets: Annotated[
        str, typer.Option(help="In process: comma list of presets, and full for 16 bits.")
    ] = "full,tq_k5v3",
    server: Annotated[
        str | None, typer.Option(help="Ask this OpenAI server instead: http://localhost:8000/v1.")
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(help="Name that the server goes by; default what --model says.")
    ] = None,
    contexts: Annotated[
        str, typer.Option(help="Comma list of tokens before a question of retrieval and recall.")
    ] = "4096,16384",
    questions: Annotated[int, typer.Option(min=1, help="Of retrieval and recall each.")] = 50,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most questions of a task; default all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time, in process.")] = 1,
    concurrent: Annotated[int, typer.Option(min=1, help="Requests at a time, to a server.")] = 16,
    chat: Annotated[bool, typer.Option(help="Put questions into the chat template.")] = False,
    calibration: Annotated[
        str, typer.Option(help="In process: auto, none or a file of `calibrate`.")
    ] = "auto",
    output: Annotated[pathlib.Path | None, typer.Option(help="Write results as JSON.")] = None,
    dtype: common.DtypeOption = "bfloat16",
    device: common.DeviceOption = "cpu",
    threads: common.ThreadsOption = 0,
    as_json: common.JsonOption = False,
) -> None:
    """Score answers (GSM8K, MMLU, IFEval, retrieval, recall) with compressed caches.

    Data sets of lm-evaluation-harness are downloaded; retrieval and recall need no network.
    """
    from turbokv.integrations.lm_eval import run
    from turbokv.integrations.lm_eval.tasks import LOCAL
    from turbokv.presets import preset_widths

    lengths = common.counts(contexts, "contexts", 512)
    wanted = common.names(tasks, run.TASKS)
    names = common.names(presets, ("full",))
    if not wanted:
        raise ValueError("tasks: wanted one or more, got none")
    unknown = [name for name in names if name != "full" and preset_widths(name) is None]
    if unknown or not names:
        raise ValueError(
            f"presets: wanted full or presets such as tq_k5v3, got {unknown or 'none'}"
        )
    if output is not None:
        check_writable(output, "output")
    run.check_installed()
    described = run.described(wanted, lengths, questions)
    if server is not None:
        if served_model is None and model is None:
            raise ValueError("served_model: wanted the name that the server goes by, got none")
        name = served_model or str(model)
        results = {
            name: run.on_server(
                server,
                name,
                described,
                tokenizer=None if model is None else str(model),
                limit=limit,
                concurrent=concurrent,
                chat=chat,
            )
        }
        title = f"{name} at {server}"
    else:
        common.check_compute(dtype, device, threads, offline=all(x in LOCAL for x in wanted))
        given = common.read_calibration(calibration) or calibration
        loaded = common.load(model, dtype, device)
        with common.time_left() as progress:
            results = run.in_process(
                loaded,
                names,
                described,
                limit=limit,
                calibration=given,
                batch_size=batch_size,
                chat=chat,
                progress=lambda what: progress(f"asking with {what}", 0, 0),
            )
        title = f"{loaded.name}, {dtype} on {device}"
    title += "" if limit is None else f", at most {limit} questions a task"
    found = {"title": title, "contexts": lengths, "limit": limit, "results": results}
    if output is not None:
        with written_whole(output, "output") as fresh:
            fresh.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if as_json:
        common.print_json(found)
    else:
        common.show(run.table(results, title))
