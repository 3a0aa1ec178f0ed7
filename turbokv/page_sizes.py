# SPDX-License-Identifier: Apache-2.0
"""Sizes of an engine's blocks in models whose layers differ, so that little is lost to padding.

An engine such as vLLM keeps one pool of blocks for all layers. It makes pages of different sizes
equal by giving smaller ones more tokens, where they divide the largest, and by padding them where
they do not. So the bytes of a token are rounded up to where they divide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenBytes:
    """What a token takes in one layer.

    Attributes
    ----------
    num_kv_heads
        Of one rank.
    head_bytes
        Bytes of a token and head.
    num_layers
        Layers of this kind.
    """

    num_kv_heads: int
    head_bytes: int
    num_layers: int = 1

    @property
    def layer_bytes(self) -> int:
        """Bytes of a token in a layer."""
        return self.num_kv_heads * self.head_bytes


def divisible_head_bytes(kinds: Sequence[TokenBytes]) -> list[int]:
    """Round the bytes of a token and head up, so that each kind's divide those of the largest.

    Parameters
    ----------
    kinds
        Different kinds of layers of one model, at least one.

    Returns
    -------
    list of int
        New ``head_bytes`` of each kind: of all roundings that divide, the one with the fewest bytes
        for a token in all layers.

    Raises
    ------
    ValueError
        If there is no kind.
    """
    if not kinds:
        raise ValueError("kinds: wanted one or more, got none")
    largest = max(kind.layer_bytes for kind in kinds)
    # how many of a kind's tokens take the place of one of the largest: about as many as fit; more
    # of them make the largest larger
    choices = [
        sorted({max(1, largest // kind.layer_bytes + more) for more in (-1, 0, 1)})
        for kind in kinds
    ]
    best: tuple[int, list[int]] | None = None
    for ratios in itertools.product(*choices):
        unit = math.lcm(
            *(ratio * kind.num_kv_heads for ratio, kind in zip(ratios, kinds, strict=True))
        )
        needed = max(kind.layer_bytes * ratio for ratio, kind in zip(ratios, kinds, strict=True))
        total = -(-max(needed, largest) // unit) * unit
        sizes = [
            total // (ratio * kind.num_kv_heads) for ratio, kind in zip(ratios, kinds, strict=True)
        ]
        cost = sum(
            kind.num_layers * kind.num_kv_heads * size
            for kind, size in zip(kinds, sizes, strict=True)
        )
        if best is None or cost < best[0]:
            best = cost, sizes
    assert best is not None
    return best[1]


def hybrid_block_size(
    layers_bytes: int, state_bytes: int, num_states: int, limit: int, step: int
) -> int:
    """Return the tokens of a block that also holds states of linear layers, one beside another.

    A block holds ``block_size`` tokens of all attention layers, or as many states as fit in that.

    Parameters
    ----------
    layers_bytes
        A token's bytes in all attention layers.
    state_bytes
        Bytes of one linear layer's state.
    num_states
        Linear layers.
    limit
        The most tokens of a block.
    step
        What the size must be a multiple of.

    Returns
    -------
    int
        The size that loses least of a block that holds states, the smallest of these; one that
        holds a single state, even above ``limit``, if none up to it does.

    Raises
    ------
    ValueError
        Naming the argument, what was wanted and what was got.
    """
    for name, value in (
        ("layers_bytes", layers_bytes),
        ("state_bytes", state_bytes),
        ("num_states", num_states),
        ("limit", limit),
        ("step", step),
    ):
        if value < 1:
            raise ValueError(f"{name}: wanted 1 or more, got {value}")
    first = -(-state_bytes // (layers_bytes * step)) * step

    def lost(block_size: int) -> float:
        room = block_size * layers_bytes
        groups = -(-num_states // max(1, room // state_bytes))
        return groups * room / (num_states * state_bytes)

    sizes = range(first, max(limit, first) + 1, step)
    return min(sizes, key=lambda size: (round(lost(size), 3), size))
