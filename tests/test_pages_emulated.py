# SPDX-License-Identifier: Apache-2.0
"""Store and decompress on the CPU, threads and tensor cores emulated, against the plain cache."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from torch import Tensor

from tests.emulated import pages
from turbokv.codec import TurboKVCodec
from turbokv.page_layout import PAGE_BITS
from turbokv.paged import PagedKVCache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="wanted g++ on PATH"),
]

CASES = 16
PRESETS = ((4, 4), (5, 3), (3, 3), (2, 2))
HALVES = (torch.float16, torch.bfloat16)


def make(r: random.Random, dim: int, tokens: int) -> PagedKVCache:
    """Return a cache with room, full of random bytes; widths of presets, 3 bits more often."""
    head_dim = dim if r.random() < 0.7 else dim - r.choice((8, 13, dim // 4))
    bits = r.choice(PRESETS)
    if r.random() < 0.5:
        bits = (r.choice((*PAGE_BITS, 3, 3)), r.choice((*PAGE_BITS, 3, 3)))
    heads, page_size = r.choice((1, 2, 3)), r.choice((16, 32, 48, 64))
    codec = TurboKVCodec(head_dim, *bits)
    cache = PagedKVCache(codec, -(-tokens // page_size) + 3, heads, page_size)
    cache.pages.random_(0, 256)
    return cache


def vectors(r: random.Random, cache: PagedKVCache, tokens: int, dtype: torch.dtype) -> Tensor:
    """Return ordinary vectors, and where there is room every special one but NaN."""
    head_dim, heads = cache.codec.head_dim, cache.layout.num_kv_heads
    x = torch.randn(2, tokens * heads, head_dim)
    if tokens * heads > 5:
        x[:, 0] = 0
        x[:, 1, 1:] = 0
        x[:, 2] *= 1e-20
        x[:, 3, 3] = torch.inf
        x[:, 4] *= 1e4
        x[:, 5, head_dim // 2 :] = -0.0
    return x.view(2, tokens, heads, head_dim).to(dtype)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_store_writes_the_bytes_of_the_plain_cache(dim: int, small: bool) -> None:
    first = random.SystemRandom().randrange(1 << 40)
    for seed in range(first, first + CASES):
        r = random.Random(seed)
        torch.manual_seed(seed)
        tokens = r.choice((1, 2, 7, 16, 17, 33, 48, 70))
        cache = make(r, dim, tokens)
        got = PagedKVCache(
            cache.codec,
            cache.num_pages,
            cache.layout.num_kv_heads,
            cache.layout.page_size,
            pages=cache.pages.clone(),
        )
        k, v = vectors(r, cache, tokens, r.choice((torch.float32, *HALVES)))
        size = cache.layout.page_size
        slots = torch.arange(tokens) + r.randrange(size)
        if r.random() < 0.4:
            slots = torch.randperm(cache.num_pages * size)[:tokens]
        slots[torch.rand(tokens) < r.choice((0.0, 0.0, 0.2))] = -1
        fields, offset = {}, None
        if r.random() < 0.3:
            fields = {
                "positions": torch.arange(tokens),
                "k_offset": 2 * torch.randn(1, *k.shape[1:]),
            }
            offset = fields["k_offset"].expand(tokens, -1, -1)
        cache.append(k, v, slots, k_offset=offset)
        pages.run(
            "store", got, k, v, small=int(small), ctas=r.choice((1, 2, 3)), slots=slots, **fields
        )
        assert torch.equal(got.pages, cache.pages), f"seed {seed}"


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("dim", [64, 128])
def test_store_keeps_16_bit_copies_and_rotated_forms(dim: int, small: bool) -> None:
    first = random.SystemRandom().randrange(1 << 40)
    for seed in range(first, first + 4):
        r = random.Random(seed)
        torch.manual_seed(seed)
        tokens = r.choice((1, 9, 40))
        cache = make(r, dim, tokens)
        heads, size = cache.layout.num_kv_heads, cache.layout.page_size
        k, v = torch.randn(2, tokens, heads, cache.codec.head_dim).to(r.choice(HALVES))
        slots = torch.arange(tokens) + r.randrange(size)
        slots[torch.rand(tokens) < 0.2] = -1
        tiles = torch.full((cache.num_pages * size // 16,), -1, dtype=torch.int32)
        kept = torch.randperm(len(tiles))[: len(tiles) // 2]
        tiles[kept] = torch.arange(len(kept), dtype=torch.int32)
        window = torch.full((len(kept), heads, 2, 16, dim), torch.nan).half()
        rotated = torch.full((2, tokens, heads, dim), torch.nan).half()
        mu = 2 * torch.randn(1, heads, cache.codec.head_dim)
        k += mu.to(k.dtype)
        fields = {"positions": torch.arange(tokens), "k_offset": mu} if r.random() < 0.6 else {}
        offset = mu.expand(tokens, -1, -1) if fields else None
        got = PagedKVCache(cache.codec, cache.num_pages, heads, size, pages=cache.pages.clone())
        cache.append(k, v, slots, k_offset=offset)
        fields |= {"tile_slots": tiles, "window": window}
        fields |= {"k_rotated": rotated[0], "v_rotated": rotated[1]}
        pages.run("store", got, k, v, small=int(small), ctas=2, slots=slots, **fields)
        assert torch.equal(got.pages, cache.pages), f"seed {seed}"
        columns = cache.codec.unrotate_output(torch.eye(dim))
        want = torch.stack([cache.codec.rotate_query(k.float()), v.float() @ columns.T])
        assert torch.allclose(rotated.float(), want, rtol=1e-3, atol=1e-3), f"seed {seed}"
        expected = torch.full_like(window, torch.nan)
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0 and tiles[slot // 16] >= 0:
                expected[tiles[slot // 16], :, :, slot % 16] = rotated[:, row].transpose(0, 1)
        assert torch.equal(window.view(torch.int16), expected.view(torch.int16)), f"seed {seed}"


@pytest.mark.parametrize("dim", [64, 128, 512])
def test_decompress_gives_the_numbers_of_the_plain_cache(dim: int) -> None:
    first = random.SystemRandom().randrange(1 << 40)
    for seed in range(first, first + CASES):
        r = random.Random(seed)
        torch.manual_seed(seed)
        tokens = r.choice((1, 16, 17, 50))
        cache = make(r, dim, tokens)
        heads, head_dim = cache.layout.num_kv_heads, cache.codec.head_dim
        table = torch.randperm(cache.num_pages)[: -(-tokens // cache.layout.page_size)].int()
        x, fields, offset = torch.randn(2, tokens, heads, head_dim), {}, None
        if r.random() < 0.3:
            offset = torch.randn(1, heads, head_dim)
            fields = {"k_offset": offset}
        expanded = None if offset is None else offset.expand(tokens, -1, -1)
        cache.append(x[0], x[1], cache.slots(table, tokens), k_offset=expanded)
        rotated = offset is None and r.random() < 0.4
        if rotated:
            k_packed, k_norms, v_packed, v_norms = cache.gather_packed(table, tokens)
            want = (
                cache.codec.decompress_k_raw(k_packed, k_norms, dtype=torch.float32),
                cache.codec.decompress_v_raw(v_packed, v_norms, dtype=torch.float32),
            )
        else:
            want = cache.gather(table, tokens, k_offset=offset)
        begin, dtype = r.randrange(tokens), r.choice(HALVES)
        width = cache.codec.padded_dim if rotated else head_dim
        got = torch.full((2, tokens - begin, heads, width), torch.nan).to(dtype)
        fields |= {"rotated": int(rotated), "first": begin, "ctas": r.choice((1, 2))}
        pages.run("decompress", cache, got[0], got[1], table=table, **fields)
        for ours, theirs in zip(got, want, strict=True):
            error = (ours.float() - theirs[begin:]).norm() / theirs[begin:].norm()
            # fp16 rounds by up to 2^-11, bf16 by 2^-8
            assert error < (6e-4 if dtype == torch.float16 else 4e-3), f"seed {seed}"
