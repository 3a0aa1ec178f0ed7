# SPDX-License-Identifier: Apache-2.0
"""What ``turbokv eval`` reads: several kinds of text, passages of them, and the rest to centre on.

``data/prose.txt`` and ``data/dialogue.txt`` are in the public domain: parts of Edward MacDowell's
"Critical and Historical Essays" (1912) and Arthur Pinero's "The 'Mind the Paint' Girl" (1912), with
lines joined to paragraphs. They are little read, so that models know them badly by heart, and of
another kind than Python's help texts, which calibrations are measured on.
"""

from __future__ import annotations

import importlib.resources
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbokv.integrations.transformers.models import english_text, leading_token

# Scored by default.
KINDS = ("prose", "dialogue", "code")
NAMES = (*KINDS, "topics")
CALIBRATION_TOKENS = 4096


def read_text(name: str) -> str:
    """Return a text: one of :data:`NAMES` or the file ``name``.

    ``prose`` (essays) and ``dialogue`` (a play) come with TurboKV, ``code`` (sources) and
    ``topics`` (texts of ``help()``) with Python, so that they differ between its versions.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    if name == "topics":
        return english_text()
    if name == "code":
        import argparse
        import inspect
        import tarfile

        return inspect.getsource(argparse) + inspect.getsource(tarfile)
    if name in KINDS:
        folder = importlib.resources.files("turbokv.integrations.transformers") / "data"
        return (folder / f"{name}.txt").read_text(encoding="utf-8")
    path = pathlib.Path(name)
    if not path.is_file():
        wanted = ", ".join(map(repr, NAMES))
        raise FileNotFoundError(f"text: wanted {wanted} or a file, got {name}")
    return path.read_text(encoding="utf-8", errors="replace")


def read_texts(names: Sequence[str]) -> dict[str, str]:
    """Return texts by name, as :func:`read_text` reads them."""
    if not names:
        raise ValueError("text: wanted one or more, got none")
    return {name: read_text(name) for name in names}


def passage_starts(length: int, tokens: int, passages: int, reserve: int = 0) -> list[int]:
    """Return where passages start: each in the middle of one of the equal parts of a text.

    Parameters
    ----------
    length
        Tokens of the text.
    tokens
        Tokens of a passage.
    passages
        How many. They never overlap: shared tokens would make their spread look too small.
    reserve
        Tokens at the end of the text that no passage may touch.

    Raises
    ------
    ValueError
        If the text is too short.
    """
    if tokens < 1 or passages < 1:
        raise ValueError(f"passages: wanted at least 1 of 1 token, got {passages} of {tokens}")
    slack = length - reserve - passages * tokens
    if slack < 0:
        raise ValueError(
            f"text: wanted at least {passages * tokens + reserve} tokens ({passages} separate"
            f" passages of {tokens} to score, {reserve} to calibrate on), got {length}: enough for"
            f" {max(0, length - reserve) // tokens} passages"
        )
    return [i * tokens + slack * (2 * i + 1) // (2 * passages) for i in range(passages)]


@dataclass(frozen=True)
class Sample:
    """What to score of a text, and what to calibrate on.

    Attributes
    ----------
    ids
        int64 ``[passages, tokens]``. Each begins with what the tokenizer begins a text with, if it
        does.
    starts
        Where the text of each passage starts in the tokenised text.
    held_out
        int64 ``[1, calibration_tokens]`` from the end of the text, disjoint from every passage.
    bos
        What each passage begins with before its text, or None.
    """

    ids: Tensor
    starts: tuple[int, ...]
    held_out: Tensor
    bos: int | None = None


def encode(tokenizer: Any, text: str) -> Tensor:
    """Tokenise a text as its middle would be, without BOS: int64 ``[1, tokens]``."""
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return ids


def sample_text(
    tokenizer: Any, text: str, tokens: int, passages: int, calibration_tokens: int = 0
) -> Sample:
    """Tokenise a text; take passages spread over it, and what follows them to calibrate on.

    Raises
    ------
    ValueError
        If the text is too short for that many separate passages and the part to calibrate on.
    """
    ids, bos = encode(tokenizer, text), leading_token(tokenizer)
    length, own = ids.shape[1], tokens - (bos is not None)
    starts = passage_starts(length, own, passages, calibration_tokens)
    scored = torch.cat([ids[:, start : start + own] for start in starts])
    if bos is not None:
        scored = torch.cat([scored.new_full((passages, 1), bos), scored], dim=1)
    return Sample(scored, tuple(starts), ids[:, length - calibration_tokens :], bos)


def sample_texts(
    tokenizer: Any,
    texts: Mapping[str, str],
    tokens: int,
    passages: int,
    calibration_text: tuple[str, str],
    calibrate: bool,
) -> tuple[dict[str, Sample], Tensor, int | None]:
    """Take passages of several texts, and what to calibrate on, which none of them touches.

    Parameters
    ----------
    tokenizer
        Of the model.
    texts
        What to score, by name.
    tokens, passages
        Of each text.
    calibration_text
        Name and text to calibrate on: of a text that is scored too, its last
        :data:`CALIBRATION_TOKENS` tokens, which are left out of the passages; of another as many
        of its first.
    calibrate
        Whether anything is to be calibrated.

    Returns
    -------
    tuple
        Samples by name; int64 ``[1, tokens]`` to calibrate on; what a text begins with, or None.
    """
    name, other = calibration_text
    samples = {
        kind: sample_text(
            tokenizer,
            text,
            tokens,
            passages,
            CALIBRATION_TOKENS if calibrate and kind == name else 0,
        )
        for kind, text in texts.items()
    }
    bos = next(iter(samples.values())).bos
    if not calibrate:
        return samples, torch.zeros((1, 0), dtype=torch.int64, device="cpu"), bos
    if name in samples:
        return samples, samples[name].held_out, bos
    return samples, encode(tokenizer, other)[:, :CALIBRATION_TOKENS], bos
