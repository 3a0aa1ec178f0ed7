# SPDX-License-Identifier: Apache-2.0
"""The bytes of FORMAT.md, pinned by golden files and by a second implementation.

``python -m tests.test_format`` writes the golden files anew: for a new version of the format only.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import ref
from turbokv import Codebook, TurboKVCodec, core, page_layout, paged
from turbokv._codebooks import CODEBOOKS
from turbokv.paged import PagedKVCache, PageLayout

ROOT = pathlib.Path(__file__).resolve().parent
CODEC_FILE, PAGES_FILE = ROOT / "data" / "golden_codec.json", ROOT / "data" / "golden_pages.json"
FORMAT_TEXT = (ROOT.parent / "turbokv" / "FORMAT.md").read_text()
HEAD_DIMS = (64, 96, 128)
BITS = range(2, 9)
# (head_dim, k_bits, v_bits, page_size): every page width, both roles, two tiles, a padded size;
# then rows of K that swap halves, and runs of V shorter than four words
PAGES = (
    (64, 4, 4, 32),
    (128, 5, 3, 16),
    (96, 3, 2, 16),
    (64, 8, 5, 16),
    (64, 2, 8, 16),
    (128, 8, 4, 16),
    (64, 4, 3, 16),
)
NUM_HEADS = 2


# --- inputs: integers times powers of two, exact in fp32 ------------------------------------------


def integers(count: int, start: int) -> Tensor:
    """Return 24-bit integers in [-2^23, 2^23) of a linear congruential sequence, as fp32."""
    state, values = start, []
    for _ in range(count):
        state = (1103515245 * state + 12345) % (1 << 31)
        values.append((state >> 7) - (1 << 23))
    return torch.tensor(values, dtype=torch.float32)


def inputs(head_dim: int) -> Tensor:
    """Return ten vectors: ordinary, wide mantissas, ties, and every special case but NaN."""
    j = torch.arange(head_dim)
    x = torch.zeros(10, head_dim, dtype=torch.float32)
    x[0] = ((37 * j + 11) % 64 - 32) / 16
    x[1] = integers(head_dim, 1) * 2.0**-22
    x[2] = integers(head_dim, 2) * 2.0**-20 + 3  # a mean, as keys have; wide enough to round
    x[3, 3] = -1.0  # every rotated coordinate has the same magnitude
    x[4, 5:7] = 2.0  # rotated coordinates are zero or equal
    x[5] = integers(head_dim, 5) * 2.0**-40  # a subnormal fp16 scale
    x[6] = integers(head_dim, 6) * 2.0**10  # saturates fp16
    x[7, 0], x[7, 1], x[7, 2] = torch.inf, -torch.inf, 1.0
    x[8] = integers(head_dim, 8) * 2.0**-90  # below the floor: counts as zero
    return x  # x[9] is zero


def offset(head_dim: int) -> Tensor:
    """Return a vector near ``inputs()[2]`` and far from the rest."""
    return 3 + (torch.arange(head_dim) % 5 - 2).float() / 8


def tokens(count: int, head_dim: int, start: int) -> Tensor:
    x = integers(count * NUM_HEADS * head_dim, start) * 2.0**-22
    return x.view(count, NUM_HEADS, head_dim)


# --- what the package writes ----------------------------------------------------------------------


def hexes(packed: Tensor, norms: Tensor) -> list[str]:
    """Codes and scale of each vector in hexadecimal, separated by a space."""
    size = norms.element_size()
    scales = norms.contiguous().view(torch.uint8).view(-1, size)
    rows = zip(packed.tolist(), scales.tolist(), strict=True)
    return [f"{bytes(codes).hex()} {bytes(scale).hex()}" for codes, scale in rows]


def codec_cases() -> Iterator[tuple[str, list[str]]]:
    """Yield a name and the bytes of every case of the flat API."""
    for head_dim in HEAD_DIMS:
        x = inputs(head_dim)
        for bits in BITS:
            codec = TurboKVCodec(head_dim, bits)
            yield f"k{bits} d{head_dim}", hexes(*codec.compress_k(x))
            yield f"v{bits} d{head_dim}", hexes(*codec.compress_v(x))
    x, mu = inputs(64), offset(64)
    yield "k4 d64 centred", hexes(*TurboKVCodec(64, 4).compress_k(x, offset=mu))
    yield "k4 d64 seed 7", hexes(*TurboKVCodec(64, 4, seed=7).compress_k(x))
    for rule in get_args(core.ScaleRule):
        for dtype in core.NORM_DTYPES:
            codec = TurboKVCodec(64, 3, k_scale_rule=rule, norm_dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            # the codes are those of "k3 d64"
            yield (
                f"k3 d64 {rule} {name}",
                [row.split()[1] for row in hexes(*codec.compress_k(x))],
            )


def page_case(head_dim: int, k_bits: int, v_bits: int, page_size: int) -> dict[str, Any]:
    """Fill page 1 of 2, all but three tokens, onto bytes of 0xA5; return the tiles of each head."""
    codec = TurboKVCodec(head_dim, k_bits, v_bits)
    layout = PageLayout(head_dim, k_bits, v_bits, page_size, NUM_HEADS)
    pages = torch.full(layout.shape(2), 0xA5, dtype=torch.uint8)
    cache = PagedKVCache(codec, 2, NUM_HEADS, page_size, pages=pages)
    count = page_size - 3
    slots = page_size + torch.arange(count)
    # centred by a constant, so that marked and unmarked scales occur
    k = tokens(count, head_dim, 3)
    k[::2] += offset(head_dim)
    cache.append(k, tokens(count, head_dim, 4), slots, k_offset=offset(head_dim))
    assert (cache.pages[0] == 0xA5).all()
    heads = cache.pages[1].view(NUM_HEADS, -1, layout.tile_bytes).tolist()
    return {
        "tile_bytes": layout.tile_bytes,
        "heads": [[bytes(tile).hex() for tile in head] for head in heads],
    }


def page_name(head_dim: int, k_bits: int, v_bits: int, page_size: int) -> str:
    return f"k{k_bits} v{v_bits} d{head_dim} page {page_size}"


def write_golden() -> None:
    """Write both golden files."""
    header = {"version": paged.FORMAT_VERSION, "written by": "python -m tests.test_format"}
    for path, cases in (
        (CODEC_FILE, dict(codec_cases())),
        (PAGES_FILE, {page_name(*case): page_case(*case) for case in PAGES}),
    ):
        path.write_text(json.dumps(header | {"cases": cases}, indent=1) + "\n")


def golden(path: pathlib.Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    assert content["version"] == paged.FORMAT_VERSION
    cases: dict[str, Any] = content["cases"]
    return cases


# --- tests ----------------------------------------------------------------------------------------


def test_golden_codes_and_scales() -> None:
    want = golden(CODEC_FILE)
    got = dict(codec_cases())
    assert got.keys() == want.keys()
    for name, rows in got.items():
        assert rows == want[name], name


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_second_implementation_gives_the_golden_bytes(role: str, bits: int, head_dim: int) -> None:
    """``ref.py`` in fp32, from FORMAT.md alone; only the float levels come from the package."""
    data = Codebook.gaussian(bits)
    book = ref.BOOKS.get(bits) or ref.Book(data.magnitudes, data.step, data.frac_bits)
    rule = {"k": "unbiased", "v": "least_squares"}[role]
    codes, scale = ref.compress(inputs(head_dim).numpy(), role, book, rule, np.float32)
    rows = zip(codes, ref.round_scale(scale), strict=True)
    got = [f"{ref.pack(row, bits).hex()} {s.tobytes().hex()}" for row, s in rows]
    assert got == golden(CODEC_FILE)[f"{role}{bits} d{head_dim}"]


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_golden_bytes_read_as_the_inputs(role: str, bits: int, head_dim: int) -> None:
    rows = [row.split() for row in golden(CODEC_FILE)[f"{role}{bits} d{head_dim}"]]
    packed = torch.tensor([list(bytes.fromhex(codes)) for codes, _ in rows], dtype=torch.uint8)
    scales = torch.tensor([list(bytes.fromhex(scale)) for _, scale in rows], dtype=torch.uint8)
    codec = TurboKVCodec(head_dim, bits)
    read = getattr(codec, f"decompress_{role}")(packed, scales.view(torch.float16).squeeze(1))
    x = inputs(head_dim)
    for i in range(5):
        error = float((read[i] - x[i]).square().sum() / x[i].square().sum())
        # these vectors are not Gaussian: one-hot ones rotate to equal magnitudes
        assert error < 3 * CODEBOOKS[bits].mse, i
    assert (scales.view(torch.float16)[6:8] == torch.finfo(torch.float16).max).all()
    assert (read[8:] == 0).all()


def test_centred_golden_marks_all_but_the_near_vector() -> None:
    rows = golden(CODEC_FILE)["k4 d64 centred"]
    marks = [int(row.split()[1][2:], 16) >> 7 for row in rows]
    # inputs 6 and 7 are so long that the offset hardly changes them
    assert marks[:6] == [1, 1, 0, 1, 1, 1] and marks[8:] == [1, 1]


@pytest.mark.parametrize("case", PAGES, ids=lambda case: page_name(*case))
def test_golden_pages(case: tuple[int, int, int, int]) -> None:
    assert page_case(*case) == golden(PAGES_FILE)[page_name(*case)]


@pytest.mark.parametrize("case", PAGES, ids=lambda case: page_name(*case))
def test_second_implementation_gives_the_golden_pages(case: tuple[int, int, int, int]) -> None:
    """``ref.py`` compresses, and places bytes as section 6 says."""
    head_dim, k_bits, v_bits, page_size = case
    count, mu = page_size - 3, offset(head_dim).numpy()
    keys = tokens(count, head_dim, 3).numpy()
    keys[::2] += mu
    values = tokens(count, head_dim, 4).numpy()
    content = golden(PAGES_FILE)[page_name(*case)]
    size = 2 * core.padded_dim(head_dim) * (k_bits + v_bits) + 64
    assert content["tile_bytes"] == size
    for head, got in enumerate(content["heads"]):
        x, centred = keys[:, head], keys[:, head] - mu
        lengths = [ref.tree_sum(ref.pad(part * part)) for part in (x, centred)]
        marked = lengths[0] < lengths[1]
        x = np.where(marked[:, None], x, centred)
        k_codes, k_scale = ref.compress(x, "k", ref.BOOKS[k_bits], "unbiased", np.float32)
        v_codes, v_scale = ref.compress(
            values[:, head], "v", ref.BOOKS[v_bits], "least_squares", np.float32
        )
        k_scale = ref.round_scale(np.where(marked, -k_scale, k_scale))
        v_scale = ref.round_scale(v_scale)
        tiles = [bytearray(b"\xa5" * size) for _ in range(page_size // 16)]
        for i in range(count):
            codes, scales = (k_codes[i], v_codes[i]), k_scale[i].tobytes() + v_scale[i].tobytes()
            ref.write_token(tiles[i // 16], i % 16, codes, (k_bits, v_bits), scales)
        assert got == [tile.hex() for tile in tiles]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256, 512])
def test_second_implementation_gives_the_same_pages(head_dim: int) -> None:
    """All pairs of widths, from random codes in the second of two tiles; and back again."""
    generator, dim = torch.Generator().manual_seed(head_dim), core.padded_dim(head_dim)
    flat, rows = {}, {}
    for role in get_args(core.Role):
        for bits in paged.PAGE_BITS:
            codes = torch.randint(1 << bits, (dim, 16), generator=generator, dtype=torch.uint8)
            flat[role, bits] = core.pack_rows(codes, bits).t()[:, None]
            rows[role, bits] = codes.t().numpy()
    scales = torch.randn(2, 16, 1, generator=generator, dtype=torch.float32).to(torch.float16)
    for k_bits, v_bits in itertools.product(paged.PAGE_BITS, repeat=2):
        layout = PageLayout(head_dim, k_bits, v_bits, 32, 1)
        pages = torch.full(layout.shape(1), 0xA5, dtype=torch.uint8)
        slots, stored = torch.arange(16, 32), (flat["k", k_bits], flat["v", v_bits])
        for role, packed, norms in zip(get_args(core.Role), stored, scales, strict=True):
            layout.scatter(pages, slots, role, packed, norms)
            got = layout.gather(pages, slots, role)
            assert torch.equal(got[0], packed) and torch.equal(got[1], norms)
        tile = bytearray(layout.tile_bytes)
        for i in range(16):
            codes = rows["k", k_bits][i], rows["v", v_bits][i]
            pair = scales[:, i].numpy().tobytes()
            ref.write_token(tile, i, codes, (k_bits, v_bits), pair)
        assert pages.numpy().tobytes() == b"\xa5" * layout.tile_bytes + tile, (k_bits, v_bits)


def test_format_text_names_version_and_constants() -> None:
    assert f"version {paged.FORMAT_VERSION}\n" in FORMAT_TEXT
    for bits, book in ref.BOOKS.items():
        listed = "0 1 2 ... 127" if bits == 8 else " ".join(map(str, book.magnitudes))
        assert f"| {bits} | {listed} | {book.step} | {book.frac_bits} |" in FORMAT_TEXT
    for head_dim in (64, 128, 256):
        widths = ((4, 4), (5, 3), (3, 3), (2, 2), (8, 4))
        sizes = [PageLayout(head_dim, k, v, 16, 1).bytes_per_token for k, v in widths]
        assert f"| head_dim {head_dim} | {' | '.join(map(str, sizes))} |" in FORMAT_TEXT
    parts: tuple[page_layout.Part, ...] = ("k_base", "k_high", "v_base", "k_scale")
    layout, first = PageLayout(128, 5, 3, 16, 1), torch.tensor([0])
    starts = tuple(int(layout.byte_offsets(part, first)[0, 0]) for part in parts)
    example = "K base starts at byte {} of the tile, K high at {}, V base at {} and "
    assert f"{example}the scales at {{}}.".format(*starts) in FORMAT_TEXT.replace("\n", " ")


if __name__ == "__main__":
    write_golden()
