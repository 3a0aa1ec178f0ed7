# SPDX-License-Identifier: Apache-2.0
"""Small target models with an EAGLE head or an MTP layer that drafts what the target would say.

A random head's drafts are never accepted, so they would not show whether it reads its own cache
rightly. Here the target has one layer, and the head is that layer again: its projection passes the
embedding on and drops the target's hidden state. Heads see every token but the first, one position
early, so their drafts are nearly always the target's next tokens, as long as their keys and values
are right. Values are large, for the next token to depend on all of the context.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.vllm import models

# At this gain 92% of three drafts are accepted, and 23% of a head whose values are zero.
VALUE_GAIN = 5.0
SINGLE: dict[str, Any] = {
    **models._COMMON,
    "head_dim": 128,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
}


def _single_layer(model_type: str, seed: int) -> Any:
    """Return a random model of one layer whose embeddings a norm leaves as they are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(SINGLE)
    if model_type == "qwen2":  # heads of hidden_size / num_attention_heads
        settings |= {"num_attention_heads": 4}
        del settings["head_dim"]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        rms = embedding.float().square().mean(-1, keepdim=True).sqrt()
        embedding.copy_(embedding.float() / rms)
        model.model.layers[0].self_attn.v_proj.weight.mul_(VALUE_GAIN)
    return model


def _layer(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.layers[0].state_dict().items()}


def _projection(embedding_first: bool) -> torch.Tensor:
    one, zero = torch.eye(SINGLE["hidden_size"]), torch.zeros(2 * (SINGLE["hidden_size"],))
    parts = (one, zero) if embedding_first else (zero, one)
    return torch.cat(parts, dim=1).to(torch.bfloat16).contiguous()


def make_eagle(folder: pathlib.Path, seed: int = 0) -> tuple[str, str]:
    """Write a target and an EAGLE head to ``folder`` once, and return their paths.

    With another ``seed`` than 0 the head is that of another target, whose drafts are rejected.
    """
    target, head = folder / "target", folder / f"head{seed}"
    if not (target / "config.json").exists():
        _single_layer("llama", 0).save_pretrained(target)
        models._no_dynamic_rope(target)
    if not (head / "config.json").exists():
        weights = {f"layers.0.{k}": v for k, v in _layer(_single_layer("llama", seed)).items()}
        del weights["layers.0.input_layernorm.weight"]  # EAGLE's first layer has none
        head.mkdir()
        save_file({**weights, "fc.weight": _projection(True)}, head / "model.safetensors")
        (head / "config.json").write_text((target / "config.json").read_text())
    return str(target), str(head)


def make_mtp(folder: pathlib.Path, seed: int = 0) -> str:
    """Write a target with an MTP layer (MiMo) to ``folder`` once, and return its path.

    With another ``seed`` than 0 the layer is that of another target, whose drafts are rejected.
    """
    target = folder / f"mtp{seed}"
    if not (target / "config.json").exists():
        _single_layer("qwen2", 0).save_pretrained(target)
        models._no_dynamic_rope(target)
        weights = load_file(target / "model.safetensors")
        layer = _layer(_single_layer("qwen2", seed))
        for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            layer[f"{name}.weight"] = torch.ones(SINGLE["hidden_size"], dtype=torch.bfloat16)
        layer["input_proj.weight"] = _projection(False)
        weights |= {f"model.mtp_layers.0.{name}": tensor for name, tensor in layer.items()}
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((target / "config.json").read_text())
        config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
        (target / "config.json").write_text(json.dumps(config))
    return str(target)


def make_hybrid(folder: pathlib.Path) -> str:
    """Write a small Qwen3-Next with an MTP layer, a copy of its attention layer, to ``folder``."""
    path = folder / "config.json"
    if not path.exists() or "num_nextn_predict_layers" not in path.read_text():
        models.make_tiny("hybrid", folder)
        weights = load_file(folder / "model.safetensors")
        size = models.TINY["hybrid"].get("hidden_size", SINGLE["hidden_size"])
        prefix = "model.layers.3."
        copied = {
            name.replace(prefix, "mtp.layers.0."): tensor.clone()
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
            copied[f"mtp.{name}.weight"] = torch.zeros(size, dtype=torch.bfloat16)  # 1 + weight
        copied["mtp.fc.weight"] = _projection(True)
        save_file(weights | copied, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}
        path.write_text(json.dumps(config))
    return str(folder)
