# SPDX-License-Identifier: Apache-2.0
"""TurboKV as a contender of ``bench_kernels.py``: random codes, scales of about the usual size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from _bench_work import Contender, Kind, Launch, Shape, Work, normal, random_bytes
from torch import Tensor

from turbokv import TurboKVCodec, core
from turbokv.centring import SEGMENT
from turbokv.core import VectorFormat
from turbokv.kernels import cuda
from turbokv.paged import PAGE_BITS, TILE, PageLayout
from turbokv.presets import preset_name, preset_widths

_RECENT_TILES = 128 // TILE
_STORE_SLOTS = 512


class TurboKV:
    """TurboKV with one pair of widths, as a contender of each kind."""

    def __init__(self, preset: str, window: bool = False, centred: bool = False) -> None:
        widths = preset_widths(preset)
        if widths is None:
            raise ValueError(f"presets: wanted some such as tq4 or tq_k5v3, got {preset!r}")
        self.k_bits, self.v_bits = widths
        self.preset, self.window, self.centred = preset_name(*widths), window, centred
        if not {self.k_bits, self.v_bits} <= set(PAGE_BITS):
            raise ValueError(f"presets: wanted widths among {PAGE_BITS}, got {preset!r}")

    def contender(self, kind: Kind) -> Contender:
        extras = "+w" * self.window + "+centred" * self.centred
        return Contender(
            f"TurboKV {self.preset}{extras}",
            "turbokv",
            self.preset,
            lambda shape: self._layout(shape, TILE).bytes_per_token,
            getattr(self, kind),
            self._extra_bytes,
        )

    def _layout(self, shape: Shape, page_size: int) -> PageLayout:
        return PageLayout(shape.head_dim, self.k_bits, self.v_bits, page_size, shape.num_kv_heads)

    def _extra_bytes(self, work: Work) -> int:
        heads, padded_dim = work.shape.num_kv_heads, core.padded_dim(work.shape.head_dim)
        size = 0
        if self.window and work.kind == "store":
            size += 4 * work.tokens * heads * padded_dim
        elif self.window:
            copies = 4 * TILE * padded_dim - self._layout(work.shape, TILE).tile_bytes
            tiles = len(_window_tiles(work.context or work.tokens))
            size += max(1, work.batch) * tiles * heads * copies
        if self.centred:
            size += 4 * self._segments(work) * heads * padded_dim
        return size

    def _segments(self, work: Work) -> int:
        return -(-max(work.context, work.tokens) // SEGMENT)

    def _prepare(self, work: Work) -> tuple[Tensor, tuple[VectorFormat, VectorFormat, int]]:
        """Return the pages, and the formats and page size as the kernels take them."""
        pool, shape = work.pool, work.shape
        codec = TurboKVCodec(
            shape.head_dim, self.k_bits, self.v_bits, device=pool.device, backend="torch"
        )
        formats = codec.vector_format("k"), codec.vector_format("v")
        cuda.prepare(work.kind, *formats)

        def make() -> Tensor:
            layout = self._layout(shape, pool.page_size)
            pages = random_bytes(layout.shape(pool.num_pages), pool.device)
            tiles = pages.view(pool.num_pages, shape.num_kv_heads, -1, layout.tile_bytes)
            scales = tiles[..., -4 * TILE :].view(torch.float16)
            some = torch.randn(256, shape.head_dim, device=pool.device)
            for first, stored in enumerate((codec.compress_k(some), codec.compress_v(some))):
                usual = float(stored[1].float().median())
                scales[..., first::2].uniform_(0.8 * usual, 1.2 * usual)
            return pages

        return pool.get(self.preset, make), (*formats, pool.page_size)

    def _copies(self, work: Work, tables: list[Tensor]) -> dict[str, Any]:
        """Return 16-bit copies of the first tile and the newest ones of every request."""
        if not self.window:
            return {}
        pool, heads = work.pool, work.shape.num_kv_heads
        length, per_page = work.context or work.tokens, pool.page_size // TILE
        tiles = torch.tensor(_window_tiles(length), device=pool.device)
        pages = torch.stack(tables)[..., tiles // per_page].long()
        slots = torch.arange(pages.numel(), dtype=torch.int32, device=pool.device)
        extents = (pool.num_pages, per_page)
        tile_slots = torch.full(extents, -1, dtype=torch.int32, device=pool.device)
        tile_slots[pages, (tiles % per_page).expand_as(pages)] = slots.view(pages.shape)
        window = (slots.numel(), heads, 2, TILE, core.padded_dim(work.shape.head_dim))
        return {"tile_slots": tile_slots, "window": normal(window, torch.float16, pool.device)}

    def _offsets(self, work: Work, dim: int) -> dict[str, Any]:
        if not self.centred:
            return {}
        extents = (self._segments(work), work.shape.num_kv_heads, dim)
        return {"k_offset": torch.randn(extents, device=work.pool.device)}

    def decode(self, work: Work, sets: int) -> list[Launch]:
        pages, rest = self._prepare(work)
        shape, tables, q = work.shape, work.tables(sets), work.query()
        heads = (shape.num_qo_heads, shape.num_kv_heads, shape.head_dim)
        size = cuda.decode_workspace_bytes(work.batch, *heads, device=q.device)
        same: dict[str, Any] = {
            "kv_lens": work.lengths(),
            "out": torch.empty_like(q),
            "workspace": torch.zeros(size, dtype=torch.uint8, device=q.device),
            **self._copies(work, tables),
            **self._offsets(work, core.padded_dim(shape.head_dim)),
        }

        def launch(table: Tensor) -> object:
            return cuda.decode(q, pages, *rest, table, **same)

        return [partial(launch, table) for table in tables]

    def store(self, work: Work, sets: int) -> list[Launch]:
        pages, rest = self._prepare(work)
        device, kv = pages.device, work.vectors("new")
        same = self._offsets(work, work.shape.head_dim)
        if self.centred:
            same["positions"] = torch.arange(work.tokens, device=device)
        if self.window:
            extents = (work.pool.num_pages, work.pool.page_size // TILE)
            copies = torch.randint(_STORE_SLOTS, extents, dtype=torch.int32, device=device)
            padded_dim = core.padded_dim(work.shape.head_dim)
            window = (_STORE_SLOTS, work.shape.num_kv_heads, 2, TILE, padded_dim)
            same |= {"tile_slots": copies, "window": normal(window, torch.float16, device)}

        def launch(index: int, slots: Tensor) -> None:
            cuda.store(kv[index, 0], kv[index, 1], slots, pages, *rest, **same)

        return [partial(launch, *item) for item in enumerate(work.slots(sets))]

    def decompress(self, work: Work, sets: int) -> list[Launch]:
        pages, rest = self._prepare(work)
        out, tables = work.vectors("out"), work.tables(sets)
        same = self._copies(work, tables) | self._offsets(work, work.shape.head_dim)

        def launch(index: int, table: Tensor) -> None:
            cuda.decompress(pages, *rest, table, out[index, 0], out[index, 1], **same)

        return [partial(launch, *item) for item in enumerate(tables)]


def _window_tiles(length: int) -> list[int]:
    """Return the tiles of a request that a window keeps: the sinks' and the newest."""
    tiles = length // TILE
    return [0, *range(max(1, tiles - _RECENT_TILES), tiles)]
