# SPDX-License-Identifier: Apache-2.0
"""Offsets from weights alone: the bias of a layer's keys is part of all of them."""

from __future__ import annotations

from typing import Any

import torch

from turbokv.centring import KeyOffsets
from turbokv.integrations.vllm.offsets import rotary


def offsets_of(model: Any, layer: Any, impl: Any) -> KeyOffsets | None:
    """Return the offsets that a layer's bias gives, of this rank's heads; None if it gives none.

    Parameters
    ----------
    model
        vLLM's, loaded.
    layer
        One of its ``Attention`` layers.
    impl
        The layer's implementation.

    Notes
    -----
    The same numbers in every process that holds the same weights, to the bit: where pages travel,
    their reader has to subtract what their writer added.
    """
    from vllm.model_executor.layers.linear import QKVParallelLinear

    names = {module: name for name, module in model.named_modules()}
    if layer not in names:
        return None
    parent = model.get_submodule(names[layer].rpartition(".")[0])
    children = dict(parent.named_children())
    if any(name.startswith("k_") and "norm" in name for name in children):
        return None  # a norm between the bias and the rotary embedding
    fused = [m for m in children.values() if isinstance(m, QKVParallelLinear)]
    bias = fused[0].bias if len(fused) == 1 else None
    queries, keys = impl.num_heads * impl.head_size, impl.num_kv_heads * impl.head_size
    if bias is None or bias.numel() != queries + 2 * keys:
        return None
    mu = bias.detach()[queries : queries + keys].to("cpu", torch.float32)
    mu = mu.view(impl.num_kv_heads, impl.head_size)
    # a layer without one may have none, or be rotated from outside (vLLM's Transformers backend)
    embeddings = [m for m in parent.modules() if hasattr(m, "cos_sin_cache")]
    entry = rotary.of_module(embeddings[0]) if len(embeddings) == 1 else None
    if entry is None or entry[0].rotary_dim > impl.head_size:
        return None
    embedding, factor = entry
    mu = torch.cat([mu[:, : embedding.rotary_dim] * factor, mu[:, embedding.rotary_dim :]], dim=1)
    return KeyOffsets(mu, embedding)
