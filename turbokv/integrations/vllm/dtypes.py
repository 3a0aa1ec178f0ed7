# SPDX-License-Identifier: Apache-2.0
"""The values of vLLM's ``--kv-cache-dtype`` that are ours, and what a token takes under each.

Names say the widths of keys and values. This module imports nothing of vLLM: vLLM imports it while
its own configuration is still being defined.
"""

from __future__ import annotations

from typing import Any

from turbokv import core
from turbokv.paged import MIN_PADDED_DIM, TILE, PageLayout
from turbokv.presets import PRESETS

# Every preset is a cache dtype of the same name, to (k_bits, v_bits).
CACHE_DTYPES: dict[str, tuple[int, int]] = PRESETS
MIN_HEAD_DIM = MIN_PADDED_DIM // 2 + 1
MAX_HEAD_DIM = core.MAX_HEAD_DIM


def cache_widths(name: str) -> tuple[int, int]:
    """Return ``(k_bits, v_bits)`` of a cache dtype.

    Raises
    ------
    ValueError
        If the dtype is not one of ours.
    """
    if name not in CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype: wanted one of {list(CACHE_DTYPES)}, got {name!r}")
    return CACHE_DTYPES[name]


def slot_bytes(name: str, head_dim: int) -> int:
    """Return the bytes that a token and KV head takes in a page: codes and scales of K and V.

    vLLM sizes pages by ``block_size * num_kv_heads * slot_bytes``. A page of 16 tokens is a
    multiple of 16 bytes at any width, so slots themselves need no alignment.
    """
    k_bits, v_bits = cache_widths(name)
    # KV connectors ask for the shape of a cache of one-element heads, to see its rank alone
    dim = max(head_dim, MIN_HEAD_DIM)
    return PageLayout(dim, k_bits, v_bits, TILE, 1).bytes_per_token


def cache_dtypes(vllm_config: Any) -> list[str]:
    """Return which dtypes of ours a configuration has: the model's, and its drafter's if other.

    Parameters
    ----------
    vllm_config
        vLLM's. A drafter may have a cache dtype of its own (vLLM 0.28 and newer).
    """
    drafter = getattr(vllm_config.speculative_config, "kv_cache_dtype", None)
    found = dict.fromkeys((vllm_config.cache_config.cache_dtype, drafter))
    return [name for name in found if name in CACHE_DTYPES]


def uses_turbokv(vllm_config: Any) -> bool:
    """Whether the model's cache dtype is ours, or its drafter's."""
    return bool(cache_dtypes(vllm_config))
