# SPDX-License-Identifier: Apache-2.0
"""The plain PyTorch reference of the codec: rotation, codebooks, scales and packing.

Every step is elementwise fp32 arithmetic in a fixed order, so PyTorch on any device, Triton and
CUDA agree to the bit; ``FORMAT.md`` is the normative text. The working layout here is ``[dim,
vectors]``: each coordinate of a block of vectors is one contiguous row, so that butterflies, sums
and packing are long vector operations on every device.

Source: TurboQuant (Zandieh et al., arXiv:2504.19874, section 3) for rotation and scalar
quantisation; EDEN (Vargaftik et al., ICML 2022, section 3) for the unbiased scale. Deviations: one
signed Hadamard transform in place of a dense random rotation, int8-lattice codebooks, no QJL
residual.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

# exported again: who works with formats works with these
from turbokv.codebook import MAX_BITS as MAX_BITS
from turbokv.codebook import MIN_BITS as MIN_BITS
from turbokv.codebook import Codebook as Codebook
from turbokv.codebook import check_bits as check_bits

Role = Literal["k", "v"]
ScaleRule = Literal["plain", "norm_corrected", "least_squares", "unbiased"]

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 512
# K and V draw their signs from different seeds, so that an error correlated between a token's key
# and value cannot line up.
SEED_OFFSETS: dict[Role, int] = {"k": 0, "v": 500}
DEFAULT_SEED = 42
# Inputs are clamped to +-2^48 before rotation: squares of 512 such values still fit fp32, and a
# 16-bit scale has long saturated.
INPUT_LIMIT = 2.0**48
# Below this sum of squares (of the unnormalised rotation) a vector is stored as zero: fp32 squares
# have underflowed and the direction is noise.
SQUARES_FLOOR = 2.0**-120
_INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORM_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CPU_BLOCK_ELEMENTS = 1 << 19  # 2 MiB of fp32: measured best with two threads
_DEVICE_BLOCK_ELEMENTS = 1 << 27


def padded_dim(head_dim: int) -> int:
    """Return the next power of two: the number of coordinates that are rotated and stored.

    Parameters
    ----------
    head_dim
        Elements per vector, 8 to 512.

    Raises
    ------
    TypeError, ValueError
        If ``head_dim`` is not an int in that range.
    """
    if isinstance(head_dim, bool) or not isinstance(head_dim, int):
        raise TypeError(f"head_dim: wanted an int, got {head_dim!r}")
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim: wanted {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}")
    return 1 << (head_dim - 1).bit_length()


def packed_dim(head_dim: int, bits: int) -> int:
    """Return the bytes that the codes of one vector take (scale not included)."""
    return padded_dim(head_dim) * check_bits(bits) // 8


# --- rotation -------------------------------------------------------------------------------------


def _splitmix64(x: int) -> int:
    """Return the output of SplitMix64 (Steele et al., OOPSLA 2014) for state ``x``."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def rotation_signs(role: Role, head_dim: int, seed: int = DEFAULT_SEED) -> Tensor:
    """Return the +-1 signs that precede the Hadamard transform: fp32 ``[padded_dim]`` on the CPU.

    Coordinate ``j`` is negated when the top bit of ``splitmix64(((seed + offset) << 32) + j)`` is
    set.
    """
    if role not in SEED_OFFSETS:
        raise ValueError(f"role: wanted 'k' or 'v', got {role!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 31:
        raise ValueError(f"seed: wanted an int from 0 to 2^31 - 1, got {seed!r}")
    base = (seed + SEED_OFFSETS[role]) << 32
    signs = [-1.0 if _splitmix64(base + j) >> 63 else 1.0 for j in range(padded_dim(head_dim))]
    return torch.tensor(signs, dtype=torch.float32, device="cpu")


def hadamard_rows(x: Tensor) -> Tensor:
    """Unnormalised Walsh-Hadamard transform over dim 0 of ``[dim, n]`` fp32, Sylvester order.

    Stages run with strides 1, 2, 4, ...; each writes ``(a + b, a - b)``. That order is part of the
    format. ``x`` is overwritten; the result is ``x`` or a new tensor.
    """
    dim, count = x.shape
    source, target = x, torch.empty_like(x)
    stride = 1
    while stride < dim:
        a, b = source.view(-1, 2, stride, count).unbind(1)
        out = target.view(-1, 2, stride, count)
        torch.add(a, b, out=out[:, 0])
        torch.sub(a, b, out=out[:, 1])
        source, target = target, source
        stride *= 2
    return source


def tree_sum_rows(x: Tensor) -> Tensor:
    """Sum ``[dim, n]`` over dim 0 pairwise, neighbours first (the order is part of the format)."""
    while x.shape[0] > 1:
        x = x[0::2] + x[1::2]
    return x[0]


def _round_to_fp32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32, device="cpu"))


def exact_sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded fp32 square root of fp32 ``x``.

    By way of fp64, because PyTorch's own on the CPU is off by an ulp for one value in six (MKL),
    and by which one depends on the length of the tensor. fp32 has no root so near a midpoint that
    rounding twice could matter, even if the fp64 root is off by an ulp too.
    """
    return x.to(torch.float64).sqrt_().to(torch.float32)


# --- quantisation ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VectorFormat:
    """Everything that fixes the bytes of one role (K or V): what every backend needs.

    Attributes
    ----------
    head_dim, padded_dim
        Elements per vector, and the power of two that is rotated.
    codebook
        Levels; ``codebook.bits`` is the width.
    signs
        fp32 ``[padded_dim]`` of +-1 on the compute device.
    scale_rule
        How the stored scale is computed (:func:`stored_scale`).
    norm_dtype
        dtype of the stored scale.
    """

    head_dim: int
    padded_dim: int
    codebook: Codebook
    signs: Tensor
    scale_rule: ScaleRule
    norm_dtype: torch.dtype

    def __post_init__(self) -> None:
        """Refuse signs that kernels would misread: they take an address of fp32 numbers."""
        signs = self.signs
        if signs.dtype != torch.float32 or not signs.is_contiguous():
            got = f"{signs.dtype} with strides {signs.stride()}"
            raise TypeError(f"signs: wanted contiguous torch.float32, got {got}")
        if tuple(signs.shape) != (self.padded_dim,):
            raise ValueError(f"signs: wanted shape {[self.padded_dim]}, got {list(signs.shape)}")

    @classmethod
    def create(
        cls,
        role: Role,
        head_dim: int,
        codebook: Codebook,
        *,
        scale_rule: ScaleRule,
        norm_dtype: torch.dtype = torch.float16,
        seed: int = DEFAULT_SEED,
        device: torch.device | str = "cpu",
    ) -> VectorFormat:
        """Check the arguments and place the signs on ``device``."""
        if scale_rule not in get_args(ScaleRule):
            raise ValueError(f"scale_rule: wanted one of {get_args(ScaleRule)}, got {scale_rule!r}")
        if norm_dtype not in NORM_DTYPES:
            raise ValueError(f"norm_dtype: wanted one of {NORM_DTYPES}, got {norm_dtype!r}")
        signs = rotation_signs(role, head_dim, seed).to(device)
        return cls(head_dim, padded_dim(head_dim), codebook, signs, scale_rule, norm_dtype)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.codebook.bits

    @property
    def packed_dim(self) -> int:
        """Bytes of packed codes per vector."""
        return self.padded_dim * self.bits // 8

    @cached_property
    def normaliser(self) -> float:
        """``sqrt(padded_dim) / step``: turns ``y / |y|`` into lattice units (rounded to fp32)."""
        return _round_to_fp32(math.sqrt(self.padded_dim) / self.codebook.step)

    @cached_property
    def scale_factor(self) -> float:
        """``2**frac_bits / sqrt(padded_dim)``: turns a ratio ``y / level`` into a stored scale."""
        return _round_to_fp32(2.0**self.codebook.frac_bits / math.sqrt(self.padded_dim))

    @cached_property
    def plain_factor(self) -> float:
        """``step * 2**frac_bits / padded_dim``: stored scale per unit of ``|y|`` (rule "plain")."""
        ratio = self.codebook.step * 2.0**self.codebook.frac_bits / self.padded_dim
        return _round_to_fp32(ratio)

    @cached_property
    def inverse_root(self) -> float:
        """``1 / sqrt(padded_dim)``, rounded to fp32: the normalisation of the Hadamard matrix."""
        return _round_to_fp32(1.0 / math.sqrt(self.padded_dim))

    @cached_property
    def _lattice_steps(self) -> list[tuple[int, int]] | None:
        """Twice each boundary, and how much the magnitude grows there: integers for a lattice."""
        if not self.codebook.is_lattice:
            return None
        m = [int(v) for v in self.codebook.magnitudes]
        return [(a + b, b - a) for a, b in itertools.pairwise(m)]

    @cached_property
    def _boundaries(self) -> Tensor:
        return self.codebook.boundaries.to(self.signs.device)

    @cached_property
    def levels(self) -> Tensor:
        """Value of every code times ``2**-frac_bits``, fp32 ``[2**bits]`` on the compute device."""
        return (self.codebook.levels * 2.0**-self.codebook.frac_bits).to(self.signs.device)

    @cached_property
    def _byte_levels(self) -> Tensor | None:
        """Levels of the codes in each byte value, fp32 ``[256, 8 / bits]``, for 2, 4 and 8 bits."""
        if 8 % self.bits:
            return None
        every_byte = torch.arange(256, dtype=torch.uint8, device="cpu")[None]
        codes = unpack_rows(every_byte, 8 // self.bits, self.bits)
        return self.levels[codes.t().long().to(self.levels.device)].contiguous()

    def cells(self, lattice: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise ``|u|`` in lattice units: magnitude index (uint8) and magnitude (fp32).

        A value on a boundary takes the smaller magnitude. ``lattice`` is overwritten.
        """
        steps = self._lattice_steps
        if steps is None:
            index = torch.bucketize(lattice, self._boundaries, out_int32=True)
            values = torch.tensor(
                self.codebook.magnitudes, dtype=torch.float32, device=index.device
            )
            return index.to(torch.uint8), values.index_select(0, index.view(-1)).view_as(lattice)
        # 2 |u| > b if and only if ceil(2 |u|) > b, as all b are integers; clamped as integers,
        # which also brings NaN into range
        cell = lattice.mul_(2.0).ceil_().to(torch.int32).clamp_(0, steps[-1][0] + 1)
        cell = cell.to(torch.uint8)
        if self.codebook.is_mid_tread and all(grow == 1 for _, grow in steps):
            index = cell >> 1  # boundaries 1, 3, 5, ...
            return index, index.to(torch.float32)
        # clamp(cell, b, b + 1) is b, or b + 1 beyond the boundary. Their sum modulo 256 counts
        # boundaries once the b are taken off: far cheaper than lookups, which run on one thread.
        index = torch.full_like(cell, -sum(b for b, _ in steps) % 256)
        start = int(self.codebook.magnitudes[0]) - sum(b * grow for b, grow in steps)
        magnitude = torch.full_like(cell, start % 256)
        for b, grow in steps:
            beyond = cell.clamp(b, b + 1)
            index += beyond
            magnitude.add_(beyond, alpha=grow)
        return index, magnitude.to(torch.float32)


def stored_scale(fmt: VectorFormat, y: Tensor, squares: Tensor, magnitude: Tensor) -> Tensor:
    """Return the scale to store, fp32 ``[n]`` (before rounding to ``norm_dtype``).

    Parameters
    ----------
    y
        ``|rotated|``, unnormalised, ``[dim, n]``.
    squares
        Sum of squares of ``y`` per vector.
    magnitude
        Quantised magnitudes in lattice units.

    Notes
    -----
    With level vector L: *plain* ``step * |y|``; *norm_corrected* keeps the length, ``|y| / |L|``;
    *least_squares* minimises the squared error, ``<y, L> / <L, L>``; *unbiased* makes
    ``<x_hat, x> = |x|^2`` (EDEN), ``<y, y> / <y, L>``.
    """
    live = squares > SQUARES_FLOOR
    if fmt.scale_rule == "plain":
        scale = exact_sqrt(squares) * fmt.plain_factor
    else:
        if fmt.scale_rule == "norm_corrected":
            # <L, L> is a sum of small integers for every lattice: exact in any order
            ratio = exact_sqrt(squares) / exact_sqrt(tree_sum_rows(magnitude * magnitude))
        elif fmt.scale_rule == "least_squares":
            ratio = tree_sum_rows(y * magnitude) / tree_sum_rows(magnitude * magnitude)
        else:
            ratio = squares / tree_sum_rows(y * magnitude)
        scale = ratio * fmt.scale_factor
    return torch.where(live | squares.isnan(), scale, torch.zeros_like(scale))


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round an fp32 scale to ``dtype``, saturating at its largest finite value (NaN stays NaN)."""
    limit = torch.finfo(dtype).max
    return scale.clamp(-limit, limit).to(dtype)


# --- packing --------------------------------------------------------------------------------------


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes ``[dim, n]`` into bytes ``[dim * bits / 8, n]`` (FORMAT.md, section 4).

    The codes of a vector form a little-endian bit string: code ``j`` owns bits ``j * bits`` and up.
    """
    dim, count = codes.shape
    if bits == 8:
        return codes
    if 8 % bits == 0:
        packed = codes[0 :: 8 // bits].clone()
        for i in range(1, 8 // bits):
            packed |= codes[i :: 8 // bits] << (bits * i)
        return packed
    # eight codes make `bits` whole bytes
    out = codes.new_empty((dim // 8, bits, count))
    groups = codes.view(dim // 8, 8, count)
    for byte in range(bits):
        value: Tensor | None = None
        for code in range(8 * byte // bits, (8 * byte + 7) // bits + 1):
            shift = code * bits - 8 * byte
            part = groups[:, code] << shift if shift >= 0 else groups[:, code] >> -shift
            value = part if value is None else value | part
        assert value is not None
        out[:, byte] = value
    return out.view(dim * bits // 8, count)


def unpack_rows(packed: Tensor, dim: int, bits: int) -> Tensor:
    """Undo :func:`pack_rows`: bytes ``[dim * bits / 8, n]`` to uint8 codes ``[dim, n]``."""
    count = packed.shape[1]
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    codes = packed.new_empty((dim, count))
    if 8 % bits == 0:
        for i in range(8 // bits):
            codes[i :: 8 // bits] = (packed >> (bits * i)) & mask
        return codes
    groups, out = packed.view(dim // 8, bits, count), codes.view(dim // 8, 8, count)
    for code in range(8):
        byte, shift = divmod(code * bits, 8)
        value = groups[:, byte] >> shift
        if shift + bits > 8:
            value = value | (groups[:, byte + 1] << (8 - shift))
        out[:, code] = value & mask
    return codes


# --- whole vectors --------------------------------------------------------------------------------


def check_vectors(x: Tensor, dim: int, name: str = "x") -> None:
    """Raise if ``x`` is not a floating tensor ``[..., dim]`` that the codec reads."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: wanted a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(f"{name}: wanted float32, float16 or bfloat16, got {x.dtype}")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: wanted a strided tensor, got layout {x.layout}")
    if x.ndim == 0 or x.shape[-1] != dim:
        raise ValueError(f"{name}: wanted shape [..., {dim}], got {list(x.shape)}")


def _blocks(count: int, dim: int, device: torch.device) -> Iterator[slice]:
    elements = _CPU_BLOCK_ELEMENTS if device.type == "cpu" else _DEVICE_BLOCK_ELEMENTS
    size = max(1, elements // dim)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def rotate_rows(x: Tensor, fmt: VectorFormat) -> Tensor:
    """Sign and transform ``[n, head_dim]`` into unnormalised rotated ``[padded_dim, n]`` fp32.

    Detached, as everything here: no gradient flows through the codec.
    """
    rows = torch.zeros if fmt.padded_dim != fmt.head_dim else torch.empty
    y = rows((fmt.padded_dim, x.shape[0]), dtype=torch.float32, device=x.device)
    y[: fmt.head_dim] = x.detach().t()
    y.clamp_(-INPUT_LIMIT, INPUT_LIMIT)  # fp16 too: it has infinities
    return hadamard_rows(y.mul_(fmt.signs[:, None]))


def compress(x: Tensor, fmt: VectorFormat, packed: Tensor, norms: Tensor) -> None:
    """Compress ``x`` into ``packed`` and ``norms`` (the reference; arguments are already checked).

    Parameters
    ----------
    x
        ``[n, head_dim]``, fp32, fp16 or bf16, any strides.
    packed, norms
        Outputs: uint8 ``[n, packed_dim]`` and ``norm_dtype`` ``[n]``.
    """
    full = (1 << fmt.bits) - 1
    half = 1 << (fmt.bits - 1)
    for block in _blocks(x.shape[0], fmt.padded_dim, x.device):
        y = rotate_rows(x[block], fmt)
        # the sign bit, spread: -0 is not negative, and adding 0 makes it +0
        negative = (y.add_(0.0).view(torch.int32) >> 31).to(torch.uint8)
        y = y.abs_()
        squares = tree_sum_rows(y * y)
        root = exact_sqrt(squares)
        # a tensor, because PyTorch computes `number / tensor` as a reciprocal and a product
        inverse = torch.full_like(root, fmt.normaliser) / root
        inverse = torch.where(squares > SQUARES_FLOOR, inverse, torch.zeros_like(inverse))
        index, magnitude = fmt.cells(y * inverse)
        norms[block] = round_scale(stored_scale(fmt, y, squares, magnitude), fmt.norm_dtype)
        if fmt.codebook.is_mid_tread:  # half +- index, in uint8 arithmetic
            codes = torch.where(negative != 0, half - index, half + index)
        else:  # complementing half + index mirrors it around the middle of the code range
            codes = (index + half) ^ (negative & full)
        packed[block] = pack_rows(codes, fmt.bits).t()


def decompress(
    packed: Tensor, norms: Tensor, fmt: VectorFormat, out: Tensor, *, rotated: bool = True
) -> None:
    """Decompress into ``out``, in rotated or original space (arguments are already checked).

    Parameters
    ----------
    packed, norms
        uint8 ``[n, packed_dim]`` and scales ``[n]``; a scale's sign bit is a mark, not a sign.
    out
        ``[n, padded_dim]`` if ``rotated`` else ``[n, head_dim]``, any floating dtype.
    """
    for block in _blocks(packed.shape[0], fmt.padded_dim, packed.device):
        scale = norms[block].to(torch.float32).abs()
        byte_levels = fmt._byte_levels
        if byte_levels is not None:
            # one lookup per byte instead of one per code
            flat = packed[block].to(torch.int32).reshape(-1)
            values = byte_levels.index_select(0, flat).view(-1, fmt.padded_dim)
            values = values.mul_(scale[:, None])
            rows = None
        else:
            codes = unpack_rows(packed[block].t().contiguous(), fmt.padded_dim, fmt.bits)
            flat = codes.to(torch.int32).view(-1)
            rows = fmt.levels.index_select(0, flat).view(fmt.padded_dim, -1).mul_(scale)
            values = rows.t()
        if rotated:
            out[block] = values
            continue
        y = hadamard_rows(values.t().contiguous() if rows is None else rows)
        y = y[: fmt.head_dim].mul_((fmt.signs[: fmt.head_dim] * fmt.inverse_root)[:, None])
        out[block] = y.t()


def rotate(x: Tensor, fmt: VectorFormat, scale: float = 1.0) -> Tensor:
    """Rotate ``[n, head_dim]`` into normalised rotated space: fp32 ``[n, padded_dim]``."""
    out = torch.empty((x.shape[0], fmt.padded_dim), dtype=torch.float32, device=x.device)
    factor = fmt.inverse_root * scale
    for block in _blocks(x.shape[0], fmt.padded_dim, x.device):
        out[block] = rotate_rows(x[block], fmt).mul_(factor).t()
    return out


def unrotate(x: Tensor, fmt: VectorFormat) -> Tensor:
    """Undo :func:`rotate`: ``[n, padded_dim]`` to fp32 ``[n, head_dim]``, padding dropped."""
    out = torch.empty((x.shape[0], fmt.head_dim), dtype=torch.float32, device=x.device)
    factor = (fmt.signs * fmt.inverse_root)[: fmt.head_dim, None]
    for block in _blocks(x.shape[0], fmt.padded_dim, x.device):
        rows = x[block].detach().t()
        # a copy even of fp32: the transform overwrites what it is given
        y = torch.empty(rows.shape, dtype=torch.float32, device=x.device).copy_(rows)
        out[block] = hadamard_rows(y)[: fmt.head_dim].mul_(factor).t()
    return out
