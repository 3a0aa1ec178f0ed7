# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the codec, equal to the PyTorch reference to the bit.

Mapping: one program of one warp owns a tile ``[ROWS, DIM]`` of whole vectors, about 32 coordinates
a thread. A single warp keeps every exchange between coordinates inside the warp; with more, the
transform goes through shared memory and barriers at every other stage.

Equality with :mod:`turbokv.core` rests on three things: the same order of every sum (neighbours
first) and of the butterflies (strides 1, 2, 4, ...); correctly rounded square roots and divisions;
and no fused multiply-add, which is why every launch passes ``enable_fp_fusion=False``.

Under ``TRITON_INTERPRET=1`` (set before the first import of Triton) the same code runs on the CPU.
"""
# mypy: disable-error-code="assignment"

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbokv.core import INPUT_LIMIT, SQUARES_FLOOR, VectorFormat
from turbokv.kernels import arguments, triton_is_interpreted

# Fixed at import, as Triton's own switch is.
INTERPRETED = triton_is_interpreted()
# The interpreter pays per program, a GPU per register: 32 fp32 values a thread on the GPU.
_TILE_ELEMENTS = 1 << 15 if INTERPRETED else 1 << 10
_RULES = {"plain": 0, "norm_corrected": 1, "least_squares": 2, "unbiased": 3}

_INTERPRETED = tl.constexpr(INTERPRETED)
_INPUT_LIMIT = tl.constexpr(INPUT_LIMIT)
_SQUARES_FLOOR = tl.constexpr(SQUARES_FLOOR)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` current: Triton launches on the current CUDA device, wherever tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# --- pieces ---------------------------------------------------------------------------------------


@triton.jit
def _widen(x):
    """Convert to fp32 exactly (bf16 by its bits: the interpreter mistakes its subnormals)."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """Round fp32 to ``dtype``, ties to even (the interpreter truncates to bf16, hence the bits)."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x != x, 0x7FC0, bits)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _hadamard(x, ROWS: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr):
    """Transform ``[ROWS, DIM]`` along its rows, unnormalised.

    Constant geometry: each stage combines neighbours and moves the sums to the first half and the
    differences to the second. That rotates the bits of the index once a stage, so after ``LOG_DIM``
    stages the order is Sylvester's again, and stage ``i`` combined what was ``2**i`` apart.
    """
    for _ in tl.static_range(LOG_DIM):
        a, b = tl.split(tl.reshape(x, (ROWS, DIM // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, DIM))
    return x


@triton.jit
def _split8(x, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Split ``[ROWS, DIM]`` into eight ``[ROWS, DIM // 8]``: coordinate 0, 1, ... of every eight.

    Packing and the first sums then work on whole registers, without exchanges between threads.
    """
    even, odd = tl.split(tl.reshape(x, (ROWS, DIM // 8, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _join8(x, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Undo :func:`_split8`."""
    even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
    odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
    return tl.reshape(tl.join(even, odd), (ROWS, DIM))


@triton.jit
def _tree_sum(x, ROWS: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr):
    """Sum what :func:`_split8` gave over the vector: ``[ROWS]``, neighbours first."""
    total = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))
    for i in tl.static_range(3, LOG_DIM):
        # two terms a reduction leave the compiler no other order
        total = tl.sum(tl.reshape(total, (ROWS, DIM >> (i + 1), 2)), 2)
    return tl.reshape(total, (ROWS,))


# --- compress -------------------------------------------------------------------------------------


@triton.jit
def _compress_kernel(
    x_ptr,
    packed_ptr,
    norms_ptr,
    signs_ptr,
    boundaries_ptr,
    levels_ptr,
    count,
    x_row_stride,
    x_col_stride,
    packed_row_stride,
    packed_col_stride,
    norms_stride,
    normaliser,  # turns y / |y| into lattice units
    lattice_unit,  # turns a level into lattice units (a power of two)
    scale_factor,
    norm_limit,  # largest finite value of the scale's dtype
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # HEAD_DIM padded to a power of two
    LOG_DIM: tl.constexpr,
    BITS: tl.constexpr,
    MID_TREAD: tl.constexpr,
    RULE: tl.constexpr,  # see _RULES
    ROWS: tl.constexpr,
):
    # 64-bit offsets: KV caches of more than 2**31 elements are common
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, DIM).to(tl.int64)
    row_live = row < count
    live = row_live[:, None] & (col < HEAD_DIM)[None, :]
    x_at = x_ptr + row[:, None] * x_row_stride + col[None, :] * x_col_stride
    x = _widen(tl.load(x_at, mask=live, other=0.0))
    x = tl.clamp(x, -_INPUT_LIMIT, _INPUT_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    rotated = _hadamard(x * tl.load(signs_ptr + col)[None, :], ROWS, DIM, LOG_DIM)
    y = _split8(rotated, ROWS, DIM)

    terms = ()
    for j in tl.static_range(8):
        terms += (y[j] * y[j],)
    squares = _tree_sum(terms, ROWS, DIM, LOG_DIM)
    root = tl.sqrt_rn(squares)
    dead = squares <= _SQUARES_FLOOR  # false for NaN, whose scale must be NaN
    inverse = tl.where(dead, 0.0, tl.div_rn(tl.full((ROWS,), normaliser, tl.float32), root))

    HALF: tl.constexpr = 1 << (BITS - 1)
    word_type: tl.constexpr = tl.int32 if 8 * BITS <= 32 else tl.int64
    word = tl.zeros((ROWS, DIM // 8), word_type)
    products = ()  # <y, L>
    lengths = ()  # <L, L>; the compiler drops what the rule has no use for
    for j in tl.static_range(8):
        absolute = tl.abs(y[j])
        lattice = absolute * inverse[:, None]
        # the number of boundaries strictly below: binary search over HALF - 1 of them
        index = tl.zeros((ROWS, DIM // 8), tl.int32)
        for i in tl.static_range(BITS - 1):
            boundary = tl.load(boundaries_ptr + (index + ((HALF >> (i + 1)) - 1)))
            index += tl.where(lattice > boundary, HALF >> (i + 1), 0)
        magnitude = tl.load(levels_ptr + (index + HALF)) * lattice_unit
        products += (absolute * magnitude,)
        lengths += (magnitude * magnitude,)
        mirrored = HALF - index if MID_TREAD else HALF - 1 - index
        code = tl.where(y[j] < 0, mirrored, HALF + index)
        word |= code.to(word_type) << (j * BITS)

    if RULE == 0:
        scale = root * scale_factor
    else:
        if RULE == 1:
            length = _tree_sum(lengths, ROWS, DIM, LOG_DIM)
            ratio = tl.div_rn(root, tl.sqrt_rn(length))
        elif RULE == 2:
            product = _tree_sum(products, ROWS, DIM, LOG_DIM)
            ratio = tl.div_rn(product, _tree_sum(lengths, ROWS, DIM, LOG_DIM))
        else:
            ratio = tl.div_rn(squares, _tree_sum(products, ROWS, DIM, LOG_DIM))
        scale = ratio * scale_factor
    scale = tl.where(dead, 0.0, scale)
    scale = tl.clamp(scale, -norm_limit, norm_limit, propagate_nan=tl.PropagateNan.ALL)
    norm = _narrow(scale, norms_ptr.dtype.element_ty)
    tl.store(norms_ptr + row * norms_stride, norm, mask=row_live)

    # eight codes make BITS whole bytes
    byte_col = tl.arange(0, DIM // 8).to(tl.int64) * (BITS * packed_col_stride)
    packed_at = packed_ptr + row[:, None] * packed_row_stride + byte_col[None, :]
    for k in tl.static_range(BITS):
        byte = (word >> (8 * k)).to(tl.uint8)
        tl.store(packed_at + k * packed_col_stride, byte, mask=row_live[:, None])


def _layout(fmt: VectorFormat) -> dict[str, int]:
    """Return the compile-time constants that both kernels share."""
    return {
        "HEAD_DIM": fmt.head_dim,
        "DIM": fmt.padded_dim,
        "LOG_DIM": fmt.padded_dim.bit_length() - 1,
        "BITS": fmt.bits,
        "ROWS": _TILE_ELEMENTS // fmt.padded_dim,
    }


def compress(x: Tensor, fmt: VectorFormat, packed: Tensor, norms: Tensor) -> None:
    """Compress ``x`` into ``packed`` and ``norms`` in one launch; see :func:`core.compress`.

    Parameters
    ----------
    x
        ``[n, head_dim]``, fp32, fp16 or bf16, any strides.
    packed, norms
        Outputs: uint8 ``[n, packed_dim]`` and ``norm_dtype`` ``[n]``, any strides.

    Notes
    -----
    Neither allocates nor synchronises, so it can be captured in a CUDA graph, once a first call
    with ``fmt`` has placed its tables on the device.

    Raises
    ------
    TypeError, ValueError
        If a tensor has another device, shape or dtype, or is lazily negated.
    """
    count = arguments.check_flat(x, packed, norms, fmt, fmt.head_dim, "x")
    if count == 0:
        return
    layout = _layout(fmt)
    rule = fmt.scale_rule
    with device_guard(x.device):
        _compress_kernel[(triton.cdiv(count, layout["ROWS"]),)](
            x,
            packed,
            norms,
            fmt.signs,
            fmt._boundaries,
            fmt.levels,
            count,
            x.stride(0),
            x.stride(1),
            packed.stride(0),
            packed.stride(1),
            norms.stride(0),
            fmt.normaliser,
            2.0**fmt.codebook.frac_bits,
            fmt.plain_factor if rule == "plain" else fmt.scale_factor,
            torch.finfo(fmt.norm_dtype).max,
            MID_TREAD=fmt.codebook.is_mid_tread,
            RULE=_RULES[rule],
            **layout,
            num_warps=1,
            enable_fp_fusion=False,
        )


# --- decompress -----------------------------------------------------------------------------------


@triton.jit
def _decompress_kernel(
    packed_ptr,
    norms_ptr,
    out_ptr,
    signs_ptr,
    levels_ptr,
    count,
    packed_row_stride,
    packed_col_stride,
    norms_stride,
    out_row_stride,
    out_col_stride,
    inverse_root,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    LOG_DIM: tl.constexpr,
    BITS: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_live = row < count
    word_type: tl.constexpr = tl.int32 if 8 * BITS <= 32 else tl.int64
    word = tl.zeros((ROWS, DIM // 8), word_type)
    byte_col = tl.arange(0, DIM // 8).to(tl.int64) * (BITS * packed_col_stride)
    packed_at = packed_ptr + row[:, None] * packed_row_stride + byte_col[None, :]
    for k in tl.static_range(BITS):
        byte = tl.load(packed_at + k * packed_col_stride, mask=row_live[:, None], other=0)
        word |= byte.to(word_type) << (8 * k)

    # the sign bit of a stored scale is a mark, not a sign
    scale = tl.abs(_widen(tl.load(norms_ptr + row * norms_stride, mask=row_live, other=0.0)))
    parts = ()
    for j in tl.static_range(8):
        code = (word >> (j * BITS)).to(tl.int32) & ((1 << BITS) - 1)
        parts += (tl.load(levels_ptr + code) * scale[:, None],)
    y = _join8(parts, ROWS, DIM)
    col = tl.arange(0, DIM).to(tl.int64)
    live = row_live[:, None]
    if not ROTATED:
        y = _hadamard(y, ROWS, DIM, LOG_DIM)
        y = y * (tl.load(signs_ptr + col) * inverse_root)[None, :]
        live = live & (col < HEAD_DIM)[None, :]
    out_at = out_ptr + row[:, None] * out_row_stride + col[None, :] * out_col_stride
    tl.store(out_at, _narrow(y, out_ptr.dtype.element_ty), mask=live)


def decompress(
    packed: Tensor, norms: Tensor, fmt: VectorFormat, out: Tensor, *, rotated: bool = True
) -> None:
    """Decompress into ``out`` in one launch, as :func:`compress`; see :func:`core.decompress`.

    Parameters
    ----------
    packed, norms
        uint8 ``[n, packed_dim]`` and scales ``[n]``, any strides.
    out
        ``[n, padded_dim]`` if ``rotated`` else ``[n, head_dim]``, fp32, fp16 or bf16, any strides.

    Raises
    ------
    TypeError, ValueError
        As for :func:`compress`.
    """
    dim = fmt.padded_dim if rotated else fmt.head_dim
    count = arguments.check_flat(out, packed, norms, fmt, dim, "out")
    if count == 0:
        return
    layout = _layout(fmt)
    with device_guard(packed.device):
        _decompress_kernel[(triton.cdiv(count, layout["ROWS"]),)](
            packed,
            norms,
            out,
            fmt.signs,
            fmt.levels,
            count,
            packed.stride(0),
            packed.stride(1),
            norms.stride(0),
            out.stride(0),
            out.stride(1),
            fmt.inverse_root,
            ROTATED=rotated,
            **layout,
            num_warps=1,
            enable_fp_fusion=False,
        )
