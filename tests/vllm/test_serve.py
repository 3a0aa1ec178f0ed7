# SPDX-License-Identifier: Apache-2.0
"""``turbokv serve``: what it asks vLLM for, and what it refuses before vLLM starts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from turbokv import cli
from turbokv.integrations.vllm import installed, serve


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


@pytest.mark.parametrize("spelling", ["tq_k5v3", "k5v3", "K5V3"])
def test_a_preset_is_asked_for_by_its_widths_too(spelling: str) -> None:
    assert serve.arguments("model", spelling, {})[-1] == "tq_k5v3"


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
        ("fp8", {}, [], "preset: wanted one of .*tq4, .* got 'fp8'"),
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


Vllm = Callable[..., Path]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Vllm:
    """Pretend that a vLLM is installed, whether our plugin is, and what VLLM_PLUGINS holds."""

    def pretend(
        version: str | None,
        *,
        patched: bool = False,
        plugin: bool = True,
        chosen: str | None = None,
    ) -> Path:
        if version is not None:
            text = f"__version__ = version = '{version}'\n__version_tuple__ = version_tuple = ()\n"
            (tmp_path / "_version.py").write_text(text)
        if patched:
            (tmp_path / "turbokv_hooks.py").touch()
        spec = ModuleSpec("vllm", None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path)]
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(installed, "has_plugin", lambda: plugin)
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        if chosen is not None:
            monkeypatch.setenv("VLLM_PLUGINS", chosen)
        return tmp_path

    return pretend


@pytest.mark.parametrize(
    ("version", "patched"),
    [
        ("0.28.0", False),
        ("0.31.2", False),
        ("0.33.0", False),
        ("0.33.1.dev3+gabc", False),
        ("0.26.0+turbokv.1", True),
        ("0.26.0", True),  # hooks put on by hand
    ],
)
def test_these_versions_serve(version: str, patched: bool, vllm: Vllm) -> None:
    vllm(version, patched=patched, plugin=not patched)
    serve.check_installed()


@pytest.mark.parametrize(
    ("version", "patched"),
    [
        ("0.26.0", False),
        ("0.27.1", False),
        ("0.34.0", False),
        ("1.0.0", False),
        (None, False),
        ("0.33.0", True),
    ],
)
def test_other_versions_are_refused_with_what_to_do(
    version: str | None, patched: bool, vllm: Vllm
) -> None:
    vllm(version, patched=patched)
    with pytest.raises(
        ValueError, match=r"serve: wanted vLLM 0\.28 to 0\.33 \(pip .*make build-all\), found"
    ) as caught:
        serve.run(["serve", "model"])
    assert (version or "names no version") in str(caught.value)


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install vllm==0\.33\.0.*, found none"):
        serve.run(["serve", "model"])


def test_stock_vllm_needs_our_entry_point(vllm: Vllm) -> None:
    vllm("0.33.0", plugin=False)
    with pytest.raises(ValueError, match=r"entry point 'turbokv'.*install TurboKV's wheel"):
        serve.check_installed()


@pytest.mark.parametrize(
    ("chosen", "serves"), [("turbokv,lora", True), ("lora", False), ("", False)]
)
def test_vllm_plugins_may_not_leave_ours_out(chosen: str, serves: bool, vllm: Vllm) -> None:
    vllm("0.33.0", chosen=chosen)
    if serves:
        serve.check_installed()
    else:
        with pytest.raises(ValueError, match="VLLM_PLUGINS: wanted a list with 'turbokv'"):
            serve.check_installed()


def test_entry_points_are_found_in_metadata(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not installed.has_plugin()
    info = tmp_path / "turbokv_cache-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: turbokv-cache\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nturbokv = turbokv:register\n")
    assert installed.has_plugin()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("def register(): print('a line of vLLM')", None),
        ("def register(): raise AttributeError('no such hook')", "fails: .*no such hook"),
        ("import no_such_module", "fails: .*no_such_module"),
        ("import time\ndef register(): time.sleep(60)", "took more than 2 s"),
        ("import os\ndef register(): os._exit(3)", "exit status 3"),
    ],
)
def test_what_a_registration_does_is_found_out(
    module: str, reason: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """vLLM itself only logs what goes wrong in a plugin's import."""
    info = tmp_path / "turbokv_cache-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: turbokv-cache\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nturbokv = pretended:register\n")
    (tmp_path / "pretended.py").write_text(module)
    package = tmp_path / "turbokv" / "integrations" / "vllm"
    package.mkdir(parents=True)
    (package / "plugin.py").write_text("def why_not(): return None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = installed.registration_failure(2 if "sleep" in module else 60)
    assert (found is None) == (reason is None), found
    assert reason is None or re.search(reason, found or ""), found


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
