# SPDX-License-Identifier: Apache-2.0
"""Rotation, quantisation, scale rules and packing, against float64 and FORMAT.md."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import ref
from turbokv import core
from turbokv.core import Codebook, Role, ScaleRule, VectorFormat

BITS = range(2, 9)
RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
ROLES: tuple[Role, ...] = get_args(Role)
DIMS = (8, 12, 64, 80, 96, 128, 256, 512)
bounded = settings(max_examples=30, deadline=None)


def make(
    head_dim: int, bits: int, role: Role = "k", rule: ScaleRule = "unbiased", seed: int = 42
) -> VectorFormat:
    """Return a format with fp32 scales, so that scale rounding does not hide errors."""
    book = Codebook.gaussian(bits)
    return VectorFormat.create(
        role, head_dim, book, scale_rule=rule, norm_dtype=torch.float32, seed=seed
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def roundtrip(fmt: VectorFormat, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compress; return codes ``[n, dim]``, scales and rotated vectors read back."""
    packed = torch.full((x.shape[0], fmt.packed_dim), 0xA5, dtype=torch.uint8)
    norms = torch.full((x.shape[0],), math.nan, dtype=torch.float32)
    core.compress(x, fmt, packed, norms)
    out = torch.full((x.shape[0], fmt.padded_dim), math.nan, dtype=torch.float32)
    core.decompress(packed, norms, fmt, out, rotated=True)
    codes = core.unpack_rows(packed.t().contiguous(), fmt.padded_dim, fmt.bits).t()
    return codes, norms, out


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "padded"), [(8, 8), (9, 16), (64, 64), (80, 128), (96, 128), (512, 512)]
)
def test_padding_is_to_the_next_power_of_two(head_dim: int, padded: int) -> None:
    assert core.padded_dim(head_dim) == padded
    for bits in BITS:
        assert core.packed_dim(head_dim, bits) == padded * bits // 8


@pytest.mark.parametrize("head_dim", [7, 513, 0, -64])
def test_head_dim_out_of_range(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim: wanted 8 to 512, got {head_dim}"):
        core.padded_dim(head_dim)


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits: wanted 2 to 8, got {bits}"):
        core.check_bits(bits)


@pytest.mark.parametrize("value", [4.0, "4", None, True])
def test_wrong_types(value: object) -> None:
    with pytest.raises(TypeError, match="bits: wanted an int from 2 to 8, got"):
        core.check_bits(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="head_dim: wanted an int, got"):
        core.padded_dim(value)  # type: ignore[arg-type]


# --- rotation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("seed", [0, 42, (1 << 31) - 1])
def test_signs_follow_the_format(role: Role, seed: int) -> None:
    got = core.rotation_signs(role, 512, seed)
    assert got.tolist() == ref.signs(role, 512, seed).tolist()


def test_splitmix64_is_the_published_generator() -> None:
    """First outputs for state 0, from the authors' code."""
    golden = 0x9E3779B97F4A7C15
    got = [core._splitmix64(i * golden % (1 << 64)) for i in range(3)]
    assert got == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_signs_are_balanced_and_differ_by_role_and_seed() -> None:
    signs = torch.stack([core.rotation_signs(r, 512, s) for r in ROLES for s in (42, 43, 44)])
    # 512 fair signs: a standard deviation of 23
    assert signs.sum(1).abs().max() < 92
    products = signs @ signs.t()
    assert (products - 512 * torch.eye(6, dtype=torch.float32)).abs().max() < 92


@pytest.mark.parametrize("seed", [-1, 1 << 31, 1.0, True, None])
def test_bad_seed(seed: object) -> None:
    with pytest.raises(ValueError, match="seed: wanted an int from 0 to 2"):
        core.rotation_signs("k", 64, seed)  # type: ignore[arg-type]


def test_bad_role() -> None:
    with pytest.raises(ValueError, match="role: wanted 'k' or 'v', got 'q'"):
        core.rotation_signs("q", 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("head_dim", DIMS)
def test_rotation_is_the_signed_hadamard_matrix(head_dim: int, role: Role) -> None:
    fmt = make(head_dim, 4, role)
    dim = fmt.padded_dim
    exact = np.diag(ref.signs(role, dim)) @ ref.hadamard_matrix(dim) / math.sqrt(dim)
    np.testing.assert_allclose(exact @ exact.T, np.eye(dim), atol=1e-12)
    got = core.rotate(torch.eye(head_dim, dtype=torch.float32), fmt)
    np.testing.assert_allclose(got.numpy(), exact[:head_dim], atol=1e-7)
    x = normal(50, head_dim)
    rotated = core.rotate(x, fmt)
    np.testing.assert_allclose(
        rotated.numpy(), x.double().numpy() @ exact[:head_dim], atol=2e-6
    )  # fp32: log2(512) additions of numbers up to 5, each rounded
    torch.testing.assert_close(core.unrotate(rotated, fmt), x, rtol=0, atol=4e-6)
    torch.testing.assert_close(rotated.norm(dim=1), x.norm(dim=1), rtol=2e-6, atol=0)


def test_butterflies_run_in_the_order_of_the_format() -> None:
    """Any other order rounds differently: NumPy in fp32 has to agree to the bit."""
    x = normal(256, 64).t().contiguous()
    expected = ref.transform(x.t().numpy().copy())
    assert np.array_equal(core.hadamard_rows(x.clone()).t().numpy(), expected)


def test_sums_run_neighbours_first() -> None:
    x = normal(512, 100)
    assert np.array_equal(core.tree_sum_rows(x).numpy(), ref.tree_sum(x.t().numpy()))


def test_square_roots_are_correctly_rounded() -> None:
    x = torch.ldexp(
        normal(100_000).square(), torch.randint(-100, 100, (100_000,), dtype=torch.int32)
    )
    assert np.array_equal(core.exact_sqrt(x).numpy(), np.sqrt(x.numpy()))


@bounded
@given(st.integers(0, 2**31 - 1), st.sampled_from(DIMS), st.floats(0.01, 100.0))
def test_rotation_keeps_products(seed: int, head_dim: int, scale: float) -> None:
    fmt = make(head_dim, 4, seed=seed)
    a, b = normal(2, 4, head_dim, seed=seed % 1000)
    got = (core.rotate(a, fmt, scale).double() * core.rotate(b, fmt).double()).sum(1)
    expected = scale * (a.double() * b.double()).sum(1)
    # relative to the lengths: about sqrt(head_dim) each
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * scale * head_dim)


# --- packing --------------------------------------------------------------------------------------


@bounded
@given(
    st.sampled_from(BITS), st.sampled_from((8, 16, 64, 512)), st.integers(0, 5), st.integers(0, 99)
)
def test_unpack_restores_every_code(bits: int, dim: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (dim, count), generator=generator).to(torch.uint8)
    packed = core.pack_rows(codes.clone(), bits)
    assert packed.shape == (dim * bits // 8, count)
    assert packed.dtype == torch.uint8
    for i in range(count):
        assert bytes(packed[:, i].tolist()) == ref.pack(codes[:, i].numpy(), bits)
    assert torch.equal(core.unpack_rows(packed, dim, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_each_code_owns_its_own_bits(bits: int) -> None:
    """Code ``j`` alone sets bits ``j * bits`` and up of the little-endian string."""
    dim, full = 16, (1 << bits) - 1
    packed = core.pack_rows(torch.eye(dim, dtype=torch.uint8) * full, bits)
    for j in range(dim):
        string = int.from_bytes(bytes(packed[:, j].tolist()), "little")
        assert string == full << (j * bits)


# --- quantisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_ties_take_the_smaller_magnitude(bits: int) -> None:
    fmt = make(64, bits)
    bounds = fmt.codebook.boundaries
    above = torch.nextafter(bounds, torch.tensor(math.inf, dtype=torch.float32))
    below = torch.nextafter(bounds, torch.tensor(-math.inf))
    want = torch.arange(bounds.numel())
    for value, index in ((bounds, want), (below, want), (above, want + 1)):
        got, magnitude = fmt.cells(value[:, None].clone())
        assert torch.equal(got[:, 0].long(), index)
        assert torch.equal(
            magnitude[:, 0],
            torch.tensor(fmt.codebook.magnitudes, dtype=torch.float32)[index].float(),
        )


@pytest.mark.parametrize("bits", BITS)
def test_cells_are_nearest_magnitudes(bits: int) -> None:
    fmt = make(64, bits)
    m = torch.tensor(fmt.codebook.magnitudes, dtype=torch.float64)
    u = torch.linspace(0, 2 * float(m[-1]), 20_001, dtype=torch.float32)[None]
    _, got = fmt.cells(u.clone())
    distance = (got.double() - u.double()).abs()
    best = (m[:, None] - u.double()).abs().min(0).values
    # a boundary of float levels is rounded to fp32
    torch.testing.assert_close(
        distance[0], best, rtol=0, atol=0 if fmt.codebook.is_lattice else 3e-7
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_codes_and_scales_equal_the_second_implementation(
    head_dim: int, bits: int, rule: ScaleRule
) -> None:
    """To the bit in fp32; in float64, codes but for near-ties, and scales to fp32 precision."""
    for role in ROLES:
        fmt = make(head_dim, bits, role, rule)
        x = normal(64, head_dim, seed=bits) * torch.logspace(-3, 3, 64)[:, None]
        codes, norms, read = roundtrip(fmt, x)
        book = ref.Book(fmt.codebook.magnitudes, fmt.codebook.step, fmt.codebook.frac_bits)
        exact_codes, exact_scale = ref.compress(x.numpy(), role, book, rule, np.float32)
        assert np.array_equal(codes.numpy(), exact_codes)
        assert np.array_equal(norms.numpy(), exact_scale)
        true_codes, true_scale = ref.compress(x.numpy(), role, book, rule)
        # 8 bits: u up to 127 with an error of 1e-5, so 1e-5 of all numbers may fall either way
        assert (codes.numpy() != true_codes).mean() < 1e-3
        np.testing.assert_allclose(norms.numpy(), true_scale, rtol=1e-4)
        np.testing.assert_allclose(
            read.numpy(), ref.read(codes.numpy(), norms.numpy(), book), rtol=1e-6
        )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("role", ROLES)
def test_scale_rules_keep_what_they_promise(bits: int, role: Role) -> None:
    """1e-5: fp32 scales, sums of 128 products."""
    x = normal(200, 128, seed=3) * 7.0
    read, codes = {}, []
    for rule in RULES:
        vector_codes, _, values = roundtrip(make(128, bits, role, rule), x)
        codes.append(vector_codes)
        read[rule] = values.double()
    assert all(torch.equal(codes[0], other) for other in codes)
    rotated = core.rotate(x, make(128, bits, role)).double()
    energy = rotated.square().sum(1)

    kept = read["norm_corrected"].square().sum(1)
    torch.testing.assert_close(kept, energy, rtol=1e-5, atol=0)
    unbiased = (read["unbiased"] * rotated).sum(1)
    torch.testing.assert_close(unbiased, energy, rtol=1e-5, atol=0)
    residual = rotated - read["least_squares"]
    overlap = (residual * read["least_squares"]).sum(1) / energy
    torch.testing.assert_close(overlap, torch.zeros_like(overlap), rtol=0, atol=1e-5)
    fmt = make(128, bits, role, "plain")
    level = (energy / 128).sqrt()[:, None] * fmt.codebook.step
    lattice = read["plain"] / level
    nearest = (
        (lattice.abs()[..., None] - torch.tensor(fmt.codebook.magnitudes, dtype=torch.float32))
        .abs()
        .amin(-1)
    )
    assert nearest.max() < 1e-3

    errors = {rule: (values - rotated).square().sum(1) for rule, values in read.items()}
    for rule in RULES:
        assert (errors["least_squares"] <= errors[rule] * (1 + 1e-5)).all()


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.119), (3, 0.0347), (4, 0.00952), (5, 0.00253)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_error_of_whole_vectors(bits: int, limit: float, head_dim: int) -> None:
    """Below the scalar limit e: on a sphere extremes are rarer. Unbiased costs e / (1 - e)."""
    x = normal(4000, head_dim)
    for rule, factor in (("least_squares", 1.0), ("unbiased", 1.0 / (1.0 - limit))):
        fmt = make(head_dim, bits, "v", rule)  # type: ignore[arg-type]
        error = (roundtrip(fmt, x)[2] - core.rotate(x, fmt)).square().mean() / x.square().mean()
        assert error <= limit * factor


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_error_of_whole_vectors_at_codec_widths(bits: int) -> None:
    fmt = make(128, bits, "v", "least_squares")
    x = normal(4000, 128)
    error = (roundtrip(fmt, x)[2] - core.rotate(x, fmt)).square().mean() / x.square().mean()
    assert error <= {6: 6.5e-4, 7: 1.65e-4, 8: 9e-5}[bits]


def test_unbiased_scale_has_no_bias_over_rotations() -> None:
    """Averaged over seeds, what is read tends to what was written: 2 bits, 200 rotations."""
    x = normal(1, 64)
    total = torch.zeros(1, 64, dtype=torch.float32)
    for seed in range(200):
        fmt = make(64, 2, seed=seed)
        total += core.unrotate(roundtrip(fmt, x)[2], fmt)
    cosine = torch.cosine_similarity(total, x)
    # an error of 13% of the energy, averaged 200 times
    assert cosine > 0.998
    assert float((total * x).sum() / x.square().sum()) == pytest.approx(200, rel=1e-5)


@bounded
@given(st.sampled_from(BITS), st.integers(-8, 8), st.sampled_from(RULES))
def test_powers_of_two_scale_exactly(bits: int, power: int, rule: ScaleRule) -> None:
    x = normal(8, 64)
    fmt = make(64, bits, rule=rule)
    codes, norms, _ = roundtrip(fmt, x)
    scaled_codes, scaled_norms, _ = roundtrip(fmt, x * 4.0**power)
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(norms * 4.0**power, scaled_norms)


@pytest.mark.parametrize("bits", BITS)
def test_opposite_vectors_have_opposite_readings(bits: int) -> None:
    fmt = make(64, bits)
    x = normal(50, 64)
    _, norms, read = roundtrip(fmt, x)
    _, negated_norms, negated = roundtrip(fmt, -x)
    assert torch.equal(norms, negated_norms)
    assert torch.equal(read, -negated)


def test_blocks_do_not_show() -> None:
    """Vectors are worked on in blocks; a vector's bytes do not depend on its neighbours."""
    fmt = make(512, 3)
    count = core._CPU_BLOCK_ELEMENTS // 512 + 3
    x = normal(count, 512)
    codes, norms, read = roundtrip(fmt, x)
    for i in (0, count - 4, count - 3, count - 1):
        one = roundtrip(fmt, x[i : i + 1])
        assert torch.equal(one[0][0], codes[i])
        assert torch.equal(one[1][0], norms[i])
        assert torch.equal(one[2][0], read[i])


def test_bad_rule_and_norm_dtype() -> None:
    book = Codebook.gaussian(4)
    with pytest.raises(ValueError, match=r"scale_rule: wanted one of .*, got 'best'"):
        VectorFormat.create("k", 64, book, scale_rule="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"norm_dtype: wanted one of .*, got torch.float64"):
        VectorFormat.create("k", 64, book, scale_rule="plain", norm_dtype=torch.float64)
