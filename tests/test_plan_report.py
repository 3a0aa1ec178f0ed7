# SPDX-License-Identifier: Apache-2.0
"""What people read of a plan: a sentence first, and no figure cut at any width."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from turbokv.doctor import Check
from turbokv.doctor import render as render_doctor
from turbokv.plan import plan
from turbokv.plan_report import render, sentence

QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


def shown(config: dict[str, Any], width: int, **options: Any) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(render(plan(config, **options)), crop=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_sentence_answers_first() -> None:
    found = sentence(plan(QWEN3_8B, gpu_memory=80, context=250_000))
    assert found == (
        "qwen3 on one GPU of 80 GiB: 1.5 M tokens at tq_k5v3, 399K at bf16;"
        " your context of 250K tokens fits 5 times at tq_k5v3, and fits once at bf16."
    )


def test_a_folder_gives_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    assert sentence(plan(folder)).startswith("Qwen3-8B on one GPU")
    assert sentence(plan(folder / "config.json")).startswith("qwen3 on one GPU")


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {"gpu_memory": 10}, "leave no memory for a cache"),
        ({"head_dim": 16}, {}, "TurboKV cannot compress this cache"),
        ({}, {"tensor_parallel": 4}, "on 4 GPUs of 80 GiB"),
        ({}, {"context": 10_000_000}, "does not fit at tq_k5v3, as at bf16"),
    ],
)
def test_the_sentence_says_what_is_so(
    change: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    assert words in sentence(plan({**QWEN3_8B, **change}, **options))


def test_a_usual_plan_fits_80_columns() -> None:
    text = shown(QWEN3_8B, 80, context=250_000)
    found = plan(QWEN3_8B, context=250_000)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for row in found.rows:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{row.name} ")]
        for number in (row.tokens, row.bytes_per_token, row.longest_sequence, row.vllm_tokens):
            assert f"{number:,}" in line.split()


def test_figures_that_need_more_than_a_pipes_80_columns_are_whole(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(QWEN3_8B))
    words = ["plan", str(config), "--gpu-memory", "900000000", "--presets", "tq4"]
    out = subprocess.run(
        [sys.executable, "-m", "turbokv", *words],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "40"},
        timeout=300,
    ).stdout
    row = plan(QWEN3_8B, gpu_memory=900_000_000).row("tq4")
    (line,) = [line for line in out.splitlines() if line.startswith("tq4 ")]
    for name, value in dataclasses.asdict(row).items():
        if name in ("tokens", "sequences", "longest_sequence", "vllm_tokens"):
            assert f"{value:,}" in line.split()


def test_a_remedy_of_the_doctor_can_be_copied() -> None:
    remedy = (
        "pip uninstall turbokv && pip install --force-reinstall --no-deps 'turbokv-cache[triton]'"
    )
    console = Console(width=40, file=io.StringIO())
    console.print(render_doctor([Check("Triton", "missing", "no", remedy)]), soft_wrap=True)
    assert remedy in console.file.getvalue()  # type: ignore[attr-defined]
