# SPDX-License-Identifier: Apache-2.0
"""Segment offsets against a direct average, in float64."""

from __future__ import annotations

import pytest
import torch

from turbokv.centring import SEGMENT, KeyOffsets, Rotary, rotary_frequencies


def direct_mean(rotary: Rotary, mu: torch.Tensor, segment: int) -> torch.Tensor:
    positions = torch.arange(segment * SEGMENT, (segment + 1) * SEGMENT)
    wide = mu.double()[:, None].expand(-1, SEGMENT, -1)
    return rotary.rotate(wide, positions).mean(1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 32, 64])
@pytest.mark.parametrize("segment", [0, 1, 500])
def test_segment_mean_is_the_mean_over_its_positions(
    interleaved: bool, rotary_dim: int, segment: int
) -> None:
    rotary = Rotary(rotary_frequencies(64, rotary_dim=rotary_dim), interleaved)
    mu = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    got = rotary.segment_means(mu, segment, segment + 1)[0]
    torch.testing.assert_close(got.double(), direct_mean(rotary, mu, segment), rtol=0, atol=1e-6)


def test_rotating_there_and_back_is_the_identity() -> None:
    rotary = Rotary(rotary_frequencies(64, theta=1e6))
    x = torch.randn(2, 100, 64, dtype=torch.float64)
    positions = torch.arange(100_000, 100_100)
    back = rotary.rotate(rotary.rotate(x, positions), positions, inverse=True)
    torch.testing.assert_close(back, x)


def test_pair_orders_match_the_published_formulas() -> None:
    inv_freq = rotary_frequencies(4)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    p = torch.tensor([7])
    a = (7 * inv_freq).tolist()
    cos, sin = (
        [torch.tensor(v, dtype=torch.float32).cos().item() for v in a],
        [torch.tensor(v, dtype=torch.float32).sin().item() for v in a],
    )
    half = [1 * cos[0] - 3 * sin[0], 2 * cos[1] - 4 * sin[1], 1 * sin[0] + 3 * cos[0]]
    pairs = [1 * cos[0] - 2 * sin[0], 1 * sin[0] + 2 * cos[0], 3 * cos[1] - 4 * sin[1]]
    assert Rotary(inv_freq).rotate(x, p)[0, :3].tolist() == pytest.approx(half, abs=1e-6)
    assert Rotary(inv_freq, True).rotate(x, p)[0, :3].tolist() == pytest.approx(pairs, abs=1e-6)


def test_offsets_change_at_segment_borders_and_in_any_order_of_calls() -> None:
    mu = torch.randn(2, 64, dtype=torch.float32)
    offsets = KeyOffsets(mu, Rotary(rotary_frequencies(64)))
    late = offsets.at(1000, 600)
    early = offsets.at(0, 600)
    assert torch.equal(early[:, 0], early[:, 255]) and not torch.equal(early[:, 255], early[:, 256])
    fresh = KeyOffsets(mu, Rotary(rotary_frequencies(64)))
    assert torch.equal(fresh.at(1000, 600), late)
    assert torch.equal(offsets.at(-5, 10)[:, 0], early[:, 0])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"mu: wanted shape \[heads, head_dim\], got \[64\]"):
        KeyOffsets(torch.zeros(64, dtype=torch.float32), Rotary(rotary_frequencies(64)))
    with pytest.raises(ValueError, match="rotary: wanted at most 32 rotary coordinates, got 64"):
        KeyOffsets(torch.zeros(2, 32, dtype=torch.float32), Rotary(rotary_frequencies(64)))
    with pytest.raises(ValueError, match="rotary_dim: wanted an even number up to 64, got 66"):
        rotary_frequencies(64, rotary_dim=66)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 32, 64])
def test_energy_left_is_the_mean_square_of_what_offsets_leave(
    interleaved: bool, rotary_dim: int
) -> None:
    rotary = Rotary(rotary_frequencies(64, rotary_dim=rotary_dim), interleaved)
    offsets = KeyOffsets(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), rotary)
    positions = torch.arange(5 * SEGMENT, 6 * SEGMENT)
    keys = rotary.rotate(offsets.mu.double()[:, None].expand(-1, SEGMENT, -1), positions)
    left = (keys - offsets.at(5 * SEGMENT, SEGMENT)).square().sum(-1).mean(-1)
    torch.testing.assert_close(offsets.energy_left(), left, rtol=1e-5, atol=1e-9)


def test_fast_channels_lose_their_mean_and_slow_ones_keep_it() -> None:
    gains = Rotary(rotary_frequencies(128, theta=1e6)).segment_gains()
    assert float(gains[0]) < 0.01  # a turn in 6 positions
    assert float(gains[-1]) > 0.999  # a turn in five million
    assert Rotary(torch.zeros(0, dtype=torch.float64)).segment_gains().shape == (0,)
