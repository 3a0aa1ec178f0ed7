# SPDX-License-Identifier: Apache-2.0
"""Offsets of centred keys without vLLM: tables of rotary modules, and the file."""

from __future__ import annotations

import pathlib

import pytest
import torch

from turbokv.calibration import Calibration, Fingerprint
from turbokv.centring import rotary_frequencies
from turbokv.integrations.vllm.offsets import file, rotary


def table(inv_freq: torch.Tensor, rows: int, dtype: torch.dtype, factor: float = 1) -> torch.Tensor:
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * inv_freq
    return (torch.cat([angle.cos(), angle.sin()], 1) * factor).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_frequencies_are_recovered_from_a_table(dtype: torch.dtype, theta: float) -> None:
    want = rotary_frequencies(128, theta)
    got = rotary.from_table(table(want, 40_960, dtype), True)
    assert got is not None and got[1] == pytest.approx(1, abs=1e-2) and got[0].interleaved
    # what counts is the angle at the last position
    assert float((got[0].inv_freq - want).abs().max()) * 40_960 < 0.02


def test_the_factor_of_a_table_is_recovered() -> None:
    got = rotary.from_table(table(rotary_frequencies(64), 3000, torch.float32, 1.37), False)
    assert got is not None and got[1] == pytest.approx(1.37, rel=1e-6)


def test_tables_that_are_not_plain_are_left_alone() -> None:
    plain = table(rotary_frequencies(64), 3000, torch.float32)
    twice = torch.cat([plain, plain])  # long and short factors behind each other
    assert rotary.from_table(twice, False) is None
    assert rotary.from_table(plain[:1], False) is None
    assert rotary.from_table(torch.zeros(100, 64), False) is None


def test_modules_without_a_table_have_no_embedding() -> None:
    assert rotary.of_module(torch.nn.Linear(2, 2)) is None
    module = torch.nn.Module()
    module.register_buffer("cos_sin_cache", table(rotary_frequencies(64), 512, torch.float32))
    module.is_neox_style = False
    found = rotary.of_model(torch.nn.ModuleList([module, module]))
    assert [r.interleaved for r in found] == [True]
    module.register_buffer("inv_freq", rotary_frequencies(32).float())
    module.register_buffer("original_inv_freq", rotary_frequencies(32).float())
    assert [r.rotary_dim for r in rotary.of_model(module)] == [64, 32]


def test_a_file_is_read_once_until_it_changes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    Calibration(Fingerprint("a", ()), {}).save(path)
    first = file.load(str(path))
    read = []
    load = Calibration.load
    monkeypatch.setattr(Calibration, "load", lambda p: read.append(p) or load(p))
    assert all(file.load(str(path)) is first for _ in range(36)) and not read
    Calibration(Fingerprint("another", ()), {}).save(path)
    assert file.load(str(path)).fingerprint.config_sha256 == "another" and len(read) == 1
    with pytest.raises(FileNotFoundError, match=r"turbokv\.calibration: wanted a file, got"):
        file.load(str(tmp_path / "none"))
