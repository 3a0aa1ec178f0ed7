# SPDX-License-Identifier: Apache-2.0
"""How many tokens vLLM's pool of blocks holds: its rules for models whose layers differ.

A block holds a page of each layer of a group. Groups are as large as the rarest kind of layer, all
draw blocks from one pool, and a request takes whole blocks from each. Checked against vLLM 0.33 on
a pretended GPU (``tests/vllm/test_page_plan.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from turbokv.page_sizes import TokenBytes, divisible_head_bytes, hybrid_block_size

PLAIN_BLOCK, OUR_BLOCK = 16, 64
# Of vLLM's server; a step in flight keeps the blocks of the one before, so that two count.
BATCH_TOKENS = 8192
_BATCHES = 2
# Of each linear layer with prefix caching: the running state, and the one that is being written.
_STATE_BLOCKS = 2


@dataclass(frozen=True)
class PageKind:
    """Layers of one kind.

    Attributes
    ----------
    kind
        ``full``, ``sliding`` or ``chunked`` attention, or the ``state`` of a linear layer.
    num_layers
        How many.
    num_kv_heads, head_bytes, plain_head_bytes
        Of a layer, and of a token and head, as it is kept and in 16 bits; 0 of a state.
    window
        Tokens of a sliding window, or of a chunk.
    state_bytes
        Of a layer's state.
    """

    kind: Literal["full", "sliding", "chunked", "state"]
    num_layers: int
    num_kv_heads: int = 0
    head_bytes: int = 0
    plain_head_bytes: int = 0
    window: int | None = None
    state_bytes: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in a layer."""
        return self.num_kv_heads * self.head_bytes


def vllm_tokens(
    kinds: Sequence[PageKind],
    cache_bytes: int,
    context: int,
    *,
    compressed: bool,
    max_num_batched_tokens: int = BATCH_TOKENS,
) -> int:
    """Return the tokens that vLLM says its cache holds, in requests of ``context`` tokens.

    Parameters
    ----------
    kinds
        Of one rank's layers, at least one.
    cache_bytes
        Memory of the cache.
    context
        ``max_model_len``.
    compressed
        Whether pages are ours: blocks of 64 tokens, rounded to divide, states packed.
    max_num_batched_tokens
        Tokens of a step; layers with a window also keep those of two steps.
    """
    states = [kind for kind in kinds if kind.kind == "state"]
    attention = [kind for kind in kinds if kind.kind != "state"]
    in_flight = _BATCHES * max_num_batched_tokens
    if not attention:
        block_bytes = max(kind.state_bytes for kind in states)
        needed = _STATE_BLOCKS * sum(kind.num_layers for kind in states)
    elif states:
        (layers,) = attention
        (state,) = states
        block_bytes, needed = _hybrid(layers, state, context, compressed, max_num_batched_tokens)
    else:
        block_bytes, needed = _attention(attention, context, compressed, in_flight)
    return cache_bytes // block_bytes * context // needed


def _group_size(kinds: Sequence[PageKind]) -> int:
    fewest, most = min(k.num_layers for k in kinds), max(k.num_layers for k in kinds)
    return most if most < 1.5 * fewest else fewest


def _attention(
    kinds: Sequence[PageKind], context: int, compressed: bool, in_flight: int
) -> tuple[int, int]:
    """Return the bytes of a block, and the blocks of a request."""
    first = OUR_BLOCK if compressed else PLAIN_BLOCK
    if compressed:
        rounded = divisible_head_bytes(
            [TokenBytes(k.num_kv_heads, k.head_bytes, k.num_layers) for k in kinds]
        )
        kinds = [replace(k, head_bytes=b) for k, b in zip(kinds, rounded, strict=True)]
    page = first * max(kind.token_bytes for kind in kinds)
    if all(kind.kind == "full" for kind in kinds):
        block_bytes = first * sum(kind.num_layers * kind.token_bytes for kind in kinds)
        return block_bytes, -(-context // first)
    size = _group_size(kinds)
    needed = 0
    for kind in kinds:
        own = first * kind.token_bytes
        block = first * (page // own) if page % own == 0 else first
        needed += -(-kind.num_layers // size) * _blocks(kind, block, context, in_flight)
    return size * page, needed


def _blocks(kind: PageKind, block: int, context: int, in_flight: int) -> int:
    """Return the blocks of a request in one group."""
    if kind.window is None:
        return -(-context // block)
    if kind.kind == "chunked":
        return -(-min(kind.window + in_flight, context) // block)
    return -(-min(kind.window - 1 + in_flight, context) // block) + 1


def _hybrid(
    layers: PageKind, state: PageKind, context: int, compressed: bool, budget: int
) -> tuple[int, int]:
    """Return the bytes of a block, and the blocks of a request, of attention and states."""
    plain = plain_hybrid_block(state.state_bytes, layers.num_kv_heads * layers.plain_head_bytes)
    if not compressed:
        block = plain_hybrid_block(state.state_bytes, layers.token_bytes)
        size = _group_size([layers, state])
        groups = [-(-kind.num_layers // size) for kind in (layers, state)]
        needed = groups[0] * -(-context // block) + groups[1] * _STATE_BLOCKS
        return size * block * layers.token_bytes, needed
    all_bytes = layers.num_layers * layers.token_bytes
    block = hybrid_block_size(
        all_bytes, state.state_bytes, state.num_layers, min(2 * plain, budget), OUR_BLOCK
    )
    room = block * all_bytes
    state_groups = -(-state.num_layers // max(1, room // state.state_bytes))
    widest = max(room, -(-state.num_layers // state_groups) * state.state_bytes)
    return widest, -(-context // block) + state_groups * _STATE_BLOCKS


def plain_hybrid_block(state_bytes: int, token_bytes: int) -> int:
    """Return the tokens of vLLM's own block, whose page of one layer holds a layer's state."""
    return PLAIN_BLOCK * -(-state_bytes // (PLAIN_BLOCK * token_bytes))
