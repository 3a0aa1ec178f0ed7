# SPDX-License-Identifier: Apache-2.0
"""PyTorch's default dtype and device change nothing: model loaders set both."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from turbokv import Codebook, TurboKVCodec, kernels
from turbokv.calibrate_online import OnlineCalibrator
from turbokv.calibrate_static import StaticCalibrator
from turbokv.calibration import Calibration, Fingerprint, LayerCalibration
from turbokv.centring import KeyOffsets, Rotary, rotary_frequencies
from turbokv.page_metadata import compute_page_metadata
from turbokv.paged import PagedKVCache

TESTS = pathlib.Path(__file__).parent
DTYPES = (torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("torch", "cpp", "triton")


def vectors(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def indices(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def codec_bytes(backend: str) -> list[Tensor]:
    found: list[Tensor] = []
    # Triton is interpreted here, which takes a second for every launch
    for bits in (3, 8) if backend == "triton" else range(2, 9):
        for head_dim in (64,) if backend == "triton" else (64, 96):
            codec = TurboKVCodec(head_dim, bits, backend=backend)
            k, offset = vectors(20, head_dim), vectors(head_dim, seed=1)
            stored = codec.compress_k(k, offset=offset)
            found += [*stored, codec.decompress_k(*stored, offset=offset)]
            found += [*codec.compress_v(k), codec.rotate_query(k)]
            found += [codec.decompress_k_raw(*stored), codec.unrotate_output(codec.rotate_query(k))]
    # calibrated levels that are no lattice take their own way through every backend
    book = Codebook(3, (0.5, 1.7, 3.1, 5.3), 0.4, 2)
    codec = TurboKVCodec(64, 3, k_codebook=book, v_codebook=book, backend=backend)
    return [
        *found,
        *codec.compress_k(vectors(20, 64)),
        codec.decompress_v(*codec.compress_v(k[:, :64])),
    ]


def paged_cache() -> list[Tensor]:
    codec = TurboKVCodec(64, 5, 3)
    cache = PagedKVCache(codec, 4, 2, 16)
    k, v = vectors(40, 2, 64), vectors(40, 2, 64, seed=1)
    offset = vectors(1, 2, 64, seed=2)
    slots = torch.arange(40, dtype=torch.int64, device="cpu")
    cache.append(k, v, slots, k_offset=offset[slots // 256])
    pages, ptr = indices(0, 1, 2, dtype=torch.int32), indices(0, 3, dtype=torch.int32)
    out, lse = cache.attention(
        vectors(2, 4, 64), ptr, pages, indices(8, dtype=torch.int32), k_offset=offset,
        qo_indptr=indices(0, 2, dtype=torch.int32), return_lse=True,
    )  # fmt: skip
    return [cache.pages, out, lse, *cache.gather(pages, 40, k_offset=offset)]


def page_tables() -> list[Tensor]:
    lens = indices(5, 0, 4, dtype=torch.int32)
    table = torch.tensor([[7, 3], [0, 0], [9, 0]], dtype=torch.int32, device="cpu")
    out = [torch.zeros(n, dtype=torch.int32, device="cpu") for n in (4, 6, 3)]
    compute_page_metadata(lens, table, 4, *out)
    return out


def calibrations(folder: pathlib.Path) -> list[Tensor]:
    rotary = Rotary(rotary_frequencies(64))
    offsets = KeyOffsets(vectors(2, 64), rotary)
    static = StaticCalibrator()
    k, v, q = vectors(2, 300, 64), vectors(2, 300, 64, seed=1), vectors(2, 300, 64, seed=2)
    static.update(0, k=k, v=v, q=q, k_pre=k)
    online = OnlineCalibrator(TurboKVCodec(64, 4))
    online.collect(0, k, v)
    book = online.codebook(0, "k")
    layer = LayerCalibration(
        offsets=offsets, k_scale=static.k_scale(0), v_scale=static.v_scale(0),
        v_shift=static.v_shift(0), k_codebook=book,
    )  # fmt: skip
    made = Calibration(Fingerprint("ab", (0.1, 0.2), "test"), {0: layer})
    made.save(folder / "c.safetensors")
    read = Calibration.load(folder / "c.safetensors", fingerprint=made.fingerprint).layers[0]
    assert read.offsets is not None and read.k_scale is not None and read.v_shift is not None
    assert read.k_codebook is not None
    levels = read.k_codebook.levels
    positions = torch.arange(300, dtype=torch.int64, device="cpu")
    return [
        offsets.at(200, 400), read.offsets.at(200, 400), static.k_mean(0), read.k_scale,
        read.v_shift, levels, rotary.rotate(k, positions), read.fold_k(k), read.unfold_v(v),
    ]  # fmt: skip


SUBJECTS: dict[str, Callable[[pathlib.Path], list[Tensor]]] = {
    **{f"codec {name}": (lambda _, name=name: codec_bytes(name)) for name in BACKENDS},
    "paged": lambda _: paged_cache(),
    "page tables": lambda _: page_tables(),
    "calibration": calibrations,
}


@contextlib.contextmanager
def default(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device) if device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_defaults_change_no_bit(
    subject: str, dtype: torch.dtype, device: str | None, tmp_path: pathlib.Path
) -> None:
    if subject.startswith("codec "):
        reason = kernels.why_unavailable(subject.split()[1], "cpu")  # type: ignore[arg-type]
        if reason is not None:
            pytest.skip(reason)
    want = SUBJECTS[subject](tmp_path)
    with default(dtype, device):
        got = SUBJECTS[subject](tmp_path)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)
        if a.is_floating_point():
            assert b.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_suites_pass_under_each_default_dtype(dtype: str) -> None:
    """Runs what tests codec, paged cache, calibration and Transformers cache once more."""
    names = ("codec", "paged", "calibration", "centring")
    files = [f"test_{name}.py" for name in names]
    files += ["transformers/test_cache.py", "transformers/test_calibrate.py"]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-x", f"--default-dtype={dtype}"]
    command += ["-m", "not gpu and not slow", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
