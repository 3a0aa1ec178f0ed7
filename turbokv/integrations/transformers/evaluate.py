# SPDX-License-Identifier: Apache-2.0
"""The table of ``turbokv eval``: presets and rivals in one run, a needle grid, a plot."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from turbokv.calibration import Calibration
from turbokv.codec import TurboKVCodec
from turbokv.integrations.transformers.baselines import BASELINES
from turbokv.integrations.transformers.cache import DEFAULT_SINKS, DEFAULT_WINDOW, TurboKVCache
from turbokv.integrations.transformers.models import english_text
from turbokv.integrations.transformers.quality import (
    CacheFactory,
    Divergence,
    compare,
    pool,
    ratio_of_means,
    simulated_cache,
)
from turbokv.presets import preset_name, preset_widths

CALIBRATIONS = ("none", "centred", "random", "mapped")
PRESETS = (
    "tq_k8v4+w",
    "tq_k5v4+w",
    "tq_k5v4+w+centred",
    "tq_k5v4+w+mapped",
    "tq4",
    "tq4+w",
    "tq4+w+random",
    "tq4+w+centred",
    "tq4+w+mapped",
    "tq_k5v3+w",
    "tq_k5v3+w+centred",
    "tq_k5v3+w+mapped",
    "tq_k4v3+w",
    "tq_k4v3+w+centred",
    "tq_k4v3+w+mapped",
    "tq3",
    "tq3+w",
    "tq3+w+centred",
    "tq3+w+mapped",
    "tq_k4v2+w",
    "tq_k4v2+w+centred",
    "tq_k4v2+w+mapped",
    "tq_k3v2+w",
    "tq_k3v2+w+centred",
    "tq_k3v2+w+mapped",
    "tq2+w",
    "tq2+w+centred",
    "tq2+w+mapped",
)
# Scored unless others are asked for: all of them are too slow for several passages on a CPU.
SHORT_PRESETS = (
    "tq_k8v4+w",
    "tq_k5v4+w",
    "tq4",
    "tq4+w",
    "tq4+w+random",
    "tq4+w+centred",
    "tq4+w+mapped",
    "tq_k5v3+w",
    "tq_k5v3+w+centred",
    "tq3+w+centred",
    "tq3+w+mapped",
    "tq2+w+centred",
    "tq2+w+mapped",
)
# With the window and without, so that what codes and what 16-bit tokens do can be told apart.
SHORT_RIVALS = ("fp8", "fp8+w", "int4_per_token_head", "int4_per_token_head+w")
RIVALS = (*BASELINES, *(name for name in SHORT_RIVALS if name.endswith("+w")))
_PRESET = re.compile(r"(\w+)((?:\+(?:w\d*|s\d+|[a-z_]+))*)")


_HELD = re.compile(r"w\d*|s\d+")


def _held_tokens(words: Sequence[str], window: int, sinks: int) -> tuple[int, int]:
    """Return window and sinks that words such as ``w``, ``w64`` and ``s8`` ask for."""
    held, first = 0, -1
    for word in words:
        if word[0] == "w":
            held = int(word[1:]) if word[1:] else window
        else:
            first = int(word[1:])
    return held, (sinks if held else 0) if first < 0 else first


@dataclass(frozen=True)
class Rival:
    """A cache of others, as written on the command line.

    Attributes
    ----------
    name
        vLLM's ``kv_cache_dtype``, then optional ``+w`` or ``+w256`` and ``+s8`` as for
        :class:`Preset`: the window that it does not have, emulated.
    """

    name: str
    dtype: str
    window: int
    sinks: int

    @classmethod
    def parse(cls, name: str, window: int = DEFAULT_WINDOW, sinks: int = DEFAULT_SINKS) -> Rival:
        """Read a rival's name; ``window`` and ``sinks`` are what a bare ``+w`` means."""
        dtype, *words = name.split("+")
        if dtype not in BASELINES or not all(_HELD.fullmatch(word) for word in words):
            raise ValueError(f"rivals: wanted some of {list(RIVALS)}, got {name!r}")
        return cls(name, dtype, *_held_tokens(words, window, sinks))


def check_rivals(names: Sequence[str]) -> None:
    """Raise ValueError unless all are names of :class:`Rival`."""
    for name in names:
        Rival.parse(name)


def is_rival(name: str) -> bool:
    """Return whether a cache of the table is another's."""
    return name.split("+")[0] in BASELINES


@dataclass(frozen=True)
class Preset:
    """A cache of ours, as written on the command line.

    Attributes
    ----------
    name
        ``tq_k5v3``, then optional ``+w`` or ``+w256`` (recent window), ``+s8`` (sinks; 4 with a
        window, else 0) and ``+centred`` (keys centred by a calibration from text), ``+mapped``
        (also mapped, by the same), ``+random`` (what caches take by default: centred by random
        token ids).
    calibration
        ``none``, ``centred``, ``mapped`` or ``random``.
    """

    name: str
    k_bits: int
    v_bits: int
    window: int
    sinks: int
    calibration: str

    @classmethod
    def parse(cls, name: str, window: int = DEFAULT_WINDOW, sinks: int = DEFAULT_SINKS) -> Preset:
        """Read a preset's name; ``window`` and ``sinks`` are what a bare ``+w`` means."""
        match = _PRESET.fullmatch(name)
        widths = None if match is None else preset_widths(match[1])
        if match is None or widths is None:
            raise ValueError(f"preset: wanted a name like tq_k5v3+w128+s4+centred, got {name!r}")
        name = preset_name(*widths) + match[2]
        words, calibration = [], "none"
        for word in match[2].split("+")[1:]:
            if word in CALIBRATIONS[1:]:
                calibration = word
            elif _HELD.fullmatch(word):
                words.append(word)
            else:
                raise ValueError(
                    f"preset: wanted +w, +wN, +sN, +centred, +mapped or +random in {name!r}, got"
                    f" +{word}"
                )
        held, first = _held_tokens(words, window, sinks)
        return cls(name, *widths, held, first, calibration)

    def bits_per_number(self, head_dim: int) -> float:
        """Return stored bits per number of a compressed token (window and sinks not counted)."""
        codec = TurboKVCodec(head_dim, self.k_bits, self.v_bits)
        return 8 * (codec.bytes_per_vector("k") + codec.bytes_per_vector("v")) / (2 * head_dim)


@dataclass(frozen=True)
class Row:
    """One line of the table: means over the scored tokens of all passages.

    Attributes
    ----------
    bits
        Stored bits per number, scales included.
    kl_over_fp8, kl_over_int4
        KL over that of the rival in the same run; None without it.
    kl_error, kl_over_fp8_error, kl_over_int4_error
        Standard errors over passages; None for one passage, and without the rival.
    passages
        The figures of each passage, in the order of the text.
    """

    name: str
    rival: bool
    bits: float
    kl: float
    one_minus_tv: float
    top1: float
    perplexity_ratio: float
    kl_over_fp8: float | None
    kl_over_int4: float | None
    kl_error: float | None
    kl_over_fp8_error: float | None
    kl_over_int4_error: float | None
    passages: tuple[Divergence, ...]


def head_dim_of(model: Any) -> int:
    """Return the model's head size."""
    config = model.config.get_text_config(decoder=True)
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def factory_for(
    model: Any,
    name: str,
    calibrations: dict[str, Calibration],
    *,
    window: int = DEFAULT_WINDOW,
    sinks: int = DEFAULT_SINKS,
    first_position: int = 0,
) -> CacheFactory:
    """Return what makes an empty cache called ``name`` (``full``, a rival or a preset)."""
    if name == "full":
        return lambda: DynamicCache(config=model.config)
    if is_rival(name):
        rival = Rival.parse(name, window, sinks)
        baseline = BASELINES[rival.dtype]
        return lambda: simulated_cache(model.config, baseline, rival.window, rival.sinks)
    preset = Preset.parse(name, window, sinks)
    calibration = None
    if preset.calibration != "none":
        if preset.calibration not in calibrations:
            raise ValueError(f"calibrations: wanted {preset.calibration!r} for {name}, got none")
        calibration = calibrations[preset.calibration]

    def make() -> Cache:
        return TurboKVCache(
            model.config,
            preset.k_bits,
            preset.v_bits,
            window=preset.window,
            sinks=preset.sinks,
            calibration=calibration,
            first_position=first_position,
        )

    return make


def score_table(
    model: Any,
    ids: Tensor,
    names: Sequence[str],
    calibrations: dict[str, Calibration],
    *,
    chunk: int = 64,
    window: int = DEFAULT_WINDOW,
    sinks: int = DEFAULT_SINKS,
    first_position: int = 0,
    score_every: int = 1,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Score presets and rivals on the same passages, all in one run.

    Parameters
    ----------
    ids
        int64 ``[passages, tokens]``. Each passage is a text of its own: it starts with empty caches
        (see :func:`quality.compare`, of which ``chunk`` and ``score_every`` are).
    """
    if ids.ndim != 2 or not ids.shape[0]:
        raise ValueError(f"ids: wanted shape [passages, tokens], got {list(ids.shape)}")
    head_dim = head_dim_of(model)
    factories = {
        name: factory_for(
            model, name, calibrations, window=window, sinks=sinks, first_position=first_position
        )
        for name in names
    }
    scores: dict[str, list[Divergence]] = {name: [] for name in factories}
    # one after the other: together they would need the memory of all their caches at once
    for number in range(ids.shape[0]):
        where = f"passage {number + 1} of {ids.shape[0]}: "

        def report(what: str, where: str = where) -> None:
            if progress is not None:
                progress(where + what)

        passage = ids[number : number + 1]
        for name, score in compare(
            model,
            passage,
            factories,
            chunk=chunk,
            first_position=first_position,
            score_every=score_every,
            progress=report,
        ).items():
            scores[name].append(score)
    return table_of(scores, head_dim)


def score_tables(
    model: Any,
    ids: Mapping[str, Tensor],
    names: Sequence[str],
    calibrations: dict[str, Calibration],
    *,
    progress: Callable[[str], None] | None = None,
    **options: int,
) -> tuple[dict[str, list[Row]], list[Row]]:
    """Score presets and rivals on several kinds of text.

    Parameters
    ----------
    ids
        As for :func:`score_table`, by kind of text.
    options
        More of :func:`score_table`'s.

    Returns
    -------
    tuple
        Rows by kind of text, and those over the passages of all kinds.
    """
    tables: dict[str, list[Row]] = {}
    for kind, passages in ids.items():

        def report(what: str, kind: str = kind) -> None:
            if progress is not None:
                progress(f"{kind}, {what}")

        tables[kind] = score_table(model, passages, names, calibrations, progress=report, **options)
    scores = {
        rows[0].name: [passage for row in rows for passage in row.passages]
        for rows in zip(*tables.values(), strict=True)
    }
    return tables, table_of(scores, head_dim_of(model))


def table_of(scores: Mapping[str, Sequence[Divergence]], head_dim: int) -> list[Row]:
    """Return the rows of a table from the scores of each passage, by the cache's name."""
    rows = []
    for name, passages in scores.items():
        rival = is_rival(name)
        bits = (
            BASELINES[name.split("+")[0]].bits_per_number(head_dim)
            if rival
            else Preset.parse(name).bits_per_number(head_dim)
        )
        kls = [passage.kl for passage in passages]
        over = {
            other: ratio_of_means(kls, [passage.kl for passage in scores[other]])
            if other in scores
            else (None, None)
            for other in ("fp8", "int4_per_token_head")
        }
        whole = pool(passages)
        rows.append(
            Row(
                name=name,
                rival=rival,
                bits=bits,
                kl=whole.kl,
                one_minus_tv=whole.one_minus_tv,
                top1=whole.top1,
                perplexity_ratio=whole.perplexity_ratio,
                kl_over_fp8=over["fp8"][0],
                kl_over_int4=over["int4_per_token_head"][0],
                kl_error=ratio_of_means(kls)[1],
                kl_over_fp8_error=over["fp8"][1],
                kl_over_int4_error=over["int4_per_token_head"][1],
                passages=tuple(passages),
            )
        )
    return rows


# --- needle ---------------------------------------------------------------------------------------

_NEEDLE = "\n\nThe secret code of the blue warehouse is: {}.\n\n"
_QUESTION = "\n\nThe secret code of the blue warehouse is:"
LEAST_NEEDLE_CONTEXT = 64  # holds the planted sentence in any tokenizer
_CODES = ("48213", "90517", "27364", "61985", "35072")


@dataclass(frozen=True)
class Needle:
    """One cell of the needle grid.

    Attributes
    ----------
    found
        Whether greedy decoding repeats the planted code.
    log_probability
        Of the code's tokens, per token.
    """

    name: str
    context: int
    depth: float
    found: bool
    log_probability: float


@torch.inference_mode()
def needle_grid(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    calibrations: dict[str, Calibration],
    *,
    contexts: Sequence[int] = (512, 1024, 2048),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    window: int = DEFAULT_WINDOW,
    sinks: int = DEFAULT_SINKS,
    chunk: int = 128,
    progress: Callable[[str], None] | None = None,
) -> list[Needle]:
    """Plant a five-digit code at several depths of a text and ask for it at the end.

    Parameters
    ----------
    names
        Caches to try: ``full``, rivals and presets.
    contexts
        Tokens before the question.
    depths
        Where the sentence is planted, 0 (start) to 1 (just before the question).
    chunk
        Tokens per forward pass of the text, so that its past is compressed as it grows.
    """
    hay = tokenizer(english_text(), return_tensors="pt").input_ids.to(model.device)
    question = tokenizer(_QUESTION, return_tensors="pt", add_special_tokens=False).input_ids
    question = question.to(model.device)
    cells = []
    for context in contexts:
        for number, depth in enumerate(depths):
            code = _CODES[number % len(_CODES)]
            planted = tokenizer(
                _NEEDLE.format(code), return_tensors="pt", add_special_tokens=False
            ).input_ids.to(model.device)
            answer = tokenizer(f" {code}", return_tensors="pt", add_special_tokens=False)
            expected = answer.input_ids.to(model.device)
            # a tokenizer may make the space a token of its own, which says nothing about the code
            blank = not tokenizer.decode(expected[0, :1]).strip()
            digits = expected[0, 1:] if blank else expected[0]
            at = int(depth * (context - planted.shape[1]))
            ids = torch.cat(
                [hay[:, :at], planted, hay[:, at : context - planted.shape[1]], question, expected],
                dim=1,
            )
            for name in names:
                cache = factory_for(model, name, calibrations, window=window, sinks=sinks)()
                logits = None
                for start in range(0, ids.shape[1], chunk):
                    piece = ids[:, start : start + chunk]
                    out = model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0]
                    logits = out if logits is None else torch.cat([logits, out])[-2 * chunk :]
                assert logits is not None
                scored = torch.log_softmax(logits[-len(digits) - 1 : -1].float(), -1)
                picked = scored.gather(1, digits[:, None]).mean()
                found = bool((scored.argmax(-1) == digits).all())
                cells.append(Needle(name, context, depth, found, float(picked)))
            if progress is not None:
                progress(f"needle at {depth:.0%} of {context}")
    return cells
