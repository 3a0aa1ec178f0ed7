# SPDX-License-Identifier: Apache-2.0
"""The generated codebooks: recomputed, converged, and as good as promised on N(0, 1)."""

from __future__ import annotations

import importlib.util
import math
import pathlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import ref
from turbokv._codebooks import CODEBOOKS
from turbokv.core import Codebook

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "scripts" / "gen_codebooks.py"
# largest mean squared error on N(0, 1), and excess over the optimum of that many levels
LIMITS = {2: 0.1190, 3: 0.0347, 4: 0.00952, 5: 0.00253, 8: 9e-5}
EXCESS = {3: 0.001, 4: 0.001, 5: 0.006, 6: 0.001, 7: 0.001}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """Return the script as a module (it is no package)."""
    spec = importlib.util.spec_from_file_location("gen_codebooks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def levels(bits: int) -> torch.Tensor:
    """Magnitudes for a coordinate of unit variance, float64."""
    book = CODEBOOKS[bits]
    return torch.tensor(book.magnitudes, dtype=torch.float64) * book.step


def sampled_mse(bits: int, count: int = 1_000_000) -> float:
    """Error of nearest-level rounding of samples in [0, 9], one a stratum, weighted by density.

    Unweighted, the few numbers beyond the last level would make most of the noise.
    """
    inside = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = (torch.arange(count, dtype=torch.float64) + inside) * (9.0 / count)
    density = torch.exp(-0.5 * x * x) * (2.0 / math.sqrt(2.0 * math.pi))
    m = levels(bits)
    error = m[torch.bucketize(x, 0.5 * (m[1:] + m[:-1]))] - x
    return float((density * error * error).mean()) * 9.0


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_recomputing_gives_the_same_codebook(generator: ModuleType, bits: int) -> None:
    got: dict[str, Any] = generator.build(bits)
    book = CODEBOOKS[bits]
    assert (got["magnitudes"], got["frac_bits"]) == (book.magnitudes, book.frac_bits)
    for name in ("step", "mse", "optimal_mse"):
        # what nine (six) written digits leave
        assert got[name] == pytest.approx(getattr(book, name), rel=5e-6), name


@pytest.mark.parametrize("bits", [6, 7])
def test_float_levels_are_a_fixed_point_of_lloyd(generator: ModuleType, bits: int) -> None:
    """Each magnitude is the mean of its cell: 1e-6 is the rounding to fp32 and a stop at 1e-10."""
    m = levels(bits)
    probability, first, _ = generator._cells(m)
    torch.testing.assert_close(first / probability, m, rtol=0, atol=1e-6)


def test_uniform_eight_bits_has_the_best_step(generator: ModuleType) -> None:
    best = generator.gaussian_mse(levels(8))
    for factor in (0.999, 1.001):
        assert generator.gaussian_mse(levels(8) * factor) > best


@pytest.mark.parametrize("bits", LIMITS)
def test_error_on_gaussian_numbers(generator: ModuleType, bits: int) -> None:
    assert generator.gaussian_mse(levels(bits)) <= LIMITS[bits]
    assert sampled_mse(bits) <= LIMITS[bits]


@pytest.mark.parametrize("bits", EXCESS)
def test_error_is_near_the_optimum(generator: ModuleType, bits: int) -> None:
    """At 6 and 7 bits the levels are the fixed point, unique for a log-concave density: optimal."""
    book = CODEBOOKS[bits]
    optimal = book.optimal_mse
    if bits in (3, 4, 5):
        optimal = generator.gaussian_mse(generator.lloyd_max(1 << (bits - 1)))
    assert generator.gaussian_mse(levels(bits)) <= optimal * (1 + EXCESS[bits])
    assert sampled_mse(bits) <= optimal * (1 + EXCESS[bits] + 1e-4)  # sampling


@pytest.mark.parametrize("bits", CODEBOOKS)
def test_written_errors_are_true(generator: ModuleType, bits: int) -> None:
    book = CODEBOOKS[bits]
    assert generator.gaussian_mse(levels(bits)) == pytest.approx(book.mse, rel=5e-6)
    assert sampled_mse(bits) == pytest.approx(book.mse, rel=1e-4)


@pytest.mark.parametrize("bits", ref.BOOKS)
def test_format_text_has_the_same_numbers(bits: int) -> None:
    """``ref.py`` was typed from FORMAT.md."""
    book, typed = CODEBOOKS[bits], ref.BOOKS[bits]
    assert (book.magnitudes, book.step, book.frac_bits) == typed


@pytest.mark.parametrize("bits", CODEBOOKS)
def test_codebook_tables(bits: int) -> None:
    book = Codebook.gaussian(bits)
    assert book.levels.numel() == 1 << bits
    assert (book.levels.diff() >= 0).all()
    assert book.boundaries.numel() == (1 << (bits - 1)) - 1
    assert book.is_lattice == (bits not in (6, 7))
    assert book.is_mid_tread == (bits == 8)
    if not book.is_mid_tread:
        assert torch.equal(book.levels, -book.levels.flip(0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"magnitudes": (1.0, 2.0, 3.0)}, "magnitudes: wanted 2 values, got 3"),
        ({"magnitudes": (3.0, 1.0)}, "magnitudes: wanted strictly ascending"),
        ({"magnitudes": (-1.0, 1.0)}, "magnitudes: wanted 0 to 127"),
        ({"magnitudes": (1.0, 128.0)}, "magnitudes: wanted 0 to 127"),
        ({"step": 0.0}, "step: wanted a positive number, got 0.0"),
        ({"step": float("nan")}, "step: wanted a positive number, got nan"),
        ({"bits": 9}, "bits: wanted 2 to 8, got 9"),
    ],
)
def test_codebook_refuses(kwargs: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"bits": 2, "magnitudes": (1.0, 3.0), "step": 0.5, "frac_bits": 1}
    with pytest.raises(ValueError, match=message):
        Codebook(**{**good, **kwargs})
