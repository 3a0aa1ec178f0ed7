# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbokv import kernels
from turbokv.kernels import BackendUnavailableError
from turbokv.page_metadata import compute_page_metadata

POISON = -7
BACKENDS: list[kernels.Backend] = ["torch", "triton"]


@dataclass
class Batch:
    """Arguments of one call; outputs are poisoned and ``kv_indices`` has slack at its end."""

    seq_lens: Tensor
    block_table: Tensor
    page_size: int
    kv_indptr: Tensor
    kv_indices: Tensor
    kv_last_page_len: Tensor

    def run(self, backend: str = "torch") -> None:
        compute_page_metadata(**vars(self), backend=backend)  # type: ignore[arg-type]


def make_batch(lengths: list[int], max_pages: int, page_size: int, slack: int = 3) -> Batch:
    n = len(lengths)
    generator = torch.Generator().manual_seed(n)
    wide = torch.randint(0, 2**30, (n, max_pages + 5), generator=generator, dtype=torch.int32)

    def poisoned(size: int) -> Tensor:
        return torch.full((size,), POISON, dtype=torch.int32)

    return Batch(
        torch.tensor(lengths, dtype=torch.int32),
        wide[:, :max_pages],
        page_size,
        poisoned(n + 1),
        poisoned(n * max_pages + slack),
        poisoned(n),
    )


def expected(batch: Batch) -> tuple[list[int], list[int], list[int]]:
    """The definition, request by request."""
    indptr = [0]
    indices: list[int] = []
    last: list[int] = []
    for length, row in zip(batch.seq_lens.tolist(), batch.block_table.tolist(), strict=True):
        left, pages = length, 0
        while left > 0 and pages < len(row):
            indices.append(row[pages])
            left, pages = left - batch.page_size, pages + 1
        indptr.append(len(indices))
        last.append(min(left + batch.page_size, batch.page_size) if pages else 0)
    return indptr, indices, last


def assert_right(batch: Batch, backend: str) -> None:
    reason = kernels.why_unavailable(backend, "cpu")  # type: ignore[arg-type]
    if reason is not None:
        pytest.skip(reason)
    batch.run(backend)
    indptr, indices, last = expected(batch)
    assert batch.kv_indptr.tolist() == indptr
    assert batch.kv_indices[: len(indices)].tolist() == indices
    assert batch.kv_last_page_len.tolist() == last
    # what is past the end is not touched
    assert bool((batch.kv_indices[len(indices) :] == POISON).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [0, 1, 5, 1023, 1024, 1025, 5000])
def test_every_batch_size(batch_size: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(batch_size)
    lengths = torch.randint(0, 13 * 16 + 1, (batch_size,), generator=generator)
    lengths[::7] = 0
    lengths[1::7] = 32  # two full pages
    lengths[2::7] = 13 * 16
    assert_right(make_batch(lengths.tolist(), 13, 16), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_requests_outnumber_the_programs(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton" and kernels.why_unavailable("triton", "cpu") is None:
        from turbokv.kernels import triton_page_metadata

        monkeypatch.setattr(triton_page_metadata, "_MAX_GRID_Y", 3)
    assert_right(make_batch([2500, 1, 0, 2499, 700], 2500, 1), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], [8], [4, 8, 12], [-5, 3]])
def test_empty_and_exactly_full_requests(lengths: list[int], backend: str) -> None:
    assert_right(make_batch(lengths, 3, 4), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_pages", [0, 2])
def test_lengths_past_the_table_are_cut(max_pages: int, backend: str) -> None:
    batch = make_batch([9, 100, 2**31 - 1, 1], max_pages, 4, slack=0)
    assert_right(batch, backend)
    assert batch.kv_last_page_len.tolist()[:3] == [min(max_pages, 1) * 4] * 3


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(-2, 90), max_size=40),
    max_pages=st.integers(0, 9),
    page_size=st.integers(1, 20),
    slack=st.integers(0, 4),
    backend=st.sampled_from(BACKENDS),
)
def test_any_lengths(
    lengths: list[int], max_pages: int, page_size: int, slack: int, backend: str
) -> None:
    assert_right(make_batch(lengths, max_pages, page_size, slack), backend)


def test_auto_runs_on_the_cpu() -> None:
    batch = make_batch([3, 9], 3, 4)
    batch.run("auto")
    assert batch.kv_indptr.tolist() == [0, 1, 4]


def test_cuda_by_name_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run"):
        make_batch([3], 3, 4).run("cuda")


def test_triton_by_name_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    batch = make_batch([3], 3, 4)
    with pytest.raises(BackendUnavailableError, match="'triton' cannot run"):
        batch.run("triton")
    assert batch.kv_indptr.tolist() == [POISON] * 2


def test_cuda_comes_first_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from turbokv.kernels import cuda

    ran: list[object] = []
    monkeypatch.setattr(kernels, "resolve_backend", lambda *a: "cuda")
    monkeypatch.setattr(cuda, "page_metadata", lambda *a: ran.append(a))
    batch = make_batch([3], 3, 4)
    batch.run("auto")
    assert len(ran) == 1
    assert batch.kv_indptr.tolist() == [POISON] * 2


INT = torch.int32


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("page_size", 0, ValueError, "page_size: wanted 1 to 2147483647, got 0"),
        ("page_size", 2**31, ValueError, "page_size: wanted 1 to 2147483647, got 2147483648"),
        ("page_size", 4.0, TypeError, "page_size: wanted an int, got 4.0"),
        ("page_size", True, TypeError, "page_size: wanted an int, got True"),
        ("seq_lens", [3, 4], TypeError, "seq_lens: wanted a torch.Tensor, got list"),
        (
            "seq_lens",
            torch.ones(2, dtype=torch.float32),
            TypeError,
            "seq_lens: wanted torch.int32, got torch.float32",
        ),
        ("seq_lens", torch.ones(2, 1, dtype=INT), ValueError, "seq_lens: wanted 1 dimensions"),
        ("seq_lens", torch.ones(4, dtype=INT)[::2], ValueError, "seq_lens: wanted a contiguous"),
        (
            "block_table",
            torch.ones(2, 3, dtype=torch.int64),
            TypeError,
            "block_table: wanted torch.int32, got torch.int64",
        ),
        ("block_table", torch.ones(6, dtype=INT), ValueError, "block_table: wanted 2 dimensions"),
        (
            "block_table",
            torch.ones(3, 3, dtype=INT),
            ValueError,
            r"block_table: wanted 2 along dimension 0 for 2 requests, got shape \[3, 3\]",
        ),
        ("block_table", torch.ones(3, 2, dtype=INT).t(), ValueError, "block_table: wanted a cont"),
        (
            "block_table",
            torch.ones(1, dtype=INT).expand(2, 2**30),
            ValueError,
            "block_table: wanted a contiguous",
        ),
        (
            "kv_indptr",
            torch.ones(2, dtype=INT),
            ValueError,
            r"kv_indptr: wanted 3 along dimension 0 for 2 requests, got shape \[2\]",
        ),
        ("kv_indptr", torch.ones(3, device="meta", dtype=INT), ValueError, "kv_indptr: wanted dev"),
        (
            "kv_indices",
            torch.ones(5, dtype=INT),
            ValueError,
            r"kv_indices: wanted at least 6 elements \(batch_size \* max_pages\), got 5",
        ),
        ("kv_last_page_len", torch.ones(3, dtype=INT), ValueError, "kv_last_page_len: wanted 2 al"),
    ],
)
def test_wrong_arguments_are_named(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    batch = replace(make_batch([3, 4], 3, 4), **{name: value})
    with pytest.raises(error, match=message):
        batch.run()


def test_tables_beyond_int32_offsets_are_refused() -> None:
    table = torch.empty(1, 2**30, dtype=INT, device="meta").expand(2, -1)
    lengths, indptr, indices, last = (
        torch.empty(n, dtype=INT, device="meta") for n in (2, 3, 1, 2)
    )
    with pytest.raises(ValueError, match="block_table: wanted at most 2147483647 entries"):
        compute_page_metadata(lengths, table, 4, indptr, indices, last)
