# SPDX-License-Identifier: Apache-2.0
"""Rival KV-cache formats: what attention would read back, simulated in fp32.

Each quantiser maps vectors ``[..., head_dim]`` to the values that the rival's cache holds for them,
in the original space, so that rivals and TurboKV are judged by the same run. Codes and scales are
rounded as the rival stores them; nothing is packed. Definitions: vLLM 0.26.0, rewritten from

- ``csrc/quantization/w8a8/fp8/nvidia/quant_utils.cuh`` (``fp8``);
- ``vllm/v1/attention/ops/int4_per_token_head.py`` (``int4_per_token_head``);
- ``vllm/model_executor/layers/quantization/turboquant/{config,centroids}.py``,
  ``vllm/v1/attention/ops/triton_turboquant_{store,decode}.py`` and
  ``vllm/v1/attention/backends/turboquant_attn.py`` (``turboquant_*``).

Left out, to the rival's advantage: fp8 queries and probabilities, bf16 rotation of int4, fp16
dequantisation when TurboQuant continues a prefill. Also left out: under ``turboquant_*`` vLLM keeps
the first and last two layers of dense models in 16 bits; here the caller chooses the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from turbokv.core import hadamard_rows

# bits of K (8 is fp8) and of V
TURBOQUANT_WIDTHS = {
    "turboquant_k8v4": (8, 4),
    "turboquant_4bit_nc": (4, 4),
    "turboquant_k3v4_nc": (3, 4),
    "turboquant_3bit_nc": (3, 3),
}


@dataclass(frozen=True)
class Baseline:
    """A rival cache format.

    Attributes
    ----------
    name
        vLLM's ``kv_cache_dtype``.
    bits_per_number
        From ``head_dim``: stored bits per K or V number, averaged over both, scales included.
    quantize_k, quantize_v
        From keys after RoPE, or values, ``[..., head_dim]`` of any floating dtype, to what is read
        back: fp32, same shape. Rotating formats raise ValueError unless ``head_dim`` is a power of
        two; the originals fail there too.
    """

    name: str
    bits_per_number: Callable[[int], float]
    quantize_k: Callable[[Tensor], Tensor]
    quantize_v: Callable[[Tensor], Tensor]


def _as_fp32(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"x: wanted a floating dtype, got {x.dtype}")
    return x.detach().to(torch.float32)


def _hadamard(x: Tensor) -> Tensor:
    """Apply the unnormalised Sylvester-Hadamard matrix to the last dimension."""
    dim = x.shape[-1]
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"x: wanted a power of two as last dimension, got {list(x.shape)}")
    if x.numel() == 0:
        return x
    # a real copy: the transform overwrites its input
    rows = x.reshape(-1, dim).t().clone(memory_format=torch.contiguous_format)
    return hadamard_rows(rows).t().reshape(x.shape).contiguous()


def _round_code(x: Tensor, bits: int) -> Tensor:
    """Round to the nearest code, halves up, within ``0`` to ``2**bits - 1``.

    Clamping first equals the originals' rounding away from zero, saturating cast and clamp.
    """
    return (x.clamp(0.0, 2.0**bits - 1) + 0.5).floor()


# --- fp8 ------------------------------------------------------------------------------------------


def fp8_e4m3(x: Tensor) -> Tensor:
    """Round to float8 e4m3 with scale 1, saturating at +-448.

    Source: vLLM 0.26.0, ``csrc/quantization/w8a8/fp8/nvidia/quant_utils.cuh`` (``__NV_SATFINITE``,
    nearest even; scale 1.0 is the default without a calibrated checkpoint).

    Parameters
    ----------
    x
        ``[..., head_dim]``, floating.

    Returns
    -------
    Tensor
        fp32, same shape.
    """
    limit = torch.finfo(torch.float8_e4m3fn).max
    # PyTorch's own cast need not saturate
    clamped = _as_fp32(x).clamp(-limit, limit)
    return clamped.to(torch.float8_e4m3fn).to(torch.float32)


# --- int4_per_token_head --------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _int4_signs(dim: int) -> Tensor:
    """Return the +-1 signs that precede the rotation, the same for K and V: fp32 ``[dim]``."""
    generator = torch.Generator("cpu").manual_seed(0x9E3779B9)
    half = torch.full((dim,), 0.5, dtype=torch.float32, device="cpu")
    return 2.0 * torch.bernoulli(half, generator=generator) - 1.0


def int4_per_token_head(x: Tensor) -> Tensor:
    """Quantise to asymmetric min-max int4 per token and head, after a signed Hadamard transform.

    Source: vLLM 0.26.0, ``vllm/v1/attention/ops/int4_per_token_head.py``. K and V alike: one fp32
    scale per vector, whose four lowest mantissa bits are overwritten by the zero point, itself an
    integer code from 0 to 15. Rounding the zero point shifts the grid by up to half a step; where
    all rotated numbers have one sign, it is clamped and the range is lost, as in the original.

    Parameters
    ----------
    x
        ``[..., head_dim]``, floating, ``head_dim`` a power of two.

    Returns
    -------
    Tensor
        fp32, same shape.
    """
    x = _as_fp32(x)
    dim = x.shape[-1]
    signs = _int4_signs(dim).to(x.device)
    rotated = _hadamard(x * signs)
    low, high = rotated.amin(-1, keepdim=True), rotated.amax(-1, keepdim=True)
    scale = ((high - low) / 15.0).clamp(min=1e-6)
    zero_point = _round_code(-low / scale, 4)
    codes = _round_code(rotated * (1.0 / scale) + zero_point, 4)
    stored_scale = (scale.view(torch.int32) & -16).view(torch.float32)
    return _hadamard((codes - zero_point) * stored_scale) * (signs / dim)


# --- turboquant -----------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def turboquant_centroids(head_dim: int, bits: int) -> Tensor:
    """Solve Lloyd-Max for N(0, 1/head_dim) the way vLLM does.

    Source: vLLM 0.26.0, ``vllm/model_executor/layers/quantization/turboquant/centroids.py``. Levels
    start evenly spaced over +-3.5 sigma; at most 200 rounds move each to its cell's centre of mass
    by the trapezoidal rule (200 steps, outer cells end at +-10.5 sigma); a round that moves none by
    1e-10 is dropped. At 4 bits the rounds run out first: these are not quite the optimal levels.

    Parameters
    ----------
    head_dim
        Elements per vector.
    bits
        Width of a code.

    Returns
    -------
    Tensor
        fp32 ``[2**bits]``, ascending, on the CPU. Shared between calls: do not write to it.
    """
    levels = 2**bits
    sigma = math.sqrt(1.0 / head_dim)
    limit = 3.5 * sigma
    middle = torch.arange(levels, dtype=torch.float64, device="cpu") + 0.5
    centroids: Tensor = -limit + 2 * limit * middle / levels
    outer = torch.tensor([3 * limit], dtype=torch.float64, device="cpu")
    steps = torch.arange(201, dtype=torch.float64, device="cpu") / 200.0
    for _ in range(200):
        inner = (centroids[:-1] + centroids[1:]) / 2.0
        edges = torch.cat([-outer, inner, outer])
        points = edges[:-1, None] + (edges[1:] - edges[:-1])[:, None] * steps
        density = torch.exp(-points.square() / (2.0 * sigma**2))
        density[:, [0, -1]] *= 0.5
        moved = (points * density).sum(-1) / density.sum(-1)
        if (moved - centroids).abs().max() < 1e-10:
            break
        centroids = moved
    return centroids.to(torch.float32)


def turboquant_key(x: Tensor, bits: int) -> Tensor:
    """Quantise keys to Lloyd-Max levels of the rotated direction, with norm correction.

    Source: vLLM 0.26.0, ``triton_turboquant_store.py`` and ``triton_turboquant_decode.py`` under
    ``vllm/v1/attention/ops``. The vector is normalised and rotated by a plain Hadamard matrix (no
    signs); a number on a boundary takes the upper level. Reading back, the level vector is scaled
    to unit length and multiplied by the norm, stored in fp16.

    Parameters
    ----------
    x
        ``[..., head_dim]``, floating, ``head_dim`` a power of two.
    bits
        Width of a code, 3 or 4 in vLLM's presets.

    Returns
    -------
    Tensor
        fp32, same shape. Norms beyond fp16 become infinite, as in the original.
    """
    x = _as_fp32(x)
    dim = x.shape[-1]
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rotated = _hadamard(x / (norm + 1e-8)) / math.sqrt(dim)
    centroids = turboquant_centroids(dim, bits).to(x.device)
    midpoints = (centroids[:-1] + centroids[1:]) / 2.0
    levels = centroids[torch.bucketize(rotated, midpoints, right=True)]
    unit = levels / (levels.square().sum(-1, keepdim=True) + 1e-16).sqrt()
    stored_norm = norm.to(torch.float16).to(torch.float32)
    return _hadamard(unit * stored_norm) / math.sqrt(dim)


def turboquant_value(x: Tensor, bits: int) -> Tensor:
    """Quantise values uniformly between their minimum and maximum, without rotation.

    Source: vLLM 0.26.0, ``vllm/v1/attention/ops/triton_turboquant_store.py``
    (``_store_quantized_value``). Codes use the fp32 scale and minimum; both are then stored in fp16
    and read back as ``code * scale + minimum``.

    Parameters
    ----------
    x
        ``[..., head_dim]``, floating.
    bits
        Width of a code, 3 or 4 in vLLM's presets.

    Returns
    -------
    Tensor
        fp32, same shape.
    """
    x = _as_fp32(x)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2.0**bits - 1)).clamp(min=1e-8)
    codes = _round_code((x - low) / scale, bits)
    stored_scale = scale.to(torch.float16).to(torch.float32)
    stored_low = low.to(torch.float16).to(torch.float32)
    return codes * stored_scale + stored_low


def turboquant_slot_bytes(head_dim: int, key_bits: int, value_bits: int) -> int:
    """Return the bytes of one token and KV head, K and V together.

    Source: vLLM 0.26.0, ``TurboQuantConfig.slot_size_aligned``: K codes and an fp16 norm (fp8 keys
    have none), V codes and an fp16 scale and minimum, rounded up to an even number.

    Parameters
    ----------
    head_dim
        Elements per vector.
    key_bits, value_bits
        Widths; 8 means fp8 keys.
    """
    key = head_dim if key_bits == 8 else math.ceil(head_dim * key_bits / 8) + 2
    slot = key + math.ceil(head_dim * value_bits / 8) + 4
    return slot + slot % 2


def _turboquant(name: str) -> Baseline:
    key_bits, value_bits = TURBOQUANT_WIDTHS[name]

    def bits_per_number(head_dim: int) -> float:
        return 8.0 * turboquant_slot_bytes(head_dim, key_bits, value_bits) / (2 * head_dim)

    return Baseline(
        name=name,
        bits_per_number=bits_per_number,
        quantize_k=fp8_e4m3 if key_bits == 8 else partial(turboquant_key, bits=key_bits),
        quantize_v=partial(turboquant_value, bits=value_bits),
    )


BASELINES: dict[str, Baseline] = {
    "fp8": Baseline("fp8", lambda head_dim: 8.0, fp8_e4m3, fp8_e4m3),
    "int4_per_token_head": Baseline(
        name="int4_per_token_head",
        bits_per_number=lambda head_dim: 8.0 * (head_dim // 2 + 4) / head_dim,
        quantize_k=int4_per_token_head,
        quantize_v=int4_per_token_head,
    ),
    **{name: _turboquant(name) for name in TURBOQUANT_WIDTHS},
}
