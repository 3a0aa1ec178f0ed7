# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of the CPU: equal to the reference to the bit, for every instruction set."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbokv import core
from turbokv.core import Codebook, Role, ScaleRule, VectorFormat
from turbokv.kernels import BackendUnavailableError, cpu
from turbokv.kernels.cpu import build

RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (8, 10, 64, 96, 128, 256, 300, 512)
POISON = 0xA5


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The library in the package if it is there and current, else one that is compiled for us."""
    with pytest.MonkeyPatch.context() as patch:
        if not cpu.available():
            path = tmp_path_factory.mktemp("cpu") / build.LIBRARY.name
            patch.setattr(cpu, "LIBRARY", build.build_library(path, extra=["-Werror"]))
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_format(
    bits: int,
    dim: int,
    rule: ScaleRule = "unbiased",
    norm_dtype: torch.dtype = torch.float16,
    codebook: Codebook | None = None,
    role: Role = "k",
) -> VectorFormat:
    book = Codebook.gaussian(bits) if codebook is None else codebook
    return VectorFormat.create(role, dim, book, scale_rule=rule, norm_dtype=norm_dtype)


def outputs(fmt: VectorFormat, n: int) -> tuple[Tensor, Tensor]:
    packed = torch.full((n, fmt.packed_dim), POISON, dtype=torch.uint8)
    return packed, torch.full((n,), -7.0, dtype=fmt.norm_dtype)


def assert_same_floats(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def assert_compresses_alike(x: Tensor, fmt: VectorFormat) -> tuple[Tensor, Tensor]:
    expected, expected_norms = outputs(fmt, x.shape[0])
    core.compress(x, fmt, expected, expected_norms)
    defined = ~expected_norms.isnan()  # the codes of a vector with NaN are unspecified
    for number in range(len(cpu.instruction_sets())):
        packed, norms = outputs(fmt, x.shape[0])
        cpu._compress(x, fmt, packed, norms, number)
        assert_same_floats(norms, expected_norms)
        assert torch.equal(packed[defined], expected[defined])
    return expected, expected_norms


def assert_decompresses_alike(
    packed: Tensor, norms: Tensor, fmt: VectorFormat, dtype: torch.dtype, rotated: bool
) -> None:
    shape = (packed.shape[0], fmt.padded_dim if rotated else fmt.head_dim)
    expected = torch.full(shape, 3.0, dtype=dtype)
    core.decompress(packed, norms, fmt, expected, rotated=rotated)
    for number in range(len(cpu.instruction_sets())):
        actual = torch.full(shape, -3.0, dtype=dtype)
        cpu._decompress(packed, norms, fmt, actual, rotated, number)
        assert_same_floats(actual, expected)


# --- equal to the reference -----------------------------------------------------------------------


def test_every_processor_has_a_baseline() -> None:
    assert cpu.instruction_sets()[0] == "baseline"
    assert cpu.why_unavailable() is None


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_reference_bits(bits: int, dim: int, hard_vectors: Callable[..., Tensor]) -> None:
    for i, rule in enumerate(RULES):
        for j, dtype in enumerate(DTYPES):
            fmt = make_format(bits, dim, rule, DTYPES[(bits + i + j) % 3], role="kv"[i % 2])  # type: ignore[arg-type]
            packed, norms = assert_compresses_alike(hard_vectors(43, dim, dtype, bits), fmt)
            assert_decompresses_alike(packed, norms, fmt, dtype, rotated=(i + j) % 2 == 0)
            assert_decompresses_alike(packed, norms, fmt, DTYPES[i % 3], rotated=(i + j) % 2 == 1)


@st.composite
def codebooks(draw: st.DrawFn) -> Codebook:
    """As calibration makes them: integers up to 127 or floats, with or without a zero."""
    bits = draw(st.integers(2, 8))
    lattice = draw(st.booleans())
    count, low = 1 << (bits - 1), 0 if bits == 8 else draw(st.integers(0, 1))
    levels = sorted(draw(st.sets(st.integers(low, 127), min_size=count, max_size=count)))
    # a power crowds the small ones, so that several boundaries share a bucket
    power = draw(st.sampled_from((1.0, 2.0, 4.0)))
    values = levels if lattice else [0.0371 * level**power / 127 ** (power - 1) for level in levels]
    floats = torch.tensor(values, dtype=torch.float32).tolist()
    return Codebook(bits, tuple(floats), 3.0 / floats[-1], 5 if lattice else 0)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
def test_the_reference_bits_of_any_codebook_and_shape(
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_sixteen_bits(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 32)
    assert_compresses_alike(x, make_format(8, 32, "least_squares", torch.float32))
    # a lone coordinate is rotated to equal ones, so results are of many sizes and signs
    fmt = make_format(8, 8, norm_dtype=torch.float32)
    packed, _ = assert_compresses_alike(torch.eye(8, dtype=torch.float32), fmt)
    scales = torch.logspace(-45, 38, 8 * 997).to(torch.float32)
    assert_decompresses_alike(packed.repeat(997, 1), scales, fmt, dtype, rotated=False)
    assert_decompresses_alike(packed.repeat(997, 1), scales, fmt, dtype, rotated=True)


def test_any_codes_and_the_mark_of_a_scale() -> None:
    generator = torch.Generator().manual_seed(5)
    for bits in range(2, 9):
        fmt = make_format(bits, 96)
        packed = torch.randint(0, 256, (19, fmt.packed_dim), generator=generator).to(torch.uint8)
        norms = torch.randn(19, generator=generator, dtype=torch.float32).to(
            torch.float16
        )  # the sign is a mark
        for rotated in (False, True):
            assert_decompresses_alike(packed, norms, fmt, torch.float32, rotated)


def test_subnormals_count_even_where_the_caller_flushes_them() -> None:
    fmt = make_format(4, 64, norm_dtype=torch.float32)
    x = torch.full((3, 64), 1e-17, dtype=torch.float32)
    x[:, ::2] = 1e-40
    expected, expected_norms = outputs(fmt, 3)
    core.compress(x, fmt, expected, expected_norms)
    packed, norms = outputs(fmt, 3)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        cpu.compress(x, fmt, packed, norms)
        flushes = (torch.tensor([1e-40], dtype=torch.float32) * 1).item() == 0
    finally:
        torch.set_flush_denormal(False)
    assert flushes  # the caller's mode is back afterwards
    assert torch.equal(packed, expected) and torch.equal(norms, expected_norms)


# --- shapes, strides, threads ---------------------------------------------------------------------


@pytest.mark.parametrize("dim", [96, 100])
def test_any_strides(dim: int, hard_vectors: Callable[..., Tensor]) -> None:
    n = 21
    fmt = make_format(3, dim)
    for dtype in DTYPES:
        dense = hard_vectors(n, dim, dtype)
        packed, norms = assert_compresses_alike(dense, fmt)
        columns = dense.t().contiguous().t()  # last stride n
        spread = torch.zeros(n, 3, 2 * dim, dtype=dtype)[:, 1, ::2].copy_(dense)
        wide = torch.zeros(n, dim + 5, dtype=dtype)[:, 3:-2].copy_(dense)
        one = dense[:1].expand(n, dim)
        for x in (columns, spread, wide, one, dense[::2]):
            assert_compresses_alike(x, fmt)
        # outputs inside wider buffers, whose other bytes stay
        target = torch.full((n, 2 * fmt.packed_dim + 1), POISON, dtype=torch.uint8)
        scales = torch.full((n, 3), -7.0, dtype=torch.float16)
        cpu.compress(dense, fmt, target[:, 1::2], scales[:, 1])
        defined = ~norms.isnan()
        assert torch.equal(target[:, 1::2][defined], packed[defined])
        assert_same_floats(scales[:, 1], norms)
        assert bool((target[:, 0::2] == POISON).all()) and bool((scales[:, 0::2] == -7).all())
        for rotated in (False, True):
            size = fmt.padded_dim if rotated else dim
            expected = torch.empty(n, size, dtype=dtype)
            core.decompress(packed, norms, fmt, expected, rotated=rotated)
            out = torch.full((size + 2, n), -3.0, dtype=dtype)
            cpu.decompress(target[:, 1::2], scales[:, 1], fmt, out[1:-1].t(), rotated=rotated)
            assert_same_floats(out[1:-1].t()[defined], expected[defined])
            assert bool((out[0] == -3).all()) and bool((out[-1] == -3).all())


@pytest.mark.parametrize("dim", [8, 60, 64])
@pytest.mark.parametrize("bits", [2, 3, 5, 7, 8])
def test_neighbouring_rows_stay(bits: int, dim: int) -> None:
    fmt = make_format(bits, dim)
    packed, norms = outputs(fmt, 9)
    cpu.compress(torch.randn(7, dim, dtype=torch.float32), fmt, packed[1:8], norms[1:8])
    for row in (0, 8):
        assert bool((packed[row] == POISON).all()) and norms[row].item() == -7
    for rotated in (False, True):
        out = torch.full((9, fmt.padded_dim if rotated else dim), -3.0, dtype=torch.float32)
        cpu.decompress(packed[1:8], norms[1:8], fmt, out[1:8], rotated=rotated)
        assert bool((out[0] == -3).all()) and bool((out[8] == -3).all())


def test_no_vectors_at_all() -> None:
    fmt = make_format(4, 128)
    packed, norms = outputs(fmt, 0)
    cpu.compress(torch.empty(0, 128, dtype=torch.float32), fmt, packed, norms)
    cpu.decompress(packed, norms, fmt, torch.empty(0, 128, dtype=torch.float32), rotated=False)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_share_the_vectors(
    count: int, threads: Callable[[int], None], hard_vectors: Callable[..., Tensor]
) -> None:
    threads(count)
    fmt = make_format(4, 128)
    packed, norms = assert_compresses_alike(hard_vectors(6007, 128, torch.float32), fmt)
    assert_decompresses_alike(packed, norms, fmt, torch.float32, rotated=False)
    assert_decompresses_alike(packed, norms, fmt, torch.bfloat16, rotated=True)


@pytest.mark.filterwarnings("error:Dynamo")
def test_torch_compile_breaks_its_graph_and_is_right() -> None:
    fmt = make_format(4, 64)
    packed, norms = assert_compresses_alike(torch.randn(5, 64, dtype=torch.float32), fmt)
    expected = torch.empty(5, 64, dtype=torch.float32)
    core.decompress(packed, norms, fmt, expected, rotated=False)

    def step(packed: Tensor, norms: Tensor) -> Tensor:
        out = torch.empty(5, 64, dtype=torch.float32)
        if cpu.available():
            cpu.decompress(packed, norms, fmt, out, rotated=False)
        return out + 1

    assert torch.equal(torch.compile(step, backend="eager")(packed, norms), expected + 1)


# --- what is refused ------------------------------------------------------------------------------


def test_other_devices_are_refused() -> None:
    assert "need CPU tensors, got device meta" in str(cpu.why_unavailable("meta"))
    assert not cpu.available("cuda")


def test_wrong_arguments_are_refused() -> None:
    fmt = make_format(4, 64)
    packed, norms = outputs(fmt, 3)
    x = torch.ones(3, 64, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x: wanted shape \[3, 64\], got \[3, 65\]"):
        cpu.compress(torch.ones(3, 65, dtype=torch.float32), fmt, packed, norms)
    with pytest.raises(ValueError, match=r"packed: wanted shape \[3, 32\], got \[2, 32\]"):
        cpu.compress(x, fmt, packed[:2], norms)
    with pytest.raises(TypeError, match=r"norms: wanted torch.float16, got torch.float32"):
        cpu.compress(x, fmt, packed, norms.float())
    with pytest.raises(TypeError, match=r"x: wanted float32, .* got torch.float64"):
        cpu.compress(x.double(), fmt, packed, norms)
    with pytest.raises(ValueError, match=r"x: wanted device cpu, got meta"):
        cpu.compress(x.to("meta"), fmt, packed, norms)
    with pytest.raises(ValueError, match=r"out: wanted shape \[3, 64\]"):
        cpu.decompress(packed, norms, fmt, torch.empty(3, 32, dtype=torch.float32), rotated=False)
    assert bool((packed == POISON).all())


def test_a_library_that_is_missing_or_foreign_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = make_format(4, 64)
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "none.so")
    assert "not built" in str(cpu.why_unavailable())
    with pytest.raises(BackendUnavailableError, match=r"python -m turbokv\.kernels\.cpu"):
        cpu.compress(torch.ones(3, 64, dtype=torch.float32), fmt, *outputs(fmt, 3))
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "LIBRARY", foreign)
    assert "does not load" in str(cpu.why_unavailable())


def test_a_library_of_other_sources_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.so"  # another name, which is not known to have loaded
    copy.write_bytes(cpu.LIBRARY.read_bytes())
    monkeypatch.setattr(cpu, "LIBRARY", copy)
    monkeypatch.setattr(build, "sources_digest", lambda: "0" * 64)
    assert "is not of the sources beside it" in str(cpu.why_unavailable())


# --- the build ------------------------------------------------------------------------------------


@pytest.fixture
def fake_compiler(tmp_path: Path) -> Path:
    """A compiler that notes its arguments and writes an empty output."""
    script = tmp_path / "fake c++"
    log = tmp_path / "log"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> "{log}"\nfor last; do :; done\n: > "$last"\n', encoding="utf-8"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_the_build_reads_the_usual_variables(
    tmp_path: Path, fake_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"'{fake_compiler}' --wrapped")
    monkeypatch.setenv("CXXFLAGS", "-Ofast -g1")
    monkeypatch.setenv("LDFLAGS", "-Wl,--some")
    target = tmp_path / "new" / "library.so"
    assert build.build_library(target, machine="x86_64") == target
    assert target.read_bytes() == b"" and [p.name for p in target.parent.iterdir()] == [target.name]
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 4 and all(line.startswith("--wrapped -Ofast -g1") for line in lines)
    assert sum("-mavx2" in line for line in lines) == 1
    assert "-Wl,--some" in lines[-1] and "-shared" in lines[-1]
    for line in lines[:-1]:  # what decides the bytes comes last
        words = line.split()
        assert words.index("-Ofast") < words.index("-fno-fast-math")
        assert "-ffp-contract=off" in words
    build.build_library(target, machine="aarch64")
    assert len((tmp_path / "log").read_text().splitlines()) == 4 + 3


def test_the_build_says_what_failed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "library.so"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"wanted a C\+\+ compiler .* got no-such-compiler"):
        build.build_library(target)
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.main(["--output", str(target)]) == 1
    assert "got none" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho the reason\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.BuildError, match=r"(?s)failed \(3\).*the reason"):
        build.build_library(target)
    assert not target.exists()
