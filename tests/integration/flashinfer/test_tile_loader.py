# SPDX-License-Identifier: Apache-2.0
"""The tile loader emulated with g++, a thread for a thread of the block: no GPU needed."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from turbokv.codec import TurboKVCodec
from turbokv.paged import PagedKVCache

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent / "emulation"
INCLUDES = (
    HERE,
    ROOT / "turbokv/integrations/flashinfer/include",
    ROOT / "turbokv/kernels/cuda/include",
)
BITS = [(2, 2), (3, 3), (4, 4), (5, 5), (8, 8), (5, 3), (3, 4)]


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    compiler = shutil.which("g++")
    assert compiler is not None, "the loader is emulated with g++: wanted it on PATH"
    library = tmp_path_factory.mktemp("emulation") / "libloader.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Werror"]
    command += ["-Wno-unknown-pragmas", *(f"-I{path}" for path in INCLUDES)]
    subprocess.run([*command, str(HERE / "loader.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).Emulate


def address(x):
    return ctypes.c_void_p(0 if x is None else x.data_ptr())


def codebook(fmt):
    magnitudes = torch.tensor([int(m) for m in fmt.codebook.magnitudes], dtype=torch.int8)
    return fmt.codebook.frac_bits, magnitudes


def make_cache(head_dim, k_bits, v_bits, page_size, heads, length, k_offset=None):
    """Pages in a shuffled order, every byte that no token wrote poisoned with NaN scales."""
    codec = TurboKVCodec(head_dim, k_bits=k_bits, v_bits=v_bits)
    pages = -(-length // page_size)
    order = torch.randperm(pages + 3)[:pages].to(torch.int32)
    probe = PagedKVCache(codec, pages + 3, heads, page_size)
    # rows of a page further apart than they need be
    wide = torch.full((*probe.pages.shape[:2], probe.pages.shape[2] + 32), 0xFF, dtype=torch.uint8)
    cache = PagedKVCache(
        codec, pages + 3, heads, page_size, pages=wide[..., : probe.pages.shape[2]]
    )
    k = torch.randn(length, heads, head_dim) * torch.logspace(-3, 2, length)[:, None, None]
    v = torch.randn(length, heads, head_dim)
    if k_offset is not None:
        # some tokens far from the offset, which are then stored uncentred
        k[::3] += k_offset[torch.arange(length) // 256][::3]
    offset = None if k_offset is None else k_offset[torch.arange(length) // 256]
    cache.append(k, v, cache.slots(order, length), offset)
    return cache, order


def run(emulate, cache, order, head, start, end, tile_kv, **options):
    layout, codec = cache.layout, cache.codec
    rows = -(-(end - start) // tile_kv) * tile_kv
    dim = codec.padded_dim
    k, v = (torch.full((rows, dim), 7, dtype=torch.float16) for _ in range(2))
    (k_frac, k_mags), (v_frac, v_mags) = (codebook(codec.vector_format(role)) for role in "kv")
    status = emulate(
        dim,
        codec.k_bits,
        codec.v_bits,
        tile_kv,
        address(cache.pages),
        ctypes.c_int64(cache.pages.stride(0)),
        ctypes.c_int64(cache.pages.stride(1)),
        layout.page_size,
        layout.num_kv_heads,
        head,
        address(order),
        start,
        end,
        *(address(options.get(name)) for name in ("tile_slots", "window", "k_offset")),
        k_frac,
        address(k_mags),
        v_frac,
        address(v_mags),
        address(k),
        address(v),
    )
    assert status == 0, "the emulation has no such case"
    return k, v


def expected(cache, order, head, start, end):
    """What rows hold: levels times scales, exact in fp32, rounded to fp16 once."""
    k_packed, k_norms, v_packed, v_norms = cache.gather_packed(order, end)
    k = cache.codec.decompress_k_raw(k_packed, k_norms.abs(), dtype=torch.float32)[start:end, head]
    v = cache.codec.decompress_v_raw(v_packed, v_norms, dtype=torch.float32)[start:end, head]
    return k, v, k_norms[start:end, head]


@pytest.mark.parametrize("tile_kv", [32, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("k_bits", "v_bits"), BITS)
def test_rows_are_levels_times_scales_to_the_bit(emulate, head_dim, k_bits, v_bits, tile_kv):
    torch.manual_seed(k_bits * head_dim + tile_kv)
    cache, order = make_cache(head_dim, k_bits, v_bits, 48, 2, 301)
    for start, end in ((0, 301), (48, 192), (16, 17)):
        k, v = run(emulate, cache, order, 1, start, end, tile_kv)
        want_k, want_v, _ = expected(cache, order, 1, start, end)
        torch.testing.assert_close(k[: end - start], want_k.half(), rtol=0, atol=0)
        torch.testing.assert_close(v[: end - start], want_v.half(), rtol=0, atol=0)
        # a probability of zero does not hide a NaN
        assert (v[end - start :] == 0).all()


def test_padded_heads_are_read_in_full(emulate):
    torch.manual_seed(1)
    cache, order = make_cache(80, 4, 4, 16, 1, 40)
    k, v = run(emulate, cache, order, 0, 0, 40, 32)
    want_k, want_v, _ = expected(cache, order, 0, 0, 40)
    torch.testing.assert_close(k[:40], want_k.half(), rtol=0, atol=0)
    torch.testing.assert_close(v[:40], want_v.half(), rtol=0, atol=0)


@pytest.mark.parametrize("tile_kv", [32, 128])
def test_offsets_return_to_keys_that_were_stored_without_them(emulate, tile_kv):
    torch.manual_seed(2)
    length, heads, head_dim = 600, 2, 64
    k_offset = torch.randn(3, heads, head_dim) * 3
    cache, order = make_cache(head_dim, 4, 4, 32, heads, length, k_offset)
    rotated = cache.codec.rotate_query(k_offset).contiguous()
    k, _ = run(emulate, cache, order, 1, 192, length, tile_kv, k_offset=rotated)
    raw, _, norms = expected(cache, order, 1, 192, length)
    mu = rotated[torch.arange(192, length) // 256, 1].half()
    uncentred = torch.signbit(norms)
    assert uncentred.any() and not uncentred.all()
    want = torch.where(uncentred[:, None], raw.double(), raw.double() + mu.double())
    torch.testing.assert_close(k[: length - 192], want.half(), rtol=0, atol=0)


@pytest.mark.parametrize(("k_bits", "v_bits"), [(4, 4), (5, 3)])
def test_tiles_with_a_copy_are_read_from_it(emulate, k_bits, v_bits):
    torch.manual_seed(3)
    length, page_size, head_dim = 150, 32, 128
    cache, order = make_cache(head_dim, k_bits, v_bits, page_size, 2, length)
    tile_slots = torch.full((cache.num_pages, page_size // 16), -1, dtype=torch.int32)
    window = torch.randn(4, 2, 2, 16, head_dim, dtype=torch.float16)
    for slot, tile in ((2, 0), (0, 5), (3, 9)):
        tile_slots[order[tile * 16 // page_size], tile * 16 % page_size // 16] = slot
    window[3, :, :, length % 16 :] = float("nan")  # tokens that were never written
    k, v = run(emulate, cache, order, 1, 0, length, 32, tile_slots=tile_slots, window=window)
    want_k, want_v, _ = expected(cache, order, 1, 0, length)
    for slot, tile in ((2, 0), (0, 5), (3, 9)):
        rows = slice(tile * 16, min(tile * 16 + 16, length))
        count = rows.stop - rows.start
        want_k[rows], want_v[rows] = window[slot, 1, :, :count].float()
    torch.testing.assert_close(k[:length], want_k.half(), rtol=0, atol=0)
    torch.testing.assert_close(v[:length], want_v.half(), rtol=0, atol=0)
    assert (v[length:] == 0).all()
