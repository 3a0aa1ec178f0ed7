# SPDX-License-Identifier: Apache-2.0
"""Models for engine tests: small random ones with sensible logits, and SmolLM2 with its weights."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB = 512
# Large enough for attention to look at particular tokens, small enough for logits to stay sane.
SPREAD = 0.04
# Of keys, beside a spread of about 0.6.
BIAS = 8.0

_COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": SPREAD,
}
TINY: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3", "head_dim": 128, "num_hidden_layers": 4},
    "head64": {"model_type": "qwen3", "head_dim": 64, "num_hidden_layers": 4},
    "head256": {"model_type": "qwen3", "head_dim": 256, "num_hidden_layers": 2},
    "head96": {"model_type": "qwen3", "head_dim": 96, "num_hidden_layers": 4},
    # keys with a large mean, as Qwen2's have: what calibration is for
    "biased": {"model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 4},
    # where rotary embedding turns fast, so that offsets cannot take it off
    "biased_fast": {"model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 2},
    "mixed": {
        "model_type": "gemma3_text",
        "head_dim": 128,
        "num_hidden_layers": 6,
        "sliding_window": 256,
        "query_pre_attn_scalar": 128,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
    },
    "hybrid": {
        "model_type": "qwen3_next",
        "head_dim": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "partial_rotary_factor": 0.25,
        # vLLM takes none of these without experts
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
}


def tiny_config(kind: str) -> Any:
    """Return the Transformers configuration of a small model."""
    from transformers import AutoConfig

    settings = {**_COMMON, **TINY[kind]}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def make_tiny(kind: str, folder: pathlib.Path, seed: int = 0) -> str:
    """Write a small random model to ``folder`` once, and return its path."""
    if not (folder / "model.safetensors").exists():
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.bfloat16)
        if kind.startswith("biased"):
            # of the pairs of rotary channels, those that turn slowly or fast
            pairs = slice(0, 8) if kind == "biased_fast" else slice(20, 32)
            for layer in model.model.layers:
                bias = layer.self_attn.k_proj.bias.data.view(-1, 2, 32)
                bias[:, :, pairs].normal_(std=BIAS)
        model.save_pretrained(folder)
        _no_dynamic_rope(folder)
    return str(folder)


def _no_dynamic_rope(folder: pathlib.Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("transformers_version", None)
    path.write_text(json.dumps(config))


def make_smollm2(folder: pathlib.Path) -> str:
    """Write SmolLM2-135M-Instruct, which its package carries as GGUF, as vLLM reads it."""
    if not (folder / "model.safetensors").exists():
        from turbokv.integrations.transformers.models import load_model

        folder.mkdir(parents=True, exist_ok=True)
        loaded = load_model(dtype=torch.bfloat16)
        loaded.tokenizer.save_pretrained(folder)
        # not save_pretrained, which refuses models that were read from GGUF files
        config = loaded.model.config.to_dict()
        config.pop("quantization_config", None)
        config["architectures"] = [type(loaded.model).__name__]
        config["dtype"] = "bfloat16"
        (folder / "config.json").write_text(json.dumps(config, default=str))
        tensors = {
            k: v.to(torch.bfloat16).contiguous() for k, v in loaded.model.state_dict().items()
        }
        tensors.pop("lm_head.weight", None)  # tied to the embedding
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
