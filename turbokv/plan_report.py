# SPDX-License-Identifier: Apache-2.0
"""A plan for people: a sentence that answers, a table for 80 columns, then what it rests on."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from turbokv.plan import GIB, CacheRow, Plan, describe, size_text
from turbokv.window_pool import SINKS, WINDOW

_HEADINGS = (
    "bits",
    "bytes/\ntoken",
    "per\nsequence",
    "tokens",
    "sequen-\nces",
    "longest",
    "tokens\nin vLLM",
    "over\nbf16",
)


def _count(number: int) -> str:
    """Return a number of tokens for a sentence: 1.5 M, 250K."""
    if number >= 1_000_000:
        return f"{number / 1e6:.1f} M"
    return f"{number / 1e3:.0f}K" if number >= 10_000 else f"{number:,}"


def _times(number: int) -> str:
    return {0: "does not fit", 1: "fits once", 2: "fits twice"}.get(number, f"fits {number} times")


def sentence(plan: Plan) -> str:
    """Return the answer in a sentence: what fits with TurboKV, and what without."""
    degrees = plan.tensor_parallel * plan.pipeline_parallel
    gpus = "one GPU" if degrees == 1 else f"{degrees} GPUs"
    place = f"{plan.name} on {gpus} of {plan.gpu_bytes / GIB:g} GiB"
    if plan.cache_bytes == 0:
        return f"{place}: weights and reserve leave no memory for a cache."
    bf16 = plan.row("bf16")
    ours = _recommended(plan)
    if ours is None:
        return f"{place}: {_count(bf16.tokens)} tokens at bf16; TurboKV cannot compress this cache."
    context = f"your context of {_count(plan.context)} tokens"
    then = f"{context} {_times(ours.sequences)} at {ours.name}"
    same = ours.sequences == bf16.sequences
    versus = ", as at bf16" if same else f", and {_times(bf16.sequences)} at bf16"
    return (
        f"{place}: {_count(ours.tokens)} tokens at {ours.name}, {_count(bf16.tokens)} at bf16;"
        f" {then}{versus}."
    )


def _recommended(plan: Plan) -> CacheRow | None:
    """Return the row that a sentence speaks of: the recommended preset's, else the first."""
    ours = [row for row in plan.rows if row.name not in ("bf16", "fp8")]
    best = [row for row in ours if row.name == "tq_k5v3"]
    return next(iter(best or ours), None)


def _table(plan: Plan) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("cache", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.rows:
        table.add_row(
            row.name,
            f"{row.bits_per_number:.2f}",
            f"{row.bytes_per_token:,}",
            size_text(row.bytes_per_sequence),
            f"{row.tokens:,}",
            f"{row.sequences:,}",
            "any" if row.longest_sequence is None else f"{row.longest_sequence:,}",
            "" if row.vllm_tokens is None else f"{row.vllm_tokens:,}",
            f"{row.ratio:.2f}x",
        )
    return table


def _grounds(plan: Plan) -> Iterator[str]:
    weights = plan.weights
    degrees = (plan.tensor_parallel, plan.pipeline_parallel, plan.data_parallel)
    names = [f"{name} {n}" for name, n in zip(("tp", "pp", "dp"), degrees, strict=True) if n > 1]
    yield ", ".join((plan.model_type, f"{plan.context:,} tokens of context", *names))
    yield "layers: " + ", ".join(describe(group) for group in plan.layers)
    reserve, needed = size_text(plan.reserve_bytes), size_text(weights.num_bytes)
    yield (
        f"{size_text(plan.gpu_bytes)} at {plan.utilisation:.0%}, less {reserve} reserve and"
        f" {needed} weights ({weights.num_params / 1e9:.2f}B parameters, {weights.source}):"
        f" {size_text(plan.cache_bytes)} of cache"
    )
    ours = _recommended(plan)
    if ours is not None and plan.cache_bytes:
        yield _copies(plan, ours)
    yield from plan.notes


def _copies(plan: Plan, row: CacheRow) -> str:
    """Say what the pool of 16-bit copies takes, and for how many running requests it is enough."""
    if row.recent_bytes == 0:
        return "no 16-bit copies of the newest tokens, as their share does not hold one request's"
    share = row.recent_bytes / plan.cache_bytes
    if row.whole_windows >= plan.max_num_seqs:
        enough = f"enough for {plan.max_num_seqs:,} running requests"
    else:
        enough = (
            f"enough for {row.whole_windows:,} of {plan.max_num_seqs:,} running requests, with more"
            " each keeps fewer"
        )
    return (
        f"16-bit copies of the newest {WINDOW} and first {SINKS} tokens:"
        f" {size_text(row.recent_bytes)}, {share:.1%} of the cache, {enough}"
    )


def render(plan: Plan) -> Group:
    """Return the plan for :mod:`rich`."""
    grounds = (Text(f"- {line}") for line in _grounds(plan))
    return Group(Text(sentence(plan), style="bold"), Text(), _table(plan), Text(), *grounds)
