# SPDX-License-Identifier: Apache-2.0
"""OnlineCalibrator: codebooks per layer from the vectors a model really stores.

Every layer keeps one histogram of ``|coordinate| / rms`` in rotated space for keys and one for
values: constant memory, no sampling. :meth:`OnlineCalibrator.codebook` runs Lloyd's iteration on it
and restricts the result to an int8 lattice, so calibrated codebooks run in the same kernels.

A calibrated codebook lowers the squared error of its layer and may still raise the divergence of
the model: keep it only if ``turbokv eval`` confirms it.

Source: Lloyd (1982); TurboQuant, arXiv:2504.19874, section 3, for the rotated coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbokv import core
from turbokv.codec import TurboKVCodec
from turbokv.core import Codebook, Role, check_bits

LATTICE_BITS = (2, 3, 4, 5)
_BINS, _RANGE = 4096, 8.0  # a coordinate beyond 8 rms falls into the last bin
_MIN_COUNT = 10_000
_LARGEST = 127


class OnlineCalibrator:
    """Collects rotated coordinates by layer and role, and fits codebooks to them.

    Parameters
    ----------
    codec
        Rotates the vectors; its widths are the defaults of :meth:`codebook`.
    """

    def __init__(self, codec: TurboKVCodec) -> None:
        self.codec = codec
        self._counts: dict[tuple[int, Role], Tensor] = {}

    def collect(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Add keys and values ``[..., head_dim]``, as they would be compressed.

        Keys with an offset are given with it subtracted.
        """
        roles: tuple[tuple[Role, Tensor], ...] = (("k", k), ("v", v))
        for role, x in roles:
            core.check_vectors(x, self.codec.head_dim, role)
            flat = x.reshape(-1, self.codec.head_dim)
            rotated = core.rotate(flat, self.codec.vector_format(role))
            rms = rotated.square().mean(-1, keepdim=True).sqrt()
            unit = (rotated / rms.clamp_min(1e-20)).abs()[rms[..., 0] > 0]
            bins = (unit * (_BINS / _RANGE)).clamp_(max=_BINS - 1).to(torch.int64)
            counts = torch.bincount(bins.reshape(-1), minlength=_BINS).to("cpu", torch.float64)
            key = (layer, role)
            self._counts[key] = self._counts.get(key, torch.zeros_like(counts)) + counts

    def count(self, layer: int, role: Role) -> int:
        """Return the coordinates collected for a layer and role."""
        counts = self._counts.get((layer, role))
        return 0 if counts is None else int(counts.sum())

    def codebook(self, layer: int, role: Role, bits: int | None = None) -> Codebook:
        """Fit a codebook of int8 magnitudes.

        Parameters
        ----------
        layer, role
            Whose vectors.
        bits
            2 to 5 (the widths that kernels expand from a lattice); default the codec's.

        Raises
        ------
        ValueError
            If fewer than 10,000 coordinates were collected, or the width has no lattice.
        """
        if bits is None:
            bits = self.codec.k_bits if role == "k" else self.codec.v_bits
        if check_bits(bits) not in LATTICE_BITS:
            raise ValueError(f"bits: wanted one of {LATTICE_BITS}, got {bits}")
        have = self.count(layer, role)
        if have < _MIN_COUNT:
            raise ValueError(
                f"layer: wanted at least {_MIN_COUNT} {role} coordinates collected for layer"
                f" {layer}, got {have}"
            )
        weight = self._counts[layer, role]
        centre = (torch.arange(_BINS, dtype=torch.float64, device="cpu") + 0.5) * (_RANGE / _BINS)
        start = torch.tensor(Codebook.gaussian(bits).magnitudes, dtype=torch.float64, device="cpu")
        levels = _lloyd(start * Codebook.gaussian(bits).step, centre, weight)
        return _lattice(bits, levels, centre, weight)


def _assign(levels: Tensor, centre: Tensor) -> Tensor:
    return torch.bucketize(centre, 0.5 * (levels[1:] + levels[:-1]))


def _error(levels: Tensor, centre: Tensor, weight: Tensor) -> float:
    """Mean squared error on the histogram."""
    nearest = levels[_assign(levels, centre)]
    return float((weight * (centre - nearest) ** 2).sum() / weight.sum())


def _lloyd(levels: Tensor, centre: Tensor, weight: Tensor) -> Tensor:
    """Lloyd's iteration on a histogram; a cell without weight keeps its level."""
    for _ in range(500):
        cell = _assign(levels, centre)
        mass = torch.zeros_like(levels).index_add_(0, cell, weight)
        moment = torch.zeros_like(levels).index_add_(0, cell, weight * centre)
        updated = torch.where(mass > 0, moment / mass.clamp_min(1e-300), levels)
        if float((updated - levels).abs().max()) < 1e-7:
            return updated
        levels = updated
    return levels


def _lattice(bits: int, levels: Tensor, centre: Tensor, weight: Tensor) -> Codebook:
    """Round levels to int8 magnitudes times the step that costs least."""
    if bits == 2:
        # two bits are uniform everywhere (no lookup in kernels): only the step is fitted
        pair = torch.tensor([1.0, 3.0], dtype=torch.float64, device="cpu")
        candidates = [(pair, s) for s in _steps(0.3, 0.7)]
    else:
        smallest = float(levels[-1]) / _LARGEST
        candidates = [
            (torch.round(levels / s).clamp(1, _LARGEST), s) for s in _steps(smallest, 3 * smallest)
        ]
    best: tuple[float, Tensor, float] | None = None
    for magnitudes, step in candidates:
        if bool((magnitudes.diff() <= 0).any()):
            continue
        error = _error(magnitudes * step, centre, weight)
        if best is None or error < best[0]:
            best = (error, magnitudes, step)
    if best is None:
        raise ValueError(f"bits: wanted separable levels at {bits} bits, got {levels.tolist()}")
    gaussian = Codebook.gaussian(bits)
    return Codebook(bits, tuple(int(m) for m in best[1]), best[2], gaussian.frac_bits)


def _steps(low: float, high: float) -> list[float]:
    return torch.linspace(low, high, 300, dtype=torch.float64, device="cpu").tolist()
