# SPDX-License-Identifier: Apache-2.0
"""Prefill of a chunk over compressed context: inline expansion beside what else could be done.

Times, in one process and in alternating order, with CUDA events:
  fa2_bf16          FlashInfer's FA2 kernel on a bf16 cache
  fa3_bf16          FlashAttention-3, as vLLM ships it, on a bf16 cache
  inline            FlashInfer's FA2 kernel on compressed pages, rotations included
  decompress+fa3    compressed pages expanded to a bf16 workspace, then FlashAttention-3

Run on a GPU host with the patched FlashInfer:  python scripts/bench_prefill.py --json out.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from turbokv.codec import TurboKVCodec
from turbokv.kernels import cuda
from turbokv.paged import PageLayout

QO_HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
BF16 = torch.bfloat16
Run = Callable[[], Any]


class Work:
    """A chunk of queries whose request has ``context`` older tokens; pages in a shuffled order."""

    def __init__(self, chunk: int, context: int) -> None:
        self.chunk, self.length = chunk, context + chunk
        self.pages = -(-self.length // PAGE)
        g = torch.Generator(device="cuda").manual_seed(chunk + context)
        shape = (self.length, KV_HEADS, HEAD_DIM)
        self.q = torch.randn(chunk, QO_HEADS, HEAD_DIM, device="cuda", generator=g).to(BF16)
        self.k = torch.randn(shape, device="cuda", generator=g).to(BF16)
        self.v = torch.randn(shape, device="cuda", generator=g).to(BF16)
        self.table = torch.randperm(self.pages, device="cuda", generator=g).int()
        token = torch.arange(self.length, device="cuda")
        self.slots = self.table.long()[token // PAGE] * PAGE + token % PAGE
        self.qo_indptr = torch.tensor([0, chunk], dtype=torch.int32)
        self.kv_indptr = torch.tensor([0, self.pages], dtype=torch.int32)
        self.last = torch.tensor([(self.length - 1) % PAGE + 1], dtype=torch.int32)

    @property
    def flops(self) -> float:
        """Of causal attention: a multiplication and an addition for every visible pair, twice."""
        pairs = self.chunk * (self.length - self.chunk) + self.chunk * (self.chunk + 1) // 2
        return 4.0 * pairs * QO_HEADS * HEAD_DIM

    def tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.qo_indptr, self.kv_indptr, self.table, self.last


def fa2(work: Work, workspace: torch.Tensor) -> Run:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    cache = torch.empty(work.pages, 2, PAGE, KV_HEADS, HEAD_DIM, dtype=BF16, device="cuda")
    for i, x in enumerate((work.k, work.v)):
        flat = torch.empty(work.pages * PAGE, KV_HEADS, HEAD_DIM, dtype=BF16, device="cuda")
        flat[work.slots] = x
        cache[:, i] = flat.view(work.pages, PAGE, KV_HEADS, HEAD_DIM)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
    shape = (QO_HEADS, KV_HEADS, HEAD_DIM, PAGE)
    wrapper.plan(*work.tables(), *shape, causal=True, q_data_type=BF16)
    out = torch.empty_like(work.q)
    return lambda: wrapper.run(work.q, cache, out=out)


def fa3_function() -> Any:
    """Return vLLM's FlashAttention-3, or None if it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        return None
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def attend_fa3(work: Work, k: Any, v: Any, out: Any, starts: Any, **tables: Any) -> Any:
    return fa3_function()(
        work.q,
        k,
        v,
        max_seqlen_q=work.chunk,
        cu_seqlens_q=starts,
        max_seqlen_k=work.length,
        causal=True,
        out=out,
        fa_version=3,
        **tables,
    )


def fa3(work: Work) -> Run:
    caches = []
    for x in (work.k, work.v):
        flat = torch.empty(work.pages * PAGE, KV_HEADS, HEAD_DIM, dtype=BF16, device="cuda")
        flat[work.slots] = x
        caches.append(flat.view(work.pages, PAGE, KV_HEADS, HEAD_DIM))
    starts = work.qo_indptr.cuda()
    lens = torch.tensor([work.length], dtype=torch.int32, device="cuda")
    out = torch.empty_like(work.q)
    return lambda: attend_fa3(
        work, caches[0], caches[1], out, starts, seqused_k=lens, block_table=work.table[None]
    )


def compress(work: Work, codec: TurboKVCodec) -> torch.Tensor:
    layout = PageLayout(HEAD_DIM, codec.k_bits, codec.v_bits, PAGE, KV_HEADS)
    pages = torch.zeros(layout.shape(work.pages), dtype=torch.uint8, device="cuda")
    formats = (codec.vector_format("k"), codec.vector_format("v"))
    cuda.store(work.k, work.v, work.slots, pages, *formats, PAGE)
    return pages


def inline(work: Work, codec: TurboKVCodec, workspace: torch.Tensor) -> Run:
    from turbokv.integrations.flashinfer import BatchPrefillWithPagedTurboKVCacheWrapper

    pages = compress(work, codec)
    wrapper = BatchPrefillWithPagedTurboKVCacheWrapper(workspace)
    shape = (QO_HEADS, KV_HEADS, HEAD_DIM, PAGE)
    formats = (codec.vector_format("k"), codec.vector_format("v"))
    k_format, v_format = formats
    wrapper.plan(*work.tables(), *shape, k_format, v_format, causal=True)
    out = torch.empty_like(work.q)
    return lambda: wrapper.run(work.q, pages, out=out)


def decompress_fa3(work: Work, codec: TurboKVCodec) -> Run:
    pages = compress(work, codec)
    formats = (codec.vector_format("k"), codec.vector_format("v"))
    k, v = torch.empty_like(work.k), torch.empty_like(work.v)
    starts, ends = work.qo_indptr.cuda(), torch.tensor([0, work.length], dtype=torch.int32).cuda()
    out = torch.empty_like(work.q)

    def run() -> Any:
        cuda.decompress(pages, *formats, PAGE, work.table, k, v)
        return attend_fa3(work, k, v, out, starts, cu_seqlens_k=ends)

    return run


def event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, a round at a time, forwards and backwards."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(2):
            run()
    for i in range(rounds):
        for name in list(runs)[:: 1 if i % 2 == 0 else -1]:
            begin, end = event(), event()
            begin.record()
            runs[name]()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return times


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunk", type=int, nargs="*", default=[2048])
    parser.add_argument("--context", type=int, nargs="*", default=[32768])
    parser.add_argument("--bits", nargs="*", default=["4,4"], help="pairs of K and V, such as 5,3")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.cuda.get_device_name()
    print(f"{device}; {QO_HEADS}/{KV_HEADS} heads, D {HEAD_DIM}, page {PAGE}, causal, bf16")
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
    records = []
    for chunk in args.chunk:
        for context in args.context:
            work = Work(chunk, context)
            runs: dict[str, Run] = {"fa2_bf16": fa2(work, workspace)}
            with_fa3 = fa3_function() is not None
            if with_fa3:
                runs["fa3_bf16"] = fa3(work)
            else:
                print("fa3_bf16 and decompress+fa3 left out: vLLM's FlashAttention is missing")
            for bits in args.bits:
                k_bits, v_bits = map(int, bits.split(","))
                codec = TurboKVCodec(HEAD_DIM, k_bits=k_bits, v_bits=v_bits, device="cuda")
                name = f"K{k_bits}V{v_bits}"
                runs[f"inline {name}"] = inline(work, codec, workspace)
                if with_fa3:
                    runs[f"decompress+fa3 {name}"] = decompress_fa3(work, codec)
                    other = runs[f"decompress+fa3 {name}"]().clone()
                    apart = difference(runs[f"inline {name}"](), other)
                    print(f"{name}: inline and decompress+fa3 differ by {apart:.1e}")
            times = measure(runs, args.rounds)
            base = statistics.median(times["fa2_bf16"])
            print(f"chunk {chunk} over {context}:")
            for name, values in times.items():
                median = statistics.median(values)
                rate = work.flops / median / 1e9
                print(
                    f"  {name:22} {median:8.3f} ms  [{min(values):.3f}, {max(values):.3f}]"
                    f"  {rate:5.0f} TFLOP/s  {median / base:5.2f}x fa2_bf16"
                )
                records.append(
                    {
                        "chunk": chunk,
                        "context": context,
                        "name": name,
                        "ms": values,
                        "median": median,
                    }
                )
    if args.json:
        args.json.write_text(json.dumps({"device": device, "cells": records}, indent=1))


if __name__ == "__main__":
    main()
