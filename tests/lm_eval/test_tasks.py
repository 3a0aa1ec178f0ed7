# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness on a tiny model in process, and against a server that answers."""

from __future__ import annotations

import http.server
import json
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from turbokv import cli, cli_options
from turbokv.integrations.lm_eval import run, tasks
from turbokv.integrations.transformers.models import LoadedModel

# --- our tasks, which need no harness -------------------------------------------------------------


@pytest.mark.parametrize("make", [tasks.retrieval_docs, tasks.recall_docs])
def test_questions_can_be_answered_from_their_text(make: Any) -> None:
    for context in (1024, 4096):
        docs = make(context, 5)
        assert docs == make(context, 5) and docs[:2] == make(context, 2)
        assert len({doc["target"] for doc in docs}) == 5
        for doc in docs:
            assert doc["input"].count(doc["target"]) == 1
            assert context * 3 < len(doc["input"]) < context * 5


def test_what_is_recalled_was_read_before_the_long_sum() -> None:
    (doc,) = tasks.recall_docs(2048, 1)
    assert doc["input"].index(doc["target"]) < 1500 < len(doc["input"]) - 6000


def test_an_answer_is_scored_by_its_beginning_and_likeness() -> None:
    doc = {"input": "", "target": "room 12 with code ab."}
    assert tasks.score(doc, [" room 12 with code ab. And more"]) == {
        "exact": 1.0,
        "similarity": 1.0,
    }
    found = tasks.score(doc, ["room 13 with code ab."])
    assert found["exact"] == 0.0 and found["similarity"] > 0.9
    assert tasks.score(doc, [""]) == {"exact": 0.0, "similarity": 0.0}


def test_mistakes_are_found_first(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli_options, "load", load)
    for line, sentence in (
        ("--presets k9v9", "presets: wanted full or"),
        ("--contexts 10", "contexts: wanted 512 or more, got 10"),
        ("--tasks ,", "tasks: wanted one or more, got none"),
        (f"--output {tmp_path}/no/o.json", "output: wanted a file in a folder"),
    ):
        result = CliRunner().invoke(cli.app, ["tasks", *line.split()])
        assert isinstance(result.exception, ValueError), line
        assert str(result.exception).startswith(sentence)


# --- the harness ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    pytest.importorskip("lm_eval", reason="wanted lm-evaluation-harness")
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {chr(32 + i): i for i in range(95)} | {"\n": 95, "<e>": 96}
    bare = Tokenizer(models.WordLevel(letters, unk_token="?"))
    bare.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<e>", pad_token="<e>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=96,
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()
    return LoadedModel(model, tokenizer, "tiny")


def _tiny_task(kind: str, **more: Any) -> dict[str, Any]:
    task = tasks.local_task(kind, 512, 2)
    task["generation_kwargs"]["max_gen_toks"] = 4
    return task | more


def test_tasks_run_in_process(loaded: LoadedModel) -> None:
    found = run.in_process(
        loaded, ["full", "tq_k5v3"], [_tiny_task("recall")], batch_size=2, limit=2
    )
    assert list(found) == ["full", "tq_k5v3"]
    for of_one in found.values():
        figures = of_one["turbokv_recall_512"]
        assert figures["exact,none"] == 0.0 and 0 <= figures["similarity,none"] < 0.5
    shown = run.table(found, "tiny")
    assert shown.row_count == 2 and len(shown.columns) == 4


def test_likelihoods_go_through_the_cache(loaded: LoadedModel) -> None:
    from turbokv.integrations.lm_eval.model import CacheLM, cache_maker

    ids = torch.randint(0, 96, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = loaded.model(ids).logits
    errors = {}
    for name in ("full", "tq5", "tq2"):
        make = cache_maker(loaded.model, name, "none")
        found = CacheLM(loaded.model, loaded.tokenizer, make, 64)._model_call(ids)
        assert torch.allclose(found[:, :64], expected[:, :64], atol=1e-5)
        errors[name] = float((found - expected).abs().max())
    assert errors["full"] < 1e-4 < errors["tq5"] < errors["tq2"]


class _Answers(http.server.BaseHTTPRequestHandler):
    """Answers every completion with the truth, which it finds in the prompt."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompts = asked["prompt"] if isinstance(asked["prompt"], list) else [asked["prompt"]]
        choices = []
        for i, prompt in enumerate(prompts):
            last = prompt.rstrip().rsplit("\n", 1)[-1].removesuffix(":")
            key = last.rsplit(" for ", 1)[-1].removesuffix(" in the text above is")
            line = next(x for x in prompt.splitlines() if f" {key} is: " in x)
            choices.append({"index": i, "text": " " + line.rsplit(": ", 1)[1].rstrip(".")})
        body = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}/v1"
        httpd.shutdown()


def test_tasks_run_against_a_server(server: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("lm_eval", reason="wanted lm-evaluation-harness")
    output = tmp_path / "o.json"
    line = ["tasks", "--server", server, "--served-model", "m", "--tasks", "retrieval"]
    line += ["--contexts", "512", "--questions", "3", "--output", str(output)]
    result = CliRunner().invoke(cli.app, line)
    assert result.exit_code == 0, result.exception
    figures = json.loads(output.read_text())["results"]["m"]["turbokv_retrieval_512"]
    assert figures["exact,none"] == 1.0 and figures["similarity,none"] == 1.0
    assert "turbokv_retrieval_512" in result.stdout
