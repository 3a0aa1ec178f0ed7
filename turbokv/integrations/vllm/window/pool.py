# SPDX-License-Identifier: Apache-2.0
"""The recent window inside the engine: which tiles also have a 16-bit copy.

Every token is compressed when it is written. A copy is extra, and pages belong to no request, so
the copies live in a pool of slots (one slot: 16 tokens, K and V, all heads of a layer) and a map
says, for each 16-token tile of each page, which slot holds its copy, or -1. All layers share the
map; each has its own storage.

:meth:`RecentWindow.refresh` runs once a step, before the forward pass, on the lengths and the block
table that the step will use. Its rules:

1. *Live* are the tiles that hold any of a request's newest ``window`` tokens after the step, any of
   those that the step's first query sees, and a request's first tile if ``sinks`` are wanted. When
   the pool is too small for all requests of the batch, each gets an equal share of it: its first
   tile and fewer of the newest, rather than some everything and others nothing.
2. A tile that the step writes from its first token loses the slot it had, whoever had it.
3. A live tile keeps its slot. A tile that is live no more loses it if a request of the batch goes
   on without it, or has it in its window but beyond its share. If no request of the batch holds it
   (finished, preempted, not scheduled), it keeps the slot until slots are short: whoever continues
   its tokens finds them in 16 bits. First tiles are kept longest.
4. A live tile without a slot gets one if and only if this step writes it from its first token.
   Sinks come first, then the newest tile of every request, and so on.

The invariant: *a slot always holds every token written to its tile since that tile was last
started*. Rule 4 starts it, :func:`turbokv.kernels.cuda.ops.store` writes the slot together with the
codes as long as the map names it, and a tile that lost its slot cannot get one back, since its
16-bit values are gone. So a prefix hit, a preempted and resumed request, a reordered batch and a
rolled-back draft read what was stored: in 16 bits where a slot survived, compressed elsewhere. The
newest tokens of a prefix hit do not depend on which slots survived: they are computed again
(:mod:`turbokv.integrations.vllm.window.prefix_hits`). Whoever changes pages without ``store`` (a KV
connector's load, a wake from sleep) must name them to :meth:`RecentWindow.invalidate`, or call
:meth:`RecentWindow.clear`.

:mod:`turbokv.window_pool` says what a slot takes and how many there are.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from turbokv import kernels
from turbokv.integrations.vllm.window import reference
from turbokv.paged import TILE
from turbokv.window_pool import window_tiles

_INT32_MAX = 2**31 - 1
_WINDOWS: weakref.WeakSet[RecentWindow] = weakref.WeakSet()


@dataclass(frozen=True)
class WindowMetrics:
    """What the pool did so far; sums over steps except for the last two.

    Attributes
    ----------
    steps
        Calls of ``refresh``.
    tiles
        Tiles of newest tokens and sinks that requests had in those steps.
    compressed
        Of these, tiles without a slot: read compressed.
    wanted, refused
        New tiles that wanted a slot, and those that got none.
    evicted
        Tiles of requests not in the batch that gave up their slot.
    in_use, slots
        Slots that hold a copy, and all.
    """

    steps: int = 0
    tiles: int = 0
    compressed: int = 0
    wanted: int = 0
    refused: int = 0
    evicted: int = 0
    in_use: int = 0
    slots: int = 0


def live_windows() -> list[RecentWindow]:
    """Return the windows of this process, oldest first: one for each group of layers."""
    return sorted(_WINDOWS, key=lambda window: window.number)


class RecentWindow:
    """A device-side map from physical tiles to slots of 16-bit copies, kept up to date by step.

    Parameters
    ----------
    num_pages, page_size
        Of the paged cache; ``page_size`` a multiple of 16.
    num_slots
        Slots of the pool; the storage of a layer is float16 ``[num_slots, num_kv_heads, 2, 16,
        padded_dim]`` and the caller's.
    window, sinks
        Newest tokens of each request, and first ones (0 to 16), to hold in 16 bits.
    device
        Where the map lives.
    null_page
        The page that block tables name where there is none (vLLM: 0); it never gets a slot. -1 if
        there is no such page.
    backend
        ``auto``, ``triton`` or ``torch`` (plain Python on the tensors: the reference, and what a
        CPU runs).

    Attributes
    ----------
    tile_slots
        int32 ``[num_pages, page_size // 16]``, contiguous: slot of each tile, or -1. Its address
        never changes, so a captured CUDA graph may read it.
    number
        Of this window among those of the process.
    on_refresh
        Called with the window after every refresh; None at first.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_slots: int,
        window: int,
        sinks: int,
        device: torch.device | str,
        *,
        null_page: int = 0,
        backend: kernels.Backend = "auto",
    ) -> None:
        for name, value, least in (
            ("num_pages", num_pages, 1),
            ("page_size", page_size, TILE),
            ("num_slots", num_slots, 1),
            ("window", window, 0),
            ("sinks", sinks, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: wanted an int, got {value!r}")
            if not least <= value <= _INT32_MAX:
                raise ValueError(f"{name}: wanted {least} or more, got {value}")
        if page_size % TILE:
            raise ValueError(f"page_size: wanted a multiple of {TILE}, got {page_size}")
        if sinks > TILE:
            raise ValueError(f"sinks: wanted at most {TILE}, one tile, got {sinks}")
        if not window and not sinks:
            raise ValueError("window: wanted a window or sinks, got 0 of both")
        if num_pages * (page_size // TILE) > _INT32_MAX:
            raise ValueError(f"num_pages: wanted fewer than 2**31 tiles, got {num_pages} pages")
        self.page_size = page_size
        self.num_slots = num_slots
        self.window = window
        self.sinks = sinks
        self.null_page = null_page
        self.device = torch.device(device)
        if backend not in ("auto", "triton", "torch"):
            raise ValueError(f"backend: wanted 'auto', 'triton' or 'torch', got {backend!r}")
        if backend == "auto":
            backend = "triton" if self.device.type == "cuda" else "torch"
        self.backend = kernels.resolve_backend(backend, self.device, "pages")

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=self.device)

        self.tile_slots = full(-1, num_pages, page_size // TILE)
        self._slot_tile = full(-1, num_slots)
        self._slot_index = full(0, num_slots)  # which tile of its request
        self._slot_state = full(0, num_slots)
        self._order = full(0, num_slots)
        self._counters = full(0, 8, dtype=torch.int64)
        self._snapshot: Tensor | None = None
        self._pending: torch.cuda.Event | None = None
        if self.backend == "triton":
            # compiles now rather than in the first step; a batch of none changes nothing
            empty = full(0, 0, 1)
            _until_compiled(lambda: self._launch(empty, empty[:, 0], empty[:, 0]))
        self._counters.zero_()
        self.on_refresh: Callable[[RecentWindow], None] | None = None
        self.number: int = max((window.number for window in _WINDOWS), default=-1) + 1
        _WINDOWS.add(self)

    # --- once a step --------------------------------------------------------------------------

    def refresh(self, block_table: Tensor, seq_lens: Tensor, query_lens: Tensor) -> None:
        """Bring the map up to date for the step that is about to run.

        Parameters
        ----------
        block_table
            int32 ``[batch_size, max_pages]``, rows any distance apart: pages of each request.
            Entries past its tokens are not read.
        seq_lens
            int32 ``[batch_size]``: tokens of each request after the step; 0 for padding.
        query_lens
            int32 ``[batch_size]``: how many of them, the newest, this step writes.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was wanted and what was got.

        Notes
        -----
        On CUDA one launch, which neither allocates nor synchronises. Values are not checked, but
        pages outside the map are passed over.
        """
        batch_size = seq_lens.shape[0]
        for name, tensor, shape in (
            ("block_table", block_table, (batch_size, None)),
            ("seq_lens", seq_lens, (batch_size,)),
            ("query_lens", query_lens, (batch_size,)),
        ):
            if tensor.dtype != torch.int32:
                raise TypeError(f"{name}: wanted torch.int32, got {tensor.dtype}")
            fits = tensor.ndim == len(shape) and all(
                want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
            )
            if not fits:
                raise ValueError(f"{name}: wanted shape {list(shape)}, got {list(tensor.shape)}")
            if tensor.device != self.tile_slots.device:
                raise ValueError(
                    f"{name}: wanted device {self.tile_slots.device}, got {tensor.device}"
                )
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise ValueError(
                    f"{name}: wanted a contiguous last dimension, got strides {tensor.stride()}"
                )
        if self.backend == "triton":
            self._launch(block_table, seq_lens, query_lens)
        else:
            reference.refresh(
                block_table,
                seq_lens,
                query_lens,
                self.tile_slots,
                self._slot_tile,
                self._slot_index,
                self._slot_state,
                self._counters,
                window=self.window,
                sinks=self.sinks,
                null_page=self.null_page,
            )
        if self.on_refresh is not None:
            self.on_refresh(self)

    def _launch(self, block_table: Tensor, seq_lens: Tensor, query_lens: Tensor) -> None:
        _triton_refresh()(
            block_table,
            seq_lens,
            query_lens,
            self.tile_slots,
            self._slot_tile,
            self._slot_index,
            self._slot_state,
            self._order,
            self._counters,
            window=self.window,
            sink_tiles=int(self.sinks > 0),
            window_tiles=window_tiles(self.window),
            null_page=self.null_page,
        )

    # --- pages that change behind the map's back ------------------------------------------------

    @torch.inference_mode()  # as vLLM's steps, whose tensors none may write outside of it
    def invalidate(self, pages: Tensor) -> None:
        """Take the slots of ``pages`` (int64 or int32, any number), whose bytes others wrote.

        Neither synchronises nor reads values on the host.
        """
        slots = self.tile_slots[pages.long()].flatten().long()
        # a spare entry at the end takes what has no slot
        lost = torch.zeros(self.num_slots + 1, dtype=torch.bool, device=self.tile_slots.device)
        lost[slots] = True  # -1 is the spare entry
        lost = lost[:-1]
        self.tile_slots[pages.long()] = -1
        self._slot_tile.masked_fill_(lost, -1)
        self._slot_state.masked_fill_(lost, 0)

    @torch.inference_mode()
    def clear(self) -> None:
        """Forget all copies, as after a wake from sleep; the map's address stays."""
        self.tile_slots.fill_(-1)
        self._slot_tile.fill_(-1)
        self._slot_state.zero_()

    # --- metrics ------------------------------------------------------------------------------

    def metrics(self) -> WindowMetrics:
        """Return the counters now; on CUDA this synchronises."""
        return self._metrics(self._counters.cpu())

    def poll(self) -> WindowMetrics | None:
        """Return counters of a recent step without waiting, and ask for newer ones.

        None until the first answer has arrived. The copy runs on the current stream.
        """
        if self.tile_slots.device.type != "cuda":
            return self.metrics()
        if self._snapshot is None:
            self._snapshot = torch.empty(8, dtype=torch.int64, device="cpu", pin_memory=True)
        found = None
        if self._pending is not None:
            if not self._pending.query():  # type: ignore[no-untyped-call]
                return None
            found = self._metrics(self._snapshot)
        self._snapshot.copy_(self._counters, non_blocking=True)
        self._pending = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pending.record()
        return found

    def _metrics(self, counters: Tensor) -> WindowMetrics:
        steps, tiles, compressed, wanted, refused, evicted, in_use, _ = counters.tolist()
        return WindowMetrics(
            steps, tiles, compressed, wanted, refused, evicted, in_use, self.num_slots
        )


def _until_compiled(launch: Callable[[], None]) -> None:
    """Launch; if the compiler gives up, twice more.

    Triton 3.6 did so in one of some ten processes on an H100, in a pass that does not always take
    things in the same order, and compiled the same code in all others.
    """
    for attempt in range(3):
        try:
            launch()
            return
        except RuntimeError as error:
            if "PassManager" not in str(error) or attempt == 2:
                raise


@functools.cache
def _triton_refresh():  # type: ignore[no-untyped-def]
    from turbokv.kernels.triton_recent_window import refresh

    return refresh
