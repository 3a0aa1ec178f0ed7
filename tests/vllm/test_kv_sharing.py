# SPDX-License-Identifier: Apache-2.0
"""Layers that read another layer's pages: Gemma 3n's, with and without vLLM's fast prefill."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch

from tests.vllm import engine as e
from tests.vllm import zoo
from turbokv.integrations.vllm.window.pool import live_windows

if (reason := e.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

CPU = e.on_cpu()
if not CPU and not torch.cuda.is_available():
    pytest.skip("neither vLLM's CPU engine nor a GPU", allow_module_level=True)
if not CPU:
    pytestmark = pytest.mark.gpu
NAME = "Gemma3nForCausalLM"
# Long enough for tiles that begin while decoding to leave the window again.
TOKENS = 40


def answers(model: str, kv_cache_dtype: str, **overrides: Any) -> list[e.Answer]:
    requests = e.prompts((150, 40, 5, 77), zoo.VOCAB)
    settings: dict[str, Any] = {"max_model_len": 256, "max_num_batched_tokens": 64}
    if CPU:
        settings |= {"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 1 << 27}
    if kv_cache_dtype != "auto":
        settings["turbokv"] = {"window": 32, "sinks": 4}
    with e.engine(model, kv_cache_dtype, **(settings | overrides)) as llm:
        found = e.ask(llm, requests, TOKENS)
        if kv_cache_dtype != "auto":
            context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
            _one_map_for_pages(context)
        return found


def _one_map_for_pages(context: dict[str, Any]) -> None:
    """Check that pages have one map, whoever reads them, and that a step brings it up once."""
    impls = {name: layer.impl for name, layer in context.items() if hasattr(layer, "impl")}
    sharing = [impl for impl in impls.values() if impl.kv_sharing_target_layer_name is not None]
    assert sharing
    for impl in sharing:
        owner = impls[impl.kv_sharing_target_layer_name]
        assert impl.storage() is owner.cache
        assert owner.shared_pages.window is not None
    stored = [impl for impl in impls.values() if impl.kv_sharing_target_layer_name is None]
    maps = {id(impl.shared_pages.window) for impl in stored}
    assert maps == {id(window) for window in live_windows()}
    assert len({window.metrics().steps for window in live_windows()}) == 1


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast prefill"])
def test_layers_that_share_pages_read_what_was_stored(
    fast: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "zoo"
    model = zoo.make(NAME, pathlib.Path(folder))
    wanted = answers(model, "auto")
    found = e.compare(answers(model, "tq_k8v4", kv_sharing_fast_prefill=fast), wanted)
    print(found)
    assert found.positions >= 4 * TOKENS // 2
    assert found.error < 0.05, found
