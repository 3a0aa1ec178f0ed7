# SPDX-License-Identifier: Apache-2.0
"""How the prefill rows of a step are cut so that expanded context fits a bounded workspace.

Rows are requests with more new tokens than the decode kernel takes. Each has older tokens, which
lie compressed in pages, and fresh ones, which are at hand in 16 bits as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turbokv.paged import TILE


@dataclass(frozen=True)
class Group:
    """Consecutive prefill rows that attend in one go.

    Attributes
    ----------
    first, last
        Rows ``first`` to ``last - 1`` of the step's prefill rows.
    q_lens
        Fresh tokens of each row.
    begins
        First token of each row that any of its queries sees: 0, or later with a sliding window.
    kv_lens
        Tokens from there to the end, fresh ones included.
    is_chunked
        Whether the one row's older tokens exceed the workspace and are expanded piece by piece.
    """

    first: int
    last: int
    q_lens: tuple[int, ...]
    begins: tuple[int, ...]
    kv_lens: tuple[int, ...]
    is_chunked: bool = False

    @property
    def is_fresh(self) -> bool:
        """Whether no row has older tokens."""
        return self.q_lens == self.kv_lens

    @property
    def context_lens(self) -> tuple[int, ...]:
        """Older tokens of each row that its queries see."""
        return tuple(kv - q for kv, q in zip(self.kv_lens, self.q_lens, strict=True))


def workspace_floor(max_num_tokens: int, sliding_window: int | None) -> int:
    """Return the fewest workspace tokens that :func:`plan` works with, a multiple of 16.

    A step's fresh tokens must fit, and with a sliding window what else one row sees: windows are
    cut off by FlashAttention, which counts them from the last key, so keys must be in one piece.
    """
    extra = sliding_window + TILE if sliding_window else 0
    return -(-(max_num_tokens + extra) // TILE) * TILE


def plan(
    q_lens: Sequence[int],
    seq_lens: Sequence[int],
    capacity: int,
    sliding_window: int | None = None,
) -> tuple[Group, ...]:
    """Cut prefill rows into groups.

    Parameters
    ----------
    q_lens, seq_lens
        Fresh tokens and all tokens of each row; rows without fresh tokens are padding.
    capacity
        Tokens that fit the workspace, :func:`workspace_floor` or more.
    sliding_window
        Tokens a query sees, its own included, or None for all.

    Returns
    -------
    tuple of Group
        In order, covering every row that has fresh tokens once. Rows without older tokens are
        never in a group with rows that have some, so that they need no workspace.
    """
    groups: list[Group] = []
    pending: list[tuple[int, int, int]] = []
    first = pending_kv = 0

    def flush(upto: int) -> None:
        nonlocal first, pending_kv
        if pending:
            q, begins, kv = zip(*pending, strict=True)
            groups.append(Group(first, upto, q, begins, kv))
            pending.clear()
        first, pending_kv = upto, 0

    for row, (q_len, seq_len) in enumerate(zip(q_lens, seq_lens, strict=True)):
        context = seq_len - q_len
        if not 0 <= q_len <= seq_len:
            raise ValueError(f"q_lens: wanted 0 to {seq_len} in row {row}, got {q_len}")
        if q_len == 0:  # padding
            flush(row)
            first = row + 1
            continue
        begin = 0
        if sliding_window is not None:
            begin = max(0, context - (sliding_window - 1)) // TILE * TILE
        kv_len = seq_len - begin
        if kv_len > capacity and context > 0:
            flush(row)
            groups.append(Group(row, row + 1, (q_len,), (begin,), (kv_len,), is_chunked=True))
            first = row + 1
            continue
        is_fresh = context == 0
        if pending and (
            is_fresh != (pending[-1][0] == pending[-1][2])
            or (not is_fresh and pending_kv + kv_len > capacity)
        ):
            flush(row)
        pending.append((q_len, begin, kv_len))
        pending_kv += kv_len
    flush(len(q_lens))
    return tuple(groups)


def slices(
    q_lens: Sequence[int], seq_lens: Sequence[int], most: int
) -> tuple[list[int], list[int], list[int]]:
    """Cut prefill rows into rows of at most ``most`` queries, which the decode kernel can take.

    Returns
    -------
    tuple
        For each new row: the row it comes from, its queries, and the tokens that its last query
        sees.
    """
    rows: list[int] = []
    queries: list[int] = []
    lens: list[int] = []
    for row, (q_len, seq_len) in enumerate(zip(q_lens, seq_lens, strict=True)):
        for start in range(0, q_len, most):
            count = min(most, q_len - start)
            rows.append(row)
            queries.append(count)
            lens.append(seq_len - q_len + start + count)
    return rows, queries, lens


def chunks(context: int, capacity: int) -> tuple[tuple[int, int], ...]:
    """Cut ``context`` older tokens into pieces ``(first_token, count)`` of at most ``capacity``."""
    return tuple((i, min(capacity, context - i)) for i in range(0, context, capacity))
