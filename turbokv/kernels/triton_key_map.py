# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of mapped keys: vectors of every head times the matrix of their KV head.

Mapping: program ``(i, j, h)`` owns rows ``i * ROWS`` and up of KV head ``h``, a row being a token
and one of the query heads that share the KV head, and columns ``j * COLUMNS`` and up. So a matrix
is read once for all queries of a group, and a single token still fills some dozens of programs.

A 16-bit vector is exact in its own type, so its products run on tensor cores with the matrix in two
terms of that type, and lose less (2^-16) than rounding the result does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbokv.core import INPUT_LIMIT
from turbokv.kernels.triton_kernels import INTERPRETED, _narrow, _widen, device_guard

_INTERPRETED = tl.constexpr(INTERPRETED)
_COLUMNS = 32
_DEPTH = 64
_FEW_ROWS, _MANY_ROWS = 16, 64  # the fewest that tensor cores take; enough for long prefills
_MANY_TOKENS = 256
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["rows", "group"])
def _map_kernel(
    x_ptr,
    matrix_ptr,
    out_ptr,
    rows,
    group,
    x_token_stride,
    x_head_stride,
    out_token_stride,
    out_head_stride,
    limit,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TWO_TERMS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kv_head = tl.program_id(2)
    token = (row // group).to(tl.int64)
    head = kv_head * group + row % group
    x_row = x_ptr + token * x_token_stride + head * x_head_stride
    matrix_head = matrix_ptr + kv_head.to(tl.int64) * DIM * DIM
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in tl.static_range(0, DIM, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        is_row = (row < rows)[:, None] & (depth < DIM)[None, :]
        x = _widen(tl.load(x_row[:, None] + depth[None, :], mask=is_row, other=0.0))
        # infinities would become NaN; NaN has to pass
        x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
        is_part = (depth < DIM)[:, None] & (column < DIM)[None, :]
        part = tl.load(
            matrix_head + depth[:, None] * DIM + column[None, :], mask=is_part, other=0.0
        )
        if TWO_TERMS:
            upper = _narrow(part, x_ptr.dtype.element_ty)
            lower = _narrow(part - _widen(upper), x_ptr.dtype.element_ty)
            if _INTERPRETED:  # which has no products of bf16
                total = tl.dot(x, _widen(upper), total)
                total = tl.dot(x, _widen(lower), total)
            else:
                x16 = x.to(x_ptr.dtype.element_ty)
                total = tl.dot(x16, upper, total)
                total = tl.dot(x16, lower, total)
        else:
            total = tl.dot(x, part, total, input_precision="ieee")
    out_row = out_ptr + token * out_token_stride + head * out_head_stride
    is_out = (row < rows)[:, None] & (column < DIM)[None, :]
    tl.store(
        out_row[:, None] + column[None, :], _narrow(total, out_ptr.dtype.element_ty), mask=is_out
    )


def prepare(matrix: Tensor) -> None:
    """Compile what 16-bit vectors need, so that serving never waits for a compiler."""
    kv_heads, dim, _ = matrix.shape
    for dtype in (torch.bfloat16, torch.float16):
        for tokens in (1, _MANY_TOKENS):
            map_heads(torch.zeros(tokens, kv_heads, dim, dtype=dtype, device=matrix.device), matrix)


def map_heads(x: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply row vectors by the matrix of their KV head.

    Parameters
    ----------
    x
        ``[tokens, heads, dim]``, float32, float16 or bfloat16, last dimension contiguous; heads are
        a multiple of the matrices, a group of neighbours to each.
    matrix
        float32 ``[kv_heads, dim, dim]``, contiguous, on ``x``'s device.
    out
        As ``x`` in any of its dtypes; allocated in ``x``'s dtype if absent.

    Returns
    -------
    Tensor
        ``out``. Infinities of ``x`` count as the largest finite number of its dtype, 2^48 at most.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got.

    Notes
    -----
    One launch, which does not synchronise; may be captured in a CUDA graph after a first call.
    """
    if x.dtype not in _FLOATS or matrix.dtype != torch.float32:
        raise TypeError(
            f"x, matrix: wanted a float dtype and torch.float32, got {x.dtype} and {matrix.dtype}"
        )
    tokens, heads, dim = x.shape
    kv_heads = matrix.shape[0]
    if tuple(matrix.shape) != (kv_heads, dim, dim) or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"matrix: wanted shape [a divisor of {heads}, {dim}, {dim}], got {list(matrix.shape)}"
        )
    if not matrix.is_contiguous() or x.stride(2) != 1:
        raise ValueError("x, matrix: wanted contiguous rows and a contiguous matrix, got others")
    if matrix.device != x.device:
        raise ValueError(f"matrix: wanted device {x.device}, got {matrix.device}")
    if out is None:
        out = torch.empty((tokens, heads, dim), dtype=x.dtype, device=x.device)
    if out.shape != x.shape or out.dtype not in _FLOATS or out.stride(2) != 1:
        raise ValueError(
            f"out: wanted shape {list(x.shape)} and contiguous rows of floats, got"
            f" {list(out.shape)}, {out.dtype}, strides {out.stride()}"
        )
    group = heads // kv_heads
    rows = tokens * group
    if not rows:
        return out
    is_long = tokens >= _MANY_TOKENS or INTERPRETED
    block = _MANY_ROWS if is_long else _FEW_ROWS
    columns = 2 * _COLUMNS if is_long else _COLUMNS
    grid = (triton.cdiv(rows, block), triton.cdiv(dim, columns), kv_heads)
    with device_guard(x.device):
        _map_kernel[grid](
            x,
            matrix,
            out,
            rows,
            group,
            x.stride(0),
            x.stride(1),
            out.stride(0),
            out.stride(1),
            min(INPUT_LIMIT, torch.finfo(x.dtype).max),
            DIM=dim,
            ROWS=block,
            COLUMNS=columns,
            DEPTH=_DEPTH,
            TWO_TERMS=x.dtype != torch.float32,
        )
    return out
