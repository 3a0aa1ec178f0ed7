# SPDX-License-Identifier: Apache-2.0
"""Codebooks: the magnitudes that codes stand for, in lattice units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from turbokv._codebooks import CODEBOOKS

MIN_BITS, MAX_BITS = 2, 8
# Kernels put it into the exponent of an fp16 number.
MAX_FRAC_BITS = 20


def check_bits(bits: int, name: str = "bits") -> int:
    """Return ``bits`` if it is a supported width (2 to 8), else raise naming the argument."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{name}: wanted an int from {MIN_BITS} to {MAX_BITS}, got {bits!r}")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{name}: wanted {MIN_BITS} to {MAX_BITS}, got {bits}")
    return bits


@dataclass(frozen=True)
class Codebook:
    """A symmetric codebook: positive magnitudes in lattice units.

    Attributes
    ----------
    bits
        Width of a code.
    magnitudes
        Ascending. Integers up to 127 (an int8 lattice), or floats at 6 and 7 bits. A first
        magnitude of zero makes the codebook mid-tread (8 bits).
    step
        Level of magnitude 1 for a coordinate of unit variance.
    frac_bits
        ``magnitude * 2**-frac_bits`` is what a stored scale multiplies.
    """

    bits: int
    magnitudes: tuple[float, ...]
    step: float
    frac_bits: int

    def __post_init__(self) -> None:
        """Refuse magnitudes that no kernel could read."""
        check_bits(self.bits)
        want = 1 << (self.bits - 1)
        if len(self.magnitudes) != want:
            raise ValueError(f"magnitudes: wanted {want} values, got {len(self.magnitudes)}")
        if not all(map(math.isfinite, self.magnitudes)):
            raise ValueError(f"magnitudes: wanted finite numbers, got {self.magnitudes}")
        if any(b <= a for a, b in zip(self.magnitudes, self.magnitudes[1:], strict=False)):
            raise ValueError(f"magnitudes: wanted strictly ascending, got {self.magnitudes}")
        if self.magnitudes[0] < 0 or self.magnitudes[-1] > 127:
            raise ValueError(f"magnitudes: wanted 0 to 127, got {self.magnitudes}")
        if not (math.isfinite(self.step) and self.step > 0):
            raise ValueError(f"step: wanted a positive number, got {self.step}")
        if type(self.frac_bits) is not int or not 0 <= self.frac_bits <= MAX_FRAC_BITS:
            raise ValueError(
                f"frac_bits: wanted an int from 0 to {MAX_FRAC_BITS}, got {self.frac_bits!r}"
            )

    @classmethod
    def gaussian(cls, bits: int) -> Codebook:
        """Return the data-free codebook of this width (``scripts/gen_codebooks.py``)."""
        book = CODEBOOKS[check_bits(bits)]
        return cls(book.bits, book.magnitudes, book.step, book.frac_bits)

    @property
    def is_lattice(self) -> bool:
        """Whether all magnitudes are integers, so that boundaries are exact half-integers."""
        return all(float(m).is_integer() for m in self.magnitudes)

    @property
    def is_mid_tread(self) -> bool:
        """Whether zero is a level (its two codes would coincide; one is never written)."""
        return self.magnitudes[0] == 0

    @cached_property
    def boundaries(self) -> Tensor:
        """Midpoints between magnitudes, fp32 ``[2**(bits-1) - 1]``, in lattice units."""
        m = torch.tensor(self.magnitudes, dtype=torch.float64, device="cpu")
        return (0.5 * (m[1:] + m[:-1])).float()

    @cached_property
    def levels(self) -> Tensor:
        """Value of every code in lattice units, fp32 ``[2**bits]``, ascending.

        Mid-tread codebooks never write code 0; it reads as ``-magnitudes[-1]``.
        """
        m = torch.tensor(self.magnitudes, dtype=torch.float32, device="cpu")
        if self.is_mid_tread:
            return torch.cat([-m[-1:], -m.flip(0)[:-1], m])
        return torch.cat([-m.flip(0), m])
