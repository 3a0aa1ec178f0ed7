# SPDX-License-Identifier: Apache-2.0
"""The demo on a tiny model: what it measures, what it shows, and the copy of a converted model."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import tokenizers
import transformers
from rich.console import Console

from turbokv.integrations.transformers import converted, demo, demo_report, models
from turbokv.integrations.transformers.cache import TurboKVCache
from turbokv.integrations.transformers.demo import Answer, DemoResult, run_demo


@pytest.fixture(scope="module")
def tiny() -> models.LoadedModel:
    words = {chr(code): code - 32 for code in range(32, 127)}
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain)
    return models.LoadedModel(model, tokenizer, "tiny")


OPTIONS: dict[str, Any] = {"window": 16, "sinks": 4, "calibration": "none", "max_new_tokens": 12}


def test_eight_bits_answer_the_same(tiny: models.LoadedModel) -> None:
    result = run_demo(tiny, prompt="hello " * 40, k_bits=8, **OPTIONS)
    assert result.prompt_tokens == 240
    assert result.same_tokens == result.agreeing_tokens == result.full.tokens
    assert result.kl < 1e-4 and result.top1 == 1.0
    assert 1.5 < result.bytes_ratio < 2


def test_the_comparison_is_along_the_uncompressed_answer(tiny: models.LoadedModel) -> None:
    """At once and from what the prompt left: as one token at a time with a cache of its own."""
    result = run_demo(tiny, prompt="hello " * 40, k_bits=2, **OPTIONS)
    ids = demo.encode_chat(tiny, "hello " * 40)
    cache = transformers.DynamicCache(config=tiny.model.config)
    first = demo.prefill(tiny, ids, cache, lambda done: None)
    answer, full, _ = demo.generate_greedy(tiny, first, cache, 12)
    ours = TurboKVCache(tiny.model, 2, window=16, sinks=4, calibration="none")
    rows = [demo.prefill(tiny, ids, ours, lambda done: None)]
    for token in answer[:-1]:
        with torch.inference_mode():
            step = token.reshape(1, 1)
            logits = tiny.model(input_ids=step, past_key_values=ours, use_cache=True).logits
        rows.append(torch.log_softmax(logits[0, -1].float(), -1))
    kl = (full.exp() * (full - torch.stack(rows))).sum(-1).mean()
    assert result.kl == pytest.approx(float(kl), rel=0.05)


def test_progress_never_runs_backwards(tiny: models.LoadedModel) -> None:
    seen: list[tuple[str, int, int]] = []
    run_demo(
        tiny,
        prompt="hello " * 40,
        k_bits=4,
        progress=lambda *report: seen.append(report),
        **{**OPTIONS, "calibration": "auto"},
    )
    phases = list(dict.fromkeys(what for what, _, _ in seen))
    assert len(phases) == 4
    for phase in phases:
        done = [count for what, count, _ in seen if what == phase]
        assert done == sorted(done)
        assert all(count <= total for what, count, total in seen if what == phase)


def test_the_cache_grows_as_its_last_tokens_did() -> None:
    answer = Answer("", 11, 1000, 1100, None, 0.0)
    assert answer.bytes_at(110, 1110) == 1100 + 10 * 1000
    assert Answer("", 1, 1000, 1000, None, 0.0).bytes_at(100, 200) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("One is whole. Two is cut off", "One is whole."),
        ("One. Two.", "One. Two."),
        ("A first sentence that has no end", "A first sentence that has no end ..."),
        ("Hm. A sentence which the limit cut", "Hm. A sentence which the limit cut ..."),
    ],
)
def test_answers_are_shown_in_whole_sentences(text: str, wanted: str) -> None:
    assert demo_report.whole_sentences(text) == wanted


def shown(result: DemoResult, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(demo_report.render(result, "float32", "tq4, window 128, sinks 4", (4, 4)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def result(other: str, same: int) -> DemoResult:
    full = Answer("The file is closed. It is safe.", 60, 40_000_000, 42_000_000, 9.0, 4.0)
    ours = Answer(other, 60, 7_700_000, 8_000_000, 3.0, 4.0)
    return DemoResult("SmolLM2-135M-Instruct", 871, full, ours, 0.5, same, same, 0.0031, 0.969)


def test_the_place_where_answers_part_is_marked() -> None:
    text = shown(result("The file is closed. It stays open.", 6))
    assert "It || is safe." in text and "It || stays open." in text
    assert "share their first 6 tokens and part at ||" in text
    assert "96.9%" in text and "lower is better" in text.replace("\n", " ")


def test_equal_answers_have_no_mark() -> None:
    text = shown(result("The file is closed. It is safe.", 60))
    assert "||" not in text and "both answers are the same" in text


def test_the_picture_compares_with_16_bits() -> None:
    text = shown(result("The file is closed. It is safe.", 60))
    assert "21.0 MB" in text and "8.0 MB" in text and "16,384" in text
    bars = [line.count("█") for line in text.splitlines() if "█" in line]
    assert len(bars) == 6 and bars[4] == max(bars) > 2 * bars[5]
    assert max(map(len, shown(result("Other.", 0), 80).splitlines())) <= 80


def test_a_converted_model_is_made_once_and_is_the_same(
    tiny: models.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"contents")
    asked: list[object] = []

    def load(path: Path | None, **options: Any) -> models.LoadedModel:
        asked.append(path)
        return tiny if path is None else models.load_model(path, **options)

    monkeypatch.setattr(converted, "smollm2_path", lambda: source)
    monkeypatch.setattr(converted, "load_model", load)
    first, again = converted.load_packaged(), converted.load_packaged()
    folder = converted.converted_folder(source)
    assert asked == [None, folder, folder]
    assert list(folder.parent.iterdir()) == [folder]
    for name, weight in tiny.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    assert first.tokenizer("hello").input_ids == tiny.tokenizer("hello").input_ids
    assert models.fingerprint(again.model).mismatch(models.fingerprint(tiny.model)) is None
    source.write_bytes(b"other contents")
    assert converted.converted_folder(source) != folder


def test_a_gguf_file_is_read_without_a_foreign_bar(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import modeling_gguf_pytorch_utils as reader

    before = reader.tqdm
    seen: list[tuple[str, int, int]] = []
    with converted.gguf_reported(lambda *report: seen.append(report), "reading"):
        assert list(reader.tqdm(range(3), desc="foreign")) == [0, 1, 2]
    assert seen == [("reading", 0, 3), ("reading", 1, 3), ("reading", 2, 3)]
    assert reader.tqdm is before and "foreign" not in capfd.readouterr().err


def test_a_copy_that_cannot_be_written_is_only_a_warning(
    tiny: models.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "turbokv").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(converted, "smollm2_path", lambda: Path(sys.executable))
    monkeypatch.setattr(converted, "load_model", lambda path: tiny)
    with pytest.warns(UserWarning, match="could not be kept"):
        assert converted.load_packaged().model is tiny.model
