# SPDX-License-Identifier: Apache-2.0
"""Python in documents runs as it stands: on a CPU, or on a GPU where it says ``cuda``."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.documents.snippets import ROOT, Block, blocks

PYTHON = blocks("python")
PAGES = sorted({block.page for block in PYTHON})
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model where Transformers finds it instead of the hub's."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, **{chr(code): code - 31 for code in range(32, 127)}}
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="[UNK]"))
    folder = tmp_path / HUB_NAME
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    return folder


def run_page(page: str, needs: str | None) -> dict[str, Any]:
    """Run a page's blocks that need the same, in order, as one program."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    for block in PYTHON:
        if block.page == page and block.needs == needs:
            exec(compile(block.text, str(block), "exec"), scope)
    return scope


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.needs is None for b in PYTHON)])
def test_blocks_run_on_a_cpu(page: str, hub_folder: Path, capsys: pytest.CaptureFixture) -> None:
    scope = run_page(page, None)
    if "cache" in scope:
        words = capsys.readouterr().out.split()
        assert words[-1] == "bytes" and int(words[-2]) > 0
    if "k" in scope:
        error = (scope["k"] - scope["keys"]).pow(2).mean()
        assert error < 0.02
        exact = scope["query"] @ scope["keys"].mT
        assert (scope["scores"] - exact).abs().max() < 6


@pytest.mark.gpu
@pytest.mark.parametrize("page", sorted({b.page for b in PYTHON if 'device="cuda"' in b.text}))
def test_blocks_run_on_a_gpu(page: str) -> None:
    scope = run_page(page, "a GPU")
    q, k, v = (scope[name].float() for name in "qkv")
    shape = (1, k.shape[1], -1, k.shape[2])
    scores = q.view(shape) @ k.permute(1, 2, 0) / k.shape[2] ** 0.5
    exact = scores.softmax(-1) @ v.permute(1, 0, 2)
    assert (scope["out"].float().view_as(exact) - exact).abs().mean() < 0.05


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_block_compiles_and_imports_what_is_there(block: Block) -> None:
    """Also of blocks that need a GPU or a server: their imports of ours exist."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("turbokv"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_blocks_of_flashinfer_name_what_the_patch_exports() -> None:
    source = (ROOT / "turbokv" / "integrations" / "flashinfer" / "__init__.py").read_text("utf-8")
    exported = re.search(r"^__all__ = \[(.*?)\]", source, re.MULTILINE | re.DOTALL)
    assert exported is not None
    (block,) = [b for b in PYTHON if "import flashinfer" in b.text]
    names = {
        node.attr
        for node in ast.walk(ast.parse(block.text))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "flashinfer"
    }
    assert names and names <= set(re.findall(r"\w+", exported[1]))
