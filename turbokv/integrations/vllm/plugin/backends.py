# SPDX-License-Identifier: Apache-2.0
"""The backend TURBOKV among vLLM's, by name."""

from __future__ import annotations

from typing import Any

NAME = "TURBOKV"
_MODULE = "turbokv.integrations.vllm.backend"
PATH = f"{_MODULE}.TurboKVAttentionBackend"


def path_of(cache_dtype: str) -> str:
    """Return the path of the backend's class for one cache dtype (``backend.class_name``)."""
    return f"{_MODULE}.{class_name(cache_dtype)}"


def class_name(cache_dtype: str) -> str:
    """Return the name of the backend's class for a cache dtype, such as ``TurboKVBackendK5V3``."""
    return "TurboKVBackend" + cache_dtype.removeprefix("tq").removeprefix("_").upper()


def add() -> str:
    """Add the name to vLLM's enum; returns how."""
    from vllm.v1.attention.backends import registry

    enum: Any = registry.AttentionBackendEnum
    if NAME in enum.__members__:
        return "was there"
    if hasattr(enum, "register"):  # names that are not in the code: vLLM 0.32 and newer
        registry.register_backend(NAME, PATH)
        return "official"
    member = object.__new__(enum)
    member._name_, member._value_ = NAME, PATH
    type.__setattr__(enum, NAME, member)
    enum._member_map_[NAME] = member
    enum._value2member_map_[PATH] = member
    enum._member_names_.append(NAME)
    return "added to the enum"
