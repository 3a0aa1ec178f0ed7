# SPDX-License-Identifier: Apache-2.0
"""The kernel of mapped keys on a GPU: against float64, in a CUDA graph, and through the cache."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from turbokv.kernels.triton_key_map import map_heads

pytestmark = pytest.mark.gpu

# Rounding of the result, and for 16 bits of the second term of the matrix; fp32 in IEEE.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).cuda()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"),
    [
        (1, 32, 8, 128),
        (16, 32, 8, 128),
        (700, 8, 8, 128),
        (300, 9, 3, 64),
        (40, 8, 2, 256),
        (33, 6, 2, 96),
        (3, 3, 3, 40),
    ],
)
def test_vectors_meet_the_matrix_of_their_head(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    x = normal(tokens, 3 * heads, dim).to(dtype)[:, heads : 2 * heads]  # as in a fused projection
    matrix = normal(kv_heads, dim, dim, seed=1)
    got = map_heads(x, matrix)
    wide = matrix.double().repeat_interleave(heads // kv_heads, 0)
    want = torch.einsum("thd,hde->the", x.double(), wide)
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(error.max()) < TOLERANCE[dtype]


def test_a_matrix_in_two_terms_is_better_than_one_rounded_to_16_bits() -> None:
    x, matrix = normal(700, 8, 128).bfloat16(), normal(8, 128, 128, seed=1)
    out = torch.empty(700, 8, 128, dtype=torch.float32, device="cuda")
    map_heads(x, matrix, out)
    want = torch.einsum("thd,hde->the", x.double(), matrix.double())
    assert float((out - want).norm() / want.norm()) < 2**-15


def test_a_graph_follows_what_its_buffers_hold() -> None:
    x, matrix = normal(16, 32, 128).bfloat16(), normal(8, 128, 128, seed=1)
    out = torch.empty_like(x)
    map_heads(x, matrix, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        map_heads(x, matrix, out)
    for seed in (2, 3):
        x.copy_(normal(16, 32, 128, seed=seed))
        matrix.copy_(normal(8, 128, 128, seed=seed + 10))
        graph.replay()
        assert torch.equal(out, map_heads(x, matrix))
