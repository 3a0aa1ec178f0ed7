# SPDX-License-Identifier: Apache-2.0
"""How prefill rows are cut into groups that fit the workspace."""

from __future__ import annotations

import random

import pytest

from turbokv.integrations.vllm.prefill.plan import Group, chunks, plan, slices, workspace_floor


def test_fresh_rows_need_no_workspace() -> None:
    (group,) = plan([100, 7], [100, 7], 16)
    assert group.is_fresh
    assert (group.first, group.last) == (0, 2)
    assert group.context_lens == (0, 0)


def test_rows_with_and_without_older_tokens_are_apart() -> None:
    groups = plan([10, 10, 10, 10], [50, 40, 10, 10], 1000)
    assert [(g.first, g.last, g.is_fresh) for g in groups] == [(0, 2, False), (2, 4, True)]
    assert groups[0].context_lens == (40, 30)


def test_rows_are_packed_as_they_fit() -> None:
    groups = plan([16] * 5, [100, 100, 100, 180, 20], 200)
    assert [(g.first, g.last) for g in groups] == [(0, 2), (2, 3), (3, 5)]


def test_a_long_row_is_alone_and_in_pieces() -> None:
    groups = plan([32, 64, 32], [96, 1000, 96], 256)
    assert [(g.first, g.last, g.is_chunked) for g in groups] == [
        (0, 1, False),
        (1, 2, True),
        (2, 3, False),
    ]
    assert chunks(groups[1].context_lens[0], 256) == ((0, 256), (256, 256), (512, 256), (768, 168))


def test_a_sliding_window_bounds_what_is_expanded() -> None:
    (group,) = plan([64], [100_000], workspace_floor(64, 512), 512)
    assert not group.is_chunked
    first_seen = 100_000 - 64 - 511
    assert group.begins == (first_seen // 16 * 16,)
    assert group.kv_lens[0] == 100_000 - group.begins[0]


def test_padding_is_passed_over() -> None:
    groups = plan([5, 0, 3, 0], [9, 0, 3, 0], 64)
    assert [(g.first, g.last) for g in groups] == [(0, 1), (2, 3)]


def test_slices_see_no_token_after_their_last_query() -> None:
    rows, queries, lens = slices([19, 0, 8], [100, 0, 8], 8)
    assert rows == [0, 0, 0, 2]
    assert queries == [8, 8, 3, 8]
    assert lens == [89, 97, 100, 8]


def test_more_fresh_tokens_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="q_lens: wanted 0 to 3 in row 0, got 4"):
        plan([4], [3], 64)


@pytest.mark.parametrize("window", [None, 40, 512])
@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_covered_once_and_fits(window: int | None, seed: int) -> None:
    rng = random.Random(seed)
    budget = 128
    q_lens: list[int] = []
    while sum(q_lens) < budget - 30:
        q_lens.append(rng.randint(1, 30))
    seq_lens = [q + rng.choice([0, 0, rng.randint(1, 3000)]) for q in q_lens]
    capacity = max(256, workspace_floor(budget, window))
    groups = plan(q_lens, seq_lens, capacity, window)
    assert [row for g in groups for row in range(g.first, g.last)] == list(range(len(q_lens)))
    for group in groups:
        check(group, q_lens, seq_lens, capacity, window)


def check(
    group: Group, q_lens: list[int], seq_lens: list[int], capacity: int, window: int | None
) -> None:
    rows = range(group.first, group.last)
    assert list(group.q_lens) == [q_lens[row] for row in rows]
    if group.is_chunked:
        assert window is None
        assert len(rows) == 1
    elif not group.is_fresh:
        assert sum(group.kv_lens) <= capacity
    for row, begin, kv_len in zip(rows, group.begins, group.kv_lens, strict=True):
        assert begin + kv_len == seq_lens[row]
        first_query = seq_lens[row] - q_lens[row]
        seen_from = 0 if window is None else max(0, first_query - window + 1)
        assert begin <= seen_from < begin + 16 or begin == seen_from
