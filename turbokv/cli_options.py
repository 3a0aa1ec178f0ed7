# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options, checks before a model is loaded, and how results are shown."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from turbokv.calibration import Calibration
    from turbokv.integrations.transformers.models import LoadedModel

console = Console()
errors = Console(stderr=True)

ModelOption = Annotated[
    pathlib.Path | None,
    typer.Option("--model", help="Local folder or GGUF file, smollm2-135m or gemma3-270m."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
WindowOption = Annotated[int, typer.Option(min=0, help="Newest tokens kept in 16 bits.")]
SinksOption = Annotated[int, typer.Option(min=0, help="First tokens kept in 16 bits.")]
DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1 ...")]
DtypeOption = Annotated[str, typer.Option(help="Compute dtype: float32, bfloat16, float16.")]
_DTYPES = ("float32", "bfloat16", "float16")
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves PyTorch's choice.")]


def print_json(value: object) -> None:
    """Print a result on stdout and nothing else."""
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


def show(found: RenderableType) -> None:
    """Print a result wide enough that no figure is cut, whatever the terminal's width is."""
    wide = console.options.update(max_width=10_000)
    parts = found.renderables if isinstance(found, Group) else [found]
    tables = [part for part in parts if isinstance(part, Table)]
    needed = [Measurement.get(console, wide, table).maximum for table in tables]
    # a console of its own: print's width is never more than the console's
    Console(width=max(console.width, *needed)).print(found)


@contextlib.contextmanager
def time_left() -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar with the time left, for one thing after the other.

    It is on stderr, as stdout is for results. What it gives is called with what is done, and with
    how much of it is done of how much (0 if that is not known).
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as progress:
        task, current = progress.add_task("", total=None), ""

        def report(what: str, done: int, total: int) -> None:
            nonlocal current
            if what != current:
                progress.reset(task, description=what)
                current = what
            progress.update(task, completed=done, total=total or None)

        yield report


def check_compute(dtype: str, device: str, threads: int, *, offline: bool = True) -> None:
    """Refuse what no model could run with; the import of PyTorch that a user waits for."""
    if offline:  # nothing may reach for the network: every model is a local path
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


def load(path: pathlib.Path | None, dtype: str, device: str) -> LoadedModel:
    """Load a model; everything else that was asked for has been checked."""
    import torch

    from turbokv.integrations.transformers import models
    from turbokv.integrations.transformers.converted import gguf_reported, load_packaged

    chosen = getattr(torch, dtype)
    with time_left() as progress:
        if path is None or str(path) == models.SMOLLM2:
            progress("loading SmolLM2-135M-Instruct", 0, 0)
            return load_packaged(dtype=chosen, device=device, progress=progress)
        progress(f"loading {path}", 0, 0)
        with gguf_reported(progress, f"loading {path}"):
            return models.load_model(path, dtype=chosen, device=device)


def read_calibration(path: str | pathlib.Path | None) -> Calibration | None:
    """Read a file before the model is loaded; whose it is can only be checked after."""
    if path is None or path in ("auto", "none"):
        return None
    from turbokv.calibration import Calibration

    return Calibration.load(path)


def counts(text: str, name: str, least: int) -> list[int]:
    """Read a comma list of numbers, each ``least`` or more."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: wanted a comma list of numbers, got {text!r}") from None
    if min(found) < least:
        raise ValueError(f"{name}: wanted {least} or more, got {min(found)}")
    return found


def names(text: str, default: tuple[str, ...]) -> list[str]:
    """Read a comma list; ``all`` is ``default``, ``none`` nothing."""
    if text == "all":
        return list(default)
    if text == "none":
        return []
    return [name.strip() for name in text.split(",") if name.strip()]
