# SPDX-License-Identifier: Apache-2.0
"""Sizes of blocks that divide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbokv.page_sizes import TokenBytes, divisible_head_bytes, hybrid_block_size


def test_gemma_4_loses_less_than_a_hundredth() -> None:
    # 16 heads of 256 in sliding layers, 4 of 512 in full ones, 4 bits
    assert divisible_head_bytes([TokenBytes(16, 260, 50), TokenBytes(4, 516, 10)]) == [260, 520]


def test_one_kind_stays_as_it_is() -> None:
    assert divisible_head_bytes([TokenBytes(8, 132, 36)]) == [132]
    with pytest.raises(ValueError, match="kinds: wanted one or more"):
        divisible_head_bytes([])


KINDS = st.lists(
    st.builds(
        TokenBytes,
        st.sampled_from([1, 2, 4, 8, 16]),
        st.sampled_from([34, 66, 68, 84, 100, 132, 196, 260, 516]),
        st.integers(1, 50),
    ),
    min_size=1,
    max_size=3,
)


@given(KINDS)
def test_sizes_divide_and_are_only_rounded_up(kinds: list[TokenBytes]) -> None:
    found = divisible_head_bytes(kinds)
    pages = [kind.num_kv_heads * size for kind, size in zip(kinds, found, strict=True)]
    assert all(max(pages) % page == 0 for page in pages)
    assert all(size >= kind.head_bytes for kind, size in zip(kinds, found, strict=True))
    # never worse than padding all to the largest, which is what happens to sizes that do not divide
    largest = max(kind.layer_bytes for kind in kinds)
    total = sum(kind.num_layers * page for kind, page in zip(kinds, pages, strict=True))
    assert total <= sum(kind.num_layers for kind in kinds) * largest * 1.5


def test_a_block_holds_states_with_little_loss() -> None:
    # Qwen3.6-35B-A3B at 4 bits: 10 attention layers of 2 heads, 30 linear ones
    size = hybrid_block_size(10 * 520, 1_097_728, 30, 1088, 64)
    assert size <= 1088
    assert size % 64 == 0
    room = size * 10 * 520
    assert room // 1_097_728 * 1_097_728 > 0.9 * room


def test_a_block_holds_one_state_at_least() -> None:
    assert hybrid_block_size(100, 10_000, 4, 64, 16) == 112
    with pytest.raises(ValueError, match="step: wanted 1 or more, got 0"):
        hybrid_block_size(100, 10_000, 4, 64, 0)
