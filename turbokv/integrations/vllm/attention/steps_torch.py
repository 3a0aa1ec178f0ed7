# SPDX-License-Identifier: Apache-2.0
"""The steps of attention in plain PyTorch, for the CPU.

The functions are those of :mod:`turbokv.integrations.vllm.attention.steps_cuda`. Slow and exact:
they let vLLM's scheduler and its CPU engine run over compressed pages where there
is no GPU, and are what the GPU's answers are compared with. They read lengths on the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from turbokv import core, kernels
from turbokv.centring import SEGMENT
from turbokv.integrations.vllm.attention.layer import CacheLayer
from turbokv.paged import TILE, PageLayout


def prepare(layer: CacheLayer) -> None:
    """Nothing has to be loaded or compiled."""


def decode_workspace_bytes(
    max_requests: int, num_qo_heads: int, layer: CacheLayer, max_q_len: int
) -> int:
    """No workspace is needed."""
    return 0


def _layout(layer: CacheLayer, page_size: int) -> PageLayout:
    k_bits, v_bits = layer.k_format.bits, layer.v_format.bits
    return PageLayout(layer.head_dim, k_bits, v_bits, page_size, layer.num_kv_heads)


def map_keys(layer: CacheLayer, k: Tensor) -> Tensor:
    """Return keys as they are stored: float32 where the layer maps them, else ``k``."""
    return k if layer.k_matrix is None else _times(k, layer.k_matrix)


def map_queries(layer: CacheLayer, q: Tensor) -> Tensor:
    """Return queries that meet such keys: float32 where the layer maps them, else ``q``."""
    return q if layer.q_matrix is None else _times(q, layer.q_matrix)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows ``[tokens, heads, dim]`` by the matrix of their KV head."""
    finite = x.float().clamp(-core.INPUT_LIMIT, core.INPUT_LIMIT)
    grouped = finite.view(x.shape[0], matrix.shape[0], -1, x.shape[2])
    return torch.einsum("thgd,hde->thge", grouped, matrix).reshape(x.shape)


def store(
    layer: CacheLayer,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    pages: Tensor,
    page_size: int,
    positions: Tensor | None,
    tile_slots: Tensor | None,
    *,
    single_tokens: bool = False,
) -> None:
    """Compress fresh tokens into their slots, and keep 16-bit copies where a tile has one."""
    keep = (slot_mapping[: k.shape[0]] >= 0).nonzero()[:, 0]
    slots = slot_mapping[keep]
    layout = _layout(layer, page_size)
    vectors = {"k": map_keys(layer, k[keep]).float(), "v": v[keep].float()}
    for role, fmt in (("k", layer.k_format), ("v", layer.v_format)):
        x, uncentred = vectors[role], None
        if role == "k" and layer.k_offset is not None:
            assert positions is not None
            offset = layer.k_offset[positions[keep] // SEGMENT]
            uncentred = x.square().sum(-1) < (x - offset).square().sum(-1)
            x = torch.where(uncentred[..., None], x, x - offset)
        packed = x.new_empty((*x.shape[:-1], fmt.packed_dim), dtype=torch.uint8)
        norms = x.new_empty(x.shape[:-1], dtype=torch.float16)
        flat = x.reshape(-1, fmt.head_dim)
        kernels.compress(flat, fmt, packed.view(-1, fmt.packed_dim), norms.view(-1), "torch")
        if uncentred is not None:
            norms = torch.where(uncentred, -norms, norms)
        layout.scatter(pages, slots, role, packed, norms)  # type: ignore[arg-type]
    if tile_slots is None or layer.copies is None:
        return
    copy_slots = tile_slots.reshape(-1)[slots // TILE]
    for part, (role, fmt) in enumerate((("k", layer.k_format), ("v", layer.v_format))):
        rotated = core.rotate(vectors[role].reshape(-1, fmt.head_dim), fmt)
        rotated = rotated.view(-1, layer.num_kv_heads, fmt.padded_dim).to(torch.float16)
        held = (copy_slots >= 0).nonzero()[:, 0]
        layer.copies[copy_slots[held].long(), :, part, slots[held] % TILE] = rotated[held]


def _read(
    layer: CacheLayer,
    pages: Tensor,
    page_size: int,
    table: Tensor,
    begin: int,
    end: int,
    tile_slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tokens ``begin`` to ``end - 1`` of a request, keys as the layer maps them, float32."""
    token = torch.arange(begin, end, dtype=torch.int64, device=table.device)
    slots = table.long()[token // page_size] * page_size + token % page_size
    layout = _layout(layer, page_size)
    found = []
    for part, (role, fmt) in enumerate((("k", layer.k_format), ("v", layer.v_format))):
        packed, norms = layout.gather(pages, slots, role)  # type: ignore[arg-type]
        x = norms.new_empty((*norms.shape, fmt.padded_dim), dtype=torch.float32)
        kernels.decompress(
            packed.reshape(-1, fmt.packed_dim),
            norms.reshape(-1),
            fmt,
            x.view(-1, fmt.padded_dim),
            rotated=True,
            backend="torch",
        )
        if role == "k" and layer.k_offset_rotated is not None:
            offset = layer.k_offset_rotated[token // SEGMENT]
            x += torch.where(torch.signbit(norms)[..., None], torch.zeros_like(x), offset)
        if tile_slots is not None and layer.copies is not None:
            copy_slots = tile_slots.reshape(-1)[slots // TILE].long()
            held = (copy_slots >= 0).nonzero()[:, 0]
            x[held] = layer.copies[copy_slots[held], :, part, slots[held] % TILE].float()
        flat = core.unrotate(x.view(-1, fmt.padded_dim), fmt)
        found.append(flat.view(*norms.shape, -1)[..., : fmt.head_dim])
    return found[0], found[1]


def expand(
    layer: CacheLayer,
    pages: Tensor,
    page_size: int,
    block_table: Tensor,
    out_k: Tensor,
    out_v: Tensor,
    tile_slots: Tensor | None,
    *,
    first_token: int = 0,
    token_begin: Tensor | None = None,
    out_indptr: Tensor | None = None,
) -> None:
    """Decompress tokens of one request (``block_table`` 1-D) or several, keys still mapped."""
    if block_table.ndim == 1:
        block_table = block_table[None]
    starts = [0, out_k.shape[0]] if out_indptr is None else out_indptr.tolist()
    for row, table in enumerate(block_table):
        begin = first_token if token_begin is None else int(token_begin[row])
        rows = slice(starts[row], starts[row + 1])
        end = begin + rows.stop - rows.start
        k, v = _read(layer, pages, page_size, table, begin, end, tile_slots)
        out_k[rows], out_v[rows] = k.to(out_k.dtype), v.to(out_v.dtype)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sm_scale: float,
    causal: bool,
    sliding_window: int | None,
    logits_soft_cap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of one request in float64; queries are its newest tokens if ``causal``."""
    group = q.shape[1] // k.shape[1]
    keys = k.double().repeat_interleave(group, 1)
    values = v.double().repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", q.double(), keys) * sm_scale
    if logits_soft_cap > 0:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    first = k.shape[0] - q.shape[0]  # below zero where queries outnumber keys
    own = torch.arange(first, k.shape[0], dtype=torch.int64, device=k.device)
    ahead = torch.arange(k.shape[0], dtype=torch.int64, device=k.device) - own[:, None]
    hidden = (ahead > 0) & causal
    if sliding_window is not None:
        hidden |= ahead <= -sliding_window
    logits.masked_fill_(hidden, -math.inf)
    lse = logits.logsumexp(-1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.double()[:, None])
    weights = torch.exp(logits - total.clamp(min=-1e300)[..., None])
    return torch.einsum("hqk,khd->qhd", weights, values), lse.float()


def decode(
    layer: CacheLayer,
    q: Tensor,
    pages: Tensor,
    page_size: int,
    block_table: Tensor,
    seq_lens: Tensor,
    qo_indptr: Tensor | None,
    max_q_len: int,
    tile_slots: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
    *,
    sm_scale: float,
    sliding_window: int | None,
    logits_soft_cap: float,
    sinks: Tensor | None,
    single_tokens: bool = False,
) -> None:
    """Attend to compressed pages."""
    q = map_queries(layer, q)
    rows = range(0, q.shape[0] + 1, max_q_len) if qo_indptr is None else qo_indptr.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        own = slice(rows[row], rows[row + 1])
        if own.start == own.stop or length <= 0:
            out[own] = 0
            continue
        begin = 0
        if sliding_window is not None:
            # pages before the window may be another request's, and of another kind of layer
            count = own.stop - own.start
            begin = max(0, length - count + 1 - sliding_window) // TILE * TILE
        k, v = _read(layer, pages, page_size, block_table[row], begin, length, tile_slots)
        found, _ = _attention(q[own], k, v, sm_scale, True, sliding_window, logits_soft_cap, sinks)
        out[own] = found.to(out.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    out: Tensor,
    *,
    sm_scale: float,
    causal: bool,
    sliding_window: int | None,
    logits_soft_cap: float,
    sinks: Tensor | None,
    version: int,
) -> Tensor:
    """Attend to 16-bit keys and values; returns the log-sum-exp, ``[num_heads, tokens]``."""
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    q_starts, k_starts = cu_q.tolist(), cu_k.tolist()
    for row in range(len(q_starts) - 1):
        own = slice(q_starts[row], q_starts[row + 1])
        theirs = slice(k_starts[row], k_starts[row + 1])
        found, lse[:, own] = _attention(
            q[own], k[theirs], v[theirs], sm_scale, causal, sliding_window, logits_soft_cap, sinks
        )
        out[own] = found.to(out.dtype)
    return lse


def merge(out: Tensor, out_lse: Tensor, a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> None:
    """Merge attention over two disjoint sets of tokens into ``out``."""
    total = torch.logaddexp(a_lse, b_lse)
    weight_a = torch.exp(a_lse - total).t()[..., None]
    weight_b = torch.exp(b_lse - total).t()[..., None]
    out.copy_(a.float() * weight_a + b.float() * weight_b)
    out_lse.copy_(total)
