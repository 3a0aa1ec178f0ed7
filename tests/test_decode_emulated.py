# SPDX-License-Identifier: Apache-2.0
"""The decode kernel on the CPU, threads and tensor cores emulated, against float64 attention.

The headers are those that nvcc compiles; ``tests/emulated`` has the rest. Barriers that some thread
misses, operations that lanes of a warp do not share, copies that are read before they have arrived
and writes past the end of shared memory fail here.
"""

from __future__ import annotations

import ctypes
import random
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.emulated import harness
from tests.gpu.decode_cases import DEVICE, Case, Problem, fuzzed

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or DEVICE != "cpu", reason="wanted g++, and no CUDA device"
)

TOLERANCE, LSE_TOLERANCE = 6e-4, 2e-3  # those of the tests on a GPU
LENS = (700, 5, 300, 0, 1)
# one of each: products by integers in pairs and quads, by halves; 4, 8 and 16 rows; both copies
SHAPES: dict[str, dict[str, Any]] = {
    "k4v4": {},
    "k5v3, eight rows": dict(k_bits=5, v_bits=3, group_size=8),
    "k2v2": dict(k_bits=2, v_bits=2),
    "k3v3 of 64, sixteen rows": dict(head_dim=64, k_bits=3, v_bits=3, group_size=16),
    "k4v4 by cp.async": dict(body="cp_async"),
    "k8v5 of 256": dict(head_dim=256, k_bits=8, v_bits=5),
}


def replace_multiprocessors(device: harness.Device, count: int) -> harness.Device:
    return harness.Device(device.major, count, device.shared_of_cta, device.shared_of_sm)


def check(case: Case, loose: float = 1, **options: Any) -> None:
    check_problem(Problem(case), loose, **options)


def check_problem(problem: Problem, loose: float = 1, **options: Any) -> None:
    arguments, case = problem.arguments(), problem.case
    harness.decode(arguments, **options)
    out, lse = arguments["out"], arguments["lse"]
    error = (out - problem.expected).norm() / problem.expected.norm().clamp(min=1e-6)
    assert error < loose * TOLERANCE, f"error {error:.2e}: {case}"
    finite = problem.expected_lse.isfinite()
    assert torch.equal(finite, lse.isfinite()), f"lse: {case}"
    if finite.any():
        worst = (lse - problem.expected_lse)[finite].abs().max()
        assert worst < loose * LSE_TOLERANCE, f"lse error {worst:.2e}: {case}"


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_features_agree_with_float64(shape: str) -> None:
    case = Case(lens=LENS, **SHAPES[shape])
    check(case)
    check(case, early=True)
    check(case, plain=False)
    check(replace(case, kept=0.3, centred=True, logits_soft_cap=30.0, sinks=True))
    check(replace(case, kept=1.0, page_size=64))
    # long parts have code of their own for steps in which nothing is rare
    check(replace(case, lens=(3000, 0), page_size=64, num_kv_heads=1, num_ctas=1))
    check(replace(case, lens=(3000,), kept=0.01, num_kv_heads=1, num_ctas=1))
    check(replace(case, q_lens=(2, 2, 1, 0, 1), group_size=case.group_size // 2, window_left=200))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_maxima_that_rise_and_values_of_all_sizes(shape: str) -> None:
    for seed, kept in ((0, 0.0), (1, 0.2)):
        case = Case(lens=LENS, rising=2, uneven=True, kept=kept, seed=seed, **SHAPES[shape])
        check(case, loose=4)


@pytest.mark.slow
@pytest.mark.parametrize("marked", [0.0, 0.001])
def test_steps_without_uncentred_keys_and_with_few(marked: float) -> None:
    """Steps in which no row needs anything rare have code of their own, with offsets too."""
    shape = {"lens": (3000, 2048), "num_kv_heads": 1, "num_ctas": 1}
    problem = Problem(Case(**shape, centred=True, kept=0.01))
    marks = problem.scales()[..., 1]
    marks &= 0x7F
    marks |= (torch.rand(marks.shape) < marked).to(torch.uint8) << 7
    problem.expected, problem.expected_lse = problem.solve()
    problem.poison()
    check_problem(problem)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("group_size", [1, 8, 16])
def test_offsets_of_many_segments(head_dim: int, group_size: int) -> None:
    """More segments than warps take at once, and parts that begin within one."""
    for num_ctas in (1, 3):
        check(
            Case(
                head_dim=head_dim,
                group_size=group_size,
                lens=(9000, 257),
                num_kv_heads=1,
                page_size=64,
                centred=True,
                num_ctas=num_ctas,
            ),
            loose=2,
        )


@pytest.mark.slow
def test_scores_that_rise_and_fall_move_exponents() -> None:
    """Steps whose largest probabilities differ by powers of two, up and down, at random."""
    for seed in range(3):
        problem = Problem(Case(lens=(2000, 900), num_kv_heads=1, num_ctas=1, seed=seed))
        g = torch.Generator().manual_seed(seed)
        k = problem.scales()[..., :2].view(torch.half)
        k *= (6 * torch.rand(k.shape[0], 1, 1, 1, 1, generator=g) - 3).exp2().half()
        problem.expected, problem.expected_lse = problem.solve()
        problem.poison()
        check_problem(problem, loose=4)


@pytest.mark.slow
def test_values_of_zero_below_scores_out_of_reach() -> None:
    """Probabilities beyond fp32, by the first exponent, of values that are zero."""
    problem = Problem(Case(lens=(900, 40)))
    scales = problem.scales()
    k, v = scales[..., :2].view(torch.half)[..., 0], scales[..., 2:].view(torch.half)[..., 0]
    for request, oldest in ((0, 300), (1, 17)):
        for position in range(oldest):
            page, token = int(problem.table[request, position // 16]), position % 16
            k[page, :, 0, token] = 400
            v[page, :, 0, token] = 0
    problem.expected, problem.expected_lse = problem.solve()
    arguments = problem.arguments()
    harness.decode(arguments)
    assert torch.allclose(arguments["out"], problem.expected, atol=1e-4)
    relative = (arguments["lse"] - problem.expected_lse).abs() / problem.expected_lse.abs()
    assert relative.max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("length", [5, 70, 130, 512, 1024, 1029, 1040, 1087])
def test_copies_of_the_newest_tokens_and_the_first_tile(length: int, centred: bool) -> None:
    case = Case(lens=(length,), newest=128, centred=centred, num_kv_heads=1, num_ctas=2)
    check(case)
    check(replace(case, num_ctas=1), early=True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("early", [False, True])
def test_some_rehearse_what_others_run(shape: str, early: bool) -> None:
    # 8 multiprocessors attend, 4 rehearse; the last call has too many items for that
    device = replace_multiprocessors(harness.H200, 12)
    case = Case(lens=(700,), num_kv_heads=1, **SHAPES[shape])
    check(case, early=early, device=device)
    check(replace(case, lens=(0, 5), sinks=True), early=early, device=device)
    full = replace(case, centred=True, newest=100, logits_soft_cap=20.0)
    check(full, early=early, device=device)
    check(replace(full, lens=(150, 70), num_kv_heads=4), early=early, device=device)


@pytest.mark.slow
def test_more_parts_than_are_combined_at_once() -> None:
    check(Case(lens=(2500, 900), num_kv_heads=1, num_ctas=45))
    check(Case(lens=(2500, 900), num_kv_heads=2, num_ctas=37, newest=100))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset, more", [(0, 0), (4, 8), (8, 4), (0, 1)])
@pytest.mark.parametrize("head_dim", [128, 100, 96])
def test_outputs_of_any_alignment(
    dtype: torch.dtype, offset: int, more: int, head_dim: int
) -> None:
    problem = Problem(Case(lens=(70, 200), head_dim=head_dim, num_kv_heads=1))
    arguments = problem.arguments()
    tokens, heads, _ = arguments["out"].shape
    room = torch.full((tokens, heads, offset + head_dim + more), 7.0).to(dtype)
    arguments["out"] = room[..., offset : offset + head_dim]
    harness.decode(arguments)
    error = (arguments["out"].double() - problem.expected).norm() / problem.expected.norm()
    assert error < (5e-3 if dtype == torch.bfloat16 else TOLERANCE)
    assert (room[..., :offset] == 7).all()
    assert (room[..., offset + head_dim :] == 7).all()


@pytest.mark.slow
@pytest.mark.parametrize("requests", [31, 32, 40])
def test_batches_are_laid_out_by_warps_and_by_ctas(requests: int) -> None:
    lens = tuple((37 * i) % 150 for i in range(requests))
    check(Case(lens=lens, num_kv_heads=1))
    check(Case(lens=lens, num_kv_heads=1, num_ctas=3), early=True)


@pytest.mark.slow
def test_fuzzed_shapes_agree_with_float64() -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    for case in (fuzzed(seed + i, ((4, 4),), (100, 128)) for i in range(1000)):
        rows = max(case.q_lens or (1,)) * case.group_size
        if rows > 4 or max(case.lens) > 800:
            continue
        seed += 1
        print(f"seed {case.seed}")
        check(case if case.body != "cp_async" else replace(case, body="auto"), early=seed % 2 == 0)


# --- plans ----------------------------------------------------------------------------------------


def plan(case: Case, *, early: bool = False, device: harness.Device = harness.H200) -> list[int]:
    arguments = Problem(case).arguments()
    p = harness.params(arguments)
    options = harness.Options(0, case.num_ctas, early)
    copy = "async_copy_t" if case.body == "cp_async" else "bulk_copy_t"
    padded_dim = arguments["k_format"].padded_dim
    columns = harness.columns_of(padded_dim, p.max_q_len * case.group_size)
    variant = harness.Variant(padded_dim, case.k_bits, case.v_bits, columns, copy)
    found = (ctypes.c_int * 7)()
    harness.load(variant).turbokv_plan_decode(
        *(ctypes.byref(each) for each in (p, options, device)), ctypes.c_bool(True), found
    )
    return list(found)


@pytest.mark.slow
def test_a_launch_is_planned_by_sizes_alone() -> None:
    one = Case(lens=(40,))
    grid, threads, shared, stages, cached, early, fits = plan(one)
    assert (grid, threads, stages, cached, early, fits) == (132, 256, 3, 1, 0, 1)
    assert shared <= harness.H200.shared_of_cta
    assert plan(one, early=True)[5] == 1
    assert plan(replace(one, num_ctas=7))[0] == 7
    # cp.async has two stages, and no launches that overlap
    assert plan(replace(one, body="cp_async"), early=True)[3:6] == [2, 1, 0]
    # many requests: fewer stages, then requests are read where they are needed
    many = plan(Case(lens=(1,) * 4000, num_kv_heads=1))
    assert many[3] == 2 and many[4] == 1 and many[6] == 1
    most = plan(Case(lens=(1,) * 16000, num_kv_heads=1))
    assert most[3] == 2 and most[4] == 0 and most[6] == 1
    # a device with too little
    small = harness.Device(8, 46, 101376, 102400)
    assert plan(one, device=small)[6] == 0
    assert plan(replace(one, body="cp_async"), device=small)[6] == 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, {"group_size": 8}, {"head_dim": 64, "k_bits": 3}])
def test_offsets_of_long_requests_cost_no_stage(shape: dict[str, Any]) -> None:
    for requests in (1, 16, 31):
        case = Case(lens=(3,) * requests, centred=True, **shape)
        problem = Problem(case)
        arguments = problem.arguments()
        p = harness.params(arguments)
        plans = []
        for segments in (0, 1, 160, 256, 1000):
            p.num_segments = segments
            if not segments:
                p.k_offset_rotated = None
            else:
                assert problem.k_offset is not None
                p.k_offset_rotated = problem.k_offset.data_ptr()
            columns = harness.columns_of(arguments["k_format"].padded_dim, case.group_size)
            variant = harness.Variant(
                arguments["k_format"].padded_dim, case.k_bits, case.v_bits, columns
            )
            found = (ctypes.c_int * 7)()
            harness.load(variant).turbokv_plan_decode(
                ctypes.byref(p),
                ctypes.byref(harness.Options(0, 0, False)),
                ctypes.byref(harness.H200),
                ctypes.c_bool(False),
                found,
            )
            plans.append(list(found))
        assert all(each == plans[0] for each in plans), (case, plans)
