# SPDX-License-Identifier: Apache-2.0
"""The headers on the host: compiled without CUDA, and equal to the Python reference to the bit."""

from __future__ import annotations

import ctypes
import importlib.util
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from turbokv import core
from turbokv._codebooks import CODEBOOKS
from turbokv.codec import TurboKVCodec
from turbokv.core import Codebook, Role, ScaleRule, VectorFormat
from turbokv.paged import FORMAT_VERSION, PAGE_BITS, TILE, PagedKVCache

ROOT = pathlib.Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "turbokv" / "kernels" / "cuda" / "include"
SOURCE = ROOT / "tests" / "headers" / "host_library.cpp"
ROLES: tuple[Role, ...] = ("k", "v")
RULES: tuple[ScaleRule, ...] = ("plain", "norm_corrected", "least_squares", "unbiased")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (64, 80, 128, 256, 512)


@pytest.fixture(scope="module")
def check_headers() -> ModuleType:
    """Return the script as a module (it is no package)."""
    script = ROOT / "scripts" / "check_headers.py"
    spec = importlib.util.spec_from_file_location("check_headers", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    assert compiler is not None, "the headers are tested with g++: wanted it on PATH"
    path = tmp_path_factory.mktemp("headers") / "host_library.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, *flags, "-shared", "-fPIC", f"-I{INCLUDE}", str(SOURCE), "-o", str(path)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.OrderHigh.restype = loaded.NaturalHigh.restype = ctypes.c_uint32
    loaded.ToHalf.restype = loaded.ToBFloat16.restype = ctypes.c_uint16
    loaded.FromHalf.restype = ctypes.c_float
    loaded.PageOffset.restype = ctypes.c_int64
    return loaded


def pointer(x: Tensor) -> ctypes.c_void_p:
    assert x.is_contiguous()
    return ctypes.c_void_p(x.data_ptr())


def vector_format(role: Role, bits: int, head_dim: int, rule: ScaleRule) -> VectorFormat:
    return VectorFormat.create(role, head_dim, Codebook.gaussian(bits), scale_rule=rule)


def compress(
    library: ctypes.CDLL, x: Tensor, fmt: VectorFormat, role: Role, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 ``[n, padded_dim]`` and fp16 scales, by the headers."""
    codes = torch.empty(x.shape[0], fmt.padded_dim, dtype=torch.uint8)
    scales = torch.empty(x.shape[0], dtype=torch.float16)
    library.Compress(
        ROLES.index(role),
        fmt.bits,
        fmt.head_dim,
        RULES.index(fmt.scale_rule),
        DTYPES.index(x.dtype),
        x.shape[0],
        pointer(x),
        None if offset is None else pointer(offset),
        pointer(codes),
        pointer(scales),
    )
    return codes, scales


def unpack(packed: Tensor, dim: int, bits: int) -> Tensor:
    return core.unpack_rows(packed.t().contiguous(), dim, bits).t()


def assert_same_vectors(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Codes and the scales' bits; a vector with NaN may have any codes and any NaN."""
    nan = want[1].isnan()
    assert torch.equal(got[1].isnan(), nan)
    assert torch.equal(got[1].view(torch.int16)[~nan], want[1].view(torch.int16)[~nan])
    assert torch.equal(got[0][~nan], want[0][~nan])


def test_format_version(library: ctypes.CDLL) -> None:
    assert library.FormatVersion() == FORMAT_VERSION


@pytest.mark.parametrize("bits", PAGE_BITS)
def test_codebooks_are_the_generated_ones(library: ctypes.CDLL, bits: int) -> None:
    magnitudes = (ctypes.c_int8 * 128)()
    step, frac_bits = ctypes.c_double(), ctypes.c_int()
    library.Codebook(bits, magnitudes, ctypes.byref(step), ctypes.byref(frac_bits))
    book = CODEBOOKS[bits]
    assert tuple(magnitudes[: 1 << (bits - 1)]) == book.magnitudes
    assert (step.value, frac_bits.value) == (book.step, book.frac_bits)
    assert library.AcceptsCodebook(bits, magnitudes, step)


@pytest.mark.parametrize(
    ("bits", "magnitudes", "step"),
    [
        (2, (3, 3), 0.5),
        (2, (3, 1), 0.5),
        (2, (-1, 1), 0.5),
        (2, (0, 1), 0.5),  # mid-tread is for 8 bits only
        (2, (1, 3), 0.0),
        (2, (1, 3), float("nan")),
        (6, tuple(range(1, 33)), 0.1),
        (1, (1,), 0.1),
    ],
)
def test_bad_codebooks_are_refused(
    library: ctypes.CDLL, bits: int, magnitudes: tuple[int, ...], step: float
) -> None:
    values = (ctypes.c_int8 * 128)(*magnitudes)
    assert not library.AcceptsCodebook(bits, values, ctypes.c_double(step))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("seed", [0, 42, 2**31 - 1])
def test_signs(library: ctypes.CDLL, role: Role, seed: int) -> None:
    signs = torch.empty(512)
    library.Signs(ROLES.index(role), seed, 512, pointer(signs))
    assert torch.equal(signs, core.rotation_signs(role, 512, seed))


@pytest.mark.parametrize("bits", PAGE_BITS)
@pytest.mark.parametrize("head_dim", DIMS)
def test_constants(library: ctypes.CDLL, bits: int, head_dim: int) -> None:
    constants = (ctypes.c_float * 4)()
    library.Constants(0, bits, head_dim, constants)
    fmt = vector_format("k", bits, head_dim, "plain")
    want = (fmt.normaliser, fmt.scale_factor, fmt.plain_factor, fmt.inverse_root)
    assert tuple(constants) == want


@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_hadamard(library: ctypes.CDLL, dim: int) -> None:
    x = torch.randn(dim, generator=torch.Generator().manual_seed(dim))
    want = core.hadamard_rows(x[:, None].clone())[:, 0]
    library.Transform(dim, pointer(x))
    assert torch.equal(x, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", PAGE_BITS)
@pytest.mark.parametrize("head_dim", DIMS)
def test_codes_and_scales(
    library: ctypes.CDLL,
    hard_vectors: Callable[..., Tensor],
    head_dim: int,
    bits: int,
    dtype: torch.dtype,
) -> None:
    x = hard_vectors(48, head_dim, dtype, seed=bits)
    for role, rule in (("k", "unbiased"), ("v", "least_squares"), ("k", "plain"),
                       ("v", "norm_corrected")):  # fmt: skip
        fmt = vector_format(role, bits, head_dim, rule)
        packed = torch.empty(x.shape[0], fmt.packed_dim, dtype=torch.uint8)
        norms = torch.empty(x.shape[0], dtype=torch.float16)
        core.compress(x, fmt, packed, norms)
        want = (unpack(packed, fmt.padded_dim, bits), norms)
        assert_same_vectors(compress(library, x, fmt, role), want)


@pytest.mark.parametrize("bits", PAGE_BITS)
def test_cells_on_and_beside_every_boundary(library: ctypes.CDLL, bits: int) -> None:
    """A tie takes the smaller magnitude; what is next to it in fp32 does not tie."""
    fmt = vector_format("k", bits, 64, "plain")
    ties = fmt.codebook.boundaries
    far = torch.tensor([0.0, 1e-40, 1e-3, 126.0, 127.0, 128.0, 129.0, 1e4, 3e38])
    above, below = (torch.nextafter(ties, torch.full_like(ties, side)) for side in (1e9, -1e9))
    lattice = torch.cat([ties, above, below, far])
    got = torch.empty(lattice.shape, dtype=torch.uint8)
    library.Cells(bits, lattice.numel(), pointer(lattice), pointer(got))
    assert torch.equal(got, torch.bucketize(lattice, ties).to(torch.uint8))
    assert torch.equal(got[:-1], fmt.cells(lattice[:-1].clone())[0])  # which ends at 2^30


@pytest.mark.parametrize("head_dim", [64, 96, 512])
def test_centred_keys(
    library: ctypes.CDLL, hard_vectors: Callable[..., Tensor], head_dim: int
) -> None:
    offset = torch.randn(head_dim, generator=torch.Generator().manual_seed(3))
    x = hard_vectors(64, head_dim, torch.float32)
    x[:16] = offset + 0.1 * x[:16].clamp(-1, 1)
    codec = TurboKVCodec(head_dim, 4)
    packed, norms = codec.compress_k(x, offset=offset)
    marked = torch.signbit(norms)
    assert marked.any() and not marked.all()
    fmt = codec.vector_format("k")
    got = compress(library, x, fmt, "k", offset)
    assert_same_vectors(got, (unpack(packed, fmt.padded_dim, 4), norms))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("bits", PAGE_BITS)
@pytest.mark.parametrize("head_dim", DIMS)
def test_decompress(library: ctypes.CDLL, head_dim: int, bits: int, rotated: bool) -> None:
    fmt = vector_format("v", bits, head_dim, "least_squares")
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(
        0, 1 << bits, (16, fmt.padded_dim), dtype=torch.uint8, generator=generator
    )
    scales = (torch.randn(16, generator=generator) * 10).to(torch.float16)  # marked ones among them
    dim = fmt.padded_dim if rotated else head_dim
    got, want = torch.empty(16, dim), torch.empty(16, dim)
    library.Decompress(
        1, bits, head_dim, rotated, 16, pointer(codes), pointer(scales), pointer(got)
    )
    packed = core.pack_rows(codes.t().contiguous(), bits).t()
    core.decompress(packed, scales, fmt, want, rotated=rotated)
    assert torch.equal(got, want)


@pytest.mark.parametrize("v_bits", PAGE_BITS)
@pytest.mark.parametrize("k_bits", PAGE_BITS)
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_tiles_are_those_of_the_reference(
    library: ctypes.CDLL, dim: int, k_bits: int, v_bits: int
) -> None:
    """Compress and pack by the headers: every byte of the tile is the reference cache's."""
    generator = torch.Generator().manual_seed(dim)
    k, v = (torch.randn(TILE, 1, dim, generator=generator) for _ in range(2))
    codec = TurboKVCodec(dim, k_bits, v_bits)
    cache = PagedKVCache(codec, 1, 1, TILE)
    cache.append(k, v, torch.arange(TILE))
    tile = torch.full((cache.layout.tile_bytes,), 0xA5, dtype=torch.uint8)
    assert library.TileBytesOf(dim, k_bits, v_bits) == tile.numel()
    for role, x in zip(ROLES, (k, v), strict=True):
        codes, scales = compress(library, x[:, 0].contiguous(), codec.vector_format(role), role)
        place = (ROLES.index(role), dim, k_bits, v_bits)
        library.PackTile(*place, pointer(codes), pointer(scales), pointer(tile))
        again = torch.empty_like(codes)
        library.UnpackTile(*place, pointer(tile), pointer(again))
        assert torch.equal(again, codes)
    assert torch.equal(tile, cache.pages[0, 0])


@pytest.mark.parametrize("role", ROLES)
def test_high_bits_move_as_words(library: ctypes.CDLL, role: Role) -> None:
    where = [library.HighPositionOf(ROLES.index(role), j) for j in range(32)]
    for j, position in enumerate(where):
        assert library.HighCoordinateOf(ROLES.index(role), position) == j
        assert library.OrderHigh(ROLES.index(role), 1 << j) == 1 << position
        assert library.NaturalHigh(ROLES.index(role), 1 << position) == 1 << j
    assert sorted(where) == list(range(32))


def test_sixteen_bit_numbers(library: ctypes.CDLL) -> None:
    """Every fp16 and both of its neighbouring midpoints; bf16 by a sample with all exponents."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float32)
    for code, value in zip(bits[::7].tolist(), values[::7].tolist(), strict=True):
        got = library.FromHalf(code)
        assert got == value or (np.isnan(got) and np.isnan(value))
    finite = np.sort(values[np.isfinite(values)])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    edges = np.array([65519.996, 65520.0, 1e9, -1e9, 1e-8, 2.0**-25, -(2.0**-25)], np.float32)
    sample = np.concatenate([middles[::5], beside[0][::5], beside[1][::5], edges])
    with np.errstate(over="ignore"):
        want = sample.astype(np.float16).view(np.uint16)
    got = [library.ToHalf(ctypes.c_float(value)) for value in sample.tolist()]
    assert got == want.tolist()
    assert library.ToHalf(ctypes.c_float(float("nan"))) & 0x7FFF > 0x7C00
    random = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0))
    numbers = random.to(torch.int32).view(torch.float32)
    numbers = numbers[~numbers.isnan()]
    want16 = numbers.to(torch.bfloat16).view(torch.int16).tolist()
    got16 = [library.ToBFloat16(ctypes.c_float(value)) for value in numbers.tolist()]
    assert got16 == [value & 0xFFFF for value in want16]


def test_addresses_are_64_bit(library: ctypes.CDLL) -> None:
    wide = (ctypes.c_int64(1 << 20), ctypes.c_int64(1 << 17), ctypes.c_int64(1 << 22))
    assert library.PageOffset(*wide, 5, 3, 2112) == (1 << 42) + 5 * (1 << 17) + 3 * 2112


@pytest.mark.parametrize(
    ("length", "pages"), [(-3, 0), (0, 0), (1, 1), (16, 1), (17, 2), (2**31 - 1, 9)]
)
def test_count_pages(library: ctypes.CDLL, length: int, pages: int) -> None:
    assert library.CountPagesOf(length, 16, 9) == pages


def test_headers_include_cuda_and_std_only(check_headers: ModuleType) -> None:
    assert check_headers.foreign_includes() == []


def test_every_header_compiles_alone_on_the_host(check_headers: ModuleType) -> None:
    check_headers.check_host()


def test_every_header_compiles_alone_with_nvcc(check_headers: ModuleType) -> None:
    """One architecture here; ``scripts/check_headers.py`` takes the others."""
    if shutil.which("nvcc") is None:
        pytest.skip("wanted nvcc on PATH")
    check_headers.check_device(["sm_90a"], device_only=True)


def test_check_headers_finds_what_is_foreign(
    check_headers: ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "turbokv").mkdir()
    for name, line in (("good", "<cstdint>"), ("bad", "<torch/torch.h>")):
        (tmp_path / "turbokv" / f"{name}.cuh").write_text(f"#include {line}\n")
    monkeypatch.setattr(check_headers, "INCLUDE", tmp_path)
    found: Any = check_headers.foreign_includes()
    assert found == ["bad.cuh: torch/torch.h"]
