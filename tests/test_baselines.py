# SPDX-License-Identifier: Apache-2.0
"""The simulated rival formats: errors, stored sizes and edge cases of the originals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from turbokv.integrations.transformers import baselines
from turbokv.integrations.transformers.baselines import BASELINES

HEAD_DIMS = (64, 128)


def gaussian(head_dim: int, count: int = 20_000) -> Tensor:
    """Return standard normal vectors ``[count, head_dim]``, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, head_dim, generator=generator, dtype=torch.float32)


def mse(x: Tensor, read_back: Tensor) -> float:
    """Return the mean squared error per number."""
    return float((read_back - x).square().mean())


def hadamard_matrix(dim: int) -> Tensor:
    """Return the orthonormal Sylvester matrix, from the parity of common bits."""
    index = range(dim)
    rows = [[(-1.0) ** (i & j).bit_count() for j in index] for i in index]
    return torch.tensor(rows, dtype=torch.float32) / math.sqrt(dim)


def min_max_mse(x: Tensor, bits: int) -> float:
    """Return the error of uniform rounding between extremes: step squared over 12."""
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    return float((step.square() / 12).mean())


# --- errors on Gaussian vectors -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "head_dim", "expected"),
    [(4, 64, 0.00889), (4, 128, 0.00918), (3, 64, 0.0329), (3, 128, 0.0338)],
)
def test_turboquant_key_error_is_lloyd_max(bits: int, head_dim: int, expected: float) -> None:
    """Lloyd-Max on N(0, 1) has MSE 0.00950 at 4 bits and 0.03454 at 3.

    On the sphere of a finite dimension extremes are rarer, which takes 2 to 7% off.
    """
    x = gaussian(head_dim)
    got = mse(x, baselines.turboquant_key(x, bits))
    # 1.3 million numbers: sampling error below 0.5%
    assert got == pytest.approx(expected, rel=0.01)
    assert 0.92 < got / {3: 0.03454, 4: 0.00950}[bits] < 1.0


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_turboquant_value_error_is_uniform_rounding(bits: int, head_dim: int) -> None:
    """Both extremes lie on the grid, so the error is a little below step squared over 12."""
    x = gaussian(head_dim)
    ratio = mse(x, baselines.turboquant_value(x, bits)) / min_max_mse(x, bits)
    assert 0.94 < ratio < 1.0


@pytest.mark.parametrize(("head_dim", "expected"), [(64, 0.00829), (128, 0.01011)])
def test_int4_error_is_uniform_rounding_and_a_rounded_zero_point(
    head_dim: int, expected: float
) -> None:
    """The grid is shifted by up to half a step; TurboQuant's V has an fp16 minimum instead."""
    x = gaussian(head_dim)
    got = mse(x, baselines.int4_per_token_head(x))
    assert got == pytest.approx(expected, rel=0.01)
    assert got > mse(x, baselines.turboquant_value(x, 4))


def test_fp8_error_is_that_of_three_mantissa_bits() -> None:
    """Half a step is a sixteenth of the number, from the smallest normal number up."""
    x = gaussian(128)
    read_back = baselines.fp8_e4m3(x)
    assert mse(x, read_back) == pytest.approx(7.05e-4, rel=0.01)
    normal = x.abs() >= 2.0**-6
    assert ((read_back - x).abs()[normal] <= x.abs()[normal] / 16).all()


# --- definitions ----------------------------------------------------------------------------------


def test_fp8_saturates_and_rounds_to_even() -> None:
    """Ties, overflow, infinity and subnormal numbers, by hand."""
    x = torch.tensor(
        [448.0, 465.0, 1e6, -1e6, math.inf, 17.0, 19.0, 2.0**-10, 1.5 * 2.0**-9],
        dtype=torch.float32,
    )
    expected = [448.0, 448.0, 448.0, -448.0, 448.0, 16.0, 20.0, 0.0, 2.0**-8]
    assert baselines.fp8_e4m3(x).tolist() == expected


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_centroids_equal_the_originals(head_dim: int) -> None:
    """Values of vLLM 0.26.0's solver, in units of sigma; the optimum at 4 bits ends in 2.7326."""
    three = [0.2449836, 0.7556455, 1.3431800, 2.1503496]
    four = [0.1284277, 0.3881378, 0.6568799, 0.9424483, 1.2562575, 1.6178818, 2.0684471, 2.7309222]
    for bits, upper in ((3, three), (4, four)):
        got = baselines.turboquant_centroids(head_dim, bits) * math.sqrt(head_dim)
        wanted = torch.tensor([-value for value in reversed(upper)] + upper, dtype=torch.float32)
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-7)


@pytest.mark.parametrize("bits", [3, 4])
def test_turboquant_key_levels_are_in_hadamard_space_with_fp16_norm(bits: int) -> None:
    """Rotating what is read back gives nearest levels, rescaled to the fp16 norm."""
    x = gaussian(64, 50) * 3.0
    rotated = baselines.turboquant_key(x, bits) @ hadamard_matrix(64)
    norm = x.norm(dim=-1, keepdim=True)
    # norm correction: the length read back is the stored norm, up to fp32 rounding
    torch.testing.assert_close(
        rotated.norm(dim=-1, keepdim=True), norm.half().float(), rtol=1e-5, atol=0
    )
    direction = (x @ hadamard_matrix(64)) / norm
    centroids = baselines.turboquant_centroids(64, bits)
    nearest = centroids[(direction[..., None] - centroids).abs().argmin(-1)]
    torch.testing.assert_close(
        rotated, torch.nn.functional.normalize(nearest, dim=-1) * norm.half(), rtol=1e-4, atol=1e-5
    )


def test_turboquant_value_by_hand() -> None:
    """Steps of 1 and of 0.2; scale and minimum are read back in fp16."""
    x = torch.tensor([[0.0, 1.0, 7.4, 15.0], [-1.0, 0.5, 0.25, 2.0]], dtype=torch.float32)
    got = baselines.turboquant_value(x, 4)
    step = torch.tensor(0.2, dtype=torch.float32).half().item()
    by_hand = [[0.0, 1.0, 7.0, 15.0], [-1.0, 8 * step - 1, 6 * step - 1, 15 * step - 1]]
    torch.testing.assert_close(got, torch.tensor(by_hand, dtype=torch.float32))
    assert (
        baselines.turboquant_value(torch.full((4,), 0.1, dtype=torch.float32), 3)[0]
        == torch.tensor(0.1, dtype=torch.float32).half()
    )


def test_int4_levels_are_integer_codes_around_an_integer_zero_point() -> None:
    """Rotated numbers read back as integers, 0 among them, times the vector's step."""
    x = gaussian(128, 50)
    signs = baselines._int4_signs(128)
    unnormalised = hadamard_matrix(128) * math.sqrt(128)
    rotated = (x * signs) @ unnormalised
    read_back = (baselines.int4_per_token_head(x) * signs) @ unnormalised
    step = (rotated.amax(-1, keepdim=True) - rotated.amin(-1, keepdim=True)) / 15
    levels = read_back / step
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    levels = levels.round()
    assert (levels.amax(-1) - levels.amin(-1) <= 15).all()
    assert (levels.amin(-1) <= 0).all()
    inside = (rotated / step - levels).abs() <= 0.5 + 1e-3
    # at most the extreme on the clipped side lies farther than half a step from its level
    assert ((rotated / step - levels).abs() <= 1.0 + 1e-3).all()
    assert inside.float().mean() > 0.98


def test_int4_loses_vectors_whose_rotation_has_one_sign_as_the_original_does() -> None:
    """Coordinate 0 alone rotates to a constant: the range is zero and the zero point clamped."""
    x = torch.zeros(2, 64, dtype=torch.float32)
    x[0, 0], x[1, 0] = 3.0, -3.0
    assert baselines.int4_per_token_head(x).abs().max() < 1e-4


# --- every format ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_read_back_is_finite_fp32_of_the_same_shape(name: str) -> None:
    """Zeros, constants, spikes, bf16, strides and emptiness; the input is left alone."""
    baseline = BASELINES[name]
    assert baseline.name == name
    cases = torch.zeros(2, 4, 6, 64, dtype=torch.bfloat16)
    cases[:, :, 1] = 1.0
    cases[:, :, 2] = -1e-6
    cases[:, :, 3] = 300.0
    cases[:, :, 4, 7] = 100.0
    cases[:, :, 5] = gaussian(64, 8).view(2, 4, 64).bfloat16()
    before = cases.clone()
    for quantize in (baseline.quantize_k, baseline.quantize_v):
        for x in (cases, cases.transpose(1, 2), cases[:0]):
            got = quantize(x)
            assert got.dtype == torch.float32
            assert got.shape == x.shape
            assert got.isfinite().all()
        assert torch.equal(cases, before)
        assert quantize(torch.zeros(64, dtype=torch.float32)).abs().max() == 0


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("constant", [1.0, -2.5])
def test_constant_vectors_keep_their_length(name: str, constant: float) -> None:
    """A rotated constant takes few values, so rounding errors add up: 10%, not 1%."""
    x = torch.full((3, 128), constant, dtype=torch.float32)
    for quantize in (BASELINES[name].quantize_k, BASELINES[name].quantize_v):
        assert quantize(x).norm() == pytest.approx(x.norm().item(), rel=0.1)


@pytest.mark.parametrize("name", BASELINES)
def test_one_vector_is_not_overwritten(name: str) -> None:
    """The transform works in place, and the transpose of one vector needs no copy."""
    x = gaussian(64, 1)
    before = x.clone()
    BASELINES[name].quantize_k(x)
    BASELINES[name].quantize_v(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("name", "at_64", "at_128"),
    [
        ("fp8", 128, 256),
        ("int4_per_token_head", 72, 136),
        ("turboquant_k8v4", 100, 196),
        ("turboquant_4bit_nc", 70, 134),
        ("turboquant_k3v4_nc", 62, 118),
        ("turboquant_3bit_nc", 54, 102),
    ],
)
def test_bits_per_number_follows_the_originals_slot_bytes(
    name: str, at_64: int, at_128: int
) -> None:
    """Bytes of K and V: int4 is D/2 + 4 each, turboquant has slot_size_aligned."""
    bits_per_number = BASELINES[name].bits_per_number
    assert bits_per_number(64) == 8 * at_64 / (2 * 64)
    assert bits_per_number(128) == 8 * at_128 / (2 * 128)


def test_every_format_is_pinned() -> None:
    """A new format needs a row in the table above."""
    assert set(BASELINES) == {"fp8", "int4_per_token_head", *baselines.TURBOQUANT_WIDTHS}


def test_bad_input_names_what_was_wanted() -> None:
    """Rotating formats need a power of two, all need floating numbers."""
    with pytest.raises(ValueError, match="power of two"):
        baselines.int4_per_token_head(torch.zeros(2, 96, dtype=torch.float32))
    with pytest.raises(ValueError, match="power of two"):
        baselines.turboquant_key(torch.zeros(2, 96, dtype=torch.float32), 4)
    with pytest.raises(TypeError, match="floating"):
        baselines.fp8_e4m3(torch.zeros(2, 64, dtype=torch.int32))
