# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbokv import TurboKVCodec, core, kernels
from turbokv.core import Codebook, ScaleRule, VectorFormat
from turbokv.kernels import BackendUnavailableError, cpu

RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (8, 64, 96, 128, 256, 512)
POISON = 0xA5

# NumPy, which the interpreter computes with, warns of the zero and infinite vectors that are meant.
interpreted = [
    pytest.mark.skipif(
        not kernels.triton_is_interpreted() or not kernels._triton_installed(),
        reason="wanted Triton with TRITON_INTERPRET=1",
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def marked(test: Callable[..., None]) -> Callable[..., None]:
    for mark in interpreted:
        test = mark(test)
    return test


# --- choice of the backend ------------------------------------------------------------------------


@pytest.mark.parametrize(("reason", "chosen"), [(None, "cpp"), ("not built", "torch")])
def test_auto_on_the_cpu_never_interprets(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, chosen: str
) -> None:
    monkeypatch.setattr(cpu, "why_unavailable", lambda device: reason)
    assert kernels.resolve_backend("auto", "cpu") == chosen


def test_auto_on_the_gpu_is_the_first_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(kernels, "_triton_installed", lambda: True)
    names = kernels.available_backends("cuda")
    assert kernels.resolve_backend("auto", "cuda") == names[0]
    assert names[-2:] == ["triton", "torch"]
    monkeypatch.setattr(kernels, "_triton_installed", lambda: False)
    assert "triton" not in kernels.available_backends("cuda")
    assert kernels.resolve_backend("auto", "cuda") == kernels.available_backends("cuda")[0]


def test_auto_never_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.resolve_backend("auto", "cuda") == "torch"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_name_that_can_run_is_kept(backend: kernels.Backend) -> None:
    if kernels.why_unavailable(backend, "cpu") is None:
        assert kernels.resolve_backend(backend, "cpu") == backend


@pytest.mark.parametrize("name", ["", "numpy", "CUDA", None])
def test_an_unknown_name_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"backend: wanted one of .*, got"):
        kernels.check_backend(name)


def test_triton_without_gpu_or_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(kernels, "_triton_installed", lambda: True)
    with pytest.raises(BackendUnavailableError, match=r"'triton' cannot run: .*device cpu"):
        kernels.resolve_backend("triton", "cpu")


def test_triton_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_triton_installed", lambda: False)
    with pytest.raises(BackendUnavailableError, match=r"'triton' cannot run: .*not installed"):
        kernels.resolve_backend("triton", "cuda")


def test_cuda_on_the_cpu_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run"):
        kernels.resolve_backend("cuda", "cpu")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_refused_backend_runs_nothing(
    backend: kernels.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name in ("compress", "decompress"):
        monkeypatch.setattr(core, name, lambda *a, **k: pytest.fail("fell back to PyTorch"))
    fmt = make_format(4, 64)
    packed, norms = outputs(fmt, 3)
    with pytest.raises(BackendUnavailableError):
        kernels.compress(torch.ones(3, 64, dtype=torch.float32), fmt, packed, norms, backend)
    with pytest.raises(BackendUnavailableError):
        out = torch.empty(3, 64, dtype=torch.float32)
        kernels.decompress(packed, norms, fmt, out, rotated=False, backend=backend)
    with pytest.raises(BackendUnavailableError):
        TurboKVCodec(64, backend=backend)
    assert bool((packed == POISON).all())


@marked
def test_triton_by_name_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compress", "decompress"):
        monkeypatch.setattr(core, name, lambda *a, **k: pytest.fail("fell back to PyTorch"))
    codec = TurboKVCodec(64, 4, backend="triton")
    packed, norms = codec.compress_k(torch.ones(2, 3, 64, dtype=torch.float32))
    assert codec.decompress_k(packed, norms).shape == (2, 3, 64)


# --- Triton, interpreted, against the reference ---------------------------------------------------


def make_format(
    bits: int,
    dim: int,
    rule: ScaleRule = "unbiased",
    norm_dtype: torch.dtype = torch.float16,
    codebook: Codebook | None = None,
) -> VectorFormat:
    book = Codebook.gaussian(bits) if codebook is None else codebook
    return VectorFormat.create("k", dim, book, scale_rule=rule, norm_dtype=norm_dtype)


def outputs(fmt: VectorFormat, n: int) -> tuple[Tensor, Tensor]:
    packed = torch.full((n, fmt.packed_dim), POISON, dtype=torch.uint8)
    return packed, torch.full((n,), -7.0, dtype=fmt.norm_dtype)


def assert_same_floats(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def assert_compresses_alike(x: Tensor, fmt: VectorFormat) -> tuple[Tensor, Tensor]:
    expected, expected_norms = outputs(fmt, x.shape[0])
    core.compress(x, fmt, expected, expected_norms)
    packed, norms = outputs(fmt, x.shape[0])
    kernels.compress(x, fmt, packed, norms, "triton")
    assert_same_floats(norms, expected_norms)
    defined = ~expected_norms.isnan()  # the codes of a vector with NaN are unspecified
    assert torch.equal(packed[defined], expected[defined])
    return expected, expected_norms


def assert_decompresses_alike(
    packed: Tensor, norms: Tensor, fmt: VectorFormat, dtype: torch.dtype, rotated: bool
) -> None:
    shape = (packed.shape[0], fmt.padded_dim if rotated else fmt.head_dim)
    expected, actual = torch.full(shape, 3.0, dtype=dtype), torch.full(shape, -3.0, dtype=dtype)
    core.decompress(packed, norms, fmt, expected, rotated=rotated)
    kernels.decompress(packed, norms, fmt, actual, rotated=rotated, backend="triton")
    assert_same_floats(actual, expected)


@marked
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_triton_gives_the_reference_bits(
    bits: int, dim: int, hard_vectors: Callable[..., Tensor]
) -> None:
    # two rules a case and dtypes that turn, so that each meets each over the widths and sizes
    for i in range(DIMS.index(dim) % 2, len(RULES), 2):
        rule = RULES[i]
        dtype, norm_dtype = DTYPES[(bits + i) % 3], DTYPES[(dim // 8 + i) % 3]
        fmt = make_format(bits, dim, rule, norm_dtype)
        packed, norms = assert_compresses_alike(hard_vectors(43, dim, dtype, bits), fmt)
        assert_decompresses_alike(packed, norms, fmt, DTYPES[(bits + i) % 3], rotated=i < 2)


@st.composite
def codebooks(draw: st.DrawFn) -> Codebook:
    """As calibration makes them: integers up to 127 or floats, with or without a zero."""
    bits = draw(st.integers(2, 7))
    lattice = draw(st.booleans())
    count, low = 1 << (bits - 1), draw(st.integers(0, 1))
    levels = sorted(draw(st.sets(st.integers(low, 127), min_size=count, max_size=count)))
    scale = 1.0 if lattice else 0.0371
    floats = torch.tensor([scale * level for level in levels]).tolist()
    return Codebook(bits, tuple(floats), 3.0 / floats[-1], 5 if lattice else 0)


@marked
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    codebook=codebooks(),
    dim=st.integers(8, 150),
    n=st.integers(1, 40),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from(DTYPES),
    norm_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31 - 1),
)
def test_triton_gives_the_reference_bits_of_any_codebook_and_shape(
    codebook: Codebook,
    dim: int,
    n: int,
    rule: ScaleRule,
    dtype: torch.dtype,
    norm_dtype: torch.dtype,
    seed: int,
    hard_vectors: Callable[..., Tensor],
) -> None:
    fmt = make_format(codebook.bits, dim, rule, norm_dtype, codebook)
    packed, norms = assert_compresses_alike(hard_vectors(n, dim, dtype, seed), fmt)
    assert_decompresses_alike(packed, norms, fmt, dtype, rotated=seed % 2 == 0)


@marked
def test_triton_reads_and_writes_any_strides(hard_vectors: Callable[..., Tensor]) -> None:
    n, dim = 21, 96
    fmt = make_format(3, dim)
    dense = hard_vectors(n, dim, torch.bfloat16)
    packed, norms = assert_compresses_alike(dense, fmt)
    columns = dense.t().contiguous().t()  # last stride n
    spread = torch.zeros(n, 3, 2 * dim, dtype=torch.bfloat16)[:, 1, ::2].copy_(dense)
    for x in (columns, spread):
        assert_compresses_alike(x, fmt)
    # outputs inside wider buffers, whose other bytes stay
    wide = torch.full((n, 2 * fmt.packed_dim + 1), POISON, dtype=torch.uint8)
    wide_norms = torch.full((n, 3), -7.0, dtype=torch.float16)
    target = wide[:, 1::2]
    kernels.compress(dense, fmt, target, wide_norms[:, 1], "triton")
    defined = ~norms.isnan()
    assert torch.equal(target[defined], packed[defined])
    assert_same_floats(wide_norms[:, 1], norms)
    assert bool((wide[:, 0::2] == POISON).all()) and bool((wide_norms[:, 0::2] == -7).all())
    expected = torch.empty(n, dim, dtype=torch.float32)
    core.decompress(packed, norms, fmt, expected, rotated=False)
    out = torch.full((dim + 2, n), -3.0, dtype=torch.float32)
    kernels.decompress(
        target, wide_norms[:, 1], fmt, out[1:-1].t(), rotated=False, backend="triton"
    )
    assert_same_floats(out[1:-1].t()[defined], expected[defined])
    assert bool((out[0] == -3).all()) and bool((out[-1] == -3).all())


@marked
def test_triton_leaves_neighbouring_rows_alone() -> None:
    fmt = make_format(5, 64)
    packed, norms = outputs(fmt, 9)
    kernels.compress(
        torch.randn(7, 64, dtype=torch.float32), fmt, packed[1:8], norms[1:8], "triton"
    )
    for row in (0, 8):
        assert bool((packed[row] == POISON).all()) and norms[row].item() == -7
    out = torch.full((9, 64), -3.0, dtype=torch.float32)
    kernels.decompress(packed[1:8], norms[1:8], fmt, out[1:8], rotated=False, backend="triton")
    assert bool((out[0] == -3).all()) and bool((out[8] == -3).all())


@marked
def test_triton_accepts_no_vectors_at_all() -> None:
    fmt = make_format(4, 128)
    packed, norms = outputs(fmt, 0)
    kernels.compress(torch.empty(0, 128, dtype=torch.float32), fmt, packed, norms, "triton")
    kernels.decompress(
        packed,
        norms,
        fmt,
        torch.empty(0, 128, dtype=torch.float32),
        rotated=False,
        backend="triton",
    )


@marked
def test_triton_ignores_the_mark_of_a_scale() -> None:
    fmt = make_format(4, 64)
    packed, norms = assert_compresses_alike(torch.randn(5, 64, dtype=torch.float32), fmt)
    norms[::2] *= -1
    assert_decompresses_alike(packed, norms, fmt, torch.float32, rotated=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinities_count_as_the_input_limit(backend: kernels.Backend, dtype: torch.dtype) -> None:
    if kernels.why_unavailable(backend, "cpu") is not None:
        pytest.skip("wanted Triton with TRITON_INTERPRET=1")
    fmt = make_format(4, 64, norm_dtype=torch.float32)
    x = torch.zeros(1, 64, dtype=dtype)
    x[0, 5] = float("-inf")
    packed, norms = outputs(fmt, 1)
    kernels.compress(x, fmt, packed, norms, backend)
    expected, expected_norms = outputs(fmt, 1)
    limit = x.to(torch.float32).clamp(-core.INPUT_LIMIT, core.INPUT_LIMIT)
    core.compress(limit, fmt, expected, expected_norms)
    assert torch.equal(packed, expected) and torch.equal(norms, expected_norms)
    assert bool(norms.isfinite().all())


@marked
def test_kernels_compile_for_a_gpu_without_fused_multiply_adds(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(root),
    }
    script = root / "tests" / "compile_kernels.py"
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_square_roots_are_correctly_rounded() -> None:
    x = torch.rand(4099, generator=torch.Generator().manual_seed(1), dtype=torch.float32) * 100
    assert np.array_equal(core.exact_sqrt(x).numpy(), np.sqrt(x.numpy()))
