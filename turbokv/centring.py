# SPDX-License-Identifier: Apache-2.0
"""Centred keys: the vector that every key of a segment of positions has subtracted.

A constant added to all keys that a query meets cancels in the softmax, so what keys share need not
be quantised. After rotary embedding they share little over long ranges, but within a segment of 256
positions the mean of ``R(p) mu`` over its positions does well, with ``mu`` the mean key *before*
rotary embedding. Readers rebuild ``K = scale * code + mu_segment``, which is exact for any ``mu``.

Source: softmax invariance to key offsets is used by OptR and KVQuant (arXiv:2401.18079, section
3.1, pre-RoPE statistics); the per-segment form is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENT = 256  # logical positions that share one offset; part of the format
PROBE_TOKENS = 64
# fp32 rounding through some tens of layers stays under 1e-3; a wrong rotary gives errors near 1.
_PROBE_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Rotary:
    """How a layer embeds positions: enough to rotate a key to position ``p`` and back.

    Attributes
    ----------
    inv_freq
        float64 ``[rotary_dim / 2]``, radians per position. Empty means no rotary embedding.
    interleaved
        False: coordinate ``i`` pairs with ``i + rotary_dim / 2`` (Llama). True: ``2i`` with
        ``2i + 1`` (GPT-J).
    """

    inv_freq: Tensor
    interleaved: bool = False

    @property
    def rotary_dim(self) -> int:
        """Leading coordinates that rotate; the rest keep their place."""
        return 2 * self.inv_freq.numel()

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Multiply the pairs of ``x`` ``[..., head_dim]`` by ``cos + i sin`` of each pair."""
        dim = self.rotary_dim
        if self.interleaved:
            a, b = x[..., 0:dim:2], x[..., 1:dim:2]
            turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        else:
            a, b = x[..., : dim // 2], x[..., dim // 2 : dim]
            turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
        still = x[..., dim:].expand(*turned.shape[:-1], -1)
        return torch.cat([turned, still], dim=-1)

    def rotate(self, x: Tensor, positions: Tensor, *, inverse: bool = False) -> Tensor:
        """Rotate ``x`` ``[..., tokens, head_dim]`` to ``positions`` ``[tokens]`` (or back)."""
        inv_freq = self.inv_freq.to(x.device)
        angle = positions.to(device=x.device, dtype=torch.float64)[:, None] * inv_freq
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return self._turn(x, cos, -sin if inverse else sin)

    def segment_gains(self) -> Tensor:
        """Return the length of the mean of each pair's turns over a segment, against that of one.

        float64 ``[rotary_dim / 2]``, 0 to 1: the absolute mean of ``e^{i p f}`` over 256
        consecutive positions, whichever they are. A pair near 0 turns so fast that a segment's
        mean loses it.
        """
        turns = torch.arange(SEGMENT, device="cpu", dtype=torch.float64)[:, None]
        angle = turns * self.inv_freq.to("cpu", torch.float64)
        return torch.complex(angle.cos(), angle.sin()).mean(0).abs()

    def segment_means(self, mu: Tensor, first: int, last: int) -> Tensor:
        """Mean of ``R(p) mu`` over each segment's 256 positions.

        Parameters
        ----------
        mu
            ``[heads, head_dim]``, the mean key before rotary embedding.
        first, last
            Segments ``first`` to ``last - 1``.

        Returns
        -------
        Tensor
            fp32 ``[last - first, heads, head_dim]`` on ``mu``'s device.
        """
        device = mu.device
        inv_freq = self.inv_freq.to(device)
        starts = torch.arange(first, last, device=device, dtype=torch.float64) * SEGMENT
        # the mean of e^{i p f} over a segment is e^{i start f} times a constant of f
        inner = torch.arange(SEGMENT, device=device, dtype=torch.float64)[:, None] * inv_freq
        mean_cos, mean_sin = inner.cos().mean(0), inner.sin().mean(0)
        angle = starts[:, None] * inv_freq
        cos = angle.cos() * mean_cos - angle.sin() * mean_sin
        sin = angle.sin() * mean_cos + angle.cos() * mean_sin
        return self._turn(mu.to(torch.float64), cos[:, None], sin[:, None]).to(torch.float32)


def matching_rotary(keys: Tensor, candidates: Iterable[Rotary]) -> Rotary | None:
    """Return the first rotary that explains how ``keys`` differ by position, or None.

    Parameters
    ----------
    keys
        ``[heads, tokens, head_dim]`` at positions 0, 1, ...: of tokens that had the same key before
        rotary embedding, so that ``k(p) = R(p) k(0)`` holds for the right one.
    candidates
        Tried in order; without rotary embedding first, if it is among them.
    """
    k = keys.to("cpu", torch.float64)
    positions = torch.arange(k.shape[1], dtype=torch.int64, device="cpu")
    for rotary in candidates:
        if rotary.rotary_dim > k.shape[-1]:
            continue
        expected = rotary.rotate(k[:, :1].expand_as(k), positions)
        if float((expected - k).norm() / k.norm()) < _PROBE_TOLERANCE:
            return rotary
    return None


def no_rotary() -> Rotary:
    """Return the embedding of layers whose keys do not depend on their position."""
    return Rotary(torch.empty(0, dtype=torch.float64, device="cpu"))


@dataclass(eq=False)
class KeyOffsets:
    """Offsets of one layer's keys, by logical position.

    Attributes
    ----------
    mu
        fp32 ``[heads, head_dim]``: mean key before rotary embedding.
    rotary
        The layer's rotary embedding.
    """

    mu: Tensor
    rotary: Rotary

    def __post_init__(self) -> None:
        """Check shapes and start with no segment computed."""
        if self.mu.ndim != 2:
            raise ValueError(f"mu: wanted shape [heads, head_dim], got {list(self.mu.shape)}")
        if self.rotary.rotary_dim > self.mu.shape[1]:
            raise ValueError(
                f"rotary: wanted at most {self.mu.shape[1]} rotary coordinates,"
                f" got {self.rotary.rotary_dim}"
            )
        self._table = self.mu.new_zeros((0, *self.mu.shape))

    def to(self, device: torch.device) -> KeyOffsets:
        """Return the same offsets on ``device``."""
        return self if self.mu.device == device else KeyOffsets(self.mu.to(device), self.rotary)

    def energy_left(self) -> Tensor:
        """Return what a segment's offset leaves of the mean key: float64 ``[heads]``, on the CPU.

        The mean over positions of ``|R(p) mu - offset|^2``. A pair of channels of gain ``g``
        (:meth:`Rotary.segment_gains`) leaves ``1 - g^2`` of its part of ``|mu|^2``, and channels
        that do not rotate leave nothing.
        """
        dim = self.rotary.rotary_dim
        squares = self.mu[:, :dim].to("cpu", torch.float64).square()
        if self.rotary.interleaved:
            pairs = squares[:, 0::2] + squares[:, 1::2]
        else:
            pairs = squares[:, : dim // 2] + squares[:, dim // 2 :]
        return (pairs * (1.0 - self.rotary.segment_gains().square())).sum(1)

    def at(self, start: int, count: int) -> Tensor:
        """Return the offsets of ``count`` consecutive positions: fp32 ``[heads, count, head_dim]``.

        Positions below zero (padding) take the first segment's offset.
        """
        positions = torch.arange(start, start + count, dtype=torch.int64, device=self.mu.device)
        positions.clamp_(min=0)
        needed = max(0, start + count - 1) // SEGMENT + 1
        if needed > self._table.shape[0]:
            have = self._table.shape[0]
            more = self.rotary.segment_means(self.mu, have, max(needed, 2 * have))
            self._table = torch.cat([self._table, more])
        return self._table[positions // SEGMENT].transpose(0, 1)


def rotary_frequencies(
    head_dim: int, theta: float = 10_000.0, rotary_dim: int | None = None
) -> Tensor:
    """Return plain RoPE frequencies, float64 ``[rotary_dim / 2]`` (arXiv:2104.09864, 3.2.2)."""
    dim = head_dim if rotary_dim is None else rotary_dim
    if dim % 2 or not 0 <= dim <= head_dim:
        raise ValueError(f"rotary_dim: wanted an even number up to {head_dim}, got {dim}")
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / max(dim, 1)
    return torch.exp(-math.log(theta) * exponent)
