# SPDX-License-Identifier: Apache-2.0
"""Compiled Triton kernels: equal to the reference on the CPU and on the GPU, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

import pytest
import torch
from torch import Tensor

from turbokv import core, kernels
from turbokv.core import Codebook, ScaleRule, VectorFormat
from turbokv.page_metadata import compute_page_metadata

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or kernels.triton_is_interpreted(),
        reason="wanted a CUDA device, and compiled kernels (pytest -m gpu)",
    ),
]

RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (64, 96, 128, 256, 512)
POISON = 0xA5
N = 203


def make_format(
    bits: int,
    dim: int,
    rule: ScaleRule = "unbiased",
    norm_dtype: torch.dtype = torch.float16,
    device: str = "cuda",
    codebook: Codebook | None = None,
) -> VectorFormat:
    book = Codebook.gaussian(bits) if codebook is None else codebook
    return VectorFormat.create(
        "v", dim, book, scale_rule=rule, norm_dtype=norm_dtype, device=device
    )


def compressed(x: Tensor, fmt: VectorFormat, backend: kernels.Backend) -> tuple[Tensor, Tensor]:
    """Compress into poisoned outputs; return them on the CPU."""
    packed = torch.full((x.shape[0], fmt.packed_dim), POISON, dtype=torch.uint8, device=x.device)
    norms = torch.full((x.shape[0],), -7.0, dtype=fmt.norm_dtype, device=x.device)
    kernels.compress(x, fmt, packed, norms, backend)
    return packed.cpu(), norms.cpu()


def assert_same_floats(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def assert_all_agree(
    x: Tensor,
    bits: int,
    rule: ScaleRule,
    norm_dtype: torch.dtype,
    out_dtype: torch.dtype,
    codebook: Codebook | None = None,
) -> None:
    """CPU reference == PyTorch on CUDA == Triton on CUDA, compressing and decompressing."""
    dim = x.shape[1]
    on_cpu = make_format(bits, dim, rule, norm_dtype, "cpu", codebook)
    on_gpu = make_format(bits, dim, rule, norm_dtype, "cuda", codebook)
    packed, norms = compressed(x, on_cpu, "torch")
    defined = ~norms.isnan()
    backends: tuple[kernels.Backend, ...] = ("torch", "triton")
    for backend in backends:
        got, got_norms = compressed(x.cuda(), on_gpu, backend)
        assert_same_floats(got_norms, norms)
        assert torch.equal(got[defined], packed[defined]), backend
    for rotated in (False, True):
        shape = (x.shape[0], on_cpu.padded_dim if rotated else dim)
        expected = torch.full(shape, 3.0, dtype=out_dtype)
        kernels.decompress(packed, norms, on_cpu, expected, rotated=rotated, backend="torch")
        for backend in backends:
            out = torch.full(shape, -3.0, dtype=out_dtype, device="cuda")
            kernels.decompress(
                packed.cuda(), norms.cuda(), on_gpu, out, rotated=rotated, backend=backend
            )
            assert_same_floats(out.cpu(), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_all_backends_agree(
    bits: int, dim: int, rule: ScaleRule, hard_vectors: Callable[..., Tensor]
) -> None:
    # every input dtype at 128; elsewhere they turn, because each combination is one compilation
    turn = bits + dim // 32 + RULES.index(rule)
    for i in range(3 if dim == 128 else 1):
        x = hard_vectors(N, dim, DTYPES[(turn + i) % 3], bits)
        assert_all_agree(x, bits, rule, DTYPES[(turn + bits) % 3], DTYPES[(turn + 1) % 3])


@pytest.mark.parametrize("bits", range(2, 8))
def test_calibrated_codebooks_agree(bits: int, hard_vectors: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(bits)
    count = 1 << (bits - 1)
    lattice = sorted((torch.randperm(127, generator=generator)[:count] + 1).tolist())
    mid_tread = [0, *lattice[1:]]
    floats = torch.tensor([0.0371 * level for level in lattice]).tolist()
    for levels in (lattice, mid_tread, floats):
        book = Codebook(bits, tuple(map(float, levels)), 3.0 / levels[-1], 5)
        x = hard_vectors(N, 128, torch.float32, bits)
        assert_all_agree(x, bits, "least_squares", torch.float32, torch.float32, book)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_outputs_agree(
    dtype: torch.dtype, hard_vectors: Callable[..., Tensor]
) -> None:
    dim = 96
    fmt = make_format(3, dim)
    dense = hard_vectors(N, dim, dtype).cuda()
    packed, norms = compressed(dense, fmt, "triton")
    defined = ~norms.isnan()
    columns = dense.t().contiguous().t()
    spread = torch.zeros(N, 3, 2 * dim, dtype=dtype, device="cuda")[:, 1, ::2].copy_(dense)
    for x in (columns, spread):
        got, got_norms = compressed(x, fmt, "triton")
        assert_same_floats(got_norms, norms)
        assert torch.equal(got[defined], packed[defined])
    wide = torch.full((N, 2 * fmt.packed_dim + 1), POISON, dtype=torch.uint8, device="cuda")
    wide_norms = torch.full((N, 3), -7.0, dtype=torch.float16, device="cuda")
    kernels.compress(dense, fmt, wide[:, 1::2], wide_norms[:, 1], "triton")
    assert torch.equal(wide[:, 1::2].cpu()[defined], packed[defined])
    assert bool((wide[:, 0::2] == POISON).all()) and bool((wide_norms[:, 0::2] == -7).all())
    expected = torch.empty(N, dim, device="cuda")
    kernels.decompress(packed.cuda(), norms.cuda(), fmt, expected, rotated=False, backend="triton")
    out = torch.full((dim + 2, N), -3.0, device="cuda")
    kernels.decompress(
        wide[:, 1::2], wide_norms[:, 1], fmt, out[1:-1].t(), rotated=False, backend="triton"
    )
    assert_same_floats(out[1:-1].t().cpu()[defined], expected.cpu()[defined])
    assert bool((out[0] == -3).all()) and bool((out[-1] == -3).all())


def test_offsets_past_two_to_the_31() -> None:
    # 2**24 vectors of 128 at 8 bits: elements of x and out, and bytes of packed, all pass 2**31
    n, dim = (1 << 24) + 77, 128
    fmt = make_format(8, dim)
    x = torch.zeros(n, dim, dtype=torch.bfloat16, device="cuda")
    x[-100:] = torch.randn(100, dim, device="cuda")
    packed = torch.full((n, dim), POISON, dtype=torch.uint8, device="cuda")
    norms = torch.full((n,), -7.0, dtype=torch.float16, device="cuda")
    assert packed.numel() > 2**31
    kernels.compress(x, fmt, packed, norms, "triton")
    expected, expected_norms = compressed(
        x[-100:].cpu(), make_format(8, dim, device="cpu"), "torch"
    )
    assert torch.equal(packed[-100:].cpu(), expected)
    assert torch.equal(norms[-100:].cpu(), expected_norms)
    assert not bool(norms[:-100].any())
    x.fill_(7.0)
    kernels.decompress(packed, norms, fmt, x, rotated=True, backend="triton")
    tail = torch.empty(100, dim, dtype=torch.bfloat16)
    core.decompress(expected, expected_norms, make_format(8, dim, device="cpu"), tail)
    assert torch.equal(x[-100:].cpu(), tail)
    assert not bool(x[:-100].any())


@contextmanager
def no_synchronisation_or_allocation() -> Iterator[None]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with no_synchronisation_or_allocation():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_codec_replays_in_a_cuda_graph(hard_vectors: Callable[..., Tensor]) -> None:
    fmt = make_format(4, 128)
    x = torch.zeros(N, 128, dtype=torch.bfloat16, device="cuda")
    packed = torch.empty(N, fmt.packed_dim, dtype=torch.uint8, device="cuda")
    norms = torch.empty(N, dtype=torch.float16, device="cuda")
    out = torch.empty(N, 128, dtype=torch.bfloat16, device="cuda")

    def step() -> None:
        kernels.compress(x, fmt, packed, norms, "triton")
        kernels.decompress(packed, norms, fmt, out, rotated=False, backend="triton")

    graph = capture(step)
    for seed in (1, 2):
        x.copy_(hard_vectors(N, 128, torch.bfloat16, seed))
        for tensor in (packed, norms, out):
            tensor.fill_(77)
        graph.replay()
        on_cpu = make_format(4, 128, device="cpu")
        expected, expected_norms = compressed(x.cpu(), on_cpu, "torch")
        assert_same_floats(norms.cpu(), expected_norms)
        values = torch.empty(N, 128, dtype=torch.bfloat16)
        core.decompress(expected, expected_norms, on_cpu, values, rotated=False)
        assert_same_floats(out.cpu(), values)


def test_auto_is_not_pytorch_on_the_gpu() -> None:
    assert kernels.resolve_backend("auto", "cuda") in ("triton", "cuda")


# --- page metadata --------------------------------------------------------------------------------


def page_outputs(batch_size: int, max_pages: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (batch_size + 1, batch_size * max_pages + 3, batch_size)
    indptr, indices, last = (
        torch.full((size,), -7, dtype=torch.int32, device=device) for size in sizes
    )
    return indptr, indices, last


def page_reference(lengths: Tensor, table: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    outputs = page_outputs(table.shape[0], table.shape[1], "cpu")
    compute_page_metadata(lengths.cpu(), table.cpu(), page_size, *outputs, backend="torch")
    return outputs


@pytest.mark.parametrize("page_size", [1, 16, 24])
@pytest.mark.parametrize("batch_size", [0, 1, 5, 1023, 1024, 1025, 5000])
def test_page_metadata_replays_in_a_cuda_graph(batch_size: int, page_size: int) -> None:
    max_pages = 301
    table = torch.randint(0, 2**30, (batch_size, max_pages + 5), dtype=torch.int32, device="cuda")[
        :, :max_pages
    ]
    lengths = torch.zeros(batch_size, dtype=torch.int32, device="cuda")
    outputs = page_outputs(batch_size, max_pages, "cuda")
    graph = capture(lambda: compute_page_metadata(lengths, table, page_size, *outputs))
    for _ in range(3):
        lengths.random_(-3, (max_pages + 1) * page_size)
        lengths[::7] = 0
        lengths[1::7] = 2 * page_size
        for output in outputs:
            output.fill_(-7)
        graph.replay()
        for output, expected in zip(
            outputs, page_reference(lengths, table, page_size), strict=True
        ):
            assert torch.equal(output.cpu(), expected)


def test_page_metadata_of_few_long_requests() -> None:
    max_pages = 70_000  # more chunks than the grid is wide
    table = torch.randint(0, 2**30, (2, max_pages), dtype=torch.int32, device="cuda")
    lengths = torch.tensor([max_pages, 2**31 - 1], dtype=torch.int32, device="cuda")
    outputs = page_outputs(2, max_pages, "cuda")
    compute_page_metadata(lengths, table, 1, *outputs, backend="triton")
    for output, expected in zip(outputs, page_reference(lengths, table, 1), strict=True):
        assert torch.equal(output.cpu(), expected)


def test_page_metadata_row_offsets_past_two_to_the_31() -> None:
    stride = 1 << 30
    memory = torch.zeros(2 * stride + 8, dtype=torch.int32, device="cuda")
    table = memory.as_strided((3, 8), (stride, 1))
    table[2] = torch.arange(8, dtype=torch.int32, device="cuda") + 5
    lengths = torch.tensor([1, 2, 8], dtype=torch.int32, device="cuda")
    outputs = page_outputs(3, 8, "cuda")
    compute_page_metadata(lengths, table, 1, *outputs)
    assert outputs[0].tolist() == [0, 1, 3, 11]
    assert outputs[1][:11].tolist() == [0] * 3 + list(range(5, 13))
