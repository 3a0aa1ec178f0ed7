# SPDX-License-Identifier: Apache-2.0
"""The checks of ``make lint`` on documents: what they refuse, and what they let pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import check_docs, readme
from tests.documents.snippets import ROOT


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("a cache of 4 bits a number", "bits a number"),
        ("and the log says so.", "says so"),
        ("kept in 16 bits besides", "besides"),
        ("measured at K5V3", "K5V3"),
        ("We leverage tensor cores", "leverage"),
        ("one line\nis brought to L2", "is brought"),
    ],
)
def test_a_word_to_stumble_on_is_named(text: str, got: str) -> None:
    (found,) = check_docs.stumbles("page.md", text)
    assert found.startswith(f"page.md:{1 + text.count(chr(10))}: wanted ")
    assert found.endswith(f"got {got!r}")


@pytest.mark.parametrize(
    "text", ["4 bits per number", "tokens a row may see", "the preset k5v3", "beside a cache"]
)
def test_plain_words_pass(text: str) -> None:
    assert not list(check_docs.stumbles("page.md", text))


def test_a_dead_path_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[here](page.md) [there](other.md) `turbokv/absent.py` `turbokv/plan.py`")
    assert list(check_docs.dead_paths(page, {"turbokv"})) == ["other.md", "turbokv/absent.py"]


def test_the_readme_takes_its_models_from_the_zoo() -> None:
    zoo = (
        "| `LlamaForCausalLM` | yes | 0.02 | 100% | 0.7 |  |\n"
        "| `BloomForCausalLM` | refused |  |  | 0.05 | alibi |\n"
        "| `GPT2LMHeadModel` | yes | 0.03 | 82% | 0.8 |  |\n"
        "| `GptOssForCausalLM` | not here |  |  |  | no numbers |\n"
    )
    text = readme.models(zoo)
    assert "allow: Llama, GPT2." in text
    assert "size: Bloom." in text and "CPU: GptOss." in text


def test_the_picture_is_of_the_readmes_table() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert list(readme.caches(text)) == ["bf16", "fp8", "tq4", "tq_k5v3"]
    assert all(len(cells) == 4 for cells in readme.caches(text).values())
    other = text.replace(readme.caches(text)["tq4"][0], "1")
    assert readme.digest(other) != readme.digest(text)
    assert readme.digest(text).encode() in readme.PICTURE.read_bytes()
