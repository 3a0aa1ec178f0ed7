# SPDX-License-Identifier: Apache-2.0
"""The command line on a tiny model: mistakes are found before it loads, results are kept."""

from __future__ import annotations

import json
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from turbokv import cli, cli_options
from turbokv.calibration import Calibration
from turbokv.integrations.transformers import report
from turbokv.integrations.transformers.models import LoadedModel

runner = CliRunner()


class Letters:
    """A tokenizer of single bytes."""

    bos_token_id = None
    chat_template = None

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        ids = list(text.encode("ascii", "replace"))
        return SimpleNamespace(input_ids=torch.tensor([ids]) if _.get("return_tensors") else ids)

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(int(i) % 128) for i in ids)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()
    loaded = LoadedModel(model, Letters(), "tiny")
    monkeypatch.setattr(cli_options, "load", lambda *_: loaded)
    return loaded


MISTAKES: list[tuple[str, str]] = [
    ("demo --device foo", "device: wanted a PyTorch device, got 'foo'"),
    ("demo --device meta", "device: wanted one that can compute, got 'meta'"),
    ("demo --dtype int8", "dtype: wanted float32 or bfloat16 or float16, got 'int8'"),
    ("demo --calibration MISSING", "calibration: wanted a file"),
    ("calibrate MISSING/c.safetensors", "output: wanted a file in a folder that can be written"),
    ("calibrate FOLDER", "output: wanted a file in a folder that can be written"),
    ("calibrate FILE --parts offsets,foo", "parts: wanted some of"),
    (
        "calibrate FILE --text MISSING",
        "text: wanted 'prose', 'dialogue', 'code', 'topics' or a file",
    ),
    ("calibrate FILE --device foo", "device: wanted a PyTorch device, got 'foo'"),
    ("eval --plot MISSING/p.png", "plot: wanted a file in a folder that can be written"),
    ("eval --needle --needle-contexts abc", "needle_contexts: wanted a comma list of numbers"),
    ("eval --needle-contexts 512,8", "needle_contexts: wanted 64 or more, got 8"),
    ("eval --presets k9v9", "preset: wanted a name like tq_k5v3"),
    ("eval --presets k4v4+foo", "preset: wanted +w, +wN, +sN"),
    ("eval --presets none --rivals none", "presets: wanted some"),
    ("eval --rivals foo", "rivals: wanted some of"),
    ("eval --text MISSING", "text: wanted 'prose', 'dialogue', 'code', 'topics' or a file"),
    (
        "eval --calibration-text MISSING",
        "text: wanted 'prose', 'dialogue', 'code', 'topics' or a file",
    ),
    ("eval --calibration MISSING", "calibration: wanted a file"),
    ("eval --text ,", "text: wanted one or more, got none"),
    ("eval --score-every 65", "score_every: wanted at most the 64 of chunk, got 65"),
    ("eval --tokens 128 --chunk 128", "chunk: wanted fewer than the 128 tokens"),
    ("eval --device foo", "device: wanted a PyTorch device, got 'foo'"),
]


@pytest.mark.parametrize(("line", "sentence"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistakes_are_found_before_the_model_loads(
    line: str, sentence: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"MISSING": "missing", "FOLDER": "", "FILE": "c.safetensors"}
    for word, name in places.items():
        line = line.replace(word, str(tmp_path / name))

    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli_options, "load", load)
    result = runner.invoke(cli.app, line.split())
    assert isinstance(result.exception, (ValueError, TypeError, FileNotFoundError))
    assert str(result.exception).startswith(sentence)
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_sentence_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["turbokv", "demo", "--device", "foo"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "turbokv: device: wanted a PyTorch device, got 'foo'\n"


def test_an_answer_of_one_token_is_valid_json(tiny: LoadedModel) -> None:
    line = ["demo", "--max-new-tokens", "1", "--prompt", "hello " * 40, "--json"]
    result = runner.invoke(cli.app, line)
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert found["full"]["tokens"] == 1 and found["full"]["tokens_per_second"] is None
    shown = runner.invoke(cli.app, line[:-1])
    assert shown.exit_code == 0 and "Speed" not in shown.stdout  # of no second token


def test_json_has_no_number_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    cli_options.print_json({"a": [float("nan"), 1.5], "b": (float("inf"),), "c": pathlib.Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None], "c": "x"}


EVAL = ["eval", "--tokens", "128", "--passages", "2", "--json"]
EVAL += ["--presets", "k4v4+w16", "--rivals", "fp8"]


def test_scores_outlive_a_plot_that_fails(
    tiny: LoadedModel, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "check_plot", lambda _: None)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "plot_quality", fail)
    result = runner.invoke(cli.app, [*EVAL, "--plot", str(tmp_path / "p.png")])
    assert isinstance(result.exception, OSError)
    assert {row["name"] for row in json.loads(result.stdout)["rows"]} == {"fp8", "tq4+w16"}


def test_plot_and_calibration_are_written(tiny: LoadedModel, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    plot, file = tmp_path / "p.png", tmp_path / "c.safetensors"
    result = runner.invoke(cli.app, ["calibrate", str(file), "--tokens", "256", "--json"])
    assert result.exit_code == 0, result.exception
    assert sorted(Calibration.load(file).layers) == [0, 1]
    line = [*EVAL, "--plot", str(plot), "--calibration", str(file)]
    result = runner.invoke(cli.app, line)
    assert result.exit_code == 0, result.exception
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.safetensors", "p.png"]


def test_several_texts_are_scored_by_default(tiny: LoadedModel) -> None:
    line = ["eval", "--tokens", "128", "--passages", "1", "--chunk", "64"]
    line += ["--presets", "tq4+w16", "--rivals", "fp8,fp8+w16"]
    found = json.loads(runner.invoke(cli.app, [*line, "--json"]).stdout)
    assert list(found["texts"]) == ["prose", "dialogue", "code"]
    assert {row["name"] for row in found["rows"]} == {"fp8", "fp8+w16", "tq4+w16"}
    assert all(len(row["passages"]) == 3 and row["kl_error"] for row in found["rows"])
    shown = runner.invoke(cli.app, line)
    assert shown.exit_code == 0 and "KL over that of fp8 by text" in shown.stdout
