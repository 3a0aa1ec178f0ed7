# SPDX-License-Identifier: Apache-2.0
"""What a captured graph reads stays where it is: over reloads of weights, and sleep and wake."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

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
# vLLM's CPU engine gives no numbers for gpt-oss, which alone has attention sinks.
NAME = "Qwen3ForCausalLM" if CPU else "GptOssForCausalLM"
KEPT = {"copies", "tile_slots", "k_offset", "k_offset_rotated"} | (set() if CPU else {"logits"})
# The model's own parameter, which no graph reads: what it holds is copied.
NOT_READ = ("sinks",)


def tensors(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors that an object of ours reaches through objects of ours."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif type(value).__module__.startswith("turbokv."):
        items = vars(value).items() if hasattr(value, "__dict__") else ()
    else:
        return
    for key, item in list(items):
        if key not in NOT_READ:
            yield from tensors(item, f"{name}.{key}", seen)


def addresses(llm: Any) -> dict[str, int]:
    """Return where everything lies that layers, windows and scratch memory keep on the device."""
    from turbokv.integrations.vllm.attention import scratch

    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    seen: set[int] = set()
    found: dict[str, int] = {}
    roots = {name: layer.impl for name, layer in context.items() if hasattr(layer, "impl")}
    roots["scratch"] = scratch.current()
    roots |= {f"window {window.number}": window for window in live_windows()}
    for name, root in roots.items():
        for path, tensor in tensors(root, name, seen):
            if tensor.device.type == ("cpu" if CPU else "cuda") and tensor.numel():
                found[path] = tensor.data_ptr()
    return found


def kinds(found: dict[str, int]) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path in found}


def settings(asleep: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "max_model_len": 512,
        "max_num_batched_tokens": 128,
        "turbokv": {"window": 32, "sinks": 4},
    }
    if CPU:
        return found | {"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 1 << 27}
    return found | {"enable_sleep_mode": asleep}


def test_nothing_that_a_graph_reads_moves(tmp_path: pathlib.Path) -> None:
    model = zoo.make(NAME, tmp_path)
    requests = e.prompts((200, 40, 5), zoo.VOCAB)
    with e.engine(model, "tq_k5v4", **settings(not CPU)) as llm:
        wanted = e.ask(llm, requests, 6)
        before = addresses(llm)
        # copies and their map, offsets of centred keys, sinks
        assert kinds(before) >= KEPT
        llm.collective_rpc("reload_weights")
        assert addresses(llm) == before
        again = e.compare(e.ask(llm, requests, 6), wanted)
        print("reload", again)
        assert again.error < 0.01
        for level in () if CPU else (1, 2):
            llm.sleep(level=level)
            llm.wake_up()
            if level == 2:  # weights were not kept
                llm.collective_rpc("reload_weights")
            assert addresses(llm) == before
            again = e.compare(e.ask(llm, requests, 6), wanted)
            print("sleep", level, again)
            assert again.error < 0.02
