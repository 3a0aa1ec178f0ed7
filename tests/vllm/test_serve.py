# SPDX-License-Identifier: Apache-2.0
"""``turbokv serve``: what it asks vLLM for, and what it refuses before vLLM starts."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from turbokv import cli
from turbokv.integrations.vllm import serve


def test_our_options_become_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(serve, "run", asked.append)
    words = "serve model --preset tq_k5v3 --path flash_attn --window 64 --skip-layers 0,35"
    result = CliRunner().invoke(cli.app, [*words.split(), "--port", "8123", "--max-model-len=4096"])
    assert result.exit_code == 0, result.output
    (argv,) = asked
    assert argv[:4] == ["serve", "model", "--kv-cache-dtype", "tq_k5v3"]
    assert argv[4] == "--additional-config"
    assert json.loads(argv[5]) == {
        "turbokv": {"path": "flash_attn", "window": 64, "skip_layers": ["0", "35"]}
    }
    assert argv[6:] == ["--port", "8123", "--max-model-len=4096"]


def test_defaults_are_vllms_and_ours() -> None:
    assert serve.arguments("model", "tq4", {"path": None}) == [
        "serve",
        "model",
        "--kv-cache-dtype",
        "tq4",
    ]


@pytest.mark.parametrize(
    ("preset", "options", "extra", "message"),
    [
        ("fp8", {}, [], "preset: wanted one of tq4, .* got 'fp8'"),
        ("tq4", {"path": "fast"}, [], r"turbokv\.path: wanted one of"),
        ("tq4", {"calibration": "absent"}, [], r"turbokv\.calibration: wanted a file"),
        ("tq4", {}, ["--kv-cache-dtype=fp8"], "--kv-cache-dtype: wanted --preset"),
        ("tq4", {}, ["--kv_cache_dtype", "fp8"], "--kv_cache_dtype: wanted --preset"),
        ("tq4", {}, ["--additional-config", "{}"], "--additional-config: wanted --preset"),
    ],
)
def test_mistakes_are_told_before_vllm_starts(
    preset: str, options: dict[str, object], extra: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        serve.arguments("model", preset, options, extra)


@pytest.mark.parametrize("installed", [False, True])
def test_a_vllm_without_the_patch_is_refused(
    installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = ModuleSpec("vllm", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if installed else None)
    with pytest.raises(ValueError, match=r"wanted the patched vLLM .*, got"):
        serve.run(["serve", "model"])
    (tmp_path / "turbokv_hooks.py").touch()
    if installed:
        serve.check_installed()


def test_metrics_have_a_folder_while_the_server_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], Path]] = []

    def main() -> None:
        folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
        assert folder.is_dir()
        seen.append((sys.argv, folder))

    for name in ("vllm", "vllm.entrypoints", "vllm.entrypoints.cli", "vllm.entrypoints.cli.main"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["vllm.entrypoints.cli.main"], "main", main, raising=False)
    monkeypatch.setattr(serve, "check_installed", lambda: None)
    monkeypatch.setattr(sys, "argv", ["turbokv"])
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")
    serve.run(["serve", "model"])
    ((argv, folder),) = seen
    assert argv == ["vllm", "serve", "model"]
    assert not folder.exists()
