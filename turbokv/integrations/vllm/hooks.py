# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls, by our plugin or by our patch: the surface between the two, as plain functions.

Nothing of vLLM is imported here, because vLLM imports this module while it starts.
"""

from __future__ import annotations

from typing import Any

from turbokv.integrations import build_identity
from turbokv.integrations.vllm.dtypes import CACHE_DTYPES, slot_bytes, uses_turbokv

__all__ = [
    "CACHE_DTYPES",
    "after_worker_call",
    "check_and_update_config",
    "is_turbokv",
    "layer_spec",
    "token_page_bytes",
    "uses_turbokv",
]

# Pages are written and read by both: a vLLM that was built with another turbokv ends here.
build_identity.check("vllm", "vllm")


def is_turbokv(kv_cache_dtype: object) -> bool:
    """Whether a ``kv_cache_dtype`` is one of ours."""
    return kv_cache_dtype in CACHE_DTYPES


def check_and_update_config(vllm_config: Any) -> None:
    """Refuse at start-up what cannot work, and bring the options into vLLM's configuration.

    Does nothing unless the cache dtype is ours, or the drafter's is. Called once the configuration
    is complete and before any layer is made.
    """
    if uses_turbokv(vllm_config):
        from turbokv.integrations.vllm import startup

        startup.complete(vllm_config)


def token_page_bytes(vllm_config: Any) -> int:
    """Return the bytes that a token takes in a page of one layer of the model."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    slot = slot_bytes(vllm_config.cache_config.cache_dtype, model.get_head_size())
    return int(model.get_num_kv_heads(parallel)) * slot


def layer_spec(layer: Any, vllm_config: Any) -> Any:
    """Return the KV cache spec of an attention layer whose cache dtype is ours."""
    from turbokv.integrations.vllm import compat

    return compat.layer_spec(layer, vllm_config)


def after_worker_call(engine_core: Any, method: Any) -> None:
    """Forget cached pages after workers took other weights; at the end of every worker call."""
    if uses_turbokv(engine_core.vllm_config):
        from turbokv.integrations.vllm import connectors

        connectors.after_worker_call(engine_core, method)
