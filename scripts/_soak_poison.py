# SPDX-License-Identifier: Apache-2.0
"""NaN patterns wherever nothing should be read: free pages, padding, freed slots, workspaces.

An engine in this process is watched from its scheduler to its workers. Before each step

- pages that are free and in no prefix cache, pages that the step was given and has not written, and
  vLLM's null page are filled with ones: NaN as a 16-bit number and as a stored scale;
- so is the workspace that layers share;

and once the step's map of 16-bit copies is made, the slots that changed hands or are free are.
Whatever reads one of them answers NaN, which :mod:`soak` looks for in every log-probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from turbokv.integrations.vllm.window.pool import live_windows

_ONES = 0xFF


class Poison:
    """Fills what must not be read, step by step.

    Attributes
    ----------
    pages, slots
        How many were filled so far; slots only where that needs no wait for the device.
    """

    def __init__(self, core: Any, layers: dict[str, Any]) -> None:
        self.pages = self.slots = 0
        self._pool = core.scheduler.kv_cache_manager.block_pool
        self._layers = layers
        self._clean: set[int] = set()
        self._given: set[int] = set()
        self._windows: list[Any] = []
        self._fill([self._pool.null_block.block_id])
        take = self._pool.get_new_blocks

        def get_new_blocks(*args: Any, **kwargs: Any) -> Any:
            blocks = take(*args, **kwargs)
            self._given.update(block.block_id for block in blocks)
            return blocks

        self._pool.get_new_blocks = get_new_blocks
        execute = core.model_executor.execute_model

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            self.before_step(scheduled)
            return execute(scheduled, *args, **kwargs)

        core.model_executor.execute_model = execute_model

    def tensors(self) -> Iterable[Tensor]:
        """Yield the cache of every layer, uint8 or 16 bits, blocks first."""
        for layer in self._layers.values():
            found = getattr(layer, "kv_cache", None)
            for tensor in found if isinstance(found, (list, tuple)) else [found]:
                if isinstance(tensor, Tensor) and tensor.numel():
                    yield tensor

    def _fill(self, blocks: Iterable[int]) -> None:
        blocks = sorted(blocks)
        if not blocks:
            return
        total = self._pool.num_gpu_blocks
        places: dict[int, Tensor] = {}
        for tensor in self.tensors():
            ratio = tensor.shape[0] // total  # a block of vLLM's may be several pages of a kernel's
            if ratio not in places:
                where = torch.tensor(blocks, dtype=torch.int64)[:, None] * ratio
                places[ratio] = (where + torch.arange(ratio)).flatten().to(tensor.device)
            tensor.view(torch.uint8).index_fill_(0, places[ratio], _ONES)
        self.pages += len(blocks)

    def before_step(self, scheduled: Any) -> None:
        """Fill pages that are free, and those given since the last step; then the workspace."""
        unread = {
            block.block_id
            for block in self._pool.free_block_queue.get_all_free_blocks()
            # vLLM lets some be read until they are given to others
            if block.block_hash is None and block.block_id not in self._watched()
        }
        self._fill((unread | self._given) - self._clean)
        self._clean = unread
        self._given.clear()
        if getattr(scheduled, "kv_connector_metadata", None) is not None and _on_gpu():
            torch.cuda.current_stream().synchronize()  # loads have streams of their own
        _fill_workspaces()
        windows = live_windows()  # made in the first step
        if windows != self._windows and len(windows) == 1:  # else whose are which layers?
            windows[0].on_refresh = self._watch(windows[0], windows[0].on_refresh)
        self._windows = windows

    def _watched(self) -> Any:
        return getattr(self._pool, "_reuse_watchers", ())

    def _watch(self, window: Any, then: Callable[[Any], None] | None) -> Callable[[Any], None]:
        known = window._slot_tile.clone()

        def refreshed(window: Any) -> None:
            """Fill slots that are free or hold a tile since this step."""
            if then is not None:
                then(window)
            if _on_gpu() and torch.cuda.is_current_stream_capturing():
                return
            unread = (window._slot_tile != known) | (window._slot_tile < 0)
            known.copy_(window._slot_tile)
            for layer in self._layers.values():
                copies = getattr(
                    getattr(getattr(layer, "impl", None), "cache", None), "copies", None
                )
                if copies is not None and copies.shape[0] == unread.shape[0]:
                    copies.masked_fill_(unread.view(-1, 1, 1, 1, 1), float("nan"))
            if not _on_gpu():
                self.slots += int(unread.sum())

        return refreshed


def _on_gpu() -> bool:
    return torch.cuda.is_available()


def _fill_workspaces() -> None:
    from turbokv.integrations.vllm import compat
    from turbokv.integrations.vllm.attention import scratch

    own = scratch.current()._own
    if own is not None:
        own.fill_(_ONES)
    for shared in getattr(compat.scratch_manager(), "_current_workspaces", None) or ():
        if isinstance(shared, Tensor):
            shared.view(torch.uint8).fill_(_ONES)


def slots_amiss(window: Any) -> list[str]:
    """Return what is wrong with a window's map and its slots, which must name each other."""
    tiles = window.tile_slots.flatten().cpu()
    owners = window._slot_tile.cpu()
    held = (tiles >= 0).nonzero()[:, 0]
    named = tiles[held].long()
    problems = []
    if named.unique().numel() != named.numel():
        problems.append(f"{named.numel()} tiles share {named.unique().numel()} slots")
    elif not torch.equal(owners[named].long(), held):
        problems.append("slots name other tiles than those that name them")
    if int((owners >= 0).sum()) != held.numel():
        problems.append(f"{int((owners >= 0).sum())} slots are held, {held.numel()} tiles have one")
    return problems
