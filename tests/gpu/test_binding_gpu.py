# SPDX-License-Identifier: Apache-2.0
"""The operators on the GPU: streams, threads, torch.compile, and variants made on demand."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from turbokv import TurboKVCodec, kernels
from turbokv.paged import PagedKVCache

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="wanted a CUDA device (pytest -m gpu)"
    ),
]

if torch.cuda.is_available():
    from turbokv.kernels import cuda
    from turbokv.kernels.cuda import build


class Filled:
    """A cache that the reference filled, and what filled it."""

    def __init__(self, head_dim: int) -> None:
        g = torch.Generator(device=DEVICE).manual_seed(head_dim)
        self.codec = TurboKVCodec(head_dim, k_bits=4, v_bits=4, device=DEVICE)
        self.cache = PagedKVCache(self.codec, 7, 3, 32)
        self.k_format, self.v_format = (self.codec.vector_format(role) for role in ("k", "v"))
        self.k, self.v = torch.randn(2, 150, 3, head_dim, device=DEVICE, generator=g).half()
        self.slots = torch.arange(20, 170, device=DEVICE)
        self.cache.append(self.k, self.v, self.slots)

    def store(self, pages: Tensor) -> None:
        cuda.store(self.k, self.v, self.slots, pages, self.k_format, self.v_format, 32)


def test_launches_go_to_the_current_stream() -> None:
    # a capture takes what its stream is given and nothing else: a launch elsewhere would end it, or
    # would write at once
    filled = Filled(128)
    pages = torch.zeros_like(filled.cache.pages)
    cuda.prepare("store", filled.k_format, filled.v_format)
    filled.store(torch.zeros_like(pages))  # the first call copies small tables
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        filled.store(pages)
    torch.cuda.synchronize()
    assert not pages.any()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(pages, filled.cache.pages)


def test_threads_launch_too() -> None:
    filled = Filled(64)
    pages = torch.zeros_like(filled.cache.pages)
    thread = threading.Thread(target=filled.store, args=(pages,))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(pages, filled.cache.pages)


def test_torch_compile_takes_the_operators_whole() -> None:
    filled = Filled(128)
    indices = torch.tensor([[1, 2, 3]], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([90], dtype=torch.int32, device=DEVICE)
    q = torch.randn(1, 6, 128, device=DEVICE).half()

    def step(pages: Tensor, k: Tensor) -> Tensor:
        cuda.store(2 * k, filled.v, filled.slots, pages, filled.k_format, filled.v_format, 32)
        out = cuda.decode(q, pages, filled.k_format, filled.v_format, 32, indices, kv_lens=lens)
        return out + 1

    expected_pages, pages = (torch.zeros_like(filled.cache.pages) for _ in range(2))
    expected = step(expected_pages, filled.k)  # also prepares
    out = torch.compile(step, fullgraph=True)(pages, filled.k)
    assert torch.equal(pages, expected_pages)
    torch.testing.assert_close(out, expected)


def test_a_variant_outside_the_library_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    if build.find_nvcc() is None:
        pytest.skip("wanted nvcc, found none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # a pair of widths that no other test asks this process for
    codec = TurboKVCodec(64, k_bits=2, v_bits=8, device=DEVICE)
    cuda.prepare("decode", codec.vector_format("k"), codec.vector_format("v"))
    assert list(tmp_path.rglob("turbokv_decode_p64_k2v8*.so"))


def test_the_library_is_what_runs_pages() -> None:
    assert kernels.why_unavailable("cuda", DEVICE, "pages") is None
    assert kernels.resolve_backend("auto", DEVICE, "pages") == "cuda"
