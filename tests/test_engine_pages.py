# SPDX-License-Identifier: Apache-2.0
"""Blocks of vLLM's pool, against what vLLM 0.33 made of these shapes on a pretended H100."""

from __future__ import annotations

import pytest

from turbokv.engine_pages import PageKind, plain_hybrid_block, vllm_tokens

GIB40 = 40 << 30
GEMMA3 = [
    PageKind("sliding", 52, 16, 512, 512, 1024),
    PageKind("full", 10, 16, 512, 512),
]
GEMMA4 = [
    PageKind("sliding", 50, 16, 260, 1024, 1024),
    PageKind("full", 10, 4, 516, 2048),
]
QWEN36 = [
    PageKind("full", 10, 2, 260, 1024),
    PageKind("state", 30, state_bytes=1_097_728),
]
SCOUT = [
    PageKind("chunked", 36, 8, 512, 512, 8192),
    PageKind("full", 12, 8, 512, 512),
]


@pytest.mark.parametrize(
    ("kinds", "context", "compressed", "tokens"),
    [
        (GEMMA3, 32_768, False, 270_191),
        (GEMMA4, 131_072, True, 1_479_581),
        (QWEN36, 131_072, True, 7_517_707),
        (SCOUT, 131_072, False, 681_996),
    ],
    ids=["Gemma 3 27B", "Gemma 4 31B at tq4", "Qwen3.6-35B at tq4", "Llama 4 Scout"],
)
def test_tokens_are_those_that_vllm_prints(
    kinds: list[PageKind], context: int, compressed: bool, tokens: int
) -> None:
    found = vllm_tokens(kinds, GIB40, context, compressed=compressed, max_num_batched_tokens=2048)
    assert abs(found - tokens) <= 0.01 * tokens


def test_one_kind_of_layer_is_memory_by_bytes() -> None:
    kinds = [PageKind("full", 36, 8, 132, 512)]
    found = vllm_tokens(kinds, 36 * 8 * 132 * 64 * 1000, 6400, compressed=True)
    assert found == 64_000


def test_vllms_own_block_of_a_hybrid() -> None:
    assert plain_hybrid_block(1_097_728, 2048) == 544
