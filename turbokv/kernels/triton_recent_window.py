# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of the recent window's slot map: which tiles hold a 16-bit copy in this step.

Mapping: one program does everything. The decisions need an order over all slots and all requests
(who gets the free ones), the work is small (some 20 tiles a request, some thousand slots), and a
second launch would cost the host more than the whole kernel takes. The lanes take (kind, request)
pairs with the kind outermost, so that when slots are short every request gets its sinks, then its
newest tile, and so on. Phases pass data through global memory; a barrier stands between them.

:mod:`turbokv.integrations.vllm.window.pool` states the rules, and
:mod:`turbokv.integrations.vllm.window.reference` is the reference in plain Python.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from turbokv.kernels.triton_kernels import device_guard

TILE = 16
# Of a slot, in this step: its tile is live, is some request's first, was live in the step before,
# is beyond the share of every request whose window it is in.
LIVE = 1
SINK = 2
LEFT = 4
BEYOND = 8
# Of the counters, int64: sums over steps but for the last two.
STEPS, TILES, COMPRESSED, WANTED, REFUSED, EVICTED, IN_USE, HAND = range(8)

_TILE = tl.constexpr(TILE)
_LIVE = tl.constexpr(LIVE)
_SINK = tl.constexpr(SINK)
_LEFT = tl.constexpr(LEFT)
_BEYOND = tl.constexpr(BEYOND)
_BLOCK = 1024


@triton.jit
def _lengths(seq_lens_ptr, query_lens_ptr, row, live, max_tokens):
    """Return the tokens of a request before and after this step."""
    after = tl.load(seq_lens_ptr + row, mask=live, other=0)
    new = tl.load(query_lens_ptr + row, mask=live, other=0)
    before = tl.maximum(after - tl.maximum(new, 0), 0)
    return tl.minimum(before, max_tokens), tl.minimum(after, max_tokens)


@triton.jit
def _address(
    block_table_ptr, row, tile, live, stride, num_pages, null_page, TILES_PER_PAGE: tl.constexpr
):
    """Return where the map holds a request's tile, and whether it does."""
    entry = block_table_ptr + row.to(tl.int64) * stride + tile // TILES_PER_PAGE
    page = tl.load(entry, mask=live, other=-1)
    live = live & (page >= 0) & (page < num_pages) & (page != null_page)
    return page * TILES_PER_PAGE + tile % TILES_PER_PAGE, live


@triton.jit
def _candidate(
    index,
    batch_size,
    seq_lens_ptr,
    query_lens_ptr,
    max_tokens,
    share,
    WINDOW: tl.constexpr,
    SINK_TILES: tl.constexpr,
    WINDOW_TILES: tl.constexpr,
):
    """Return (request, tile, exists, is a sink, is new, counts, is live): one that may have a copy.

    Kinds, outermost: the sinks; the tiles of the newest tokens after this step, newest first; those
    of the newest before it, which the step's first queries still see. Live are the sinks, and of
    the others as many as the request's share, in that order.
    """
    kind = index // batch_size
    row = index % batch_size
    live = kind < SINK_TILES + 2 * WINDOW_TILES
    before, after = _lengths(seq_lens_ptr, query_lens_ptr, row, live, max_tokens)
    is_sink = kind < SINK_TILES
    is_late = (kind >= SINK_TILES) & (kind < SINK_TILES + WINDOW_TILES)
    oldest = tl.maximum(after - WINDOW, 0) // _TILE
    late = (after - 1) // _TILE - (kind - SINK_TILES)
    early = (before - 1) // _TILE - (kind - SINK_TILES - WINDOW_TILES)
    tile = tl.where(is_sink, kind, tl.where(is_late, late, early))
    live &= after > 0
    live &= is_sink | (tile >= SINK_TILES)
    live &= is_sink | (
        tile >= tl.where(is_late, oldest, tl.maximum(before + 1 - WINDOW, 0) // _TILE)
    )
    live &= is_sink | is_late | ((before > 0) & (tile < oldest))
    is_new = live & (tile * _TILE >= before) & (is_sink | is_late)
    return row, tile, live, is_sink, is_new, is_sink | is_late, kind - SINK_TILES < share


# Batches change all the time, and each kind that Triton would compile for costs a second. One kind
# serves all, so that a compilation at start-up is the last.
@triton.jit(
    do_not_specialize=[
        "batch_size",
        "max_tokens",
        "block_table_stride",
        "num_pages",
        "num_slots",
        "null_page",
    ],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "query_lens_ptr"],
)
def _recent_window_kernel(
    block_table_ptr,
    seq_lens_ptr,
    query_lens_ptr,
    tile_slots_ptr,
    slot_tile_ptr,
    slot_index_ptr,
    slot_state_ptr,
    order_ptr,
    counters_ptr,
    batch_size,
    max_tokens,
    block_table_stride,
    num_pages,
    num_slots,
    null_page,
    WINDOW: tl.constexpr,
    SINK_TILES: tl.constexpr,
    WINDOW_TILES: tl.constexpr,
    TILES_PER_PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    total = batch_size * (SINK_TILES + 2 * WINDOW_TILES)

    # 1. no slot is live yet; those that were are remembered
    start = 0
    while start < num_slots:
        slot = start + lane
        state = tl.load(slot_state_ptr + slot, mask=slot < num_slots, other=0)
        state = tl.where((state & _LIVE) != 0, (state & _SINK) | _LEFT, state & _SINK)
        tl.store(slot_state_ptr + slot, state, mask=slot < num_slots)
        start += BLOCK
    tl.debug_barrier()

    # 2. tiles that this step writes from their first token start anew
    most = 0
    requests = 0
    start = 0
    while start < batch_size:
        row = start + lane
        before, after = _lengths(seq_lens_ptr, query_lens_ptr, row, row < batch_size, max_tokens)
        count = (after + _TILE - 1) // _TILE - (before + _TILE - 1) // _TILE
        most = tl.maximum(most, tl.max(count, 0))
        requests += tl.sum((after > 0).to(tl.int32), 0)
        start += BLOCK
    # of the newest tiles, how many each request may have
    share = num_slots // tl.maximum(requests, 1) - SINK_TILES
    start = 0
    while start < most * batch_size:
        row = (start + lane) % batch_size
        before, after = _lengths(seq_lens_ptr, query_lens_ptr, row, row < batch_size, max_tokens)
        tile = (before + _TILE - 1) // _TILE + (start + lane) // batch_size
        address, live = _address(
            block_table_ptr,
            row,
            tile,
            tile * _TILE < after,
            block_table_stride,
            num_pages,
            null_page,
            TILES_PER_PAGE,
        )
        slot = tl.load(tile_slots_ptr + address, mask=live, other=-1)
        tl.store(tile_slots_ptr + address, -1, mask=slot >= 0)
        tl.store(slot_tile_ptr + slot, -1, mask=slot >= 0)
        tl.store(slot_state_ptr + slot, 0, mask=slot >= 0)
        start += BLOCK
    tl.debug_barrier()

    # 3. slots of tiles in some window, and of first tiles, are live; beyond its request's share a
    # tile is not, unless it is within another's
    start = 0
    while (start < total) & (share < 2 * WINDOW_TILES):
        row, tile, live, is_sink, _, _, mine = _candidate(
            start + lane,
            batch_size,
            seq_lens_ptr,
            query_lens_ptr,
            max_tokens,
            share,
            WINDOW,
            SINK_TILES,
            WINDOW_TILES,
        )
        address, live = _address(
            block_table_ptr,
            row,
            tile,
            live & (mine == 0) & (is_sink == 0),
            block_table_stride,
            num_pages,
            null_page,
            TILES_PER_PAGE,
        )
        slot = tl.load(tile_slots_ptr + address, mask=live, other=-1)
        tl.store(slot_state_ptr + slot, _BEYOND, mask=slot >= 0)
        start += BLOCK
    tl.debug_barrier()
    start = 0
    while start < total:
        row, tile, live, is_sink, _, _, mine = _candidate(
            start + lane,
            batch_size,
            seq_lens_ptr,
            query_lens_ptr,
            max_tokens,
            share,
            WINDOW,
            SINK_TILES,
            WINDOW_TILES,
        )
        address, live = _address(
            block_table_ptr,
            row,
            tile,
            live,
            block_table_stride,
            num_pages,
            null_page,
            TILES_PER_PAGE,
        )
        slot = tl.load(tile_slots_ptr + address, mask=live & (mine | is_sink), other=-1)
        tl.store(slot_state_ptr + slot, tl.where(is_sink, _LIVE | _SINK, _LIVE), mask=slot >= 0)
        start += BLOCK
    tl.debug_barrier()

    # 4. what left a window is freed if its request goes on without it; what belonged to a request
    # that is not in the batch stays, in case it comes back. First the list of such slots,
    left = 0
    start = 0
    while start < num_slots:
        slot = start + lane
        state = tl.load(slot_state_ptr + slot, mask=slot < num_slots, other=0)
        beyond = state == _BEYOND
        owner = tl.load(slot_tile_ptr + slot, mask=beyond, other=-1)
        mapped = tl.load(tile_slots_ptr + owner, mask=owner >= 0, other=-1)
        tl.store(tile_slots_ptr + owner, -1, mask=(owner >= 0) & (mapped == slot))
        tl.store(slot_tile_ptr + slot, -1, mask=beyond)
        tl.store(slot_state_ptr + slot, 0, mask=beyond)
        is_left = (state == _LEFT).to(tl.int32)
        tl.store(order_ptr + left + tl.cumsum(is_left, 0) - 1, slot, mask=is_left > 0)
        left += tl.sum(is_left, 0)
        start += BLOCK
    tl.debug_barrier()
    # then every one of them against every request.
    start = 0
    while start < left * batch_size:
        mine = start + lane < left * batch_size
        row = (start + lane) % batch_size
        slot = tl.load(order_ptr + (start + lane) // batch_size, mask=mine, other=0)
        owner = tl.load(slot_tile_ptr + slot, mask=mine, other=-1)
        tile = tl.load(slot_index_ptr + slot, mask=mine, other=0)
        _, after = _lengths(seq_lens_ptr, query_lens_ptr, row, mine, max_tokens)
        address, live = _address(
            block_table_ptr,
            row,
            tile,
            mine & (tile * _TILE < after),
            block_table_stride,
            num_pages,
            null_page,
            TILES_PER_PAGE,
        )
        gone = live & (owner >= 0) & (address == owner)
        mapped = tl.load(tile_slots_ptr + owner, mask=gone, other=-1)
        tl.store(tile_slots_ptr + owner, -1, mask=gone & (mapped == slot))
        tl.store(slot_tile_ptr + slot, -1, mask=gone)
        start += BLOCK
    tl.debug_barrier()
    # Then the order in which slots are given away: free ones, those of absent requests, and their
    # first tiles last, since every continuation of a prompt wants them.
    hand = tl.load(counters_ptr + 7).to(tl.int32)
    free = 0
    idle = 0
    start = 0
    while start < num_slots:
        mine = start + lane < num_slots
        owner = tl.load(slot_tile_ptr + start + lane, mask=mine, other=-1)
        state = tl.load(slot_state_ptr + start + lane, mask=mine, other=_LIVE) & ~_LEFT
        tl.store(slot_state_ptr + start + lane, state, mask=mine)
        free += tl.sum((mine & (owner < 0)).to(tl.int32), 0)
        idle += tl.sum((mine & (owner >= 0) & (state == 0)).to(tl.int32), 0)
        start += BLOCK
    tl.debug_barrier()
    free_before = 0
    idle_before = free
    sinks_before = free + idle
    start = 0
    while start < num_slots:
        mine = start + lane < num_slots
        slot = (start + lane + hand) % num_slots
        owner = tl.load(slot_tile_ptr + slot, mask=mine, other=-1)
        state = tl.load(slot_state_ptr + slot, mask=mine, other=_LIVE)
        is_free = (mine & (owner < 0)).to(tl.int32)
        is_idle = (mine & (owner >= 0) & (state == 0)).to(tl.int32)
        is_sink = (mine & (owner >= 0) & (state == _SINK)).to(tl.int32)
        tl.store(order_ptr + free_before + tl.cumsum(is_free, 0) - 1, slot, mask=is_free > 0)
        tl.store(order_ptr + idle_before + tl.cumsum(is_idle, 0) - 1, slot, mask=is_idle > 0)
        tl.store(order_ptr + sinks_before + tl.cumsum(is_sink, 0) - 1, slot, mask=is_sink > 0)
        free_before += tl.sum(is_free, 0)
        idle_before += tl.sum(is_idle, 0)
        sinks_before += tl.sum(is_sink, 0)
        start += BLOCK
    offered = sinks_before
    tl.debug_barrier()

    # 5. tiles that this step writes from their first token get what there is
    tiles = 0
    compressed = 0
    wanted = 0
    asked = 0
    start = 0
    while start < total:
        row, tile, live, is_sink, is_new, counts, mine = _candidate(
            start + lane,
            batch_size,
            seq_lens_ptr,
            query_lens_ptr,
            max_tokens,
            share,
            WINDOW,
            SINK_TILES,
            WINDOW_TILES,
        )
        address, live = _address(
            block_table_ptr,
            row,
            tile,
            live,
            block_table_stride,
            num_pages,
            null_page,
            TILES_PER_PAGE,
        )
        has = live & (tl.load(tile_slots_ptr + address, mask=live, other=-1) >= 0)
        is_new = live & is_new & (has == 0)
        wants = (is_new & (mine | is_sink)).to(tl.int32)
        rank = asked + tl.cumsum(wants, 0) - 1
        gets = (wants > 0) & (rank < offered)
        slot = tl.load(order_ptr + rank, mask=gets, other=0)
        loser = tl.load(slot_tile_ptr + slot, mask=gets, other=-1)
        mapped = tl.load(tile_slots_ptr + loser, mask=gets & (loser >= 0), other=-1)
        tl.store(tile_slots_ptr + loser, -1, mask=gets & (loser >= 0) & (mapped == slot))
        tl.store(tile_slots_ptr + address, slot, mask=gets)
        tl.store(slot_tile_ptr + slot, address, mask=gets)
        tl.store(slot_index_ptr + slot, tile, mask=gets)
        tl.store(slot_state_ptr + slot, tl.where(is_sink, _LIVE | _SINK, _LIVE), mask=gets)
        asked += tl.sum(wants, 0)
        wanted += tl.sum(is_new.to(tl.int32), 0)
        tiles += tl.sum((live & counts).to(tl.int32), 0)
        compressed += tl.sum((live & counts & (has == 0) & (gets == 0)).to(tl.int32), 0)
        start += BLOCK
    given = tl.minimum(asked, offered)
    tl.debug_barrier()

    tl.store(counters_ptr + 0, tl.load(counters_ptr + 0) + 1)
    tl.store(counters_ptr + 1, tl.load(counters_ptr + 1) + tiles)
    tl.store(counters_ptr + 2, tl.load(counters_ptr + 2) + compressed)
    tl.store(counters_ptr + 3, tl.load(counters_ptr + 3) + wanted)
    tl.store(counters_ptr + 4, tl.load(counters_ptr + 4) + wanted - given)
    tl.store(counters_ptr + 5, tl.load(counters_ptr + 5) + tl.maximum(given - free, 0))
    tl.store(counters_ptr + 6, (num_slots - tl.maximum(free - given, 0)).to(tl.int64))
    if given > 0:
        tl.store(counters_ptr + 7, (tl.load(order_ptr + given - 1) + 1).to(tl.int64))


def refresh(
    block_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor,
    tile_slots: Tensor,
    slot_tile: Tensor,
    slot_index: Tensor,
    slot_state: Tensor,
    order: Tensor,
    counters: Tensor,
    *,
    window: int,
    sink_tiles: int,
    window_tiles: int,
    null_page: int,
) -> None:
    """Launch once; arguments are the tensors of :class:`RecentWindow`, checked there."""
    num_pages, tiles_per_page = tile_slots.shape
    with device_guard(tile_slots.device):
        _recent_window_kernel[(1,)](
            block_table,
            seq_lens,
            query_lens,
            tile_slots,
            slot_tile,
            slot_index,
            slot_state,
            order,
            counters,
            block_table.shape[0],
            block_table.shape[1] * tiles_per_page * TILE,
            block_table.stride(0),
            num_pages,
            slot_tile.shape[0],
            null_page,
            WINDOW=window,
            SINK_TILES=sink_tiles,
            WINDOW_TILES=window_tiles,
            TILES_PER_PAGE=tiles_per_page,
            BLOCK=_BLOCK,
            num_warps=8,
        )
