# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's kernels as rivals in ``bench_kernels.py``, called as vLLM 0.33 calls them.

On a Hopper GPU vLLM serves 16-bit and float8 caches by XQA, and 4-bit caches (NVFP4: 16 codes and
a float8 scale, 4.5 bits per number) by the prefill template FA2, which serves the other types too
where it is asked for. Modules are compiled, or found compiled, in the background.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import torch
from _bench_work import BF16, FP8, Launch, Shape, Work, plain_cache, random_bytes
from torch import Tensor

CacheName = Literal["bf16", "fp8", "nvfp4"]
Builds = dict[tuple[object, ...], "Future[None]"]

_DTYPES = {"bf16": BF16, "fp8": FP8, "nvfp4": torch.uint8}
_FA2_WORKSPACE = 256 << 20
_XQA_WORKSPACE = 256 << 20
_SCALE_BLOCK = 16  # coordinates that share a scale in NVFP4
_COMPILERS = 8


def _fa2_module(cache: CacheName, head_dim: int) -> None:
    from flashinfer.prefill import get_batch_prefill_module

    # as the decode wrapper's plan() asks for it
    dims = (head_dim, head_dim, 0, False, False, False)
    get_batch_prefill_module("fa2", BF16, _DTYPES[cache], BF16, torch.int32, *dims)


def _xqa_module(cache: CacheName, page_size: int, head_dim: int, group_size: int) -> None:
    from flashinfer.xqa import get_xqa_module

    get_xqa_module(BF16, _DTYPES[cache], page_size, head_dim, group_size, False, BF16, 1)


def _import_error() -> Exception | None:
    try:
        for name in ("flashinfer", "flashinfer.prefill", "flashinfer.decode", "flashinfer.xqa"):
            importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises
        return error
    return None


def start_builds(shapes: Iterable[Shape], page_size: int) -> Builds:
    """Compile all modules in the background, that of the first shape first.

    Parameters
    ----------
    shapes
        Heads that are going to be measured.
    page_size
        Tokens of a page; XQA has a module for each.

    Returns
    -------
    dict
        A future for each module, keyed by what is asked of it; it holds the error if there is one.
    """
    wanted: dict[tuple[object, ...], Callable[[], None]] = {}
    found: Builds = {}
    for shape in shapes:
        dim, group = shape.head_dim, shape.num_qo_heads // shape.num_kv_heads
        names: tuple[CacheName, ...] = ("bf16", "fp8")
        for name in names:
            wanted["xqa", name, dim, group] = partial(_xqa_module, name, page_size, dim, group)
        for name in (*names, "nvfp4"):
            wanted["fa2", name, dim] = partial(_fa2_module, name, dim)
    # not first in threads that run at once: its modules import each other
    failed = _import_error()
    if failed is not None:
        for key in wanted:
            found[key] = Future()
            found[key].set_exception(failed)
        return found
    pool = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="flashinfer-build")
    found = {key: pool.submit(build) for key, build in wanted.items()}
    pool.shutdown(wait=False)
    return found


# --- caches ---------------------------------------------------------------------------------------


def nvfp4_token_bytes(shape: Shape) -> int:
    """Bytes of a token in an NVFP4 cache: codes of 4 bits and a scale for each 16."""
    return 2 * (shape.vector_elements // 2 + shape.vector_elements // _SCALE_BLOCK)


def _nvfp4_cache(work: Work) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return codes and scales of K and V as views of pages ``[K codes | scales | V codes | ...]``.

    Codes are uint8 ``[num_pages, page_size, num_kv_heads, head_dim / 2]``, scales float8
    ``[num_pages, page_size, num_kv_heads, head_dim / 16]``.
    """
    pool, shape = work.pool, work.shape
    tokens = pool.page_size * shape.num_kv_heads
    code_bytes, scale_bytes = tokens * shape.head_dim // 2, tokens * shape.head_dim // _SCALE_BLOCK
    side_bytes = code_bytes + scale_bytes

    def make() -> Tensor:
        pages = random_bytes((pool.num_pages, 2, side_bytes), pool.device)
        # positive numbers from 0.25 to 1 (0x7f would be NaN)
        pages[..., code_bytes:].random_(0x28, 0x38)
        return pages

    pages: Tensor = pool.get("nvfp4", make)

    def view(side: int, start: int, width: int, dtype: torch.dtype) -> Tensor:
        extents = (pool.num_pages, pool.page_size, shape.num_kv_heads, width)
        strides = (2 * side_bytes, shape.num_kv_heads * width, width, 1)
        return pages.as_strided(extents, strides, side * side_bytes + start).view(dtype)

    codes = tuple(view(side, 0, shape.head_dim // 2, torch.uint8) for side in (0, 1))
    width = shape.head_dim // _SCALE_BLOCK
    scales = tuple(view(side, code_bytes, width, FP8) for side in (0, 1))
    return (codes[0], codes[1]), (scales[0], scales[1])


# --- decode ---------------------------------------------------------------------------------------


def fa2(cache: CacheName, builds: Builds) -> Callable[[Work, int], list[Launch]]:
    """Return a builder of launches of the FA2 template, planned as in a captured decode step."""

    def build(work: Work, sets: int) -> list[Launch]:
        import flashinfer

        shape, size = work.shape, work.pool.page_size
        if cache == "nvfp4" and shape.head_dim == 64:
            raise NotImplementedError("fa2 misreads an NVFP4 cache at head size 64 (vLLM refuses)")
        builds["fa2", cache, shape.head_dim].result()
        options: dict[str, Any] = {}
        if cache == "nvfp4":
            kv, options["kv_cache_sf"] = _nvfp4_cache(work)
        else:
            kv = plain_cache(work, cache == "fp8")
        q, tables = work.query(), work.tables(sets)
        out = torch.empty_like(q)
        indptr = torch.arange(work.batch + 1, dtype=torch.int32) * (work.context // size)
        last = torch.full((work.batch,), size, dtype=torch.int32)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(_FA2_WORKSPACE, dtype=torch.uint8, device=q.device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=indptr.to(q.device),
            paged_kv_indices_buffer=tables[0].flatten().clone(),
            paged_kv_last_page_len_buffer=last.to(q.device),
            backend="fa2",
        )
        heads = (shape.num_qo_heads, shape.num_kv_heads, shape.head_dim)
        dtypes = {"q_data_type": BF16, "kv_data_type": kv[0].dtype, "o_data_type": BF16}
        wrapper.plan(indptr, tables[0].flatten(), last, *heads, size, **dtypes)

        def launch(indices: Tensor) -> object:
            # the plan depends on lengths alone, so one serves every set of pages
            wrapper._paged_kv_indices_buf = indices
            return wrapper.run(q, kv, out=out, **options)

        return [partial(launch, t.flatten()) for t in tables]

    return build


def xqa(cache: Literal["bf16", "fp8"], builds: Builds) -> Callable[[Work, int], list[Launch]]:
    """Return a builder of launches of XQA: 16-bit queries, pages ``[heads, tokens, head_dim]``."""

    def build(work: Work, sets: int) -> list[Launch]:
        from flashinfer.decode import xqa_batch_decode_with_kv_cache

        shape, pool = work.shape, work.pool
        group = shape.num_qo_heads // shape.num_kv_heads
        builds["xqa", cache, shape.head_dim, group].result()
        extents = (pool.num_pages, shape.num_kv_heads, pool.page_size, shape.head_dim)
        # the same bytes as those of [tokens, heads]: any order of random numbers will do
        k, v = (part.view(extents) for part in plain_cache(work, cache == "fp8"))
        q, lengths = work.query(), work.lengths()
        out = torch.empty_like(q)
        workspace = torch.zeros(_XQA_WORKSPACE, dtype=torch.uint8, device=q.device)

        def launch(table: Tensor) -> object:
            return xqa_batch_decode_with_kv_cache(
                q,
                (k, v),
                workspace,
                table,
                lengths,
                work.context,
                bmm1_scale=shape.head_dim**-0.5,
                bmm2_scale=1.0,
                out=out,
                kv_layout="HND",
            )

        return [partial(launch, t.contiguous()) for t in work.tables(sets)]

    return build
