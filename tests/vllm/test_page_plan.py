# SPDX-License-Identifier: Apache-2.0
"""Pages of models whose layers differ, on a pretended H100 and a vLLM as it is: no GPU."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vllm import asked
from turbokv.engine_pages import BATCH_TOKENS
from turbokv.plan import plan

# the newest: 0.26, which is patched, sizes pages itself
ALL = [vllm for vllm in [*asked.installed(), *asked.fetched()[-1:]] if not vllm.is_patched]
if not ALL:
    pytest.skip(asked.MISSING, allow_module_level=True)

pytestmark = pytest.mark.slow
GIB = 1 << 30
_SIX = [*["sliding_attention"] * 5, "full_attention"]
_FOUR = [*["linear_attention"] * 3, "full_attention"]
# Shapes of published models: what matters to pages, the rest as Transformers has it.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma3ForCausalLM": (
        "gemma3_text",
        {
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "sliding_window": 1024,
            "layer_types": _SIX * 10 + ["sliding_attention"] * 2,
        },
    ),
    "Gemma4ForCausalLM": (
        "gemma4_text",
        {
            "num_hidden_layers": 60,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "global_head_dim": 512,
            "num_global_key_value_heads": 4,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 1024,
            "layer_types": _SIX * 10,
        },
    ),
    "GptOssForCausalLM": (
        "gpt_oss",
        {
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 18,
        },
    ),
    # Qwen3.6-35B-A3B: the same layers under another name
    "Qwen3NextForCausalLM": (
        "qwen3_next",
        {
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "layer_types": _FOUR * 10,
        },
    ),
    # Nemotron 3 Nano
    "NemotronHForCausalLM": (
        "nemotron_h",
        {
            "hidden_size": 2688,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "layers_block_type": ["mamba", "moe", "mamba", "moe", "mamba", "attention", "moe"] * 6
            + ["mamba", "moe"] * 5,
        },
    ),
    # Scout
    "Llama4ForCausalLM": (
        "llama4_text",
        {
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_chunk_size": 8192,
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """Write the configurations, and keep one process: importing vLLM takes most of the time."""
    from transformers import AutoConfig

    made = tmp_path_factory.mktemp("configs")
    for name, (model_type, settings) in MODELS.items():
        config = AutoConfig.for_model(model_type, max_position_embeddings=262_144, **settings)
        config.save_pretrained(made / name)
        path = made / name / "config.json"
        written = json.loads(path.read_text()) | {"architectures": [name], "dtype": "bfloat16"}
        # as published checkpoints say it, not as the newest Transformers writes it
        if written.pop("per_layer_config", None) is not None:
            written |= settings
        path.write_text(json.dumps(written))
    with asked.running(ALL[-1]):
        yield made


def describe(path: pathlib.Path, dtype: str, **arguments: Any) -> Any:
    """Return what vLLM makes of a model's cache of 40 GiB at 128K tokens."""
    settings = {
        "max_model_len": 131_072,
        "memory": 40 * GIB,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": True,
        **arguments,
    }
    return asked.describe(ALL[-1], path, dtype, **settings)


def test_gemma_4_keeps_what_compression_gains(folder: pathlib.Path) -> None:
    plain = describe(folder / "Gemma4ForCausalLM", "auto")
    found = describe(folder / "Gemma4ForCausalLM", "tq4")
    # heads of 256 take 260 bytes; those of 512 take 520 for 516, so that two pages are one
    assert found["slots"] == [260, 520]
    assert found["group_pages"] == [64 * 16 * 260]
    assert found["capacity"] > 3.9 * plain["capacity"]


def test_gemma_4_with_sliding_layers_in_16_bits(folder: pathlib.Path) -> None:
    skip = {"turbokv": {"skip_layers": ["sliding_window"]}}
    plain = describe(folder / "Gemma4ForCausalLM", "auto")
    found = describe(folder / "Gemma4ForCausalLM", "tq4", additional_config=skip)
    assert found["group_pages"][0] % min(found["pages"]) == 0
    assert found["capacity"] > 2 * plain["capacity"]


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "NemotronHForCausalLM"])
@pytest.mark.parametrize("dtype", ["tq4", "tq2"])
def test_prefixes_of_hybrids_are_found_in_steps_as_with_16_bits(
    name: str, dtype: str, folder: pathlib.Path
) -> None:
    plain = describe(folder / name, "auto", max_num_batched_tokens=4096)
    found = describe(folder / name, dtype, max_num_batched_tokens=4096)
    assert found["block_size"] <= 2 * plain["block_size"]
    assert found["capacity"] > 2.5 * plain["capacity"]
    if name == "Qwen3NextForCausalLM":  # and so it starts with a budget of 2,048 tokens
        assert describe(folder / name, dtype)["block_size"] <= 2048


def test_chunked_local_attention_has_compressed_pages(folder: pathlib.Path) -> None:
    plain = describe(folder / "Llama4ForCausalLM", "auto")
    found = describe(folder / "Llama4ForCausalLM", "tq4")
    assert {name for name, _ in found["groups"]} == {
        "ChunkedLocalAttentionSpec",
        "FullAttentionSpec",
    }
    assert found["slots"] == [132]
    assert found["block_size"] == 64
    assert found["capacity"] > 3.8 * plain["capacity"]


@pytest.mark.parametrize("name", MODELS)
def test_turbokv_plan_says_what_vllm_will_hold(name: str, folder: pathlib.Path) -> None:
    found = plan(folder / name, gpu_memory=400, context=131_072, recent_fraction=0)
    memory = {"memory": found.cache_bytes, "max_num_batched_tokens": BATCH_TOKENS}
    for row, dtype in (("bf16", "auto"), ("k4v4", "tq4"), ("k5v4", "tq_k5v4"), ("k2v2", "tq2")):
        engine = describe(folder / name, dtype, **memory)["capacity"]
        planned = found.row(row).vllm_tokens
        assert planned is not None
        assert abs(planned - engine) < 0.01 * engine, (row, planned, engine)
