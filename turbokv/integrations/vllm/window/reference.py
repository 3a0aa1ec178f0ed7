# SPDX-License-Identifier: Apache-2.0
"""The recent window's map in plain Python: the reference, and what a CPU runs.

:mod:`turbokv.integrations.vllm.window.pool` states the rules; the Triton kernel
(:mod:`turbokv.kernels.triton_recent_window`) takes the same tensors and gives the same slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbokv.paged import TILE
from turbokv.window_pool import window_tiles

# Of a slot, in this step: its tile is live, is some request's first, was live in the step before,
# is beyond the share of every request whose window it is in.
_LIVE = 1
_SINK = 2
_LEFT = 4
_BEYOND = 8
_STEPS, _TILES, _COMPRESSED, _WANTED, _REFUSED, _EVICTED, _IN_USE, _HAND = range(8)


def refresh(
    block_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor,
    tile_slots: Tensor,
    slot_tile: Tensor,
    slot_index: Tensor,
    slot_state: Tensor,
    counters: Tensor,
    *,
    window: int,
    sinks: int,
    null_page: int,
) -> None:
    """Apply the rules one by one, in place; reads lengths on the host.

    Parameters
    ----------
    block_table, seq_lens, query_lens
        As for :meth:`~turbokv.integrations.vllm.window.pool.RecentWindow.refresh`.
    tile_slots
        int32 ``[num_pages, page_size // 16]``: the map.
    slot_tile, slot_index, slot_state
        int32 ``[num_slots]``: the tile of each slot in the map or -1, which tile of its request
        that is, and flags.
    counters
        int64 ``[8]``.
    window, sinks, null_page
        As for :class:`~turbokv.integrations.vllm.window.pool.RecentWindow`.
    """
    table = block_table.tolist()
    tiles_per_page = tile_slots.shape[1]
    flat = tile_slots.view(-1)
    num_pages, num_slots = tile_slots.shape[0], slot_tile.shape[0]
    map_, owner, state = flat.tolist(), slot_tile.tolist(), slot_state.tolist()
    index = slot_index.tolist()
    state = [(s & _SINK) | (_LEFT if s & _LIVE else 0) for s in state]
    capacity = len(table[0]) * tiles_per_page * TILE if table else 0

    requests = sum(after > 0 for after in seq_lens.tolist())
    share = num_slots // max(requests, 1) - (sinks > 0)
    rows = []
    for row, (after, new) in enumerate(zip(seq_lens.tolist(), query_lens.tolist(), strict=True)):
        before = max(after - max(new, 0), 0)
        rows.append((row, min(before, capacity), min(after, capacity)))

    def address(row: int, tile: int) -> int | None:
        page = table[row][tile // tiles_per_page]
        if not 0 <= page < num_pages or page == null_page:
            return None
        return int(page * tiles_per_page + tile % tiles_per_page)

    def mark(row: int, tile: int, value: int) -> None:
        where = address(row, tile)
        if where is not None and map_[where] >= 0:
            state[map_[where]] = value

    def free(slot: int) -> None:
        if map_[owner[slot]] == slot:
            map_[owner[slot]] = -1
        owner[slot], state[slot] = -1, 0

    # rule 2
    for row, before, after in rows:
        for tile in range(-(-before // TILE), -(-after // TILE)):
            where = address(row, tile)
            if where is not None and map_[where] >= 0:
                free(map_[where])
    # rule 1
    live, seen = _wanted_tiles(rows, window, sinks)
    for rank, row, tile in seen:
        if rank > share:
            mark(row, tile, _BEYOND)
    for rank, row, tile in seen:
        if rank <= share:
            mark(row, tile, _LIVE)
    for _, row, tile, is_sink in live:
        if is_sink:
            mark(row, tile, _LIVE | _SINK)
    # rule 3
    for slot in range(num_slots):
        if state[slot] == _BEYOND or (
            state[slot] == _LEFT
            and any(
                index[slot] * TILE < after and address(row, index[slot]) == owner[slot]
                for row, _, after in rows
            )
        ):
            free(slot)
        state[slot] &= ~_LEFT
    # rule 4
    counts = counters.tolist()
    order = [(slot + counts[_HAND]) % num_slots for slot in range(num_slots)]
    unused = [slot for slot in order if owner[slot] < 0]
    held = [slot for slot in order if owner[slot] >= 0]
    offered = unused + [slot for slot in held if state[slot] == 0]
    offered += [slot for slot in held if state[slot] == _SINK]
    given = wanted = tiles = compressed = 0
    for rank, row, tile, is_sink in live:
        where = address(row, tile)
        if where is None:
            continue
        tiles += 1
        if map_[where] < 0:
            is_new = tile * TILE >= rows[row][1]
            wanted += is_new
            if not is_new or not (rank <= share or is_sink) or given == len(offered):
                compressed += 1
                continue
            slot = offered[given]
            given += 1
            if owner[slot] >= 0:
                free(slot)
            map_[where], owner[slot], index[slot] = slot, where, tile
            state[slot] = _LIVE | _SINK if is_sink else _LIVE
    counts[_STEPS] += 1
    counts[_TILES] += tiles
    counts[_COMPRESSED] += compressed
    counts[_WANTED] += wanted
    counts[_REFUSED] += wanted - given
    counts[_EVICTED] += max(given - len(unused), 0)
    counts[_IN_USE] = num_slots - max(len(unused) - given, 0)
    if given:
        counts[_HAND] = offered[given - 1] + 1
    flat.copy_(torch.tensor(map_, dtype=torch.int32, device="cpu"))
    slot_tile.copy_(torch.tensor(owner, dtype=torch.int32, device="cpu"))
    slot_index.copy_(torch.tensor(index, dtype=torch.int32, device="cpu"))
    slot_state.copy_(torch.tensor(state, dtype=torch.int32, device="cpu"))
    counters.copy_(torch.tensor(counts, dtype=torch.int64, device="cpu"))


def _wanted_tiles(
    rows: list[tuple[int, int, int]], window: int, sinks: int
) -> tuple[list[tuple[int, int, int, bool]], list[tuple[int, int, int]]]:
    """Return the tiles that requests want in 16 bits, and those that a step sees.

    Entries are rank among kinds, request and tile, and of the first whether it is a sink. Live
    are those whose rank is within the request's share.
    """
    live: list[tuple[int, int, int, bool]] = []
    seen: list[tuple[int, int, int]] = []
    for row, before, after in rows:
        if after <= 0:
            continue
        first = 1 if sinks else 0
        if sinks:
            live.append((0, row, 0, True))
        oldest = max(after - window, 0) // TILE
        newest = (after - 1) // TILE
        if window:
            late = range(newest, max(first, oldest) - 1, -1)
            live += [(1 + rank, row, tile, False) for rank, tile in enumerate(late)]
            early = max(first, max(before + 1 - window, 0) // TILE)
            end = -(-before // TILE)
            seen += [
                (end - tile + window_tiles(window), row, tile)
                for tile in range(early, min(oldest, end))
            ]
    live.sort(key=lambda entry: entry[:2])
    seen += [entry[:3] for entry in live if not entry[3]]
    return live, seen
