# SPDX-License-Identifier: Apache-2.0
"""What the tests share: Triton's mode, and vectors that try every branch of the codec."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--default-dtype",
        choices=("float16", "bfloat16", "float32", "float64"),
        default="float32",
        help="PyTorch's default dtype while the tests run; model loaders change it",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_default_dtype(getattr(torch, config.getoption("--default-dtype")))
    # Triton reads this once, at its first import, so it is set before any test module is. A run of
    # the GPU tests (-m gpu) compiles its kernels, every other run interprets them on the CPU.
    if config.option.markexpr.strip() != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def hard_vectors() -> Callable[..., Tensor]:
    """Return a maker of ``[n, dim]`` on the CPU: lengths from 1e-6 to 1e6, and the odd cases."""

    def make(n: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, dim, generator=generator, dtype=torch.float32)
        x *= 10 ** (12 * torch.rand(n, 1, generator=generator, dtype=torch.float32) - 6)
        odd: list[Tensor] = [
            torch.zeros(dim, dtype=torch.float32),
            x[-1].clone(),
            x[-1].clone(),
            torch.ones(dim, dtype=torch.float32),
        ]
        odd[1][dim // 2] = float("nan")
        odd[2][0], odd[2][1] = float("inf"), float("-inf")
        odd += [
            torch.full((dim,), value, dtype=torch.float32)
            for value in (1e30, -1e30, 1e-19, 1e-41, 65504.0)
        ]
        odd.append(torch.zeros(dim, dtype=torch.float32).index_fill(0, torch.tensor([3]), -2.0))
        rows = torch.randperm(n, generator=generator)[: len(odd)]
        for row, vector in zip(rows.tolist(), odd, strict=False):
            x[row] = vector
        return x.to(dtype)

    return make
