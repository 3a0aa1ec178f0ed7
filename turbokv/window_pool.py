# SPDX-License-Identifier: Apache-2.0
"""How many 16-bit copies of tiles a cache has: what requests need, within a share of its memory.

One slot holds a tile of 16 tokens, K and V, all heads, in every layer. The engine allocates them
(:mod:`turbokv.integrations.vllm.window.pool`), ``turbokv plan`` counts them; both ask here.
"""

from __future__ import annotations

from turbokv.page_layout import TILE

WINDOW, SINKS = 128, 4
# At 4 bits and head_dim 128 the rest holds 3.68 times as many tokens as bf16.
FRACTION = 0.05


def slot_bytes(num_kv_heads: int, padded_dim: int) -> int:
    """Return the bytes of one slot in one layer: 16 tokens of K and V in float16."""
    return num_kv_heads * 2 * TILE * padded_dim * 2


def window_tiles(window: int) -> int:
    """Return the most tiles that ``window`` tokens in a row can touch."""
    return 0 if window == 0 else -(-(window - 1) // TILE) + 1


def slots_per_request(window: int = WINDOW, sinks: int = SINKS) -> int:
    """Return how many slots one decoding request holds at most."""
    return window_tiles(window) + (sinks > 0)


def pool_slots(
    cache_bytes: int,
    bytes_per_slot: int,
    max_num_seqs: int,
    *,
    fraction: float = FRACTION,
    window: int = WINDOW,
    sinks: int = SINKS,
) -> int:
    """Return how many slots the pool should have.

    Parameters
    ----------
    cache_bytes
        Memory for the cache of all layers, the pool included.
    bytes_per_slot
        Of all layers together: the sum of :func:`slot_bytes`.
    max_num_seqs
        The most requests of a step: the pool takes what they can hold and an eighth more, since a
        request that is prefilled holds two windows for a step.
    fraction
        ``window_pool_fraction``: the share of ``cache_bytes`` to spend at most.
    window, sinks
        Newest and first tokens of each request.

    Returns
    -------
    int
        Slots; 0 if the share does not hold one request's, where the window should be off.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: wanted 0 or more and less than 1, got {fraction}")
    if bytes_per_slot < 1:
        return 0
    each = slots_per_request(window, sinks)
    affordable = int(cache_bytes * fraction) // bytes_per_slot
    useful = (max_num_seqs + max(1, max_num_seqs // 8)) * each
    return min(affordable, useful) if affordable >= each else 0


def whole_windows(num_slots: int, window: int = WINDOW, sinks: int = SINKS) -> int:
    """Return how many running requests a pool gives all of their newest and first tokens."""
    return num_slots // max(1, slots_per_request(window, sinks))
