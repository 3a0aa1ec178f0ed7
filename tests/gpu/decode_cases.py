# SPDX-License-Identifier: Apache-2.0
"""Random decode problems and their answer in float64, for the tests of the CUDA kernels."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from turbokv import core
from turbokv.codec import TurboKVCodec
from turbokv.paged import PagedKVCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there emulated kernels are tested


@dataclass
class Case:
    """What a decode call is asked; lengths and query lengths are per request."""

    head_dim: int = 128
    k_bits: int = 4
    v_bits: int = 4
    lens: tuple[int, ...] = (1000, 5, 777, 0, 1)
    q_lens: tuple[int, ...] = ()  # default: one each
    num_kv_heads: int = 2
    group_size: int = 4
    page_size: int = 16
    dtype: torch.dtype = torch.float16
    causal: bool = True
    logits_soft_cap: float = 0.0
    window_left: int = -1
    sinks: bool = False
    centred: bool = False
    kept: float = 0.0  # share of tiles that are kept in 16 bits
    newest: int = 0  # tokens whose tiles have 16-bit copies, as has the first tile
    rising: float = 0.0  # K scales grow by so many powers of two to the oldest token
    uneven: bool = False  # V scales over 16 powers of two, a fifth of them zero
    indptr: bool = False  # page table as indptr and indices
    strided: bool = False
    rotated_output: bool = False
    rotated_query: bool = False
    body: str = "auto"
    num_ctas: int = 0
    seed: int = 0
    books: tuple[core.Codebook | None, core.Codebook | None] = field(default=(None, None))


def random_pages(cache: PagedKVCache, generator: torch.Generator) -> None:
    """Fill with random codes and scales from 0.4 to 1.4: any bytes are codes (8 bits: but zero)."""
    pages, layout = cache.pages, cache.layout
    pages.copy_(
        torch.randint(1, 256, pages.shape, dtype=torch.uint8, device=DEVICE, generator=generator)
    )
    tiles = pages.view(*pages.shape[:2], -1, layout.tile_bytes)
    scales = 0.4 + torch.rand(*tiles.shape[:3], 32, device=DEVICE, generator=generator)
    tiles[..., -64:] = scales.half().view(torch.uint8)


class Problem:
    """Tensors of a case: a cache with shuffled pages, what has never been written poisoned."""

    def __init__(self, case: Case) -> None:
        self.case = case
        g = torch.Generator(device=DEVICE).manual_seed(case.seed)
        self.q_lens = case.q_lens or (1,) * len(case.lens)
        self.codec = TurboKVCodec(
            case.head_dim,
            k_bits=case.k_bits,
            v_bits=case.v_bits,
            k_codebook=case.books[0],
            v_codebook=case.books[1],
            device=DEVICE,
        )
        batch_size, heads, size = len(case.lens), case.num_kv_heads, case.page_size
        counts = [-(-n // size) for n in case.lens]
        num_pages = sum(counts) + 2
        self.cache = PagedKVCache(self.codec, num_pages, heads, size)
        random_pages(self.cache, g)
        if case.uneven:
            v = self.scales()[..., 2:].view(torch.half)
            v *= (torch.rand(v.shape, device=DEVICE, generator=g) * 16 - 10).exp2().half()
            v *= (torch.rand(v.shape, device=DEVICE, generator=g) < 0.8).half()
        order = torch.randperm(num_pages, device=DEVICE, generator=g).int()
        starts = torch.tensor([0, *counts]).cumsum(0)
        self.kv_indptr = starts.int().to(DEVICE)
        self.kv_indices = order[: sum(counts)].contiguous()
        # entries past a request's pages must not be read: far outside the cache
        self.table = torch.full(
            (batch_size, max([1, *counts]) + 1), 2**30, dtype=torch.int32, device=DEVICE
        )
        for i, n in enumerate(counts):
            self.table[i, :n] = self.kv_indices[int(starts[i]) : int(starts[i]) + n]
        self.kv_lens = torch.tensor(case.lens, dtype=torch.int32, device=DEVICE)
        self.raise_scores()
        self.last = torch.tensor(
            [(n - 1) % size + 1 if n else 0 for n in case.lens], dtype=torch.int32, device=DEVICE
        )
        self.qo_indptr = torch.tensor([0, *self.q_lens]).cumsum(0).int().to(DEVICE)
        nnz, qo_heads = sum(self.q_lens), heads * case.group_size
        dim = self.codec.padded_dim if case.rotated_query else case.head_dim
        if case.strided:
            wide = torch.randn(nnz, qo_heads * 2, dim + 8, device=DEVICE, generator=g)
            self.q = (2 * wide).to(case.dtype)[:, ::2, :dim]
        else:
            q = torch.randn(nnz, qo_heads, dim, device=DEVICE, generator=g)
            self.q = (2 * q).to(case.dtype)
        self.sinks = None
        if case.sinks:
            self.sinks = 3 * torch.randn(qo_heads, device=DEVICE, generator=g) + 2
        self.k_offset = None
        if case.centred:
            segments = -(-max([1, *case.lens]) // 256)
            self.k_offset = torch.randn(
                segments, heads, self.codec.padded_dim, device=DEVICE, generator=g
            )
            marks = self.scales()[..., 1]
            marked = torch.rand(marks.shape, device=DEVICE, generator=g) < 0.3
            marks |= marked.to(torch.uint8) << 7
        self.tile_slots = self.window = None
        if case.kept > 0 or case.newest > 0:
            tiles = size // 16
            slots = torch.full((num_pages, tiles), -1, dtype=torch.int32, device=DEVICE)
            kept = torch.rand(num_pages, tiles, device=DEVICE, generator=g) < case.kept
            for i, n in enumerate(case.lens if case.newest else ()):
                pages = self.kv_indices[int(starts[i]) : int(starts[i + 1])].long()
                own = torch.arange(len(pages) * tiles, device=DEVICE)
                own = (own == 0) | (own >= max(n - case.newest, 0) // 16) & (own * 16 < n)
                kept[pages] |= own.view(-1, tiles)
            count = int(kept.sum())
            slots[kept] = torch.randperm(count, device=DEVICE, generator=g).int()
            shape = (max(count, 1), heads, 2, 16, self.codec.padded_dim)
            self.window = torch.randn(shape, device=DEVICE, generator=g).half()
            self.tile_slots = slots
        self.expected, self.expected_lse = self.solve()
        self.poison()

    def raise_scores(self) -> None:
        """Multiply K scales, so that the maximum of scores goes on rising to the oldest tokens."""
        if self.case.rising == 0:
            return
        k = self.scales()[..., :2].view(torch.half)
        for row, length in zip(self.table, self.case.lens, strict=True):
            position = torch.arange(length, device=DEVICE)
            page = row[position // self.case.page_size].long()
            token = position % self.case.page_size
            factor = (self.case.rising * (1 - position / max(length, 1))).exp2().half()
            k[page, :, token // 16, token % 16, 0] *= factor[:, None]

    def scales(self) -> Tensor:
        """Bytes of scales, ``[pages, heads, tiles, 16, (K, K, V, V)]``."""
        tiles = self.cache.pages.view(*self.cache.pages.shape[:2], -1, self.cache.layout.tile_bytes)
        return tiles[..., -64:].unflatten(-1, (16, 4))

    def poison(self) -> None:
        """Put NaN where no token has been written."""
        for i, length in enumerate(self.case.lens):
            if length % self.case.page_size == 0:
                continue
            page = int(self.table[i, length // self.case.page_size])
            token = length % self.case.page_size
            flat = self.scales()[page].flatten(1, 2)
            flat[:, token:] = 0xFF
            tiles = self.cache.pages[page].view(
                self.case.num_kv_heads, -1, self.cache.layout.tile_bytes
            )
            tiles[:, -(-token // 16) :] = 0xFF
            if self.tile_slots is not None and self.window is not None:
                slot = int(self.tile_slots[page, token // 16])
                if slot >= 0:
                    self.window[slot, :, :, token % 16 :] = float("nan")

    def rotated(self, i: int) -> tuple[Tensor, Tensor]:
        """K and V of request ``i`` in rotated space, float64 ``[length, heads, padded_dim]``."""
        length, size = self.case.lens[i], self.case.page_size
        pages = self.table[i, : -(-length // size)]
        k_packed, k_norms, v_packed, v_norms = self.cache.gather_packed(pages, length)
        k = self.codec.decompress_k_raw(k_packed, k_norms.abs(), dtype=torch.float32).double()
        v = self.codec.decompress_v_raw(v_packed, v_norms, dtype=torch.float32).double()
        position = torch.arange(length, device=DEVICE)
        if self.k_offset is not None:
            offset = self.k_offset.double()[position // 256]
            k = k + offset * (~torch.signbit(k_norms))[..., None]
        if self.tile_slots is not None and self.window is not None:
            page = pages.long()[position // size]
            slot = self.tile_slots[page, position % size // 16].long()
            kept = slot >= 0
            k[kept] = self.window[slot[kept], :, 0, position[kept] % 16].double()
            v[kept] = self.window[slot[kept], :, 1, position[kept] % 16].double()
        return k, v

    def solve(self) -> tuple[Tensor, Tensor]:
        """Attend in float64: output in the space asked for, float32, and base-2 LSE."""
        case = self.case
        q = self.q.double()
        if not case.rotated_query:
            q = self.codec.rotate_query(self.q.float()).double()
        out = torch.zeros(*q.shape[:2], self.codec.padded_dim, dtype=torch.float64, device=DEVICE)
        lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64, device=DEVICE)
        row = 0
        for i, (length, q_len) in enumerate(zip(case.lens, self.q_lens, strict=True)):
            rows = slice(row, row + q_len)
            row += q_len
            if not length or not q_len:
                continue
            k, v = self.rotated(i)
            grouped = q[rows].unflatten(1, (case.num_kv_heads, case.group_size))
            logits = torch.einsum("qhgd,khd->qhgk", grouped, k) * case.head_dim**-0.5
            if case.logits_soft_cap > 0:
                logits = case.logits_soft_cap * torch.tanh(logits / case.logits_soft_cap)
            own = torch.arange(length - q_len, length, device=DEVICE)[:, None]
            token = torch.arange(length, device=DEVICE)
            hidden = (token > own) & case.causal
            if case.window_left >= 0:
                hidden = hidden | (token < own - case.window_left)
            logits = logits.masked_fill(hidden[:, None, None, :], -math.inf)
            total = logits.logsumexp(-1)
            weights = torch.exp(logits - total.clamp(min=-1e300)[..., None])
            out[rows] = torch.einsum("qhgk,khd->qhgd", weights, v).flatten(1, 2)
            lse[rows] = total.flatten(1, 2)
        if self.sinks is not None:
            with_sink = torch.logaddexp(lse, self.sinks.double())
            out *= torch.exp(lse - with_sink)[..., None]
            lse = with_sink
        result = out.float()
        if not case.rotated_output:
            result = self.codec.unrotate_output(result)
        return result, lse / math.log(2.0)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``turbokv.kernels.cuda.decode``, outputs poisoned."""
        case = self.case
        out = torch.full_like(self.expected, math.nan)
        if case.strided:
            out = torch.full((*out.shape[:2], out.shape[2] + 8), math.nan, device=DEVICE)
            out = out[..., : self.expected.shape[2]]
        arguments: dict[str, Any] = dict(
            q=self.q,
            pages=self.cache.pages,
            k_format=self.codec.vector_format("k"),
            v_format=self.codec.vector_format("v"),
            page_size=case.page_size,
            kv_indices=self.kv_indices if case.indptr else self.table,
            qo_indptr=self.qo_indptr,
            max_q_len=max(self.q_lens),
            causal=case.causal,
            window_left=case.window_left,
            logits_soft_cap=case.logits_soft_cap,
            sinks=self.sinks,
            out=out,
            lse=torch.full(self.q.shape[:2], math.nan, device=DEVICE),
            rotated_output=case.rotated_output,
            rotated_query=case.rotated_query,
            tile_slots=self.tile_slots,
            window=self.window,
            k_offset=self.k_offset,
            body=case.body,
            num_ctas=case.num_ctas,
        )
        if case.indptr:
            arguments.update(kv_indptr=self.kv_indptr, kv_last_page_len=self.last)
        else:
            arguments.update(kv_lens=self.kv_lens)
        return arguments


def fuzzed(seed: int, pairs: tuple[tuple[int, int], ...], dims: tuple[int, ...]) -> Case:
    """Draw a case; small enough that thousands run in minutes."""
    r = random.Random(seed)
    page_size = r.choice((16, 16, 16, 32, 48, 64, 528))
    batch_size = r.choice((1, 1, 2, 3, 5, 9))
    longest = r.choice((20, 100, 700, 3000))
    lens = tuple(r.choice((0, 1, 15, 16, 17, r.randint(1, longest))) for _ in range(batch_size))
    q_lens = tuple(min(n, r.randint(1, r.choice((8, 17)))) if r.random() < 0.9 else 1 for n in lens)
    if r.random() < 0.5:
        q_lens = (1,) * batch_size
    if not sum(q_lens):
        q_lens = (1,) * batch_size
    k_bits, v_bits = r.choice(pairs)
    return Case(
        head_dim=r.choice(dims),
        k_bits=k_bits,
        v_bits=v_bits,
        lens=lens,
        q_lens=q_lens,
        num_kv_heads=r.choice((1, 2, 3)),
        group_size=r.choice((1, 2, 3, 4, 6, 8, 12, 16, 20)),
        page_size=page_size,
        dtype=r.choice((torch.float16, torch.bfloat16, torch.float32)),
        causal=r.random() < 0.8,
        logits_soft_cap=r.choice((0.0, 0.0, 0.0, 30.0)),
        window_left=r.choice((-1, -1, -1, 0, 40, 500)),
        sinks=r.random() < 0.2,
        centred=r.random() < 0.3,
        kept=r.choice((0.0, 0.0, 0.3, 1.0)),
        indptr=r.random() < 0.3,
        strided=r.random() < 0.3,
        rotated_output=r.random() < 0.2,
        rotated_query=r.random() < 0.2,
        body=r.choice(("auto", "auto", "bulk", "cp_async")),
        num_ctas=r.choice((0, 0, 0, 1, 7, 300)),
        seed=seed,
    )
