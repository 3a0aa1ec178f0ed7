# SPDX-License-Identifier: Apache-2.0
"""The operators on the GPU: the reference's bytes, PyTorch's streams, graphs and compiler."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from turbokv import TurboKVCodec, core, kernels
from turbokv.page_metadata import compute_page_metadata
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

PAIRS = ((4, 4), (3, 3), (2, 2), (5, 3), (5, 4), (4, 3), (8, 8), (8, 2))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Filled:
    """A cache that the reference filled, and what filled it."""

    def __init__(
        self, head_dim: int, pair: tuple[int, int], dtype: torch.dtype, centred: bool = False
    ) -> None:
        g = torch.Generator(device=DEVICE).manual_seed(head_dim)
        self.codec = TurboKVCodec(head_dim, k_bits=pair[0], v_bits=pair[1], device=DEVICE)
        self.cache = PagedKVCache(self.codec, 7, 3, 32)
        self.k_format, self.v_format = (self.codec.vector_format(role) for role in ("k", "v"))
        nnz = 150
        # every other head and a part of each row, so that no stride is the natural one
        wide = torch.randn(2, nnz, 6, head_dim + 8, device=DEVICE, generator=g)
        self.k, self.v = (x[:, ::2, :head_dim] for x in wide.to(dtype))
        self.slots = torch.randperm(7 * 32, device=DEVICE, generator=g)[:nnz]
        self.slots[:100] = torch.arange(20, 120, device=DEVICE)  # whole tiles, and parts
        self.slots[100:][self.slots[100:] < 120] = -1
        self.positions = self.offset = None
        offset: Tensor | None = None
        if centred:
            self.positions = torch.arange(300, 300 + nnz, device=DEVICE)
            self.offset = torch.randn(2, 3, head_dim, device=DEVICE, generator=g)
            offset = self.offset[self.positions // 256]
        self.cache.append(self.k, self.v, self.slots, offset)

    def store(self, pages: Tensor, **more: Any) -> None:
        cuda.store(
            self.k,
            self.v,
            self.slots,
            pages,
            self.k_format,
            self.v_format,
            32,
            positions=self.positions,
            k_offset=self.offset,
            **more,
        )


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 200, 256])
def test_store_writes_the_reference_s_bytes(head_dim: int, pair: tuple[int, int]) -> None:
    for dtype in DTYPES:
        for centred in (False, True):
            filled = Filled(head_dim, pair, dtype, centred)
            pages = torch.zeros_like(filled.cache.pages)
            filled.store(pages)
            assert torch.equal(pages, filled.cache.pages), (dtype, centred)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("rotated", [False, True])
def test_decompress_agrees_with_the_reference(pair: tuple[int, int], rotated: bool) -> None:
    for head_dim in (64, 96, 128, 256):
        filled = Filled(head_dim, pair, torch.float16)
        dim = filled.codec.padded_dim if rotated else head_dim
        out_k, out_v = (torch.empty(61, 3, dim, dtype=torch.float16, device=DEVICE) for _ in "kv")
        indices = torch.tensor([3, 1, 2], dtype=torch.int32, device=DEVICE)
        cuda.decompress(
            filled.cache.pages,
            filled.k_format,
            filled.v_format,
            32,
            indices,
            out_k,
            out_v,
            first_token=9,
            rotated=rotated,
        )
        packed = filled.cache.gather_packed(indices, 70)
        if rotated:
            k = filled.codec.decompress_k_raw(*packed[:2], dtype=torch.float16)
            v = filled.codec.decompress_v_raw(*packed[2:], dtype=torch.float16)
        else:
            k = filled.codec.decompress_k(*packed[:2], dtype=torch.float16)
            v = filled.codec.decompress_v(*packed[2:], dtype=torch.float16)
        assert torch.equal(out_k, k[9:]) and torch.equal(out_v, v[9:])


def test_rotated_outputs_and_the_window_are_not_centred() -> None:
    filled = Filled(96, (5, 3), torch.bfloat16, centred=True)
    slots = torch.full((7, 2), -1, dtype=torch.int32, device=DEVICE)
    slots[1, 0] = 1
    window = torch.zeros(2, 3, 2, 16, 128, dtype=torch.float16, device=DEVICE)
    outputs = [torch.empty(150, 3, 128, dtype=torch.float16, device=DEVICE) for _ in "kv"]
    pages = torch.zeros_like(filled.cache.pages)
    filled.store(pages, k_rotated=outputs[0], v_rotated=outputs[1], tile_slots=slots, window=window)
    assert torch.equal(pages, filled.cache.pages)
    rows = [int((filled.slots == 32 + token).nonzero()) for token in range(16)]
    for i, (x, fmt) in enumerate([(filled.k, filled.k_format), (filled.v, filled.v_format)]):
        rotated = core.rotate(x.flatten(0, 1), fmt).view(150, 3, 128).half()
        assert torch.equal(outputs[i], rotated)
        assert torch.equal(window[1, :, i].transpose(0, 1), rotated[rows])
    assert not window[0].any()


@pytest.mark.parametrize("batch_size", [0, 1, 9, 1025])
def test_page_metadata_agrees_with_pytorch(batch_size: int) -> None:
    g = torch.Generator().manual_seed(batch_size)
    lens = torch.randint(-3, 300, (batch_size,), generator=g).int()
    table = torch.randint(0, 1 << 20, (batch_size, 17), generator=g).int()
    results = []
    for device, backend in (("cpu", "torch"), (DEVICE, "cuda"), (DEVICE, "auto")):
        sizes = (batch_size + 1, batch_size * 17, batch_size)
        out = [torch.zeros(n, dtype=torch.int32, device=device) for n in sizes]
        compute_page_metadata(lens.to(device), table.to(device), 16, *out, backend=backend)  # type: ignore[arg-type]
        results.append([x.cpu() for x in out])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_launches_go_to_the_current_stream() -> None:
    filled = Filled(128, (4, 4), torch.float16)
    pages = torch.zeros_like(filled.cache.pages)
    cuda.prepare("store", filled.k_format, filled.v_format)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        filled.store(pages)
        done = stream.record_event()
    assert not done.query()
    torch.cuda.default_stream().synchronize()
    assert not done.query()
    stream.synchronize()
    assert torch.equal(pages, filled.cache.pages)


def test_a_graph_replays_store() -> None:
    filled = Filled(128, (5, 3), torch.float16)
    pages = torch.zeros_like(filled.cache.pages)
    filled.store(pages)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled.store(pages)
    pages.zero_()
    graph.replay()
    assert torch.equal(pages, filled.cache.pages)


def test_threads_launch_too() -> None:
    filled = Filled(64, (4, 4), torch.float16)
    pages = torch.zeros_like(filled.cache.pages)
    thread = threading.Thread(target=filled.store, args=(pages,))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(pages, filled.cache.pages)


def test_torch_compile_takes_the_operators_whole() -> None:
    filled = Filled(128, (4, 4), torch.float16)
    indices = torch.tensor([[1, 2, 3]], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([90], dtype=torch.int32, device=DEVICE)
    q = torch.randn(1, 6, 128, device=DEVICE).half()

    def step(pages: Tensor, k: Tensor) -> Tensor:
        cuda.store(2 * k, filled.v, filled.slots, pages, filled.k_format, filled.v_format, 32)
        out = cuda.decode(q, pages, filled.k_format, filled.v_format, 32, indices, kv_lens=lens)
        return out + 1

    expected_pages, pages = (torch.zeros_like(filled.cache.pages) for _ in range(2))
    expected = step(expected_pages, filled.k)
    out = torch.compile(step, fullgraph=True)(pages, filled.k)
    assert torch.equal(pages, expected_pages)
    torch.testing.assert_close(out, expected)


def test_a_variant_outside_the_library_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    if build.find_nvcc() is None:
        pytest.skip("wanted nvcc, found none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    filled = Filled(300, (4, 4), torch.float16)
    pages = torch.zeros_like(filled.cache.pages)
    filled.store(pages)
    assert torch.equal(pages, filled.cache.pages)
    assert list(tmp_path.rglob("turbokv_store_p512.so"))


def test_the_library_is_what_runs_pages() -> None:
    assert kernels.why_unavailable("cuda", DEVICE, "pages") is None
    assert kernels.resolve_backend("auto", DEVICE, "pages") == "cuda"
