# SPDX-License-Identifier: Apache-2.0
"""The paged cache: sizes, bytes, append, gather, and attention against float64."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import ref
from turbokv import TurboKVCodec, core
from turbokv.centring import SEGMENT
from turbokv.page_layout import PAGE_BITS, Part, base_bits, flat_to_planes, planes_to_flat
from turbokv.paged import PagedKVCache, PageLayout

PARTS: tuple[Part, ...] = get_args(Part)
bounded = settings(max_examples=20, deadline=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def filled(
    lengths: list[int],
    *,
    head_dim: int = 64,
    bits: tuple[int, int] = (4, 4),
    heads: int = 2,
    page_size: int = 16,
    k_offset: Tensor | None = None,
) -> tuple[PagedKVCache, tuple[Tensor, Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
    """Store requests on shuffled pages of a poisoned cache.

    Returns the cache, ``(kv_indptr, kv_indices, kv_last_page_len)`` and each request's ``(k, v)``.
    """
    codec = TurboKVCodec(head_dim, *bits)
    counts = [-(-length // page_size) for length in lengths]
    num_pages = sum(counts) + 2
    layout = PageLayout(head_dim, *bits, page_size, heads)
    # 0xFF: scales of NaN, which no reader may let through
    pages = torch.full(layout.shape(num_pages), 0xFF, dtype=torch.uint8)
    cache = PagedKVCache(codec, num_pages, heads, page_size, pages=pages)
    indices = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1))[: sum(counts)]
    kv_indptr = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    requests = []
    for i, length in enumerate(lengths):
        k, v = (normal(length, heads, head_dim, seed=2 * i + part) for part in (0, 1))
        own = None
        if k_offset is not None:
            own = k_offset[torch.arange(length) // SEGMENT]
            k = k + own
        slots = cache.slots(indices[int(kv_indptr[i]) : int(kv_indptr[i + 1])], length)
        cache.append(k, v, slots, k_offset=own)
        requests.append((k, v))
    last = torch.tensor([(length - 1) % page_size + 1 for length in lengths], dtype=torch.int32)
    return cache, (kv_indptr, indices.to(torch.int32), last), requests


# --- layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "k_bits", "v_bits", "tile"),
    [(128, 4, 4, 2112), (128, 3, 3, 1600), (128, 2, 2, 1088), (64, 5, 3, 1088), (96, 8, 2, 2624)],
)
def test_sizes(head_dim: int, k_bits: int, v_bits: int, tile: int) -> None:
    layout = PageLayout(head_dim, k_bits, v_bits, 48, 3)
    assert layout.tile_bytes == tile
    assert layout.page_head_bytes == 3 * tile
    assert layout.page_bytes == 9 * tile
    assert layout.bytes_per_token == 3 * tile // 16
    assert layout.shape(7) == (7, 3, 3 * tile)
    codec = TurboKVCodec(head_dim, k_bits, v_bits)
    stored = codec.bytes_per_vector("k") + codec.bytes_per_vector("v")
    assert layout.bytes_per_token == 3 * stored
    cache = PagedKVCache(codec, 7, 3, 48)
    assert cache.pages.shape == layout.shape(7) and cache.layout == layout


@pytest.mark.parametrize("k_bits", PAGE_BITS)
@pytest.mark.parametrize("v_bits", PAGE_BITS)
@pytest.mark.parametrize("head_dim", [33, 96, 256, 512])
def test_parts_tile_the_page_exactly(head_dim: int, k_bits: int, v_bits: int) -> None:
    """Every byte belongs to one token (of V at 3 bits, a half each to two), parts are aligned."""
    layout = PageLayout(head_dim, k_bits, v_bits, 32, 1)
    offsets = {part: layout.byte_offsets(part, torch.arange(32)) for part in PARTS}
    whole = [table for part, table in offsets.items() if v_bits != 3 or part != "v_base"]
    every = torch.cat([table.flatten() for table in whole])
    if v_bits == 3:
        even, odd = (offsets["v_base"][i::2].flatten().sort().values for i in (0, 1))
        assert torch.equal(even, odd)
        every = torch.cat([every, even])
    assert torch.equal(every.sort().values, torch.arange(layout.page_head_bytes))
    assert layout.tile_bytes % 16 == 0
    start = 0
    for part in ("k_base", "k_high", "v_base", "v_high"):
        table = offsets[part]
        entries = 2 if v_bits == 3 and part == "v_base" else 1
        assert table.shape == (32, layout.part_bytes(part) * entries)
        if table.numel():  # one run of bytes in each tile, in this order
            tiles = table.view(2, -1)
            firsts = torch.tensor([start, start + layout.tile_bytes])
            assert torch.equal(tiles.min(1).values, firsts) and start % 16 == 0
            size = 16 * layout.part_bytes(part)
            start += size
            assert torch.equal(tiles.max(1).values, firsts + size - 1)
    assert torch.equal(offsets["k_scale"][:16, 0], start + 4 * torch.arange(16))
    assert torch.equal(offsets["v_scale"], offsets["k_scale"] + 2)


@pytest.mark.parametrize("bits", [bits for bits in PAGE_BITS if bits != 3])
@pytest.mark.parametrize("head_dim", [64, 128, 512])
def test_four_tokens_of_v_share_aligned_words(head_dim: int, bits: int) -> None:
    """And a row of K is one run of bytes, aligned to the largest power of two it can be."""
    layout = PageLayout(head_dim, bits, bits, 16, 1)
    for part in ("v_base", "v_high"):
        offsets = layout.byte_offsets(part, torch.arange(16))
        for token in (0, 2, 4, 6):
            lanes = offsets[[token, token + 1, token + 8, token + 9]]
            assert (lanes // 4 == lanes[:1] // 4).all()
            order = [0, 2, 1, 3] if bits == 2 else [0, 1, 2, 3]
            assert (lanes % 4 == torch.tensor(order)[:, None]).all()
    for part in ("k_base", "k_high"):
        offsets = layout.byte_offsets(part, torch.arange(16))
        if offsets.numel():
            rows = offsets.sort(1).values
            first = rows[:1, :1] + layout.part_bytes(part) * torch.arange(16)[:, None]
            assert torch.equal(rows, first + torch.arange(layout.part_bytes(part)))


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("bits", PAGE_BITS)
def test_planes_return_to_the_flat_form(role: core.Role, bits: int) -> None:
    for lead in ((3, 0, 2), (2, 5), (7,), ()):
        packed = torch.randint(256, (*lead, 128 * bits // 8), dtype=torch.uint8)
        base, high = flat_to_planes(packed, role, bits)
        assert base.shape == (*lead, 16 * base_bits(bits))
        assert high.shape == (*lead, 16 * (bits - base_bits(bits)))
        assert torch.equal(planes_to_flat(base, high, role, bits), packed)


def test_planes_hold_signs_and_magnitudes() -> None:
    """What kernels rely on: where the sign is, and that four bits permute by bytes."""
    eight = torch.arange(32, dtype=torch.uint8)[:, None].expand(32, 64)  # one code throughout
    negative = torch.arange(32) < 16
    for role in get_args(core.Role):
        _, high = flat_to_planes(core.pack_rows(eight.t().contiguous(), 5).t(), role, 5)
        assert torch.equal(high == 0, negative[:, None].expand(high.shape))
    base, _ = flat_to_planes(core.pack_rows(eight.t().contiguous(), 5).t(), "k", 5)
    assert torch.equal(base[:16].flip(0), base[16:])  # opposite codes have the same index
    assert torch.equal(base[16:, 0], 17 * torch.arange(16, dtype=torch.uint8))
    base, _ = flat_to_planes(core.pack_rows(eight[:16].t().contiguous(), 4).t(), "k", 4)
    assert torch.equal(base[:, 0] >> 2 & 1, torch.arange(16, dtype=torch.uint8) >> 3)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_three_bits_come_to_lanes_as_selectors(head_dim: int) -> None:
    """What decode does: three words hold 32 codes, whose selectors are four masked words."""
    layout, units = PageLayout(head_dim, 3, 3, 16, 1), head_dim // 64
    codes = torch.randint(8, (2, head_dim, 16), dtype=torch.uint8)
    pages = torch.zeros(layout.shape(1), dtype=torch.uint8)
    for role, own in zip(get_args(core.Role), codes, strict=True):
        packed = core.pack_rows(own, 3).t()[:, None]
        layout.scatter(pages, torch.arange(16), role, packed, torch.ones(16, 1).half())
    for key, own in zip((True, False), codes, strict=True):
        start = 0 if key else 6 * head_dim
        words = pages[0, 0, start : start + 6 * head_dim].view(torch.int32)
        chunks, first = [], 0
        while first < 3 * units:
            left = 3 * units - first
            size = 4 if left >= 4 else 2 if left >= 2 else 1
            chunks.append(words[32 * first : 32 * (first + size)].view(32, size))
            first += size
        for lane, row in enumerate(torch.cat(chunks, 1).tolist()):
            g, t = lane // 4, lane % 4
            for unit in range(units):
                w = [word & 0xFFFFFFFF for word in row[3 * unit : 3 * unit + 3]]
                masks = (0x11111111, 0x22222222, 0x44444444)
                last = sum(
                    (x >> 3 - i) & mask for i, (x, mask) in enumerate(zip(w, masks, strict=True))
                )
                for k, selector in enumerate([*(x & 0x77777777 for x in w), last]):
                    for n in range(8):
                        if key:
                            place = t * head_dim // 4 + 16 * unit + 4 * k + n % 4, g + 8 * (n // 4)
                        else:
                            token = 2 * t + n % 2 + 8 * (n // 2 % 2)
                            place = (8 * unit + g) * 8 + 2 * k + n // 4, token
                        assert selector >> 4 * n & 15 == own[place]


class ReversedLayout(PageLayout):
    """Another order of bytes: tiles and what they hold back to front."""

    def byte_offsets(self, part: Part, tokens: Tensor) -> Tensor:
        return self.page_head_bytes - 1 - super().byte_offsets(part, tokens)


def test_layout_alone_decides_the_bytes() -> None:
    """Another layout moves bytes in the page and changes nothing else."""
    cache, tables, requests = filled([40, 7])
    other = PagedKVCache(cache.codec, cache.num_pages, 2)
    other.layout = ReversedLayout(64, 4, 4, 16, 2)
    for i, (k, v) in enumerate(requests):
        pages = tables[1][int(tables[0][i]) : int(tables[0][i + 1])]
        other.append(k, v, other.slots(pages, len(k)))
        for got, want in zip(other.gather(pages, len(k)), cache.gather(pages, len(k)), strict=True):
            assert torch.equal(got, want)
    first = int(tables[1][0])
    assert torch.equal(other.pages[first].flip(-1), cache.pages[first])
    q = normal(2, 4, 64)
    assert torch.equal(other.attention(q, *tables), cache.attention(q, *tables))


# --- append and gather ----------------------------------------------------------------------------


@bounded
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.sampled_from(PAGE_BITS),
    st.sampled_from(PAGE_BITS),
    st.sampled_from((16, 48)),
    st.sampled_from((64, 96)),
)
def test_gather_returns_what_the_codec_stores(
    lengths: list[int], k_bits: int, v_bits: int, page_size: int, head_dim: int
) -> None:
    cache, (indptr, indices, _), requests = filled(
        lengths, head_dim=head_dim, bits=(k_bits, v_bits), page_size=page_size
    )
    codec = cache.codec
    for i, (k, v) in enumerate(requests):
        pages = indices[int(indptr[i]) : int(indptr[i + 1])]
        stored = cache.gather_packed(pages, len(k))
        for got, want in zip(stored, (*codec.compress_k(k), *codec.compress_v(v)), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
        got_k, got_v = cache.gather(pages, len(k))
        assert torch.equal(got_k, codec.decompress_k(*stored[:2]))
        assert torch.equal(got_v, codec.decompress_v(*stored[2:]))


@pytest.mark.parametrize("bits", [(4, 4), (5, 3), (8, 2)])
def test_append_touches_only_its_tokens(bits: tuple[int, int]) -> None:
    codec = TurboKVCodec(64, *bits)
    cache = PagedKVCache(codec, 3, 2, 32)
    cache.pages.fill_(0xA5)
    slots = torch.tensor([33, -1, 95, 32, -1])
    k, v = normal(5, 2, 64), normal(5, 2, 64, seed=1)
    cache.append(k, v, slots)
    # one token at a time gives the same bytes
    single = PagedKVCache(codec, 3, 2, 32, pages=torch.full_like(cache.pages, 0xA5))
    for i in (2, 0, 3):
        single.append(k[i : i + 1], v[i : i + 1], slots[i : i + 1])
    assert torch.equal(single.pages, cache.pages)
    touched = torch.zeros(cache.pages.shape, dtype=torch.bool)
    for part in PARTS:
        offsets = cache.layout.byte_offsets(part, torch.tensor([0, 1]))
        touched[1][:, offsets.flatten()] = True
        touched[2][:, cache.layout.byte_offsets(part, torch.tensor([31])).flatten()] = True
    assert (cache.pages[~touched] == 0xA5).all()
    before = cache.pages.clone()
    cache.append(k[:2], v[:2], torch.tensor([-1, -1]))
    cache.append(k[:0], v[:0], torch.tensor([], dtype=torch.int64))
    assert torch.equal(cache.pages, before)


@pytest.mark.parametrize("bits", PAGE_BITS)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_every_token_may_change_alone(bits: int, head_dim: int) -> None:
    layout, tokens = PageLayout(head_dim, bits, bits, 16, 1), torch.arange(16)
    generator = torch.Generator().manual_seed(bits)
    pages = torch.randint(256, layout.shape(1), dtype=torch.uint8, generator=generator)
    vectors = layout.part_bytes("k_base") + layout.part_bytes("k_high")
    for token in tokens[torch.randperm(16, generator=generator)].split(1):
        before, rest = pages.clone(), tokens[tokens != token]
        packed = torch.randint(256, (1, 1, vectors), dtype=torch.uint8, generator=generator)
        for role in get_args(core.Role):
            layout.scatter(pages, token, role, packed, torch.ones(1, 1, dtype=torch.float32).half())
            assert torch.equal(layout.gather(pages, token, role)[0], packed)
        own = torch.cat([layout.byte_offsets(part, token).flatten() for part in PARTS])
        changed = (pages != before)[0, 0].nonzero().flatten()
        assert torch.isin(changed, own).all() and len(changed) > len(own) // 3
        for role in get_args(core.Role):
            for got, want in zip(
                *(layout.gather(x, rest, role) for x in (pages, before)), strict=True
            ):
                # scales are random bytes, NaN among them
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_append_takes_sixteen_bits_and_strides(dtype: torch.dtype) -> None:
    codec = TurboKVCodec(64)
    k, v = normal(2, 20, 64).to(dtype), normal(20, 2, 128).to(dtype)
    caches = [PagedKVCache(codec, 2, 2) for _ in range(2)]
    caches[0].append(k.transpose(0, 1), v[..., ::2], torch.arange(20))
    caches[1].append(k.transpose(0, 1).float(), v[..., ::2].float(), torch.arange(20))
    assert torch.equal(caches[0].pages, caches[1].pages)


def test_pages_may_be_strided() -> None:
    """An engine's tensor may hold several layers, or heads before pages."""
    codec = TurboKVCodec(64)
    layout = PageLayout(64, 4, 4, 16, 2)
    store = torch.zeros(2, 5, layout.page_head_bytes + 32, dtype=torch.uint8)
    pages = store.transpose(0, 1)[..., : layout.page_head_bytes]
    cache = PagedKVCache(codec, 5, 2, pages=pages)
    plain = PagedKVCache(codec, 5, 2)
    for each in (cache, plain):
        each.append(normal(30, 2, 64), normal(30, 2, 64), torch.arange(40, 70))
    assert torch.equal(cache.pages, plain.pages)
    assert (store[..., layout.page_head_bytes :] == 0).all()


def test_offsets_beyond_two_gibibytes() -> None:
    """Memory is only reserved; the operating system backs the few pages that are written."""
    layout = PageLayout(128, 4, 4, 16, 8)
    num_pages = (5 << 29) // layout.page_bytes
    pages = torch.empty(layout.shape(num_pages), dtype=torch.uint8)
    assert pages.numel() > 1 << 31
    cache = PagedKVCache(TurboKVCodec(128), num_pages, 8, pages=pages)
    k, v = normal(17, 8, 128), normal(17, 8, 128, seed=1)
    used = torch.tensor([num_pages - 1, 2])
    cache.append(k, v, cache.slots(used, 17))
    got_k, got_v = cache.gather(used, 17)
    assert torch.equal(got_k, cache.codec.decompress_k(*cache.codec.compress_k(k)))
    assert torch.equal(got_v, cache.codec.decompress_v(*cache.codec.compress_v(v)))


# --- attention ------------------------------------------------------------------------------------


def expected(
    cache: PagedKVCache, q: Tensor, tables: tuple[Tensor, ...], qo: list[int], **options: Any
) -> tuple[Tensor, Tensor]:
    """Plain attention in float64 over what the cache decompresses to."""
    k_offset = options.pop("k_offset", None)
    out, lse = (
        torch.zeros(q.shape, dtype=torch.float64),
        torch.zeros(q.shape[:2], dtype=torch.float32).double(),
    )
    indptr, indices, last = tables
    for i in range(len(last)):
        pages = indices[int(indptr[i]) : int(indptr[i + 1])]
        length = (len(pages) - 1) * cache.layout.page_size + int(last[i]) if len(pages) else 0
        k, v = cache.gather(pages, length, k_offset=k_offset)
        rows = slice(qo[i], qo[i + 1])
        doubles = (x.double().numpy() for x in (q[rows], k, v))
        got = ref.attention(*doubles, **options)
        out[rows], lse[rows] = torch.from_numpy(got[0]), torch.from_numpy(got[1])
    return out, lse


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """2e-5: rotations in fp32 of vectors of a few dozen numbers up to 5."""
    torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("bits", [(2, 2), (5, 3), (4, 4), (8, 5)])
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_decode_attention(bits: tuple[int, int], group_size: int, head_dim: int) -> None:
    """One token, a full last page, ragged pages and a request of length 0."""
    lengths = [1, 32, 0, 45, 16]
    cache, tables, _ = filled(lengths, head_dim=head_dim, bits=bits)
    q = normal(5, 2 * group_size, head_dim, seed=9)
    got = cache.attention(q, *tables, return_lse=True)
    scale = 1 / math.sqrt(head_dim)
    want = expected(
        cache, q, tables, [0, 1, 2, 3, 4, 5], sm_scale=scale, causal=True, cap=0.0, window_left=-1
    )
    check(got, want)
    assert (got[0][2] == 0).all() and (got[1][2] == -math.inf).all()
    assert torch.equal(got[0], cache.attention(q, *tables))


@bounded
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    queries=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    causal=st.booleans(),
    cap=st.sampled_from((0.0, 1.5)),
    window_left=st.sampled_from((-1, 0, 5)),
    sm_scale=st.sampled_from((0.05, 0.3)),
)
def test_attention_of_several_queries(
    lengths: list[int],
    queries: list[int],
    causal: bool,
    cap: float,
    window_left: int,
    sm_scale: float,
) -> None:
    """Also more queries than tokens, whose first see nothing."""
    cache, tables, _ = filled(lengths, bits=(5, 3))
    qo = [0, *np.cumsum(queries[: len(lengths)]).tolist()]
    q = normal(qo[-1], 4, 64, seed=9)
    got = cache.attention(
        q,
        *tables,
        sm_scale,
        qo_indptr=torch.tensor(qo, dtype=torch.int32),
        causal=causal,
        logits_soft_cap=cap,
        window_left=window_left,
        return_lse=True,
    )
    want = expected(
        cache, q, tables, qo, sm_scale=sm_scale, causal=causal, cap=cap, window_left=window_left
    )
    check(got, want)
    hidden = want[1] == -math.inf
    assert (got[0][hidden] == 0).all() and (got[1][hidden] == -math.inf).all()


def test_attention_with_centred_keys() -> None:
    """Two segments with offsets of their own; tokens nearer to zero are marked and stay."""
    k_offset = 3 * normal(2, 2, 64, seed=4)
    cache, tables, requests = filled([SEGMENT + 9, 3], k_offset=k_offset)
    first = tables[1][:1].long() * 16
    cache.append(
        torch.zeros(1, 2, 64, dtype=torch.float32),
        torch.ones(1, 2, 64, dtype=torch.float32),
        first,
        k_offset[:1],
    )
    q = normal(2, 4, 64, seed=9)
    options = {"sm_scale": 0.125, "causal": True, "cap": 0.0, "window_left": -1}
    got = cache.attention(q, *tables, k_offset=k_offset, return_lse=True)
    want = expected(cache, q, tables, [0, 1, 2], k_offset=k_offset, **options)
    check(got, want)
    k, _ = cache.gather(tables[1][:17], SEGMENT + 9, k_offset=k_offset)
    assert (k[0] == 0).all()
    error = (k[1:] - requests[0][0][1:]).square().mean()
    assert error < 0.0095 * 1.01  # that of the centred part, whose numbers have unit variance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_has_the_dtype_of_the_query(dtype: torch.dtype) -> None:
    cache, tables, _ = filled([20, 0])
    q = normal(2, 2, 64).to(dtype)
    got = cache.attention(q, *tables)
    assert isinstance(got, Tensor) and got.dtype == dtype
    assert torch.equal(got, cache.attention(q.float(), *tables).to(dtype))


def test_attention_is_near_that_of_the_originals() -> None:
    """K8V8: the chain is right end to end, not only consistent with itself."""
    cache, tables, requests = filled([50, 33], bits=(8, 8))
    q = normal(2, 4, 64, seed=9)
    got = cache.attention(q, *tables)
    for i, (k, v) in enumerate(requests):
        doubles = (x.double().numpy() for x in (q[i : i + 1], k, v))
        want, _ = ref.attention(*doubles, sm_scale=0.125, causal=True, cap=0.0, window_left=-1)
        # values are read with an error of 0.0094 each, and some thirty are averaged
        assert np.sqrt(np.square(got[i].numpy() - want[0]).mean()) < 0.005


def test_empty_batch() -> None:
    cache, _, _ = filled([5])
    none = torch.zeros(1, dtype=torch.int32)
    out, lse = cache.attention(
        torch.zeros(0, 2, 64, dtype=torch.float32), none, none[:0], none[:0], return_lse=True
    )
    assert out.shape == (0, 2, 64) and lse.shape == (0, 2)
