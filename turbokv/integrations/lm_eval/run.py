# SPDX-License-Identifier: Apache-2.0
"""Run tasks of lm-evaluation-harness and tell what came out, as JSON and as a table."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from turbokv.integrations.lm_eval.tasks import LOCAL, local_task

if TYPE_CHECKING:
    from turbokv.integrations.transformers.models import LoadedModel

# What is run by default: sums, knowledge, instructions, retrieval, recall.
TASKS = ("gsm8k", "mmlu", "ifeval", *LOCAL)
Results = dict[str, dict[str, Any]]  # by task


def check_installed() -> None:
    """Raise ValueError unless lm-evaluation-harness is there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "tasks: wanted the extra 'turbokv-cache[lm-eval]', got no module 'lm_eval'"
        )


def described(tasks: Sequence[str], contexts: Sequence[int], count: int) -> list[Any]:
    """Return what the harness takes for names: its own are left, ours become descriptions."""
    found: list[Any] = []
    for name in tasks:
        if name in LOCAL:
            found += [local_task(name, context, count) for context in contexts]
        else:
            found.append(name)
    return found


def _evaluate(model: Any, tasks: list[Any], limit: int | None, **options: Any) -> Results:
    from lm_eval import simple_evaluate

    answer = simple_evaluate(
        model=model, tasks=tasks, limit=limit, log_samples=False, bootstrap_iters=1000, **options
    )
    results: Results = {}
    for task, figures in answer["results"].items():
        kept = {
            name: value
            for name, value in figures.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        # "exact_match,strict-match" and its "exact_match_stderr,strict-match"
        results[task] = kept
    return results


def in_process(
    loaded: LoadedModel,
    caches: Sequence[str],
    tasks: list[Any],
    *,
    limit: int | None = None,
    calibration: Any = "auto",
    batch_size: int = 1,
    chunk: int = 64,
    chat: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Results]:
    """Run tasks on a loaded model once for every cache.

    Parameters
    ----------
    loaded
        Model and tokenizer.
    caches
        Presets, and ``full`` for Transformers' own cache.
    tasks
        As :func:`described` returns them.
    limit
        Most questions of a task; None asks all.
    calibration
        As :class:`turbokv.integrations.transformers.TurboKVCache` takes it.
    batch_size
        Of questions.
    chunk
        Tokens of a forward pass where likelihoods are computed.
    chat
        Whether questions are put into the tokenizer's chat template.
    progress
        Called with a cache's name before it is tried.

    Returns
    -------
    dict
        Figures by cache and task.
    """
    from turbokv.integrations.lm_eval.model import CacheLM, cache_maker

    found = {}
    for name in caches:
        if progress is not None:
            progress(name)
        make_cache = cache_maker(loaded.model, name, calibration)
        model = CacheLM(loaded.model, loaded.tokenizer, make_cache, chunk, batch_size=batch_size)
        found[name] = _evaluate(model, tasks, limit, apply_chat_template=chat)
    return found


def on_server(
    url: str,
    model: str,
    tasks: list[Any],
    *,
    tokenizer: str | None = None,
    limit: int | None = None,
    concurrent: int = 16,
    max_length: int = 131_072,
    chat: bool = False,
) -> Results:
    """Run tasks against an OpenAI server (``turbokv serve``, ``vllm serve``).

    Parameters
    ----------
    url
        With the version: ``http://localhost:8000/v1``.
    model
        The name that the server goes by.
    tokenizer
        Folder or hub name; wanted for tasks of likelihoods (MMLU), whose prompts are sent as
        tokens. Without it prompts are sent as texts.
    limit
        Most questions of a task; None asks all.
    concurrent
        Requests at a time.
    max_length
        Longest prompt and answer in tokens.
    chat
        Whether questions go to ``/chat/completions``, which knows no likelihoods.

    Returns
    -------
    dict
        Figures by task.
    """
    kind, path = (
        ("local-chat-completions", "chat/completions")
        if chat
        else (
            "local-completions",
            "completions",
        )
    )
    arguments = {
        "model": model,
        "base_url": f"{url.rstrip('/')}/{path}",
        "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface" if tokenizer else "none",
        "tokenized_requests": tokenizer is not None and not chat,
        "num_concurrent": concurrent,
        "max_length": max_length,
    }
    return _evaluate(kind, tasks, limit, model_args=arguments, apply_chat_template=chat)


def table(results: Mapping[str, Results], title: str) -> Table:
    """Return figures with standard errors, a column for every cache."""
    shown = Table(title=title, box=SIMPLE_HEAD, padding=0)
    shown.add_column("task")
    shown.add_column("figure")
    for name in results:
        shown.add_column(name, justify="right")
    tasks = list(dict.fromkeys(task for of_one in results.values() for task in of_one))
    for task in tasks:
        figures = {
            figure: None
            for of_one in results.values()
            for figure in of_one.get(task, {})
            if "_stderr" not in figure and figure not in ("sample_len", "sample_count")
        }
        for figure in figures:
            cells = []
            for of_one in results.values():
                value = of_one.get(task, {}).get(figure)
                error = of_one.get(task, {}).get(_error_of(figure))
                spread = "" if error is None else f" ± {error:.3f}"
                cells.append("" if value is None else f"{value:.3f}{spread}")
            shown.add_row(task, figure.removesuffix(",none"), *cells)
    return shown


def _error_of(figure: str) -> str:
    """Return the name of a figure's standard error: ``exact,none`` has ``exact_stderr,none``."""
    name, comma, filtered = figure.partition(",")
    return f"{name}_stderr{comma}{filtered}"
