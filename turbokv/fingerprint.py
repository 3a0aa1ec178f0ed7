# SPDX-License-Identifier: Apache-2.0
"""Which model something was measured on: its architecture, and samples of its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

SKETCH_SIZE = 64
# Embedding samples of the same weights in another dtype agree to bf16's rounding (2^-9); those of
# an unrelated model do not agree at all.
SKETCH_TOLERANCE = 0.02


@dataclass(frozen=True)
class Fingerprint:
    """Which model a calibration belongs to.

    Attributes
    ----------
    config_sha256
        Hash of the fields of the config that shape keys and values.
    sketch
        SKETCH_SIZE samples of the input embedding, to tell models of one architecture apart.
    name
        For messages only.
    """

    config_sha256: str
    sketch: tuple[float, ...]
    name: str = ""

    def mismatch(self, other: Fingerprint) -> str | None:
        """Return why the two differ, or None.

        Where ``other`` has no samples, as when only a config is at hand, the architecture decides.
        """
        if self.config_sha256 != other.config_sha256:
            return (
                f"its architecture hashes to {self.config_sha256[:12]} ({self.name or 'unnamed'}),"
                f" this model's to {other.config_sha256[:12]} ({other.name or 'unnamed'})"
            )
        if not other.sketch:
            return None
        a, b = (
            torch.tensor(sketch, dtype=torch.float64, device="cpu")
            for sketch in (self.sketch, other.sketch)
        )
        if a.shape != b.shape or float((a - b).norm()) > SKETCH_TOLERANCE * float(b.norm()):
            return (
                f"the architecture is the same but the weights are not"
                f" ({self.name or 'unnamed'} against {other.name or 'unnamed'})"
            )
        return None


def architecture_sha256(config: Any) -> str:
    """Hash what shapes a model's keys and values.

    Parameters
    ----------
    config
        As of Transformers (vLLM's ``hf_config`` is one). Written so that defaults spelt out or
        left out, and integers or floats, give the same hash: engines complete configs differently.
    """
    get_text = getattr(config, "get_text_config", None)
    text = config if get_text is None else get_text(decoder=True)
    heads = int(text.num_attention_heads)
    fields = {
        "model_type": str(text.model_type),
        "hidden_size": int(text.hidden_size),
        "num_hidden_layers": int(text.num_hidden_layers),
        "num_attention_heads": heads,
        "num_key_value_heads": int(getattr(text, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(text, "head_dim", None) or int(text.hidden_size) // heads),
        "rope": _rope_fields(text),
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _rope_fields(text: Any) -> Any:
    """Return kind, base and factor of the rotary embedding, by kind of layer where they differ."""
    found = getattr(text, "rope_parameters", None)
    if not found:
        scaling = getattr(text, "rope_scaling", None) or {}
        found = {"rope_theta": getattr(text, "rope_theta", None), **scaling}

    def one(entry: Any) -> list[Any]:
        theta, factor = entry.get("rope_theta"), entry.get("factor")
        return [
            str(entry.get("rope_type") or entry.get("type") or "default"),
            None if theta is None else float(theta),
            None if factor is None else float(factor),
        ]

    nested = {key: one(entry) for key, entry in found.items() if isinstance(entry, dict)}
    return nested or one(found)
