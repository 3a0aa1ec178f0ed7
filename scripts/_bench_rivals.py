# SPDX-License-Identifier: Apache-2.0
"""What ``bench_kernels.py`` times TurboKV against.

FlashAttention-3 and the Triton kernels are those of vLLM 0.33.0; FlashInfer is 0.7.2
(``_bench_flashinfer.py``). Every rival is called as its engine calls it in a captured decode step.
Where a choice had to be made it favours the rival: FA3's float8 queries come quantised, its
schedule comes computed, upstream TurboQuant's final copy into the output is left out, and buffers
are allocated beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from _bench_flashinfer import Builds, fa2, nvfp4_token_bytes, xqa
from _bench_work import FP8, Contender, Kind, Launch, Shape, Work, plain_cache, random_bytes
from torch import Tensor

_CUDA_GRAPH_SPLITS = 32  # vLLM: flash_attn_max_num_splits_for_cuda_graph
_TQ_SPLITS = 32  # vLLM: tq_max_kv_splits_for_cuda_graph
_TRITON_SEGMENTS = 16  # vLLM: NUM_PAR_SOFTMAX_SEGMENTS
_TRITON_MIN_GRID = 128  # vLLM: MIN_LAUNCH_GRID_SIZE_2D


# --- decode ---------------------------------------------------------------------------------------


def _fa3(fp8: bool, num_splits: int) -> Callable[[Work, int], list[Launch]]:
    def build(work: Work, sets: int) -> list[Launch]:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

        k, v = plain_cache(work, fp8)
        shape, device, lengths, q = work.shape, k.device, work.lengths(), work.query()
        starts = torch.arange(work.batch + 1, dtype=torch.int32, device=device)
        out = torch.empty_like(q)
        scales: dict[str, Tensor] = {}
        if fp8:
            q = q.to(FP8)
            one = torch.ones(work.batch, shape.num_kv_heads, device=device)
            scales = {"q_descale": one, "k_descale": one, "v_descale": one}
        same: dict[str, Any] = {"cu_seqlens_q": starts, "causal": True, "num_splits": num_splits}
        heads = (shape.num_qo_heads, shape.num_kv_heads, shape.head_dim)
        schedule = get_scheduler_metadata(
            work.batch,
            1,
            work.context,
            *heads,
            lengths,
            q.dtype,
            page_size=work.pool.page_size,
            **same,
        )
        same |= {"seqused_k": lengths, "out": out, "scheduler_metadata": schedule, **scales}
        same |= {"max_seqlen_q": 1, "max_seqlen_k": work.context, "fa_version": 3}

        def launch(table: Tensor) -> object:
            return flash_attn_varlen_func(q, k, v, block_table=table, **same)

        return [partial(launch, t) for t in work.tables(sets)]

    return build


def _tq_cache(work: Work) -> Tensor:
    """Return upstream TurboQuant's 4-bit cache ``[num_pages, page_size, num_kv_heads, slot]``."""
    pool, shape = work.pool, work.shape

    def make() -> Tensor:
        extents = (pool.num_pages, shape.num_kv_heads, pool.page_size, shape.head_dim + 6)
        cache = random_bytes(extents, pool.device)
        # a slot: codes of K, its norm, codes of V, scale and zero point
        halves, quarter = cache.view(torch.float16), shape.head_dim // 4
        halves[..., quarter].uniform_(8.0, 12.0)
        halves[..., 2 * quarter + 1].uniform_(0.2, 0.4)
        halves[..., 2 * quarter + 2].uniform_(-3.0, -2.0)
        return cache

    cache: Tensor = pool.get("turboquant", make)
    return cache.transpose(1, 2)


def _hadamard(dim: int, device: torch.device) -> Tensor:
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < dim:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / math.sqrt(dim)


def _centroids(dim: int, device: torch.device) -> Tensor:
    """Return 16 ascending levels of about the right size; which ones does not change the time."""
    quantiles = (torch.arange(16, device=device) + 0.5) / 16
    return torch.erfinv(2 * quantiles - 1) * math.sqrt(2 / dim)


def _tq_decode(work: Work, sets: int) -> list[Launch]:
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    cache, lengths, q, dim = _tq_cache(work), work.lengths(), work.query(), work.shape.head_dim
    rotation, levels = _hadamard(dim, q.device), _centroids(dim, q.device)
    sums = torch.empty(*q.shape[:2], _TQ_SPLITS, dim + 1, device=q.device)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=q.device)
    options: dict[str, Any] = {"norm_correction": True, "PiT": rotation, "mid_o_buf": sums}
    options |= {"output_buf": out, "lse_buf": lse, "max_num_kv_splits": _TQ_SPLITS}

    def launch(table: Tensor) -> object:
        return triton_turboquant_decode_attention(
            q, cache, table, lengths, rotation, levels, dim**-0.5, 4, dim // 2 + 2, 4, **options
        )

    return [partial(launch, t) for t in work.tables(sets)]


def _int4_cache(work: Work) -> tuple[Tensor, ...]:
    """Return codes of K and V ``[num_pages, page_size, num_kv_heads, ...]`` and their scales."""
    pool, shape = work.pool, work.shape

    def make() -> Tensor:
        extents = (pool.num_pages, pool.page_size, shape.num_kv_heads, shape.head_dim + 8)
        cache = random_bytes(extents, pool.device)
        cache.view(torch.float32)[..., shape.head_dim // 8 :: shape.head_dim // 8 + 1].uniform_(
            0.01, 0.02
        )
        return cache

    cache: Tensor = pool.get("int4", make)
    k, v = cache.chunk(2, dim=-1)
    words, step = cache.view(torch.float32), shape.head_dim // 8
    return k, v, words[..., step], words[..., 2 * step + 1]


def _int4_decode(work: Work, sets: int) -> list[Launch]:
    from vllm.v1.attention.ops.int4_per_token_head import unified_attention_int4

    k, v, k_scale, v_scale = _int4_cache(work)
    shape, lengths, q = work.shape, work.lengths(), work.query()
    out = torch.empty_like(q)
    starts = torch.arange(work.batch + 1, dtype=torch.int32, device=q.device)
    threshold = _TRITON_MIN_GRID // shape.num_kv_heads
    extents = (threshold, shape.num_qo_heads, _TRITON_SEGMENTS)
    sums = torch.empty(*extents, 1 << (shape.head_dim - 1).bit_length(), device=q.device)
    names = ("sinks", "alibi_slopes", "qq_bias", "output_scale", "mm_prefix_range")
    unused: dict[str, None] = dict.fromkeys(names)
    options = {
        "cu_seqlens_q": starts,
        "max_seqlen_q": 1,
        "seqused_k": lengths,
        "max_seqlen_k": work.context,
        "softmax_scale": shape.head_dim**-0.5,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "use_alibi_sqrt": False,
        "k_scale_cache": k_scale,
        "v_scale_cache": v_scale,
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": _TRITON_SEGMENTS,
        "softmax_segm_output": sums,
        "softmax_segm_max": torch.empty(extents, device=q.device),
        "softmax_segm_expsum": torch.empty(extents, device=q.device),
    }

    def launch(table: Tensor) -> object:
        unified_attention_int4(q, k, v, out, block_table=table, **unused, **options)
        return out

    return [partial(launch, t) for t in work.tables(sets)]


# --- store and decompress -------------------------------------------------------------------------


def _stores(
    work: Work, sets: int, store: Callable[[Tensor, Tensor, Tensor], object]
) -> list[Launch]:
    kv = work.vectors("new")
    return [partial(store, kv[i, 0], kv[i, 1], s) for i, s in enumerate(work.slots(sets))]


def _plain_store(fp8: bool) -> Callable[[Work, int], list[Launch]]:
    def build(work: Work, sets: int) -> list[Launch]:
        from vllm import _custom_ops as ops

        k_cache, v_cache = plain_cache(work, fp8)
        if fp8:
            k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
        one = torch.ones(1, device=k_cache.device)
        name = "fp8" if fp8 else "auto"

        def store(k: Tensor, v: Tensor, slots: Tensor) -> None:
            ops.reshape_and_cache_flash(k, v, k_cache, v_cache, slots, name, one, one)

        return _stores(work, sets, store)

    return build


def _tq_store(work: Work, sets: int) -> list[Launch]:
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    cache, dim = _tq_cache(work), work.shape.head_dim
    rotation, levels = _hadamard(dim, cache.device), _centroids(dim, cache.device)
    middles = (levels[1:] + levels[:-1]) / 2

    def store(k: Tensor, v: Tensor, slots: Tensor) -> None:
        triton_turboquant_store(k, v, cache, slots, rotation, middles, 4, dim // 2 + 2, 4)

    return _stores(work, sets, store)


def _int4_store(work: Work, sets: int) -> list[Launch]:
    from vllm.v1.attention.ops.int4_per_token_head import reshape_and_cache_int4

    caches = _int4_cache(work)
    scales = {"k_scale_cache": caches[2], "v_scale_cache": caches[3]}

    def store(k: Tensor, v: Tensor, slots: Tensor) -> None:
        reshape_and_cache_int4(k, v, *caches[:2], slots, **scales)

    return _stores(work, sets, store)


def _copy(work: Work, sets: int) -> list[Launch]:
    source, target = work.vectors("new"), work.vectors("out")
    return [partial(target[i].copy_, source[i]) for i in range(sets)]


def rivals(kind: Kind, builds: Builds) -> list[Contender]:
    """Return what TurboKV is compared with."""

    def plain(size: int) -> Callable[[Shape], int]:
        return lambda shape: 2 * size * shape.vector_elements

    def padded(extra: int) -> Callable[[Shape], int]:
        return lambda shape: shape.num_kv_heads * (shape.head_dim + extra)

    if kind == "decompress":
        return [Contender("copy bf16", "bf16", "", plain(2), _copy)]
    triton = [
        ("turboquant_4bit_nc (vLLM)", "turboquant", padded(6), _tq_decode, _tq_store),
        ("int4_per_token_head (vLLM)", "int4", padded(8), _int4_decode, _int4_store),
    ]
    found = []
    families: tuple[Literal["bf16", "fp8"], ...] = ("bf16", "fp8")
    for family in families:
        fp8 = family == "fp8"
        size = plain(1 if fp8 else 2)

        def add(name: str, build: Any, family: Any = family, size: Any = size) -> None:
            found.append(Contender(f"{name} {family}", family, family, size, build))

        if kind == "store":
            add("reshape_and_cache_flash", _plain_store(fp8))
            continue
        add("FA3 32 splits", _fa3(fp8, _CUDA_GRAPH_SPLITS))
        add("FA3 heuristic", _fa3(fp8, 0))
        add("XQA (FlashInfer)", xqa(family, builds))
        add("FA2 (FlashInfer)", fa2(family, builds))
    if kind == "decode":
        name = "FA2 NVFP4 (FlashInfer)"
        found.append(Contender(name, "other", "nvfp4", nvfp4_token_bytes, fa2("nvfp4", builds)))
    for name, cache, token_bytes, decode, store in triton:
        build = decode if kind == "decode" else store
        found.append(Contender(name, "other", cache, token_bytes, build))
    return found
