# SPDX-License-Identifier: Apache-2.0
"""Hostile random problems for decode; ``fuzz_answer.py`` has their answers.

Whatever a kernel must not let into a result is poisoned: pages of nobody, tokens that were never
written, entries past a page table's row, slots and offsets of nobody, gaps between rows. A seed
gives the same bytes on every device.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turbokv.codec import TurboKVCodec
from turbokv.paged import PageLayout

NOWHERE = 2**31 - 1  # an index that nobody may follow
TILE, SEGMENT = 16, 256
MAX_BATCH = 12
FAR_BYTES = 5 << 30  # pages of a few problems lie so far apart

# head sizes and widths of the kernels that are compiled ahead of time, then of others
COMMON = tuple(
    (dim, *pair)
    for dim in (64, 96, 128, 200, 256)
    for pair in ((4, 4), (3, 3), (2, 2), (5, 3), (5, 4), (4, 3))
)
RARE = (
    *((512, *pair) for pair in ((4, 4), (3, 3), (2, 2), (5, 3))),
    *((128, *pair) for pair in ((8, 4), (8, 8), (2, 4), (3, 5), (4, 2), (5, 5))),
    *((64, *pair) for pair in ((8, 3), (2, 8), (3, 2))),
    *((256, *pair) for pair in ((8, 5), (2, 3))),
)


@dataclass(frozen=True)
class Trial:
    """What one problem is; all of it follows from ``seed``."""

    seed: int
    head_dim: int
    k_bits: int
    v_bits: int
    lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    num_kv_heads: int
    group_size: int
    page_size: int
    q_dtype: torch.dtype
    out_dtype: torch.dtype
    causal: bool
    logits_soft_cap: float
    window_left: int
    sinks: str  # "", "usual", "huge" or "none of some heads"
    centred: bool
    kept: float  # share of tiles with a 16-bit copy
    keys: str  # "usual", "rising", "huge sinks", "zeros"
    values: str  # "usual", "uneven", "all zero", "zero tiles"
    bad: str  # "", or what one token's scale and a number of its copy are: "nan", "inf"
    poison: str  # "ones", "nan" or "inf": what pages of nobody hold
    query: float  # its size
    far: bool  # pages beyond 2^32 bytes
    indptr: bool
    strided: bool
    rotated_output: bool
    rotated_query: bool
    body: str
    num_ctas: int
    bad_query: str  # "", or what one number of one query is: "nan", "inf"


def draw(seed: int, shapes: tuple[tuple[int, int, int], ...], max_q_len: int, far: bool) -> Trial:
    """Draw a trial among the given head sizes and widths; ``far`` allows pages far apart."""
    r = random.Random(seed)
    head_dim, k_bits, v_bits = r.choice(shapes)
    batch_size = r.choice((1, 1, 2, 3, 5, 9, MAX_BATCH))
    longest = r.choice((20, 100, 700, 3000))
    lens = tuple(
        r.choice((0, 1, 15, 16, 17, 64, *[r.randint(1, longest)] * 4)) for _ in range(batch_size)
    )
    q_lens = (1,) * batch_size
    if r.random() < 0.5:
        q_lens = tuple(min(n, r.randint(0, max_q_len)) for n in lens)
    if not sum(q_lens):
        q_lens = (1,) * batch_size
    halves = (torch.float16, torch.bfloat16)
    return Trial(
        seed=seed,
        head_dim=head_dim,
        k_bits=k_bits,
        v_bits=v_bits,
        lens=lens,
        q_lens=q_lens,
        num_kv_heads=r.choice((1, 2, 3)),
        group_size=r.choice((*range(1, 17), 4, 4, 8, 8, 20, 33)),
        page_size=r.choice((16, 16, 16, 32, 48, 64, 64, 528, 2032)),
        q_dtype=r.choice((*halves, torch.float32)),
        out_dtype=r.choice((torch.float32, torch.float32, *halves)),
        causal=r.random() < 0.8,
        logits_soft_cap=r.choice((0.0, 0.0, 0.0, 5.0, 30.0)),
        window_left=r.choice((-1, -1, -1, 0, 1, 40, 500)),
        sinks=r.choice(("", "", "", "usual", "huge", "none of some heads")),
        centred=r.random() < 0.3,
        kept=r.choice((0.0, 0.0, 0.1, 0.4, 1.0)),
        keys=r.choice(("usual", "usual", "rising", "huge sinks", "zeros")),
        values=r.choice(("usual", "usual", "uneven", "all zero", "zero tiles")),
        bad=r.choice(("",) * 8 + ("nan", "inf")),
        poison=r.choice(("ones", "nan", "inf")),
        query=r.choice((2.0, 2.0, 0.01, 8.0)),
        far=far and r.random() < 0.01,
        indptr=r.random() < 0.3,
        strided=r.random() < 0.3,
        rotated_output=r.random() < 0.2,
        rotated_query=r.random() < 0.2,
        body=r.choice(("auto", "auto", "bulk", "cp_async")),
        num_ctas=r.choice((0, 0, 0, 1, 7, 300)),
        bad_query=r.choice(("",) * 18 + ("nan", "inf")),
    )


@functools.cache
def codec_of(head_dim: int, k_bits: int, v_bits: int, device: str) -> TurboKVCodec:
    return TurboKVCodec(head_dim, k_bits, v_bits, device=device)


# --- a problem ------------------------------------------------------------------------------------


class Arena:
    """Memory that problems share: poisoned bytes over 5 GiB, and workspaces."""

    def __init__(self, device: str, far: bool) -> None:
        self.device = device
        self.bytes = torch.full((FAR_BYTES if far else 0,), 0xFF, dtype=torch.uint8, device=device)


class Problem:
    """The tensors of a trial; ``arguments`` is what decode takes."""

    def __init__(self, trial: Trial, arena: Arena) -> None:
        self.trial, self.arena, self.device = trial, arena, arena.device
        # NumPy's, so that a seed that fails on a GPU has the same bytes on a CPU
        self.generator = np.random.default_rng(trial.seed)
        sizes = (trial.page_size, trial.num_kv_heads)
        self.codec = codec_of(trial.head_dim, trial.k_bits, trial.v_bits, self.device)
        self.layout = PageLayout(trial.head_dim, trial.k_bits, trial.v_bits, *sizes)
        self.dim, self.tiles = self.codec.padded_dim, trial.page_size // TILE
        self.counts = [-(-n // trial.page_size) for n in trial.lens]
        self._make_pages()
        self._make_tables()
        self._make_queries()
        self._make_extras()

    # pages: [n, heads, bytes], `used` in the order of requests

    def _make_pages(self) -> None:
        t, layout = self.trial, self.layout
        total = sum(self.counts)
        if t.far:
            num_pages = FAR_BYTES // layout.page_bytes
            flat = self.arena.bytes[: num_pages * layout.page_bytes]
            self.pages = flat.view(layout.shape(num_pages))
            ids = random.Random(t.seed).sample(range(num_pages - 4 * total - 4, num_pages), total)
        else:
            num_pages = total + 2
            extents = list(layout.shape(num_pages))
            wide = [extents[0], extents[1] + t.strided, extents[2] + 16 * t.strided]
            self.pages = self._poisoned(wide)[:, : extents[1], : extents[2]]
            ids = random.Random(t.seed).sample(range(num_pages), total)
        self.ids = torch.tensor(ids, dtype=torch.int64, device=self.device)
        content = self._random_bytes((total, t.num_kv_heads, layout.page_head_bytes))
        self._set_scales(content)
        self._forget_unwritten(content)
        self.content = content
        self.pages[self.ids] = content

    def _random_bytes(self, extents: tuple[int, ...]) -> Tensor:
        # no zeros: the code 0 of 8 bits is never written
        return self._tensor(self.generator.integers(1, 256, extents, dtype=np.uint8))

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _poisoned(self, extents: list[int]) -> Tensor:
        if self.trial.poison == "ones":
            return torch.full(extents, 0xFF, dtype=torch.uint8, device=self.device)
        extents[-1] //= 2  # every pair of bytes, a scale or codes, is a NaN or an infinity
        word = 0x7E01 if self.trial.poison == "nan" else 0x7C00
        return torch.full(extents, word, dtype=torch.int16, device=self.device).view(torch.uint8)

    def _scales(self, content: Tensor) -> Tensor:
        """Scales as fp16 ``[pages, tiles, heads, 16, (K, V)]``, a view."""
        tiles = content.view(*content.shape[:2], self.tiles, self.layout.tile_bytes)
        scales = tiles[..., -4 * TILE :].view(torch.float16)
        return scales.unflatten(-1, (TILE, 2)).transpose(1, 2)

    def _positions(self) -> Tensor:
        """Position of every token of every page in its request, ``[pages, tiles, 16]``."""
        inside = torch.arange(self.trial.page_size, device=self.device)
        numbers = [i for count in self.counts for i in range(count)]
        starts = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        places = starts[:, None] * self.trial.page_size + inside
        return places.view(len(numbers), self.tiles, TILE)

    def _rand(self, *extents: int) -> Tensor:
        return self._tensor(self.generator.random(extents, dtype=np.float32))

    def _set_scales(self, content: Tensor) -> None:
        t, position = self.trial, self._positions()[:, :, None, :]
        scales = self._scales(content)
        extents = scales.shape[:-1]
        k, v = 0.4 + self._rand(*extents), 0.4 + self._rand(*extents)
        if t.keys == "rising":
            k *= (4.0 * (1 - position / 3000)).exp2()
        elif t.keys == "huge sinks":
            k = torch.where(position < 4, 10.0 ** (1 + 3 * self._rand(*extents)), k)
            v = torch.where(position < 4, v * 1e-3, v)
        elif t.keys == "zeros":
            k *= self._rand(*extents) < 0.7
        if t.values == "uneven":
            v *= (self._rand(*extents) * 16 - 10).exp2() * (self._rand(*extents) < 0.8)
        elif t.values == "all zero":
            v *= 0
        elif t.values == "zero tiles":
            v *= self._rand(*extents[:3], 1) < 0.5
        if t.centred:
            k *= torch.where(self._rand(*extents) < 0.3, -1.0, 1.0)
        scales[..., 0], scales[..., 1] = k.half(), v.half()
        if t.bad and sum(t.lens):
            r = random.Random(t.seed)
            request = r.choice([i for i, n in enumerate(t.lens) if n])
            token = r.randrange(t.lens[request])
            page = sum(self.counts[:request]) + token // t.page_size
            place = (page, token % t.page_size // TILE, r.randrange(t.num_kv_heads), token % TILE)
            self.bad_place = (*place, r.randrange(2))
            scales[self.bad_place] = float(t.bad)

    def _forget_unwritten(self, content: Tensor) -> None:
        """Poison tokens past the length: scales of all, every byte of tiles that have no token."""
        lens = [
            n for n, count in zip(self.trial.lens, self.counts, strict=True) for _ in range(count)
        ]
        length = torch.tensor(lens, dtype=torch.int64, device=self.device)[:, None, None]
        hidden = self._positions() >= length
        scales = self._scales(content)
        scales.masked_fill_(hidden[:, :, None, :, None], math.nan)
        empty = hidden[:, :, 0]
        tiles = content.view(*content.shape[:2], self.tiles, self.layout.tile_bytes).transpose(1, 2)
        tiles[empty] = 0xFF
        self.visible = ~hidden

    def _make_tables(self) -> None:
        t, batch_size = self.trial, len(self.trial.lens)
        starts = [0]
        for count in self.counts:
            starts.append(starts[-1] + count)
        ids = self.ids.int()
        self.starts = starts
        extra = 3 * t.strided
        wide = torch.full(
            (batch_size, max([1, *self.counts]) + 1 + extra), NOWHERE, dtype=torch.int32
        ).to(self.device)
        for i, count in enumerate(self.counts):
            wide[i, :count] = ids[starts[i] : starts[i] + count]
        self.table = wide[:, : wide.shape[1] - extra]
        tail = torch.full((5,), NOWHERE, dtype=torch.int32, device=self.device)
        self.kv_indices = torch.cat([ids, tail])
        self.kv_indptr = self._ints(starts)
        self.kv_lens = self._ints(t.lens)
        self.last = self._ints([(n - 1) % t.page_size + 1 if n else 0 for n in t.lens])
        self.qo_indptr = self._ints([sum(t.q_lens[:i]) for i in range(batch_size + 1)])

    def _ints(self, values: list[int] | tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _normal(self, *extents: int) -> Tensor:
        return self._tensor(self.generator.standard_normal(extents, dtype=np.float32))

    def _make_queries(self) -> None:
        t = self.trial
        heads = t.num_kv_heads * t.group_size
        dim = self.dim if t.rotated_query else t.head_dim
        q = (t.query * self._normal(sum(t.q_lens), heads, dim)).to(t.q_dtype)
        if t.bad_query:
            place = random.Random(t.seed).randrange(q.numel())
            q.view(-1)[place] = float(t.bad_query)
        self.q = q
        if t.strided:
            wide = torch.full((q.shape[0], 2 * heads, dim + 8), math.nan, device=self.device)
            self.q = wide.to(t.q_dtype)[:, ::2, :dim]
            self.q.copy_(q)

    def _make_extras(self) -> None:
        t = self.trial
        heads = t.num_kv_heads * t.group_size
        self.sinks = self.k_offset = self.tile_slots = self.window = None
        if t.sinks:
            self.sinks = 3 * self._normal(heads) + 2
            if t.sinks == "huge":
                self.sinks *= 300
            elif t.sinks != "usual":
                self.sinks[self._rand(heads) < 0.5] = -math.inf
        if t.centred:
            segments = -(-max([1, *t.lens]) // SEGMENT)
            self.k_offset = self._normal(segments + 1, t.num_kv_heads, self.dim)
            self.k_offset[segments:] = math.nan
        if t.kept:
            extents = (self.pages.shape[0], self.tiles)
            slots = torch.full(extents, NOWHERE, dtype=torch.int32, device=self.device)
            kept = self._rand(len(self.ids), self.tiles) < t.kept
            count = int(kept.sum())
            order = self._tensor(self.generator.permutation(count)).int()
            own = torch.full(kept.shape, -1, dtype=torch.int32, device=self.device)
            own[kept] = order
            slots[self.ids] = own
            # a slot more, which is nobody's
            window = self._normal(count + 1, t.num_kv_heads, 2, TILE, self.dim).half()
            window[count] = math.nan
            # tokens that were never written
            hidden = ~self.visible[kept]
            window[order.long()] = window[order.long()].masked_fill(
                hidden[:, None, None, :, None], math.nan
            )
            if t.bad and sum(t.lens):
                page, tile, head, row, role = self.bad_place
                if kept[page, tile]:
                    window[own[page, tile], head, role, row, t.seed % self.dim] = float(t.bad)
            self.tile_slots, self.window, self.own_slots = slots, window, own

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of decode but for ``out``, ``lse`` and ``workspace``."""
        t = self.trial
        arguments: dict[str, Any] = dict(
            q=self.q,
            pages=self.pages,
            k_format=self.codec.vector_format("k"),
            v_format=self.codec.vector_format("v"),
            page_size=t.page_size,
            kv_indices=self.kv_indices if t.indptr else self.table,
            qo_indptr=self.qo_indptr,
            max_q_len=max(t.q_lens),
            causal=t.causal,
            window_left=t.window_left,
            logits_soft_cap=t.logits_soft_cap,
            sinks=self.sinks,
            rotated_output=t.rotated_output,
            rotated_query=t.rotated_query,
            tile_slots=self.tile_slots,
            window=self.window,
            k_offset=self.k_offset,
            body=t.body,
            num_ctas=t.num_ctas,
        )
        if t.indptr:
            arguments.update(kv_indptr=self.kv_indptr, kv_last_page_len=self.last)
        else:
            arguments.update(kv_lens=self.kv_lens)
        return arguments

    def clear(self) -> None:
        """Leave shared memory as it was."""
        if self.trial.far:
            self.pages[self.ids] = 0xFF
