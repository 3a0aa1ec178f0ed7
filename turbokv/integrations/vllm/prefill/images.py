# SPDX-License-Identifier: Apache-2.0
"""Tokens of an image that see each other, later ones too (Gemma 3, Gemma 4).

Everything causal about such a token is attended to as for any other. What is left are the later
tokens of its own image. vLLM schedules an image whole, so these are in the step, with their 16-bit
values, and in reverse order they are earlier ones: the tokens but the last, from the end, attend
causally to the tokens but the first, from the end. The two parts are merged by their
log-sum-exps, so that FlashAttention needs no mask of its own.

The lower bound of a sliding window is the causal part's: vLLM leaves out images longer than the
window, or bounds what they see before them by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Ranges = Mapping[int, Sequence[tuple[int, int]]]


@dataclass(eq=False)
class LaterTokens:
    """Queries that see later keys, image by image and from the end of each.

    Attributes
    ----------
    queries, keys
        int64: places among a group's fresh tokens.
    starts
        int32 ``[images + 1]``: where each image starts in both.
    longest
        The most queries of any image.
    """

    queries: Tensor
    keys: Tensor
    starts: Tensor
    longest: int


def spans(
    ranges: Ranges, first_row: int, q_lens: Sequence[int], seq_lens: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Return the images that a step's rows hold two tokens of, or more.

    Parameters
    ----------
    ranges
        First and last position of each image of a request, by the request's row in the step.
    first_row
        Row of the step that ``q_lens`` starts with.
    q_lens, seq_lens
        Fresh tokens and all tokens of each row.

    Returns
    -------
    list of tuple
        Row, counted from ``first_row``, and first and last of the image's tokens among the row's
        fresh ones.
    """
    found = []
    for row, (q_len, seq_len) in enumerate(zip(q_lens, seq_lens, strict=True)):
        context = seq_len - q_len
        for start, end in ranges.get(first_row + row, ()):
            first, last = max(start - context, 0), min(end - context, q_len - 1)
            if first < last:
                found.append((row, first, last))
    return found


def reversed_tokens(
    images: Sequence[tuple[int, int, int]], row_starts: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Return queries, keys and starts of :class:`LaterTokens`.

    Parameters
    ----------
    images
        Of :func:`spans`.
    row_starts
        Where each row starts among the group's fresh tokens.
    """
    queries: list[int] = []
    keys: list[int] = []
    starts = [0]
    for row, first, last in images:
        tokens = range(row_starts[row] + last, row_starts[row] + first - 1, -1)
        queries += tokens[1:]
        keys += tokens[:-1]
        starts.append(len(queries))
    return queries, keys, starts
