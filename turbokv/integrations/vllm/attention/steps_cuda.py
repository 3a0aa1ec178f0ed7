# SPDX-License-Identifier: Apache-2.0
"""The steps of attention on a GPU: TurboKV's kernels, FlashAttention, and vLLM's merge.

:mod:`turbokv.integrations.vllm.attention.steps_torch` has the same functions for the CPU. Pages are
uint8 ``[num_pages, num_kv_heads, page_head_bytes]``; queries, keys and values ``[tokens, heads,
head_dim]``, float16 or bfloat16.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from turbokv.integrations.vllm import compat
from turbokv.integrations.vllm.attention.layer import CacheLayer, apply_attention_sinks
from turbokv.kernels import cuda

# Whether decode may start while the store before it runs, in steps whose requests have one token
# each. Not served with: a request of the same step may read, as an old token, one that another
# stores, since vLLM finds full blocks of requests that it schedules in the same step.
OVERLAP_DECODE = False


def prepare(layer: CacheLayer) -> None:
    """Load or compile the kernels of a layer, so that serving never waits for a compiler."""
    reason = cuda.why_unavailable(compat.device())
    if reason is not None:
        raise RuntimeError(reason)
    for kind in ("store", "decompress", "decode"):
        cuda.prepare(kind, layer.k_format, layer.v_format)
    if layer.k_matrix is not None:
        from turbokv.kernels import triton_key_map

        triton_key_map.prepare(layer.k_matrix)


def map_keys(layer: CacheLayer, k: Tensor) -> Tensor:
    """Return keys as they are stored, rounded to their dtype: new where the layer maps them."""
    return k if layer.k_matrix is None else _times(k, layer.k_matrix)


def map_queries(layer: CacheLayer, q: Tensor) -> Tensor:
    """Return queries that meet such keys, in their dtype: new where the layer maps them."""
    return q if layer.q_matrix is None else _times(q, layer.q_matrix)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    # imported where it is used: the host's part of this module needs no Triton
    from turbokv.kernels.triton_key_map import map_heads

    return map_heads(x, matrix)


def decode_workspace_bytes(
    max_requests: int, num_qo_heads: int, layer: CacheLayer, max_q_len: int
) -> int:
    """Return the bytes of workspace that :func:`decode` needs for the largest batch."""
    return cuda.decode_workspace_bytes(
        max_requests,
        num_qo_heads,
        layer.num_kv_heads,
        layer.head_dim,
        max_q_len=max_q_len,
        device=compat.device(),
    )


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
    """Compress fresh tokens into their slots, and keep 16-bit copies where a tile has one.

    ``single_tokens`` says that every request of the step has one token.
    """
    cuda.store(
        map_keys(layer, k),
        v,
        slot_mapping,
        pages,
        layer.k_format,
        layer.v_format,
        page_size,
        positions=positions if layer.k_offset is not None else None,
        k_offset=layer.k_offset,
        tile_slots=tile_slots,
        window=layer.copies if tile_slots is not None else None,
        launch_dependents=OVERLAP_DECODE and single_tokens,
    )


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
    cuda.decompress(
        pages,
        layer.k_format,
        layer.v_format,
        page_size,
        block_table,
        out_k,
        out_v,
        first_token=first_token,
        token_begin=token_begin,
        out_indptr=out_indptr,
        k_offset=layer.k_offset,
        tile_slots=tile_slots,
        window=layer.copies if tile_slots is not None else None,
    )


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
    """Attend to compressed pages in one launch, after one that maps queries; graph-safe."""
    cuda.decode(
        map_queries(layer, q),
        pages,
        layer.k_format,
        layer.v_format,
        page_size,
        block_table,
        kv_lens=seq_lens,
        qo_indptr=qo_indptr,
        max_q_len=max_q_len,
        sm_scale=sm_scale,
        window_left=-1 if sliding_window is None else sliding_window - 1,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        out=out,
        tile_slots=tile_slots,
        window=layer.copies if tile_slots is not None else None,
        k_offset=layer.k_offset_rotated,
        workspace=workspace,
        early_loads=OVERLAP_DECODE and single_tokens,
    )


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
    """Attend to 16-bit keys and values with FlashAttention.

    Returns
    -------
    Tensor
        Log-sum-exp, float32 ``[num_heads, tokens]``, natural, without ``sinks``.
    """
    extra: dict[str, Any] = {}
    takes_sinks = version == 3
    if sinks is not None and takes_sinks:
        extra["s_aux"] = sinks.to(q.dtype)
    _, lse = compat.flash_attention()(
        q=q,
        k=k,
        v=v,
        max_seqlen_q=max_q,
        cu_seqlens_q=cu_q,
        max_seqlen_k=max_k,
        cu_seqlens_k=cu_k,
        softmax_scale=sm_scale,
        causal=causal,
        window_size=None if sliding_window is None else [sliding_window - 1, 0],
        softcap=logits_soft_cap,
        return_softmax_lse=True,
        out=out,
        fa_version=version,
        **extra,
    )
    result: Tensor = lse
    if sinks is not None and not takes_sinks:
        apply_attention_sinks(out, result, sinks)
    return result


merge = compat.merge_attention
