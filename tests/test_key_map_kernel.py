# SPDX-License-Identifier: Apache-2.0
"""The kernel of mapped keys and queries against float64, by Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
from turbokv.kernels.triton_key_map import map_heads
from turbokv.key_map import KeyMap


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


# Rounding of the result, and for 16 bits of the second term of the matrix.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"),
    [(1, 8, 2, 128), (5, 2, 2, 64), (70, 6, 2, 96), (17, 4, 1, 256), (3, 3, 3, 40)],
)
def test_vectors_meet_the_matrix_of_their_head(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    x = normal(tokens, heads, dim).to(dtype)
    matrix = normal(kv_heads, dim, dim, seed=1)
    got = map_heads(x, matrix)
    want = torch.einsum(
        "thd,hde->the", x.double(), matrix.double().repeat_interleave(heads // kv_heads, 0)
    )
    assert got.dtype == dtype
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(error.max()) < TOLERANCE[dtype]


def test_a_matrix_in_two_terms_is_better_than_one_rounded_to_16_bits() -> None:
    x, matrix = normal(64, 2, 64).bfloat16(), normal(2, 64, 64, seed=1)
    out = torch.empty(64, 2, 64, dtype=torch.float32)
    map_heads(x, matrix, out)
    want, rounded = (
        torch.einsum("thd,hde->the", x.double(), m.double()) for m in (matrix, matrix.bfloat16())
    )
    error = float((out - want).norm() / want.norm())
    assert error < 2**-15 < 2**-10 < float((rounded - want).norm() / want.norm())


def test_keys_and_queries_of_the_kernel_are_those_of_the_map() -> None:
    key_map = KeyMap(normal(2, 64, 64) + 8 * torch.eye(64, dtype=torch.float32))
    k, q = normal(9, 2, 64, seed=2), normal(9, 6, 64, seed=3)
    mapped = map_heads(k, key_map.matrix.mT.contiguous())
    torch.testing.assert_close(mapped, key_map.map_keys(k.transpose(0, 1)).transpose(0, 1))
    asked = map_heads(q, key_map.inverse)
    torch.testing.assert_close(asked, key_map.map_queries(q.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strided_rows_and_numbers_that_are_none(dtype: torch.dtype) -> None:
    """Keys as they lie in a fused projection; infinities stay finite and NaN stays NaN."""
    fused = normal(20, 3 * 64).to(dtype)
    x = fused[:, 64:].view(20, 2, 64)
    matrix = normal(2, 64, 64, seed=1) / 64
    x[1, 0, 5], x[2, 1, 7], x[3, 0, 0] = math.inf, -math.inf, math.nan
    got = map_heads(x, matrix)
    assert bool(got[1:3].isfinite().all()) or dtype == torch.float16  # sums may leave fp16
    assert not bool(got[:3].isnan().any())
    assert bool(got[3, 0].isnan().all()) and bool(got[3, 1].isfinite().all())
    plain = map_heads(x[4:].contiguous(), matrix)
    assert torch.equal(got[4:], plain)


def test_bad_arguments_are_named() -> None:
    x, matrix = normal(3, 4, 64), normal(2, 64, 64)
    assert map_heads(x[:0], matrix).shape == (0, 4, 64)
    with pytest.raises(ValueError, match=r"matrix: wanted shape \[a divisor of 4, 64, 64\]"):
        map_heads(x, normal(3, 64, 64))
    with pytest.raises(ValueError, match="wanted contiguous rows and a contiguous matrix"):
        map_heads(x, matrix.mT)
    with pytest.raises(TypeError, match=r"got torch.float32 and torch.float16"):
        map_heads(x, matrix.half())
    with pytest.raises(ValueError, match=r"out: wanted shape \[3, 4, 64\]"):
        map_heads(x, matrix, normal(3, 5, 64))
