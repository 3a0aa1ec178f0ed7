# SPDX-License-Identifier: Apache-2.0
"""The answer to a fuzzed problem in float64, and how far from it decode's arithmetic may be.

It shares no code with the package but for the checked arguments of its codec: it reads pages bit by
bit as ``tests/ref.py`` says, and attends in float64 on the device that holds them.

How far scores may be off
-------------------------
Scores are exact in the codes, but decode holds a rotated query as integers (``query.cuh``): of its
largest coordinate M a unit is ``u = M / 32512``, at 2 bits four units for three coordinates in
four, and rounding is off by half a unit; at 2 bits coordinate 0 may have one more, which makes a
sum even. So the score of a key ``x`` is off by at most ``sum_j r_j |x_j|`` with these roundings
``r``: in proportion to the sizes of key and query, however small the score itself is. A sixteenth
of a unit covers the transform in fp32. What does not meet the integers, offsets of centred keys and
16-bit copies, is summed in fp32 of numbers of 22 bits, and scores are fp32: ``ROUNDING * |q| |x|``.

What that does
--------------
Let token t have the weight ``w_t`` (a sink has the rest) and a score that is off by at most
``d_t``. The LSE is then off by at most ``log2 sum_t w_t exp(d_t)``, sink included: the other way
round it is ``sum_t w_t d_t``, which is no more. The output o moves by
``sum_t w_t (f_t - 1) (v_t - o) / sum_t w_t f_t`` with factors ``exp(-d_t) <= f_t <= exp(d_t)``: at
most by ``sum_t w_t (exp(d_t) - 1) |v_t - o| / sum_t w_t exp(-d_t)``, where a sink is a value of
zero that is off by nothing. Both are bounds that no correct kernel can exceed. A cap is applied to
a score and to both of its ends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests import ref
from tests.gpu.fuzz_cases import SEGMENT, TILE, Problem, Trial

TOP = 127 * 256  # what the largest coordinate of a query becomes
TRANSFORM = 1 / 16  # of a unit
ROUNDING = 2.0**-19  # a few roundings of fp32, and of numbers split in two of 11 bits


@functools.cache
def places_of(dim: int, role: str, bits: int, device: str) -> Tensor:
    """Bit places of a role's parts in a tile, int64 ``[bits, 16 * dim]``."""
    places = ref.bit_places(dim, role, bits)
    return torch.from_numpy(np.ascontiguousarray(places.reshape(-1, bits).T)).to(device)


@functools.cache
def levels_of(bits: int, device: str) -> Tensor:
    """Return what each page code reads as at a scale of one, float64."""
    levels = ref.read(np.arange(1 << bits)[None], np.ones(1), ref.BOOKS[bits])[0]
    table = np.empty(1 << bits)
    table[ref.page_codes(bits)] = levels
    return torch.from_numpy(table).to(device)


@functools.cache
def rotation_of(head_dim: int, role: str, device: str) -> Tensor:
    """Return the map to rotated space, float64 ``[padded_dim, head_dim]``."""
    dim = 1 << (head_dim - 1).bit_length()
    matrix = ref.hadamard_matrix(dim) * ref.signs(role, dim) / math.sqrt(dim)
    return torch.from_numpy(np.ascontiguousarray(matrix[:, :head_dim])).to(device)


@functools.cache
def roundings_of(dim: int, k_bits: int, device: str) -> Tensor:
    """Return how far each integer of a query may be off, in units, float64 ``[dim]``."""
    off = torch.full((dim,), 0.5, dtype=torch.float64)
    if k_bits == 2:  # magnitudes m and 3m: `CodeShift` and `kEvenSum` of key_operand.cuh
        off[torch.arange(dim) % 4 > 0] = 2.0
        off[0] += 1
    return (off + TRANSFORM).to(device)


@dataclass(frozen=True)
class Answer:
    """Attention in float64; rows are (query, head)."""

    out: Tensor  # [nnz, heads, dim], in the space asked for
    lse: Tensor  # [nnz, heads], base 2
    spread: Tensor  # root of the summed squares of what each token adds to an output
    out_slack: Tensor  # how far scores that are off may move an output
    lse_slack: Tensor  # and an LSE
    spoilt: Tensor  # rows that see something that is not finite
    doomed: Tensor  # and which of them must show it


@dataclass(frozen=True)
class Keys:
    """K and V of all pages in order, float64 ``[tokens, heads, dim]``; NaN if not written."""

    k: Tensor
    v: Tensor
    off: Tensor  # [tokens, heads]: how far a score may be off for a query's unit of one
    size: Tensor  # and for a query of length one, by other roundings


def read_pages(problem: Problem) -> Keys:
    """Read pages, offsets and copies as ``tests/ref.py`` says."""
    t, dim, device = problem.trial, problem.dim, problem.device
    heads, pages = t.num_kv_heads, len(problem.ids)
    tiles = problem.content.view(pages, heads, problem.tiles, problem.layout.tile_bytes)
    tiles = tiles.transpose(1, 2)
    scales = problem._scales(problem.content)
    found, start = [], 0
    for role, bits, part in (("k", t.k_bits, 0), ("v", t.v_bits, 1)):
        codes = torch.zeros(*tiles.shape[:3], TILE * dim, dtype=torch.uint8, device=device)
        for bit, places in enumerate(places_of(dim, role, bits, device)):
            codes |= ((tiles[..., places // 8 + start] >> (places % 8).byte()) & 1) << bit
        levels = levels_of(bits, device)[codes.long()].unflatten(-1, (TILE, dim))
        found.append(levels * scales[..., part].double().abs()[..., None])
        start += 2 * dim * bits
    k, v = found  # [pages, tiles, heads, 16, dim]
    off = k.abs() @ roundings_of(dim, t.k_bits, device)
    size = k.square().sum(-1).sqrt()
    if problem.k_offset is not None:
        segment = problem._positions()[:, :, 0] // SEGMENT
        offset = problem.k_offset.double()[segment.clamp(max=problem.k_offset.shape[0] - 1)]
        plain = torch.signbit(scales[..., 0])[..., None]
        k = torch.where(plain, k, k + offset[:, :, :, None])
        # added to every score of a segment, and taken away again
        size = size + 2 * offset.square().sum(-1).sqrt()[..., None]
    if problem.window is not None:
        kept = problem.own_slots >= 0
        copies = problem.window[problem.own_slots[kept].long()].double()
        k[kept], v[kept] = copies[:, :, 0], copies[:, :, 1]
        off[kept], size[kept] = 0, copies[:, :, 0].square().sum(-1).sqrt()

    k, v, off, size = (
        x.transpose(2, 3).reshape(pages * t.page_size, heads, *x.shape[4:])
        for x in (k, v, off, size)
    )
    return Keys(k, v, off, size)


def _requests(problem: Problem) -> Iterator[tuple[int, slice, slice]]:
    """Yield length, rows of queries and rows of tokens of every request."""
    t, row = problem.trial, 0
    for i, (length, q_len) in enumerate(zip(t.lens, t.q_lens, strict=True)):
        first = problem.starts[i] * t.page_size
        yield length, slice(row, row + q_len), slice(first, first + length)
        row += q_len


def _hidden(t: Trial, length: int, q_len: int, device: str) -> Tensor:
    """Return which tokens a query may not see, bool ``[q_len, 1, 1, length]``."""
    own = torch.arange(length - q_len, length, device=device)[:, None]
    token = torch.arange(length, device=device)
    hidden = (token > own) & t.causal
    if t.window_left >= 0:
        hidden = hidden | (token < own - t.window_left)
    return hidden[:, None, None, :]


def _logits(t: Trial, q: Tensor, keys: Keys, tokens: slice) -> tuple[Tensor, Tensor]:
    """Return natural logits and how far they may be off; ``q`` and all but ``k`` are finite."""
    k = keys.k[tokens].nan_to_num(0, 0, 0)
    scale = t.head_dim**-0.5
    logits = torch.einsum("qhgd,khd->qhgk", q, k) * scale
    unit, length = q.abs().amax(-1) / TOP, q.square().sum(-1).sqrt()
    off = torch.einsum("qhg,kh->qhgk", unit, keys.off[tokens])
    off += torch.einsum("qhg,kh->qhgk", ROUNDING * length, keys.size[tokens])
    off = (off * scale).nan_to_num(0, 0, 0)
    if t.logits_soft_cap > 0:

        def capped(x: Tensor) -> Tensor:
            return t.logits_soft_cap * torch.tanh(x / t.logits_soft_cap)

        ends = (capped(logits + off), capped(logits - off))
        logits = capped(logits)
        off = torch.maximum(*((x - logits).abs() for x in ends))
    return logits, off


def solve(problem: Problem) -> Answer:
    """Attend in float64."""
    t, device = problem.trial, problem.device
    q = problem.q.double()
    if not t.rotated_query:
        q = q @ rotation_of(t.head_dim, "k", device).T
    lost = ~q.isfinite().all(-1)  # queries
    q = q.masked_fill(lost[..., None], 0)
    keys = read_pages(problem)
    extents = q.shape[:2]
    new = functools.partial(torch.zeros, dtype=torch.float64, device=device)
    out, lse = new(*extents, problem.dim), new(extents) - math.inf
    spread, out_slack, lse_slack = new(extents), new(extents), new(extents)
    spoilt = torch.zeros(extents, dtype=torch.bool, device=device)
    doomed = spoilt.clone()
    sinks = new(t.num_kv_heads, t.group_size) - math.inf
    if problem.sinks is not None:
        sinks = problem.sinks.double().view_as(sinks)
    for length, rows, tokens in _requests(problem):
        q_len = rows.stop - rows.start
        if not length or not q_len:
            continue
        k, v = keys.k[tokens], keys.v[tokens]
        k_fine, v_fine = k.isfinite().all(-1), v.isfinite().all(-1)
        v = v.nan_to_num(0, 0, 0)
        logits, off = _logits(t, q[rows].unflatten(1, (t.num_kv_heads, t.group_size)), keys, tokens)
        hidden = _hidden(t, length, q_len, device)
        k_bad = (~k_fine.T[None, :, None, :] & ~hidden).expand_as(logits)
        v_bad = (~v_fine.T[None, :, None, :] & ~hidden).expand_as(logits)
        logits = logits.masked_fill(hidden, -math.inf)
        total = torch.logaddexp(logits.logsumexp(-1), sinks)
        weights = torch.exp(logits - total.clamp(min=-1e300)[..., None])
        o = torch.einsum("qhgk,khd->qhgd", weights, v)
        sizes = v.square().sum(-1)  # [tokens, heads]
        # |v - o|, see above
        apart = sizes.T[:, None] - 2 * torch.einsum("qhgd,khd->qhgk", o, v)
        apart = (apart + o.square().sum(-1)[..., None]).clamp(min=0).sqrt()
        sink = torch.exp(sinks - total.clamp(min=-1e300))
        least = sink + (weights * torch.exp(-off)).sum(-1)
        moved = torch.where(weights > 0, weights * torch.expm1(off.clamp(max=300)) * apart, 0)
        most = torch.logaddexp((logits + off).logsumexp(-1), sinks)
        found = {
            "out": o,
            "lse": total,
            "spread": torch.einsum("qhgk,kh->qhg", weights.square(), sizes).sqrt(),
            "out_slack": moved.sum(-1) / least.clamp(min=1e-300),
            "lse_slack": torch.where(total > -math.inf, most - total, 0),
            "spoilt": (k_bad | v_bad).any(-1),
            # a key of infinite length may rightly get no weight
            "doomed": (v_bad & (weights > 1e-3) | k_bad & (t.bad == "nan")).any(-1),
            "sees": (~hidden).any(-1).expand(total.shape),
        }
        flat = {name: x.flatten(1, 2) for name, x in found.items()}
        out[rows], lse[rows], spread[rows] = flat["out"], flat["lse"], flat["spread"]
        out_slack[rows], lse_slack[rows] = flat["out_slack"], flat["lse_slack"]
        spoilt[rows] = flat["spoilt"] | lost[rows]
        doomed[rows] = flat["doomed"] | (lost[rows] & flat["sees"] & (t.bad_query == "nan"))
    if problem.sinks is not None:  # rows without a token
        lse = torch.maximum(lse, problem.sinks.double().expand(extents))
    if not t.rotated_output:
        out = out @ rotation_of(t.head_dim, "v", device)
    log2 = math.log(2.0)
    return Answer(out, lse / log2, spread, out_slack, lse_slack / log2, spoilt, doomed)
