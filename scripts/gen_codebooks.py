#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Generate the Gaussian codebooks of TurboKV: ``turbokv/_codebooks.py`` and ``codebook.cuh``.

Every codebook is symmetric, so only the positive magnitudes are kept. Widths that a kernel expands
by byte permute (2 to 5 and 8 bits) are restricted to int8 lattices times one scale ("step"); 6 and
7 bits are codec only and keep float levels.

Source: Lloyd, "Least squares quantization in PCM" (1982) for the fixed point; the lattice
restriction is ours and its cost is written into the generated file.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pathlib
import sys

import torch
from torch import Tensor

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "turbokv"
OUTPUT = PACKAGE / "_codebooks.py"
HEADER = PACKAGE / "kernels" / "cuda" / "include" / "turbokv" / "codebook.cuh"
HEADER_BITS = (2, 3, 4, 5, 8)  # the int8 lattices
LARGEST_MAGNITUDE = 127  # int8
_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) * _INV_SQRT_2PI


def _tail(x: Tensor) -> Tensor:
    """P(X > x), accurate far out because it never subtracts from one."""
    return 0.5 * torch.erfc(x / math.sqrt(2.0))


def _cells(magnitudes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return probability, first and second moment of each positive cell (midpoint boundaries).

    A magnitude of zero (mid-tread codebooks) owns the half cell from 0 to the first midpoint; the
    other half follows by symmetry.
    """
    inner = 0.5 * (magnitudes[1:] + magnitudes[:-1])
    low = torch.cat([magnitudes.new_zeros(1), inner])
    high = torch.cat([inner, magnitudes.new_full((1,), 40.0)])
    probability = _tail(low) - _tail(high)
    first = _density(low) - _density(high)
    second = probability + low * _density(low) - high * _density(high)
    return probability, first, second


def gaussian_mse(magnitudes: Tensor) -> float:
    """Mean squared error of the symmetric codebook ``+-magnitudes`` on N(0, 1), in closed form."""
    probability, first, second = _cells(magnitudes)
    return 2.0 * float((second - 2.0 * magnitudes * first + magnitudes**2 * probability).sum())


def lloyd_max(num_magnitudes: int, tolerance: float = 1e-12) -> Tensor:
    """Optimal positive magnitudes for N(0, 1): Lloyd's fixed point, run to ``tolerance``."""
    # Quantiles of N(0, 3) are the high-rate optimal point density (Panter and Dite), so the linear
    # convergence of Lloyd's iteration starts close.
    uniform = (torch.arange(num_magnitudes, dtype=torch.float64) + 0.5) / num_magnitudes
    levels = math.sqrt(3.0) * torch.special.ndtri(0.5 + 0.5 * uniform)
    for _ in range(400_000):
        probability, first, _ = _cells(levels)
        updated = first / probability
        if float((updated - levels).abs().max()) < tolerance:
            return updated
        levels = updated
    raise RuntimeError(f"Lloyd's iteration did not converge for {num_magnitudes} magnitudes")


def best_step(integers: Tensor, low: float, high: float) -> tuple[float, float]:
    """Return ``(mse, step)`` of the best scale for integer magnitudes (golden-section search)."""
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(80):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if gaussian_mse(integers * a) < gaussian_mse(integers * b):
            high = b
        else:
            low = a
    step = 0.5 * (low + high)
    return gaussian_mse(integers * step), step


def lattice(optimal: Tensor) -> tuple[list[int], float, float]:
    """Best int8 magnitudes near ``optimal``: ``(integers, step, mse)``.

    Rounds the optimal levels on a grid of scales, then walks single magnitudes by one until nothing
    improves.
    """
    best: tuple[float, float, Tensor] | None = None
    smallest = float(optimal[-1]) / LARGEST_MAGNITUDE
    for scale in torch.linspace(smallest, 2.5 * smallest, 600, dtype=torch.float64).tolist():
        integers = torch.round(optimal / scale).clamp(1, LARGEST_MAGNITUDE)
        if bool((integers.diff() <= 0).any()):
            continue
        mse = gaussian_mse(integers * scale)
        if best is None or mse < best[0]:
            best = (mse, scale, integers)
    if best is None:
        raise RuntimeError("no int8 lattice separates the levels")
    _, scale, integers = best
    mse, step = best_step(integers, 0.9 * scale, 1.1 * scale)
    improved = True
    while improved:
        improved = False
        for i in range(len(integers)):
            for delta in (-1, 1):
                trial = integers.clone()
                trial[i] += delta
                if trial.min() < 1 or trial.max() > LARGEST_MAGNITUDE or (trial.diff() <= 0).any():
                    continue
                trial_mse, trial_step = best_step(trial, 0.95 * step, 1.05 * step)
                if trial_mse < mse - 1e-12:
                    integers, mse, step, improved = trial, trial_mse, trial_step, True
    return [int(v) for v in integers.tolist()], step, mse


def build(bits: int) -> dict[str, object]:
    """Compute one codebook: magnitudes, step, binary point, mse and the optimal mse."""
    if bits == 8:
        integers = torch.arange(128, dtype=torch.float64)
        mse, step = best_step(integers, 0.02, 0.06)
        # The optimum is Lloyd-Max with 256 free levels; uniform int8 is what IMMA reads.
        optimal_mse = gaussian_mse(lloyd_max(128, tolerance=1e-10))
        magnitudes: list[float] | list[int] = [int(v) for v in integers.tolist()]
    else:
        optimal = lloyd_max(1 << (bits - 1), tolerance=1e-12 if bits < 6 else 1e-10)
        optimal_mse = gaussian_mse(optimal)
        if bits == 2:
            magnitudes = [1, 3]
            mse, step = best_step(torch.tensor([1.0, 3.0], dtype=torch.float64), 0.3, 0.7)
        elif bits in (6, 7):
            # float32, because that is what every backend computes with
            rounded = optimal.float()
            magnitudes, step, mse = rounded.tolist(), 1.0, gaussian_mse(rounded.double())
        else:
            magnitudes, step, mse = lattice(optimal)
    # A binary point inside the magnitudes keeps the stored scale near the vector's rms, where fp16
    # has its precision.
    frac_bits = 0 if step == 1.0 else round(-math.log2(step))
    return {
        "magnitudes": tuple(magnitudes),
        "step": step,
        "frac_bits": frac_bits,
        "mse": mse,
        "optimal_mse": optimal_mse,
    }


def render(books: dict[int, dict[str, object]]) -> str:
    """Return the text of ``turbokv/_codebooks.py``."""
    rows = []
    for bits, book in books.items():
        magnitudes = book["magnitudes"]
        assert isinstance(magnitudes, tuple)
        lines, line = [], ""
        for value in magnitudes:
            item = f"{value!r}, "
            if len(line) + len(item) > 84:
                lines.append(line.rstrip())
                line = ""
            line += item
        lines.append(line.rstrip())
        body = "\n            ".join(lines)
        rows.append(
            f"    {bits}: GaussianCodebook(\n"
            f"        bits={bits},\n"
            f"        magnitudes=(\n            {body}\n        ),\n"
            f"        step={book['step']:.9g},\n"
            f"        frac_bits={book['frac_bits']},\n"
            f"        mse={book['mse']:.6g},\n"
            f"        optimal_mse={book['optimal_mse']:.6g},\n"
            "    ),"
        )
    table = "\n".join(rows)
    checksum = hashlib.sha256(table.encode()).hexdigest()[:12]
    return f'''# SPDX-License-Identifier: Apache-2.0
"""Gaussian codebooks, generated by scripts/gen_codebooks.py: do not edit (sha256 {checksum})."""

from typing import NamedTuple


class GaussianCodebook(NamedTuple):
    """Positive magnitudes of a symmetric codebook and the constants that go with them.

    ``magnitude * step`` is the level for a coordinate of unit variance, ``magnitude *
    2**-frac_bits`` is what a stored scale multiplies. ``mse`` is the closed-form error on N(0, 1).
    """

    bits: int
    magnitudes: tuple[float, ...]
    step: float
    frac_bits: int
    mse: float
    optimal_mse: float


CODEBOOKS: dict[int, GaussianCodebook] = {{
{table}
}}
'''


def render_header(books: dict[int, dict[str, object]]) -> str:
    """Return the text of ``codebook.cuh``, formatted as clang-format does."""
    cases = []
    for bits in HEADER_BITS:
        book = books[bits]
        magnitudes = book["magnitudes"]
        assert isinstance(magnitudes, tuple)
        constants = f"{bits}, {book['frac_bits']}, {book['step']:.9g}"
        if bits == 8:
            cases.append(
                f"  codebook_t book = {{{constants}, {{}}}};\n"
                "  for (int i = 0; i < 128; ++i) book.magnitudes[i] = static_cast<int8_t>(i);\n"
                "  return book;"
            )
            continue
        listed = ", ".join(str(value) for value in magnitudes)
        line = f"  if (bits == {bits}) return {{{constants}, {{{listed}}}}};"
        if len(line) > 100:
            line = f"  if (bits == {bits}) {{\n    return {{{constants}, {{{listed}}}}};\n  }}"
        cases.append(line)
    body = "\n".join(cases)
    checksum = hashlib.sha256(body.encode()).hexdigest()[:12]
    return f"""// SPDX-License-Identifier: Apache-2.0
// Gaussian codebooks, generated by scripts/gen_codebooks.py: do not edit (sha256 {checksum}).
#ifndef TURBOKV_CODEBOOK_CUH_
#define TURBOKV_CODEBOOK_CUH_

#include "turbokv/types.cuh"

namespace turbokv {{

/*! \\brief A symmetric codebook on an int8 lattice; small enough for a kernel's parameters.
 *
 *  `magnitude * step` is the level of a coordinate of unit variance, `magnitude * 2^-frac_bits` is
 *  what a stored scale multiplies. A first magnitude of zero makes the codebook mid-tread (8 bits).
 */
struct codebook_t {{
  int32_t bits;
  int32_t frac_bits;
  double step;             // fp64: the constants of FORMAT.md are rounded from it
  int8_t magnitudes[128];  // the first 2^(bits - 1), strictly ascending
}};

TURBOKV_HOST_DEVICE constexpr int NumMagnitudes(const codebook_t& book) {{
  return 1 << (book.bits - 1);
}}

/*! \\brief Twice the midpoint above magnitude `i`: an integer. */
TURBOKV_HOST_DEVICE constexpr int TwiceBoundary(const codebook_t& book, int i) {{
  return book.magnitudes[i] + book.magnitudes[i + 1];
}}

/*! \\brief Whether kernels can read it: a page width, ascending, mid-tread at 8 bits only. */
TURBOKV_HOST_DEVICE constexpr bool IsValid(const codebook_t& book) {{
  if (!((book.bits >= 2 && book.bits <= 5) || book.bits == 8) || !(book.step > 0)) return false;
  if ((book.magnitudes[0] == 0) != (book.bits == 8) || book.magnitudes[0] < 0) return false;
  for (int i = 1; i < NumMagnitudes(book); ++i) {{
    if (book.magnitudes[i] <= book.magnitudes[i - 1]) return false;
  }}
  return true;
}}

/*! \\brief The data-free codebook of a width that pages can hold: 2, 3, 4, 5 or 8 bits. */
TURBOKV_HOST_DEVICE constexpr codebook_t GaussianCodebook(int bits) {{
{body}
}}

}}  // namespace turbokv

#endif  // TURBOKV_CODEBOOK_CUH_
"""


def main() -> None:
    """Write the files, or with ``--check`` fail if one differs from what would be written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    books = {bits: build(bits) for bits in range(2, 9)}
    for path, text in ((OUTPUT, render(books)), (HEADER, render_header(books))):
        if not args.check:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(f"{path.name} is not what {pathlib.Path(__file__).name} generates")


if __name__ == "__main__":
    main()
