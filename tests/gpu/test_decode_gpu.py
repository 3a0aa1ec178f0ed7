# SPDX-License-Identifier: Apache-2.0
"""Fused decode on the GPU, against float64 attention over the same pages."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from turbokv import core, kernels
from turbokv.kernels.cuda import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="wanted a CUDA device (pytest -m gpu)"
    ),
]

if torch.cuda.is_available():
    from tests.gpu.decode_cases import DEVICE, Case, Problem, fuzzed
    from turbokv.kernels import cuda

PAIRS, DIMS = build.PAIRS, build.DIMS
FUZZ_CHUNKS, FUZZ_CASES = 50, 42
# Scores are exact but for a 16-bit query. Probabilities round to fp16 (2^-11) or to integers of
# which a step's largest has 10 bits and more: measured 3.7e-4 at worst on 947 cases;
# FlashAttention-3 in bf16 is at 2e-3 on such data.
TOLERANCE = 6e-4
LSE_TOLERANCE = 2e-3  # a score of 30 times 2^-15, the query's rounding


def check(problem: Any, arguments: dict[str, Any] | None = None, loose: float = 1) -> None:
    arguments = problem.arguments() if arguments is None else arguments
    cuda.decode(**arguments)
    torch.cuda.synchronize()
    out, lse, case = arguments["out"], arguments["lse"], problem.case
    assert not out.isnan().any(), f"not written, or NaN: {case}"
    error = (out - problem.expected).norm() / problem.expected.norm().clamp(min=1e-6)
    assert error < loose * TOLERANCE, f"error {error:.2e}: {case}"
    finite = problem.expected_lse.isfinite()
    assert torch.equal(finite, lse.isfinite()), f"lse: {case}"
    if finite.any():
        worst = (lse - problem.expected_lse)[finite].abs().max()
        assert worst < loose * LSE_TOLERANCE, f"lse error {worst:.2e}: {case}"


@pytest.mark.parametrize("chunk", range(FUZZ_CHUNKS))
def test_fuzzed_shapes_agree_with_float64(chunk: int) -> None:
    first = int(os.environ.get("PYTEST_SEED", "0")) + chunk * FUZZ_CASES
    print(f"seeds {first} to {first + FUZZ_CASES - 1}")
    for seed in range(first, first + FUZZ_CASES):
        check(Problem(fuzzed(seed, PAIRS, (64, 96, 128, 200, 256))))


@pytest.mark.parametrize("body", ["bulk", "cp_async"])
@pytest.mark.parametrize("group_size", [1, 4, 7, 8, 16, 33])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("head_dim", DIMS)
def test_every_preset(head_dim: int, pair: tuple[int, int], group_size: int, body: str) -> None:
    k_bits, v_bits = pair
    check(Problem(Case(head_dim, k_bits, v_bits, group_size=group_size, body=body)))


@pytest.mark.parametrize(
    "features",
    [
        dict(logits_soft_cap=20.0),
        dict(window_left=300, q_lens=(2, 2, 2, 1, 1)),
        dict(sinks=True),
        dict(centred=True),
        dict(centred=True, logits_soft_cap=30.0, kept=0.3),
        dict(kept=0.4, page_size=2032),
        dict(kept=1.0),
        dict(q_lens=(8, 5, 3, 0, 1), group_size=5),
        dict(q_lens=(8, 5, 3, 0, 1), causal=False),
        dict(q_lens=(17, 5, 16, 0, 1), group_size=8),
        dict(q_lens=(16, 5, 17, 0, 1), group_size=1, window_left=100, kept=0.3),
        dict(rotated_output=True, rotated_query=True),
        dict(strided=True, dtype=torch.bfloat16),
        dict(indptr=True, page_size=48),
        dict(head_dim=96),
    ],
    ids=str,
)
@pytest.mark.parametrize("pair", [(4, 4), (3, 3), (2, 2), (5, 3)])
def test_every_feature(pair: tuple[int, int], features: dict[str, Any]) -> None:
    check(Problem(Case(k_bits=pair[0], v_bits=pair[1], **features)))


@pytest.mark.parametrize("kept", [0.0, 0.2])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pair", [(4, 4), (2, 2), (5, 3)])
def test_maxima_that_rise_and_values_of_all_sizes(
    pair: tuple[int, int], head_dim: int, kept: float
) -> None:
    """Steps go from the newest token to the oldest: what they have summed is rescaled."""
    shape = {"head_dim": head_dim, "k_bits": pair[0], "v_bits": pair[1], "group_size": 8}
    for seed in range(4):
        # scores are up to four times as large as elsewhere, and few tokens have most of the output
        check(Problem(Case(**shape, rising=2, uneven=True, kept=kept, seed=seed)), loose=4)


@pytest.mark.parametrize("pair", PAIRS)
def test_scores_that_rise_and_fall_move_exponents(pair: tuple[int, int]) -> None:
    """Pages whose largest probabilities differ by powers of two, up and down, at random."""
    for seed in range(3):
        shape = {"k_bits": pair[0], "v_bits": pair[1], "lens": (4000, 900), "num_ctas": 2}
        problem = Problem(Case(**shape, seed=seed))
        g = torch.Generator(device=DEVICE).manual_seed(seed)
        k = problem.scales()[..., :2].view(torch.half)
        factor = torch.rand(k.shape[0], 1, 1, 1, 1, device=DEVICE, generator=g)
        k *= (6 * factor - 3).exp2().half()
        problem.expected, problem.expected_lse = problem.solve()
        problem.poison()
        # scores, and with them their errors, are up to eight times as large as elsewhere
        check(problem, loose=8)


@pytest.mark.parametrize("marked", [0.0, 0.001])
@pytest.mark.parametrize("pair", [(4, 4), (2, 2), (5, 3), (8, 4)])
def test_steps_without_uncentred_keys_and_with_few(pair: tuple[int, int], marked: float) -> None:
    """Steps in which nothing is rare have code of their own, with offsets and copies too."""
    shape = {"k_bits": pair[0], "v_bits": pair[1], "lens": (9000, 2048), "num_ctas": 2}
    problem = Problem(Case(**shape, centred=True, kept=0.01))
    marks = problem.scales()[..., 1]
    marks &= 0x7F
    marks |= (torch.rand(marks.shape, device=DEVICE) < marked).to(torch.uint8) << 7
    problem.expected, problem.expected_lse = problem.solve()
    problem.poison()
    check(problem)


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("q_lens", [(), (5, 1, 2, 1, 16)])
def test_old_pages_are_read_before_a_store_of_new_tokens_ends(
    q_lens: tuple[int, ...], overlapped: bool
) -> None:
    """With early_loads a step that has any token of the queries waits for the kernel before."""
    problem = Problem(Case(lens=(5000, 64, 65, 1, 300), q_lens=q_lens, page_size=64))
    arguments = problem.arguments()
    fmt = {name: arguments[name] for name in ("k_format", "v_format")}
    slots = []
    for row, length, q_len in zip(problem.table, problem.case.lens, problem.q_lens, strict=True):
        positions = torch.arange(max(length - q_len, 0), length, device=DEVICE)
        slots.append(row.long()[positions // 64] * 64 + positions % 64)
    slot_mapping = torch.cat(slots)
    heads, dim = problem.case.num_kv_heads, problem.case.head_dim
    for _ in range(20):
        k, v = (torch.randn(len(slot_mapping), heads, dim, device=DEVICE).half() for _ in range(2))
        arguments["out"].fill_(float("nan"))
        into = (slot_mapping, arguments["pages"], *fmt.values(), 64)
        cuda.store(k, v, *into, launch_dependents=overlapped)
        cuda.decode(**arguments, early_loads=True)
        early = arguments["out"].clone()
        cuda.decode(**arguments)
        assert torch.equal(early, arguments["out"])


@pytest.mark.parametrize("rows", [(16, 1), (4, 4), (8, 2), (2, 16), (5, 7)])
@pytest.mark.parametrize("pair", [(4, 4), (3, 3), (2, 2)])
@pytest.mark.parametrize("head_dim", DIMS)
def test_verification_of_many_rows(
    head_dim: int, pair: tuple[int, int], rows: tuple[int, int]
) -> None:
    group_size, q_len = rows
    case = Case(head_dim, *pair, lens=(700, 64, 17), q_lens=(q_len,) * 3, group_size=group_size)
    check(Problem(case))


def test_heads_of_512() -> None:
    """Compiled when it is first asked for."""
    for features in (dict(), dict(kept=0.3, centred=True), dict(group_size=9, page_size=64)):
        check(Problem(Case(head_dim=512, **features)))
    check(Problem(Case(head_dim=300, body="cp_async")))


def test_values_of_zero_below_scores_out_of_reach() -> None:
    """Probabilities beyond fp32, by the first maximum, of values that are zero."""
    problem = Problem(Case(lens=(3000, 40)))
    scales = problem.scales()
    k, v = scales[..., :2].view(torch.half)[..., 0], scales[..., 2:].view(torch.half)[..., 0]
    for request, oldest in ((0, 1000), (1, 17)):
        for position in range(oldest):
            page, token = int(problem.table[request, position // 16]), position % 16
            k[page, :, 0, token] = 400
            v[page, :, 0, token] = 0
    problem.expected, problem.expected_lse = problem.solve()
    arguments = problem.arguments()
    cuda.decode(**arguments)
    assert arguments["out"].isfinite().all()
    assert torch.allclose(arguments["out"], problem.expected, atol=1e-4)
    relative = (arguments["lse"] - problem.expected_lse).abs() / problem.expected_lse.abs()
    assert relative.max() < 1e-3


@pytest.mark.parametrize("requests", [31, 60, 90])
@pytest.mark.parametrize("group_size", [4, 8])
@pytest.mark.parametrize("pair", [(4, 4), (3, 3), (2, 2), (5, 3)])
def test_many_items_share_multiprocessors(
    pair: tuple[int, int], group_size: int, requests: int
) -> None:
    """Enough items for two and for four CTAs per multiprocessor, of equal lengths and of others."""
    features: dict[str, Any] = dict(
        k_bits=pair[0], v_bits=pair[1], group_size=group_size, num_kv_heads=8
    )
    ragged = tuple((37 * i) % 400 for i in range(requests))
    check(Problem(Case(lens=(290,) * requests, kept=0.2, page_size=64, **features)))
    check(Problem(Case(lens=ragged, kept=0.2, centred=True, **features)))


def test_keys_are_centred_beyond_the_offsets_kept_at_a_time() -> None:
    check(Problem(Case(lens=(70_000, 65_536, 300), centred=True, kept=0.01)))
    check(Problem(Case(lens=(140_000,), num_kv_heads=1, centred=True, num_ctas=2)))


def test_batches_of_4096() -> None:
    lens = tuple(i % 70 for i in range(4096))
    check(Problem(Case(lens=lens, num_kv_heads=1)))
    # the most shared memory: requests no longer fit beside it
    check(Problem(Case(lens=(*lens[:-1], 65_000), num_kv_heads=1, group_size=16, centred=True)))


def test_more_ctas_than_steps_and_fewer() -> None:
    for num_ctas in (1, 2, 131, 1000):
        check(Problem(Case(lens=(5000, 33), num_ctas=num_ctas)))


def test_calls_are_deterministic_and_leave_the_workspace_clean() -> None:
    problem = Problem(Case(lens=(20000, 31, 400), num_kv_heads=8))
    arguments = problem.arguments()
    size = cuda.decode_workspace_bytes(
        batch_size=3, num_qo_heads=32, num_kv_heads=8, head_dim=128, device=DEVICE
    )
    arguments["workspace"] = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    check(problem, arguments)
    first = arguments["out"].clone()
    for _ in range(5):
        arguments["out"].fill_(float("nan"))
        check(problem, arguments)
        assert torch.equal(first, arguments["out"])


def test_batches_of_many_sizes_take_turns_in_one_workspace() -> None:
    """Partial results of a small batch lie nowhere that a larger one counts arrivals."""
    heads = {"num_kv_heads": 3, "group_size": 3, "head_dim": 64}
    short = tuple(500 + i for i in range(64))
    cases = [
        Case(lens=(6000, 4000, 17), seed=1, **heads),
        Case(lens=short[:16], seed=2, **heads),
        Case(lens=short, seed=3, **heads),
        Case(lens=short[:32], q_lens=(5,) * 32, seed=4, **heads),
        Case(lens=short, q_lens=(8,) * 64, seed=5, **heads),
        Case(lens=short[:9], seed=6, kept=0.3, **heads),
        Case(lens=short, seed=7, **heads),
        Case(lens=short, q_lens=(17,) * 64, seed=8, **heads),
    ]
    size = cuda.decode_workspace_bytes(
        batch_size=64, num_qo_heads=9, num_kv_heads=3, head_dim=64, max_q_len=17, device=DEVICE
    )
    workspace = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    for case in [*cases, *reversed(cases)]:
        problem = Problem(case)
        arguments = problem.arguments()
        arguments["workspace"] = workspace
        check(problem, arguments)


def test_graph_replay_follows_lengths_and_page_tables() -> None:
    problems = [
        Problem(Case(lens=lens, num_kv_heads=4, seed=i))
        for i, lens in enumerate([(4000, 17, 900, 0), (1, 2500, 0, 3999), (4000, 4000, 4000, 1)])
    ]
    pages = max(problem.cache.num_pages for problem in problems)
    width = max(problem.table.shape[1] for problem in problems)
    arguments = problems[0].arguments()
    arguments["pages"] = torch.zeros(
        pages, *problems[0].cache.pages.shape[1:], dtype=torch.uint8, device=DEVICE
    )
    arguments["kv_indices"] = torch.zeros(4, width, dtype=torch.int32, device=DEVICE)
    arguments["kv_lens"] = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    arguments["q"] = arguments["q"].clone()
    size = cuda.decode_workspace_bytes(
        batch_size=4, num_qo_heads=16, num_kv_heads=4, head_dim=128, device=DEVICE
    )
    arguments["workspace"] = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    cuda.decode(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.decode(**arguments)
    for problem in problems:
        arguments["pages"][: problem.cache.num_pages] = problem.cache.pages
        arguments["kv_indices"][:, : problem.table.shape[1]] = problem.table
        arguments["kv_lens"].copy_(problem.kv_lens)
        arguments["q"].copy_(problem.q)
        arguments["out"].fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        error = (arguments["out"] - problem.expected).norm() / problem.expected.norm()
        assert error < TOLERANCE


def test_pages_beyond_2_to_the_31_bytes() -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("wanted 12 GiB of free GPU memory")
    problem = Problem(Case(lens=(700, 33)))
    arguments = problem.arguments()
    page_bytes = problem.cache.pages[0].numel()
    apart = (5 << 30) // problem.cache.num_pages // page_bytes
    assert apart * page_bytes * (problem.cache.num_pages - 1) > 2**32
    wide = torch.empty(
        problem.cache.num_pages * apart,
        *problem.cache.pages.shape[1:],
        dtype=torch.uint8,
        device=DEVICE,
    )
    wide[::apart] = problem.cache.pages
    # once by page numbers, once by the stride of a view
    arguments["pages"] = wide
    arguments["kv_indices"] = problem.table * apart
    check(problem, arguments)
    arguments = problem.arguments()
    arguments["pages"] = wide[::apart]
    check(problem, arguments)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("length", [250_000, 1_000_000])
def test_needle_is_found_at_every_depth(length: int, bits: int) -> None:
    """One key points along the query, thousands of others do not: its value comes back."""
    from turbokv.codec import TurboKVCodec
    from turbokv.paged import PageLayout

    g = torch.Generator(device=DEVICE).manual_seed(bits)
    codec = TurboKVCodec(128, k_bits=bits, v_bits=bits, device=DEVICE)
    layout = PageLayout(128, bits, bits, 16, 1)
    num_pages = length // 16
    pages = torch.empty(layout.shape(num_pages), dtype=torch.uint8, device=DEVICE)
    k_format, v_format = codec.vector_format("k"), codec.vector_format("v")
    for start in range(0, length, 1 << 17):
        count = min(1 << 17, length - start)
        k, v = (torch.randn(count, 1, 128, device=DEVICE, generator=g).half() for _ in range(2))
        slots = torch.arange(start, start + count, device=DEVICE)
        cuda.store(k, v, slots, pages, k_format, v_format, 16)
    table = torch.arange(num_pages, dtype=torch.int32, device=DEVICE)[None]
    lens = torch.tensor([length], dtype=torch.int32, device=DEVICE)
    q = torch.randn(1, 4, 128, device=DEVICE, generator=g)
    q[:] = q[:, :1]
    for depth in torch.linspace(0, length - 1, 11).long().tolist():
        saved = pages[depth // 16].clone()
        needle = torch.randn(1, 1, 128, device=DEVICE, generator=g).half()
        slot = torch.tensor([depth], device=DEVICE)
        # a score of 3 |q|^2 / sqrt(128), about 34: e^34 against a million others
        cuda.store((3 * q[:, :1]).half(), needle, slot, pages, k_format, v_format, 16)
        out = cuda.decode(q.half(), pages, k_format, v_format, 16, table, kv_lens=lens)
        cosine = torch.nn.functional.cosine_similarity(out[0].float(), needle[0].float(), dim=-1)
        assert cosine.min() > {4: 0.99, 3: 0.97, 2: 0.9}[bits], f"depth {depth}: {cosine.tolist()}"
        pages[depth // 16] = saved


def test_a_calibrated_codebook_is_read_at_run_time() -> None:
    four = core.Codebook(4, (4, 14, 25, 37, 50, 66, 85, 110), 0.025, 5)
    three = core.Codebook(3, (9, 30, 58, 93), 0.024, 5)
    check(Problem(Case(k_bits=4, v_bits=3, books=(four, three))))


def test_output_is_as_exact_as_a_bf16_kernel() -> None:
    """At most twice the error that 16-bit attention makes on the same, decompressed data."""
    problem = Problem(Case(lens=(8192,), num_kv_heads=8, dtype=torch.bfloat16))
    arguments = problem.arguments()
    arguments["out"] = torch.empty_like(problem.expected, dtype=torch.bfloat16)
    cuda.decode(**arguments)
    k, v = problem.rotated(0)
    q = problem.codec.rotate_query(problem.q.float())
    q16, k16, v16 = (
        x.transpose(0, 1)[None].to(torch.bfloat16)
        for x in (q, *(x.float().repeat_interleave(4, 1) for x in (k, v)))
    )
    rotated = torch.nn.functional.scaled_dot_product_attention(q16, k16, v16, scale=128**-0.5)
    theirs = problem.codec.unrotate_output(rotated[0].transpose(0, 1).float())
    ours = (arguments["out"].float() - problem.expected).norm()
    assert ours <= 2 * (theirs - problem.expected).norm()


def test_arguments_are_checked() -> None:
    arguments = Problem(Case(lens=(40,))).arguments()
    for name, value, error in [
        ("q", arguments["q"][..., :64], ValueError),
        ("q", arguments["q"].cpu(), ValueError),
        ("q", arguments["q"].int(), TypeError),
        ("kv_indices", arguments["kv_indices"].long(), TypeError),
        ("kv_lens", arguments["kv_lens"][:0], ValueError),
        ("page_size", 15, ValueError),
        ("body", "fast", ValueError),
        ("num_ctas", (1 << 15) + 1, ValueError),
        ("pages", arguments["pages"][..., :-16], ValueError),
        ("workspace", torch.zeros(16, dtype=torch.uint8, device=DEVICE), ValueError),
        ("workspace", torch.zeros(1 << 24, dtype=torch.uint8, device=DEVICE)[8:], ValueError),
    ]:
        with pytest.raises(error, match=name):
            cuda.decode(**{**arguments, name: value})


def test_cuda_is_what_auto_means_for_page_tables() -> None:
    assert kernels.resolve_backend("auto", DEVICE, "pages") == "cuda"
