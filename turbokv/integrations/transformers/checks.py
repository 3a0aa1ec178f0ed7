# SPDX-License-Identifier: Apache-2.0
"""What the Transformers cache refuses, and what it reads off an attention mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicIndexedLayer


def check_count(value: int, name: str) -> int:
    """Return ``value`` if it is an int of 0 or more, else raise naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: wanted 0 or more, got {value}")
    return value


def check_states(key_states: Tensor, value_states: Tensor) -> None:
    """Refuse what a layer could only store wrongly."""
    k, v = key_states, value_states
    if k.ndim != 4 or v.ndim != 4 or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"value_states: wanted the batch, heads and tokens of key_states,"
            f" {list(k.shape[:-1])}, got {list(v.shape[:-1])}"
        )
    # the past is codes, through which no gradient flows: training would be wrong in silence
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise ValueError(
            "key_states: wanted keys and values without gradients, which a compressed past cannot"
            " carry, got some that require them (run the model under torch.no_grad())"
        )


def left_padding(attention_mask: Tensor) -> Tensor:
    """Return the number of padding slots before each sequence's first real token."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else attention_mask
        raise ValueError(f"attention_mask: wanted a tensor [batch, tokens], got {got}")
    return (attention_mask != 0).to(torch.int8).argmax(dim=1).cpu()


def describe(layers: Sequence[object]) -> str:
    """Say what layers that are not compressed keep instead."""
    kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
    if any(isinstance(layer, DynamicIndexedLayer) for layer in layers):
        return f"{kinds} only, whose sparse index TurboKV does not keep"
    return f"{kinds} only, which are bounded and need no compression"
