# SPDX-License-Identifier: Apache-2.0
"""A tiny model of every decoder family that plans and the cache know."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from turbokv.model_families import FAMILIES

# Published configs hold these; a class alone has no model or an odd one.
NEEDED: dict[str, dict[str, Any]] = {
    "dots1": {"moe_intermediate_size": 1408, "n_routed_experts": 128, "n_shared_experts": 2},
    "glm4_moe": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128, "num_key_value_heads": 8},
    "ministral": {"head_dim": 128, "num_key_value_heads": 8},
    "nemotron": {"num_key_value_heads": 8},
}


def class_name(family: str) -> str | None:
    """Return the type of the family's decoder alone, if Transformers has one."""
    for name in (f"{family}_text", family):
        if name in CONFIG_MAPPING:
            return name
    return None


DECODERS = {family: name for family in sorted(FAMILIES) if (name := class_name(family))}
# The decoders inside models that also see: the model class comes with the towers.
INSIDE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}


def build(config: Any, device: str) -> Any:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model.eval()


def published(config: Any, **more: Any) -> dict[str, Any]:
    """Return the config as ``save_pretrained`` writes it."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return {**found, **more}


SMALL: dict[str, Any] = {
    "attention_head_dim": 64,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "ffn_dim": 128,
    "ffn_hidden_size": 128,
    "hidden_size": 128,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "kv_lora_rank": 64,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "q_lora_rank": 64,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "vocab_size": 256,
    "vocab_size_per_layer_input": 256,
    "word_embed_proj_dim": 128,
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_d_ssm": 256,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "n_mamba_heads": 4,
    "mamba_headdim": 64,
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 8,
    "d_model": 128,
    "n_heads": 4,
    "n_layers": 8,
    "num_heads": 4,
    "num_layers": 8,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_kv_shared_layers": 2,
    "pad_token_id": None,
}


MIXED = ["linear_attention", "full_attention"] * 4
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 5]},
    "codegen": {"rotary_dim": 32},
    "dots1": {"n_shared_experts": 2},
    "falcon": {"num_kv_heads": 4},
    "glm4_moe": {"head_dim": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]], "window_size": 16},
    "gptj": {"rotary_dim": 32},
    "granitemoehybrid": {"layer_types": MIXED},
    "helium": {"head_dim": 32},
    "hunyuan_v1_dense": {"head_dim": 64},
    "ministral": {"head_dim": 64},
    "nemotron_h": {"n_groups": 1, "moe_shared_expert_intermediate_size": 64},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 4},
}
LATENT = ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa")
OWN |= {family: {"num_key_value_heads": 4} for family in (*LATENT, "minicpm3", "youtu")}


def shrunk(family: str) -> Any:
    """Return a config of the family's class that a CPU builds in no time."""
    kind = CONFIG_MAPPING[DECODERS[family]]
    whole = kind(**NEEDED.get(family, {})).to_dict()
    small = {key: value for key, value in SMALL.items() if key in whole}
    return kind(**{**small, **OWN.get(family, {})})
