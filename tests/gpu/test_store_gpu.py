# SPDX-License-Identifier: Apache-2.0
"""Store and decompress on the GPU: the bytes and numbers of the plain paged cache."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from turbokv.codec import TurboKVCodec
from turbokv.page_metadata import compute_page_metadata
from turbokv.paged import PagedKVCache, PageLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="wanted a CUDA device"),
]

if torch.cuda.is_available():
    from turbokv.kernels import cuda

DEVICE = "cuda"
PAIRS = ((4, 4), (3, 3), (2, 2), (5, 3), (8, 5), (4, 8))
DIMS = (64, 96, 128, 256, 512)
FUZZ_CHUNKS, FUZZ_CASES = 10, 30
POISON = 0xA5


def make(
    head_dim: int, pair: tuple[int, int], num_pages: int, heads: int, size: int
) -> PagedKVCache:
    codec = TurboKVCodec(head_dim, k_bits=pair[0], v_bits=pair[1], device=DEVICE)
    layout = PageLayout(head_dim, *pair, size, heads)
    pages = torch.full(layout.shape(num_pages), POISON, dtype=torch.uint8, device=DEVICE)
    return PagedKVCache(codec, num_pages, heads, size, pages=pages)


def stored(cache: PagedKVCache, k: Tensor, v: Tensor, slots: Tensor, **options: Tensor) -> Tensor:
    """Pages after the CUDA kernel has stored into a poisoned cache like ``cache``."""
    pages = torch.full_like(cache.pages, POISON)
    formats = (cache.codec.vector_format("k"), cache.codec.vector_format("v"))
    cuda.store(k, v, slots, pages, *formats, cache.layout.page_size, **options)
    return pages


def same_bytes(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("head_dim", DIMS)
def test_store_writes_the_bytes_of_the_reference(
    head_dim: int,
    pair: tuple[int, int],
    dtype: torch.dtype,
    hard_vectors: Callable[..., Tensor],
) -> None:
    heads, count = 3, 150
    cache = make(head_dim, pair, 16, heads, 32)
    x = hard_vectors(2 * count * heads, head_dim, dtype).to(DEVICE)
    x = x.nan_to_num(nan=1.0)  # codes of NaN are free; its scale is tested elsewhere
    k, v = x.view(2, count, heads, head_dim)
    order = torch.randperm(16 * 32, device=DEVICE)[:count]
    order[3] = order[77] = -1
    cache.append(k, v, order)
    assert same_bytes(stored(cache, k, v, order), cache.pages)


@pytest.mark.parametrize("chunk", range(FUZZ_CHUNKS))
def test_fuzzed_stores(chunk: int) -> None:
    print(f"seeds {chunk * FUZZ_CASES} to {(chunk + 1) * FUZZ_CASES - 1}")
    for seed in range(chunk * FUZZ_CASES, (chunk + 1) * FUZZ_CASES):
        r = random.Random(seed)
        torch.manual_seed(seed)
        head_dim, pair = r.choice(DIMS), r.choice(PAIRS)
        heads, size = r.choice((1, 2, 5, 8)), r.choice((16, 32, 48, 2032))
        # seldom one for the kernel of large batches, as the reference is slow
        count = r.choice((0, 1, 15, 16, 17, 64, 200)) if r.random() < 0.95 else 9000
        num_pages = -(-max(count, 1) // size) + 2
        cache = make(head_dim, pair, num_pages, heads, size)
        dtype = r.choice((torch.float32, torch.float16, torch.bfloat16))
        wide = torch.randn(2, count, 2 * heads, head_dim + 8, device=DEVICE).to(dtype)
        k, v = wide[:, :, ::2, :head_dim] if r.random() < 0.5 else wide[:, :, :heads, 8:]
        if r.random() < 0.5:  # a prefill: whole tiles in order, from any token on
            slots = torch.arange(count, device=DEVICE) + r.randint(0, size)
        else:
            slots = torch.randperm(num_pages * size, device=DEVICE)[:count]
        if r.random() < 0.3 and count:
            slots[torch.rand(count, device=DEVICE) < 0.2] = -1
        cache.append(k.contiguous(), v.contiguous(), slots)
        assert same_bytes(stored(cache, k, v, slots), cache.pages), f"seed {seed}"


@pytest.mark.parametrize("pair", [(4, 4), (5, 3), (2, 8)])
@pytest.mark.parametrize("count", [1, 40, 1800, 9000])
def test_store_centres_keys_and_keeps_16_bit_copies(count: int, pair: tuple[int, int]) -> None:
    heads, size = 2, 16
    num_pages = count // size + 4
    num_copies = -(-num_pages // 3)
    cache = make(128, pair, num_pages, heads, size)
    k, v = torch.randn(2, count, heads, 128, device=DEVICE, dtype=torch.bfloat16)
    mu = 2 * torch.randn(count // 256 + 1, heads, 128, device=DEVICE)
    k += mu[torch.arange(count, device=DEVICE) // 256].bfloat16()
    k[::7] = torch.randn_like(k[::7]) / 8  # far from the mean: stored uncentred
    slots = torch.randperm(num_pages * size, device=DEVICE)[:count]
    positions = torch.arange(count, device=DEVICE)
    cache.append(k, v, slots, k_offset=mu[positions // 256])
    tile_slots = torch.full((num_pages, 1), -1, dtype=torch.int32, device=DEVICE)
    tile_slots[::3, 0] = torch.arange(num_copies, dtype=torch.int32, device=DEVICE)
    window = torch.full((num_copies, heads, 2, 16, 128), float("nan"), device=DEVICE).half()
    rotated = torch.full((2, count, heads, 128), float("nan"), device=DEVICE).half()
    pages = stored(
        cache,
        k,
        v,
        slots,
        positions=positions,
        k_offset=mu,
        k_rotated=rotated[0],
        v_rotated=rotated[1],
        tile_slots=tile_slots,
        window=window,
    )
    assert same_bytes(pages, cache.pages)
    expected = torch.stack([cache.codec.rotate_query(k.float()), rotate_value(cache.codec, v)])
    assert torch.allclose(rotated.float(), expected, rtol=1e-3, atol=1e-3)
    copied = tile_slots[slots // 16, 0]
    kept = copied >= 0
    assert torch.equal(window[copied[kept].long(), :, 0, slots[kept] % 16], rotated[0][kept])
    assert torch.equal(window[copied[kept].long(), :, 1, slots[kept] % 16], rotated[1][kept])


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_store_of_a_prefill_writes_the_bytes_of_the_reference(
    head_dim: int, pair: tuple[int, int]
) -> None:
    """Enough numbers for the kernel of large batches on up to 150 multiprocessors."""
    heads, size = 4, 16
    count = -(-150 * 6144 // (heads * head_dim)) + 1
    dtype = (torch.float32, torch.float16, torch.bfloat16)[(head_dim // 64 + pair[0]) % 3]
    num_pages = count // size + 3
    cache = make(head_dim, pair, num_pages, heads, size)
    k, v = torch.randn(2, count, heads, head_dim, device=DEVICE).to(dtype)
    k[5, 1], v[7, 2] = 0, torch.inf
    for slots in (  # whole tiles, then single rows
        torch.arange(count, device=DEVICE) + 9,
        torch.randperm(num_pages * size, device=DEVICE)[:count],
    ):
        slots[-3] = -1
        cache.pages.fill_(POISON)
        cache.append(k, v, slots)
        assert same_bytes(stored(cache, k, v, slots), cache.pages)


def rotate_value(codec: TurboKVCodec, v: Tensor) -> Tensor:
    """V in rotated space: un-rotating is the transposed matrix, so columns of its image do."""
    matrix = codec.unrotate_output(torch.eye(codec.padded_dim, device=DEVICE))
    return v.float() @ matrix.T


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("head_dim", DIMS)
def test_decompress_reads_what_the_reference_reads(
    head_dim: int, pair: tuple[int, int], rotated: bool
) -> None:
    heads, size, length = 3, 48, 700
    cache = make(head_dim, pair, 20, heads, size)
    k, v = torch.randn(2, length, heads, head_dim, device=DEVICE)
    table = torch.randperm(20, device=DEVICE)[: -(-length // size)].int()
    slots = cache.slots(table, length)
    cache.append(k, v, slots)
    first, count = 37, 600
    dim = cache.codec.padded_dim if rotated else head_dim
    out = torch.full((2, count, heads, dim + 8), float("nan"), device=DEVICE).half()
    out = out[..., :dim]
    formats = (cache.codec.vector_format("k"), cache.codec.vector_format("v"))
    cuda.decompress(
        cache.pages, *formats, size, table, out[0], out[1], first_token=first, rotated=rotated
    )
    if rotated:
        k_packed, k_norms, v_packed, v_norms = cache.gather_packed(table, length)
        expected = (
            cache.codec.decompress_k_raw(k_packed, k_norms, dtype=torch.float32),
            cache.codec.decompress_v_raw(v_packed, v_norms, dtype=torch.float32),
        )
    else:
        expected = cache.gather(table, length)
    for actual, wanted in zip(out, expected, strict=True):
        assert torch.allclose(
            actual.float(), wanted[first : first + count].float(), rtol=2e-3, atol=2e-3
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("head_dim", DIMS)
def test_decompress_is_exact_before_it_rounds(head_dim: int, bits: int) -> None:
    """Sums of levels are integers: against fp64 only the last rounding, to 16 bits, is seen."""
    heads, length = 2, 512
    cache = make(head_dim, (bits, bits), 32, heads, 16)
    k, v = 3 * torch.randn(2, length, heads, head_dim, device=DEVICE)
    table = torch.arange(32, dtype=torch.int32, device=DEVICE)
    cache.append(k, v, torch.arange(length, device=DEVICE))
    codec = cache.codec
    k_packed, k_norms, v_packed, v_norms = cache.gather_packed(table, length)
    # level * scale has at most 19 bits, so these are exact
    raw_k = codec.decompress_k_raw(k_packed, k_norms, dtype=torch.float32).double()
    raw_v = codec.decompress_v_raw(v_packed, v_norms, dtype=torch.float32).double()
    back_k = codec.rotate_query(torch.eye(head_dim, device=DEVICE)).T
    back_v = codec.unrotate_output(torch.eye(codec.padded_dim, device=DEVICE))
    root = codec.padded_dim**-0.5
    # sums of exact numbers first: a sum that is zero must not become the rounding of its terms
    exact = (raw_k @ back_k.sign().double() * root, raw_v @ back_v.sign().double() * root)
    formats = (codec.vector_format("k"), codec.vector_format("v"))
    # half a last place, and half the smallest subnormal
    for dtype, relative, least in (
        (torch.float16, 2.0**-11, 2.0**-25),
        (torch.bfloat16, 2.0**-8, 0.0),
    ):
        out = torch.full((2, length, heads, head_dim), float("nan"), device=DEVICE).to(dtype)
        cuda.decompress(cache.pages, *formats, 16, table, out[0], out[1])
        for actual, wanted in zip(out, exact, strict=True):
            bound = (wanted.abs() * relative).clamp(min=least) * (1 + 2.0**-9) + 1e-30
            assert ((actual.double() - wanted).abs() <= bound).all()


def test_decompress_adds_offsets_and_overlays_copies() -> None:
    heads, length = 2, 600
    cache = make(128, (4, 4), 40, heads, 16)
    k, v = torch.randn(2, length, heads, 128, device=DEVICE)
    mu = 2 * torch.randn(3, heads, 128, device=DEVICE)
    positions = torch.arange(length, device=DEVICE)
    k += mu[positions // 256]
    k[::7] = torch.randn_like(k[::7]) / 8
    table = torch.randperm(40, device=DEVICE).int()
    tile_slots = torch.full((40, 1), -1, dtype=torch.int32, device=DEVICE)
    tile_slots[::3, 0] = torch.arange(14, dtype=torch.int32, device=DEVICE)
    window = torch.zeros(14, heads, 2, 16, 128, device=DEVICE).half()
    slots = cache.slots(table, length)
    pages = stored(
        cache,
        k,
        v,
        slots,
        positions=positions,
        k_offset=mu,
        tile_slots=tile_slots,
        window=window,
    )
    cache.pages.copy_(pages)
    out_k, out_v = torch.full((2, length, heads, 128), float("nan"), device=DEVICE).bfloat16()
    formats = (cache.codec.vector_format("k"), cache.codec.vector_format("v"))
    cuda.decompress(
        pages,
        *formats,
        16,
        table,
        out_k,
        out_v,
        k_offset=mu,
        tile_slots=tile_slots,
        window=window,
    )
    expected_k, expected_v = cache.gather(table, length, k_offset=mu)
    kept = tile_slots[slots // 16, 0] >= 0
    expected_k, expected_v = expected_k.clone(), expected_v.clone()
    expected_k[kept], expected_v[kept] = k[kept], v[kept]
    assert torch.allclose(out_k.float(), expected_k, rtol=1e-2, atol=1e-2)
    assert torch.allclose(out_v.float(), expected_v, rtol=1e-2, atol=1e-2)


def test_store_in_a_graph_follows_slots() -> None:
    cache = make(128, (4, 4), 8, 2, 16)
    k, v = torch.randn(2, 20, 2, 128, device=DEVICE)
    slots = torch.arange(20, device=DEVICE)
    pages = torch.full_like(cache.pages, POISON)
    formats = (cache.codec.vector_format("k"), cache.codec.vector_format("v"))
    cuda.store(k, v, slots, pages, *formats, 16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.store(k, v, slots, pages, *formats, 16)
    for _ in range(3):
        slots.copy_(torch.randperm(128, device=DEVICE)[:20])
        k.normal_()
        pages.fill_(POISON)
        cache.pages.fill_(POISON)
        graph.replay()
        cache.append(k, v, slots)
        assert same_bytes(pages, cache.pages)


def test_store_beyond_2_to_the_31_bytes() -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("wanted 12 GiB of free GPU memory")
    cache = make(128, (4, 4), 3, 2, 16)
    k, v = torch.randn(2, 48, 2, 128, device=DEVICE)
    apart = (2 << 30) // cache.layout.page_bytes
    wide = torch.empty(2 * apart + 1, *cache.pages.shape[1:], dtype=torch.uint8, device=DEVICE)
    slots = torch.arange(48, device=DEVICE)
    formats = (cache.codec.vector_format("k"), cache.codec.vector_format("v"))
    cuda.store(k, v, slots % 16 + slots // 16 * apart * 16, wide, *formats, 16)
    cache.append(k, v, slots)
    assert same_bytes(wide[::apart], cache.pages)


@pytest.mark.parametrize("batch_size", [1, 3, 1025, 5000])
def test_page_tables_equal_the_reference(batch_size: int) -> None:
    lens = torch.randint(-3, 100, (batch_size,), dtype=torch.int32)
    table = torch.randint(0, 1 << 20, (batch_size, 7), dtype=torch.int32)
    results = []
    for device, backend in (("cpu", "torch"), (DEVICE, "cuda")):
        out = [
            torch.full((n,), -7, dtype=torch.int32, device=device)
            for n in (batch_size + 1, 7 * batch_size, batch_size)
        ]
        compute_page_metadata(lens.to(device), table.to(device), 16, *out, backend=backend)
        results.append([x.cpu() for x in out])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)
