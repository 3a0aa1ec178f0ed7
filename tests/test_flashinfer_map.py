# SPDX-License-Identifier: Apache-2.0
"""What FlashInfer's functions hand the kernels where keys are mapped, without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("jinja2")
from turbokv import TurboKVCodec
from turbokv.key_map import KeyMap

HEADS, DIM = 2, 64
OURS = "turbokv.integrations.flashinfer"
BUILDS = ("flashinfer", "flashinfer.jit", "flashinfer.jit.core", "flashinfer.jit.utils")


@pytest.fixture
def ours() -> Iterator[Any]:
    """Our modules, which import FlashInfer for its builds alone: without it those are stand-ins."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("flashinfer") is None:
            for name in BUILDS:
                patch.setitem(sys.modules, name, MagicMock())
        names = ("page", "decode", "prefill", "tables")
        yield SimpleNamespace(**{n: importlib.import_module(f"{OURS}.{n}") for n in names})
        for name in [name for name in sys.modules if name.startswith(OURS)]:
            patch.delitem(sys.modules, name)
            sys.modules.pop(name, None)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def key_map() -> KeyMap:
    return KeyMap(normal(HEADS, DIM, DIM, seed=1) + 8 * torch.eye(DIM, dtype=torch.float32))


def test_appended_keys_are_mapped_and_values_are_not(
    ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ours.page
    got: list[Any] = []
    monkeypatch.setattr(page.ops, "store", lambda *args, **_: got.extend(args))
    codec = TurboKVCodec(DIM, 4)
    formats = codec.vector_format("k"), codec.vector_format("v")
    pages = torch.zeros(3, HEADS, 16 * 68, dtype=torch.uint8)
    k, v = normal(5, HEADS, DIM), normal(5, HEADS, DIM, seed=2)
    tables = (ints(0, 0, 0, 0, 0), ints(0, 1, 2, 3, 4), pages, ints(1), ints(0, 1))
    matrix = key_map().matrix.mT.contiguous()
    page.append_paged_turbokv_cache(k, v, *tables, 16, *formats, k_matrix=matrix)
    want = key_map().map_keys(k.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(got[0], want)
    assert got[1] is v
    with pytest.raises(ValueError, match=r"k_matrix: wanted shape \[2, 64, 64\], got \[1, 64, 64"):
        page.append_paged_turbokv_cache(k, v, *tables, 16, *formats, k_matrix=matrix[:1])


def wrapper_of(ours: Any, kind: Any) -> Any:
    """A planned wrapper of one request, as far as its run needs it."""
    codec = TurboKVCodec(DIM, 4)
    formats = codec.vector_format("k"), codec.vector_format("v")
    wrapper = object.__new__(kind)
    wrapper.device, wrapper._use_cuda_graph = torch.device("cpu"), False
    wrapper._shape = ours.tables.Shape.create(4, HEADS, DIM, 16, *formats, -1, None, None)
    wrapper._tables = (ints(0, 1), ints(0), ints(5))
    wrapper._batch_size = wrapper._num_rows = 1
    wrapper._max_num_rows, wrapper._max_kv_len = None, 5
    for name in ("_workspace", "_float_workspace", "_int_workspace", "_plan_info", "_scratch"):
        setattr(wrapper, name, None)
    wrapper._lse_scratch, wrapper._causal, wrapper._formats = None, True, ()
    return wrapper


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_queries_are_mapped_where_pages_hold_mapped_keys(
    kind: str, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, prefill = ours.decode, ours.prefill
    got: list[torch.Tensor] = []
    if kind == "decode":
        wrapper = wrapper_of(ours, decode.BatchDecodeWithPagedTurboKVCacheWrapper)
        monkeypatch.setattr(decode.ops, "decode", lambda q, *_, **__: got.append(q))
    else:
        wrapper = wrapper_of(ours, prefill.BatchPrefillWithPagedTurboKVCacheWrapper)
        wrapper._module = SimpleNamespace(run=lambda *args: got.append(args[3]))
    q, pages = normal(1, 4, DIM), torch.zeros(3, HEADS, 16 * 68, dtype=torch.uint8)
    wrapper.run(q, pages)
    wrapper.run(q, pages, q_matrix=key_map().inverse)
    assert got[0] is q
    want = key_map().map_queries(q.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(got[1], want)
    with pytest.raises(TypeError, match=r"q_matrix: wanted torch.float32, got torch.float16"):
        wrapper.run(q, pages, q_matrix=key_map().inverse.half())
