# SPDX-License-Identifier: Apache-2.0
"""What the plugin needs of a vLLM, asked for by name before anything is changed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from turbokv.integrations.vllm import installed

# What vLLM 0.28 to 0.33 have and our plugin calls: module, attribute (of a class: with a dot).
_WANTED = (
    ("vllm.platforms.interface", "Platform.get_attn_backend_cls"),
    ("vllm.platforms.interface", "Platform.check_and_update_config"),
    ("vllm.v1.attention.backend", "AttentionBackend.customize_spec"),
    ("vllm.v1.attention.backends.registry", "AttentionBackendEnum"),
    ("vllm.v1.kv_cache_interface", "AttentionSpec.state_content_bytes"),
    ("vllm.v1.kv_cache_interface", "KVQuantMode"),
    ("vllm.v1.kv_cache_interface", "get_kv_quant_mode"),
    ("vllm.config.cache", "CacheConfig.cache_dtype"),
    ("vllm.config.cache", "CacheDType"),
)
_ONE_OF = ("Platform._find_non_ssm_backends", "Platform._find_non_ssm_backend")


def missing() -> list[str]:
    """Return what our plugin needs and this vLLM lacks; empty where it can work."""
    found = [f"{module}.{path}" for module, path in _WANTED if not _has(module, path)]
    if not any(_has("vllm.platforms.interface", path) for path in _ONE_OF):
        found.append(f"vllm.platforms.interface.{_ONE_OF[0]}")
    return found


def refusal(lacking: Sequence[str]) -> str:
    """Return a sentence on a vLLM that lacks something."""
    found = installed.find()
    version = None if found is None else found.version
    return (
        f"wanted {installed.wanted()}, found {version or 'one that names no version'}, which lacks"
        f" {', '.join(lacking)}"
    )


def _has(module: str, path: str) -> bool:
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return False
    for name in path.split("."):
        # a field without a default is no attribute of a dataclass
        if not hasattr(found, name) and name not in getattr(found, "__dataclass_fields__", {}):
            return False
        found = getattr(found, name, None)
    return True
