# SPDX-License-Identifier: Apache-2.0
"""The FlashInfer wrappers on the GPU, against float64 attention over the same pages."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="wanted a CUDA device (pytest -m gpu)"
    ),
]
flashinfer = pytest.importorskip("flashinfer", reason="wanted the patched FlashInfer")

if torch.cuda.is_available():
    from tests.gpu.decode_cases import DEVICE, Case, Problem
    from turbokv.codec import TurboKVCodec
    from turbokv.integrations.flashinfer import (
        BatchDecodeWithPagedTurboKVCacheWrapper,
        BatchPrefillWithPagedTurboKVCacheWrapper,
        append_paged_turbokv_cache,
    )
    from turbokv.key_map import KeyMap
    from turbokv.paged import PagedKVCache

    class Rounded(Problem):
        """A problem whose rotated queries and keys were rounded to fp16, as for FlashInfer."""

        def __init__(self, problem: Problem) -> None:
            self.__dict__.update(problem.__dict__)
            if self.k_offset is not None:
                self.k_offset = self.k_offset.half().float()
            self.q = self.codec.rotate_query(self.q.float()).half()
            self.case = dataclasses.replace(self.case, rotated_query=True)

        def rotated(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            k, v = super().rotated(i)
            return k.half().double(), v.half().double()


# Every width of K and of V, and every head size.
MODULES = ((128, 4, 4), (128, 5, 3), (64, 2, 2), (256, 3, 5), (64, 8, 8))
# In prefill rotated queries, K, V, probabilities and outputs round to fp16 (2^-11). Where q and k
# are off by e each, a logit is off by up to 2 e |q| |k| / sqrt(D): 0.01 here. The LSE of a query
# dominated by one token shows that in full, and outputs are off by 2e-3 in the mean. Stock
# FlashInfer has the same error on the same fp16 rows (a test below). So prefill is compared with
# float64 attention over the rounded q, k and v: what is left is the rounding of probabilities (for
# an LSE 2^-11 log2(e) = 7e-4) and of outputs; and loosely with attention over exact ones.
TOLERANCE, PREFILL_TOLERANCE = 1.2e-3, 3e-3
PREFILL_LSE_TOLERANCE, DECODE_LSE_TOLERANCE = 1e-3, 4e-3
# FlashInfer's soft cap goes through tanh.approx, off by 2^-11 of a cap of 30.
CAP_TOLERANCE, CAP_LSE_TOLERANCE = 8e-3, 4e-2

RAGGED = ((700, 33, 1, 0, 128, 1029), (300, 33, 1, 1, 64, 1))  # lengths, and queries of each
SHORT = ((17, 1, 0, 16, 250, 1000), (1, 1, 1, 1, 1, 1))
SPLIT = ((6000,), (16,))


@pytest.fixture(scope="module")
def workspace() -> Any:
    """One for all wrappers of a process, as engines have it, and full of garbage.

    FlashInfer's plan wants group_size * head_dim * 128 KiB and more for splits on 132
    multiprocessors: more than 128 MiB for groups of 8.
    """
    return torch.full((256 << 20,), 0xFF, dtype=torch.uint8, device=DEVICE)


def plan(wrapper: Any, problem: Any, **options: Any) -> None:
    case = problem.case
    wrapper.plan(
        problem.qo_indptr,
        problem.kv_indptr,
        problem.kv_indices,
        problem.last,
        case.num_kv_heads * case.group_size,
        case.num_kv_heads,
        case.head_dim,
        case.page_size,
        problem.codec.vector_format("k"),
        problem.codec.vector_format("v"),
        causal=case.causal,
        window_left=case.window_left,
        logits_soft_cap=case.logits_soft_cap,
        **options,
    )


def options(problem: Any) -> dict[str, Any]:
    arguments = problem.arguments()
    return {
        name: arguments[name]
        for name in ("out", "lse", "k_offset", "tile_slots", "window")
        if arguments[name] is not None
    }


def compare(problem: Any, out: Any, lse: Any, *, rounded: bool) -> None:
    """Check against float64: where `rounded`, that of rounded queries, keys and values."""
    case = problem.case
    expected, expected_lse = problem.expected, problem.expected_lse
    tolerance, lse_tolerance = TOLERANCE, DECODE_LSE_TOLERANCE
    assert not out.isnan().any(), f"not written, or NaN: {case}"
    if rounded:
        if not case.logits_soft_cap:
            error = (out - expected).norm() / expected.norm().clamp(min=1e-6)
            assert error < PREFILL_TOLERANCE, f"error {error:.2e}: {case}"
        expected, expected_lse = Rounded(problem).solve()
        lse_tolerance = PREFILL_LSE_TOLERANCE
    if case.logits_soft_cap:
        tolerance, lse_tolerance = CAP_TOLERANCE, CAP_LSE_TOLERANCE
    error = (out - expected).norm() / expected.norm().clamp(min=1e-6)
    assert error < tolerance, f"error {error:.2e}: {case}"
    finite = expected_lse.isfinite()
    assert torch.equal(finite, lse.isfinite()), f"lse: {case}"
    if finite.any():
        worst = (lse - expected_lse)[finite].abs().max()
        assert worst < lse_tolerance, f"lse error {worst:.2e}: {case}"


def check_prefill(workspace: Any, case: Any, **plan_options: Any) -> None:
    problem = Problem(case)
    wrapper = BatchPrefillWithPagedTurboKVCacheWrapper(workspace)
    plan(wrapper, problem, **plan_options)
    arguments = options(problem)
    wrapper.run(problem.q, problem.cache.pages, **arguments)
    torch.cuda.synchronize()
    compare(problem, arguments["out"], arguments["lse"], rounded=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize(("head_dim", "k_bits", "v_bits"), MODULES)
def test_prefill_agrees_with_float64(
    workspace: Any, head_dim: int, k_bits: int, v_bits: int, page_size: int, causal: bool
) -> None:
    case = Case(head_dim, k_bits, v_bits, page_size=page_size, causal=causal)
    for group_size in (1, 4, 8):
        for lens, q_lens in (RAGGED, SHORT, SPLIT):
            check_prefill(
                workspace,
                dataclasses.replace(case, lens=lens, q_lens=q_lens, group_size=group_size),
            )


def test_prefill_rounds_as_stock_flashinfer_does(workspace: Any) -> None:
    """Stock FA2 over the fp16 rows that the tile loader makes has the same LSE error: it is that of
    the rows, not of the loader."""
    for causal in (True, False):
        problem = Problem(Case(lens=RAGGED[0], q_lens=RAGGED[1], page_size=16, causal=causal))
        case, rounded = problem.case, Rounded(problem)
        wrapper = BatchPrefillWithPagedTurboKVCacheWrapper(workspace)
        plan(wrapper, problem)
        _, lse = wrapper.run(problem.q, problem.cache.pages, return_lse=True)
        lse = lse.clone()
        shape = (case.num_kv_heads, case.head_dim)
        cache = torch.zeros(problem.cache.num_pages, 2, 16, *shape, device=DEVICE).half()
        for i, length in enumerate(case.lens):
            token = torch.arange(length, device=DEVICE)
            page = problem.table[i, token // 16].long()
            for role, x in enumerate(rounded.rotated(i)):
                cache[page, role, token % 16] = x.half()
        stock = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        stock.plan(
            problem.qo_indptr,
            problem.kv_indptr,
            problem.kv_indices,
            problem.last,
            case.num_kv_heads * case.group_size,
            *shape,
            case.page_size,
            causal=causal,
            q_data_type=torch.float16,
        )
        _, stock_lse = stock.run(rounded.q, cache, return_lse=True)
        finite = problem.expected_lse.isfinite()
        errors = [(x - problem.expected_lse)[finite].abs().max() for x in (lse, stock_lse)]
        assert (lse - stock_lse)[finite].abs().max() < 1e-4, errors
        assert errors[0] < 1.1 * errors[1], errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("centred", [False, True])
def test_prefill_reads_copies_and_centred_keys(
    workspace: Any, dtype: Any, kept: float, centred: bool
) -> None:
    for head_dim, k_bits, v_bits in MODULES:
        case = Case(head_dim, k_bits, v_bits, *RAGGED, kept=kept, centred=centred, dtype=dtype)
        check_prefill(workspace, dataclasses.replace(case, strided=True))
        check_prefill(workspace, dataclasses.replace(case, lens=SPLIT[0], q_lens=SPLIT[1]))


@pytest.mark.parametrize("window_left", [0, 40, 500])
@pytest.mark.parametrize("group_size", [1, 5])
def test_prefill_sees_no_further_than_its_window(
    workspace: Any, window_left: int, group_size: int
) -> None:
    for lens, q_lens in (RAGGED, SHORT, SPLIT, ((3001,), (900,))):
        for causal in (True, False):
            check_prefill(
                workspace,
                Case(
                    lens=lens,
                    q_lens=q_lens,
                    window_left=window_left,
                    group_size=group_size,
                    page_size=48,
                    causal=causal,
                    kept=0.2,
                    centred=True,
                ),
            )


def test_prefill_caps_logits(workspace: Any) -> None:
    for lens, q_lens in (RAGGED, SHORT, SPLIT):
        check_prefill(workspace, Case(lens=lens, q_lens=q_lens, logits_soft_cap=30.0))


def test_prefill_pads_head_sizes(workspace: Any) -> None:
    check_prefill(workspace, Case(80, lens=RAGGED[0], q_lens=RAGGED[1], centred=True, strided=True))


def test_splits_of_a_fixed_size_do_not_depend_on_the_batch(workspace: Any) -> None:
    case = Case(lens=(5000, 300), q_lens=(7, 9))
    check_prefill(workspace, case, fixed_split_size=16)
    check_prefill(workspace, case, disable_split_kv=True)


def test_states_of_prefix_and_rest_merge(workspace: Any) -> None:
    """LSE is FlashInfer's, so that its merge of a shared prefix works."""
    problem = Problem(Case(lens=(1024,), q_lens=(50,), causal=False, page_size=64))
    wrapper = BatchPrefillWithPagedTurboKVCacheWrapper(workspace)
    states = []
    for first, last in ((0, 10), (10, 16)):
        part = Problem(problem.case)
        part.kv_indices = problem.kv_indices[first:last].contiguous()
        part.kv_indptr = torch.tensor([0, last - first], dtype=torch.int32, device=DEVICE)
        plan(wrapper, part)
        states += wrapper.run(problem.q, problem.cache.pages, return_lse=True)
    out, lse = flashinfer.merge_state(*states)
    compare(problem, out.float(), lse, rounded=True)


def test_a_plan_waits_for_the_one_before(workspace: Any) -> None:
    """Tables on the host, and a device that is behind: plans are made in the same memory."""
    problems = [Problem(Case(lens=(5000, 900), q_lens=(300, 1))), Problem(Case(lens=(40,)))]
    arguments = [options(problem) for problem in problems]
    for problem in problems:
        for name in ("qo_indptr", "kv_indptr", "kv_indices", "last"):
            setattr(problem, name, getattr(problem, name).cpu())
    wrapper = BatchPrefillWithPagedTurboKVCacheWrapper(workspace)
    plan(wrapper, problems[1])  # the module is loaded
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    for problem, given in zip(problems, arguments, strict=True):
        plan(wrapper, problem)
        wrapper.run(problem.q, problem.cache.pages, **given)
    torch.cuda.synchronize()
    for problem, given in zip(problems, arguments, strict=True):
        compare(problem, given["out"], given["lse"], rounded=True)


@pytest.mark.parametrize("wide", [False, True])
def test_a_captured_prefill_replays_with_other_lengths(workspace: Any, wide: bool) -> None:
    queries = (200, 100, 84) if wide else (2, 1, 3)
    most = Problem(Case(lens=(4000, 3000, 2000), q_lens=queries))
    buffers = (
        torch.empty_like(most.qo_indptr),
        torch.empty_like(most.kv_indptr),
        torch.empty(most.kv_indices.shape[0] + 50, dtype=torch.int32, device=DEVICE),
        torch.empty_like(most.last),
    )
    wrapper = BatchPrefillWithPagedTurboKVCacheWrapper(workspace, True, *buffers)
    plan(wrapper, most)
    q, pages = torch.zeros_like(most.q), torch.zeros_like(most.cache.pages)
    out = torch.empty(q.shape, device=DEVICE)
    lse = torch.empty(q.shape[:2], device=DEVICE)
    wrapper.run(q, pages, out=out, lse=lse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, pages, out=out, lse=lse)
    fewer = (queries[0] - 1, 1, 0)
    for problem in (
        most,
        Problem(Case(lens=(17, 2500, 0), q_lens=(1, *queries[1:]))),
        Problem(Case(lens=(3999, 1, 900), q_lens=fewer, seed=5)),
    ):
        plan(wrapper, problem)
        rows = problem.q.shape[0]
        q[:rows] = problem.q
        pages[: problem.cache.pages.shape[0]] = problem.cache.pages
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        compare(problem, out[:rows], lse[:rows], rounded=True)
        assert out[rows:].isnan().all(), "rows that no request has were written"


# --- decode ---------------------------------------------------------------------------------------

DECODE = (
    ((1000, 5, 777, 0, 1, 4096), 16),
    ((16,) * 3, 16),
    ((5000,), 64),
)


def plan_decode(wrapper: Any, problem: Any) -> None:
    case = problem.case
    wrapper.plan(
        problem.kv_indptr,
        problem.kv_indices,
        problem.last,
        case.num_kv_heads * case.group_size,
        case.num_kv_heads,
        case.head_dim,
        case.page_size,
        problem.codec.vector_format("k"),
        problem.codec.vector_format("v"),
        window_left=case.window_left,
        logits_soft_cap=case.logits_soft_cap,
    )


@pytest.mark.parametrize(("head_dim", "k_bits", "v_bits"), [(128, 4, 4), (128, 5, 3), (64, 2, 2)])
@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_decode_agrees_with_float64(
    workspace: Any, head_dim: int, k_bits: int, v_bits: int, group_size: int
) -> None:
    for lens, page_size in DECODE:
        for extra in (
            {},
            {"kept": 0.3, "centred": True, "sinks": True, "strided": True},
            {"window_left": 100, "dtype": torch.bfloat16},
            {"logits_soft_cap": 30.0},
        ):
            problem = Problem(
                Case(
                    head_dim,
                    k_bits,
                    v_bits,
                    lens,
                    page_size=page_size,
                    group_size=group_size,
                    **extra,
                )
            )
            wrapper = BatchDecodeWithPagedTurboKVCacheWrapper(workspace)
            plan_decode(wrapper, problem)
            arguments = options(problem)
            wrapper.run(problem.q, problem.cache.pages, sinks=problem.sinks, **arguments)
            torch.cuda.synchronize()
            compare(problem, arguments["out"], arguments["lse"], rounded=False)


def test_a_captured_decode_replays_with_other_lengths(workspace: Any) -> None:
    most = Problem(Case(lens=(4000, 3000, 2000)))
    buffers = (
        torch.empty_like(most.kv_indptr),
        torch.empty(most.kv_indices.shape[0] + 50, dtype=torch.int32, device=DEVICE),
        torch.empty_like(most.last),
    )
    wrapper = BatchDecodeWithPagedTurboKVCacheWrapper(workspace, True, *buffers)
    plan_decode(wrapper, most)
    q, pages = torch.zeros_like(most.q), torch.zeros_like(most.cache.pages)
    out = torch.empty(q.shape, device=DEVICE)
    lse = torch.empty(q.shape[:2], device=DEVICE)
    wrapper.run(q, pages, out=out, lse=lse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, pages, out=out, lse=lse)
    for problem in (most, Problem(Case(lens=(17, 2500, 0))), Problem(Case(lens=(1, 1, 3000)))):
        plan_decode(wrapper, problem)
        q.copy_(problem.q)
        pages[: problem.cache.pages.shape[0]] = problem.cache.pages
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        compare(problem, out, lse, rounded=False)


# --- append ---------------------------------------------------------------------------------------


def test_appended_tokens_have_the_bytes_of_the_reference(workspace: Any) -> None:
    torch.manual_seed(0)
    codec = TurboKVCodec(128, k_bits=5, v_bits=3, device=DEVICE)
    heads, page_size, lens, new = 2, 32, (70, 5, 33), (7, 5, 0)
    counts = [-(-n // page_size) for n in lens]
    indptr = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
    indices = torch.randperm(8, device=DEVICE)[: sum(counts)].int()
    cache = PagedKVCache(codec, 8, heads, page_size)
    cache.pages.random_(0, 256)
    pages = cache.pages.clone()
    k, v = (torch.randn(sum(new), heads, 128, device=DEVICE).bfloat16() for _ in range(2))
    qo_indptr = torch.tensor([0, *new]).cumsum(0).int().to(DEVICE)
    kv_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    batch, positions = flashinfer.get_batch_indices_positions(qo_indptr, kv_lens, sum(new))
    slots = torch.cat(
        [
            cache.slots(indices[int(indptr[i]) : int(indptr[i + 1])], n)[n - new[i] :]
            for i, n in enumerate(lens)
        ]
    )
    batch[3], slots[3] = -1, -1  # skipped
    cache.append(k, v, slots)
    formats = (codec.vector_format("k"), codec.vector_format("v"))
    append_paged_turbokv_cache(k, v, batch, positions, pages, indices, indptr, page_size, *formats)
    torch.cuda.synchronize()
    assert torch.equal(pages, cache.pages)


def test_mapped_keys_attend_like_the_reference(workspace: Any) -> None:
    """Appended, decoded and prefilled with a map, against the paged reference with the same."""
    generator = torch.Generator("cpu").manual_seed(3)
    turn = torch.linalg.qr(torch.randn(2, 128, 128, generator=generator, dtype=torch.float32)).Q
    key_map = KeyMap((turn * torch.linspace(-1, 1, 128).exp()).to(DEVICE))
    codec = TurboKVCodec(128, k_bits=5, v_bits=3, device=DEVICE)
    length, page_size = 300, 32
    cache = PagedKVCache(codec, 10, 2, page_size, key_map=key_map)
    indices = torch.randperm(10, device=DEVICE).int()
    indptr = torch.tensor([0, 10], dtype=torch.int32, device=DEVICE)
    last = torch.tensor([(length - 1) % page_size + 1], dtype=torch.int32, device=DEVICE)
    k, v = (
        torch.randn(length, 2, 128, generator=generator, dtype=torch.float32).to(DEVICE)
        for _ in "kv"
    )
    q = torch.randn(40, 8, 128, generator=generator, dtype=torch.float32).to(DEVICE)
    positions = torch.arange(length, dtype=torch.int32, device=DEVICE)
    formats = (codec.vector_format("k"), codec.vector_format("v"))
    batch = torch.zeros_like(positions)
    append_paged_turbokv_cache(
        k,
        v,
        batch,
        positions,
        cache.pages,
        indices,
        indptr,
        page_size,
        *formats,
        k_matrix=key_map.matrix.mT.contiguous(),
    )
    shape = (8, 2, 128, page_size, *formats)
    tables = (indptr, indices, last)
    decode = BatchDecodeWithPagedTurboKVCacheWrapper(workspace)
    decode.plan(*tables, *shape)
    found = decode.run(q[-1:], cache.pages, q_matrix=key_map.inverse)
    wanted = cache.attention(q[-1:], *tables)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    prefill = BatchPrefillWithPagedTurboKVCacheWrapper(workspace)
    qo_indptr = torch.tensor([0, 40], dtype=torch.int32, device=DEVICE)
    prefill.plan(qo_indptr, *tables, *shape, causal=True)
    found = prefill.run(q, cache.pages, q_matrix=key_map.inverse)
    wanted = cache.attention(q, *tables, qo_indptr=qo_indptr)
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3
