# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: two answers with the place where they part, and what that is worth."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from turbokv.integrations.transformers.demo import DemoResult, ends_sentence

_BAR = 44
_CONTEXTS = (1024, 4096, 16384)
_SENTENCE_END = re.compile(r"""[.!?]["')]?(?=\s)""")
# What this model gave at these widths elsewhere: docs/results/quality.md and engine.md.
_KNOWN = "SmolLM2-135M-Instruct"
_EXPECTED = "this model gives 94 to 98% and 0.001 to 0.005 at 4 bits, 0.003 with vLLM's fp8"


def whole_sentences(text: str) -> str:
    """Return a text up to its last whole sentence, or all of it with dots if it has none."""
    if ends_sentence(text):
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends and 3 * ends[-1] > len(text) else f"{text} ..."


def _marked(text: str, shared: int) -> Text:
    """Return a text whose part behind ``shared`` characters stands out."""
    if shared >= len(text):
        return Text(text)
    return Text.assemble(text[:shared], ("|| ", "bold red"), (text[shared:].lstrip(), "yellow"))


def answers(result: DemoResult, names: tuple[str, str]) -> RenderableType:
    """Return both answers side by side; a mark stands where they part."""
    texts = [whole_sentences(each.text) for each in (result.full, result.compressed)]
    pairs = enumerate(zip(*texts, strict=False))
    shared = next((at for at, (one, other) in pairs if one != other), min(map(len, texts)))
    if shared < max(map(len, texts)):  # part before the word that differs, not within it
        shared = texts[0].rfind(" ", 0, shared + 1) + 1
    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in texts:
        grid.add_column(ratio=1)
    panels = zip(texts, names, strict=True)
    grid.add_row(*(Panel(_marked(text, shared), title=name) for text, name in panels))
    return grid


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _filling(result: DemoResult) -> Iterator[Text]:
    """Draw what the caches hold as the context grows."""
    now = [result.prompt_tokens + each.tokens - 1 for each in (result.full, result.compressed)]
    lengths = [now[0], *(length for length in _CONTEXTS if length > 2 * now[0])]
    rows = []
    for length in lengths:
        full = result.full.bytes_at(now[0], length)
        ours = result.compressed.bytes_at(now[1], length)
        if full is None or ours is None:
            return
        rows.append((length, full * result.sixteen_bit_share, float(ours)))
    most = max(row[1] for row in rows)
    yield Text("The cache as the context grows: in 16 bits, and with TurboKV", style="bold")
    for length, *sizes in rows:
        for label, size, style in zip((f"{length:,}", ""), sizes, ("white", "green"), strict=True):
            bar = "█" * max(1, round(_BAR * size / most))
            yield Text.assemble(f"{label:>7} ", (bar, style), f" {_megabytes(size)}")
    yield Text(f"        {now[0]:,} tokens are measured, longer contexts follow from them.", "dim")


def _sentences(result: DemoResult, bits: tuple[int, int]) -> Iterator[str]:
    held = result.full.cache_bytes * result.sixteen_bit_share
    yield (
        f"Memory: the cache would take {_megabytes(held)} in 16 bits and takes"
        f" {_megabytes(result.compressed.cache_bytes)} compressed: {result.bytes_ratio:.1f} times"
        " less, and more so the longer the context is."
    )
    if result.same_tokens == result.full.tokens == result.compressed.tokens:
        yield f"Words: both answers are the same, {result.same_tokens} tokens."
    else:
        yield (
            f"Words: both answers share their first {result.same_tokens} tokens and part at ||."
            " There two words were about equally likely; after that, each goes its own way."
        )
    expected = f" ({_EXPECTED})" if result.model == _KNOWN and bits == (4, 4) else ""
    yield (
        f"Agreement: along the same text, both pick the same next token in {result.top1:.1%} of"
        f" {result.full.tokens} cases. The divergence (KL) is {result.kl:.4f} nats per token; lower"
        f" is better, 0 is equal{expected}."
    )
    speeds = [each.tokens_per_second for each in (result.full, result.compressed)]
    if None not in speeds:
        yield (
            f"Speed: {speeds[0]:.1f} tokens per second without compression, {speeds[1]:.1f} with."
            " This cache for Transformers decompresses at every step and saves memory, not time;"
            " the kernels of the vLLM backend read compressed pages and are faster than bf16."
        )


def render(result: DemoResult, dtype: str, settings: str, bits: tuple[int, int]) -> Group:
    """Return the demo's result for :mod:`rich`.

    Parameters
    ----------
    result
        From :func:`.demo.run_demo`.
    dtype
        The cache's without compression.
    settings
        Of the compressed cache, in words.
    bits
        Widths of keys and values.
    """
    head = Text(f"{result.model}, {result.prompt_tokens} prompt tokens", style="bold")
    names = (f"without compression ({dtype})", f"TurboKV {settings}")
    paragraphs = [line for words in _sentences(result, bits) for line in (Text(words), Text())]
    return Group(head, answers(result, names), Text(), *paragraphs, *_filling(result))
