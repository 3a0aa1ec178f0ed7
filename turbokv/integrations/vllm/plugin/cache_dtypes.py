# SPDX-License-Identifier: Apache-2.0
"""The names of our cache dtypes among vLLM's: registered, or taught where nothing registers.

Up to vLLM 0.32 the names are a ``Literal`` that pydantic has compiled into the validators of a few
classes, and the mode of a dtype a function that is imported by name. What is changed there changes
nothing for the dtypes that were known before.
"""

from __future__ import annotations

import functools
import sys
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from turbokv.integrations.vllm.dtypes import CACHE_DTYPES

# Fields that hold a cache dtype, by class, and then whatever holds such an object in a field.
_FIELDS = (("CacheConfig", "cache_dtype"), ("SpeculativeConfig", "kv_cache_dtype"))
_HOLDERS = ("VllmConfig",)
# Above every mode that a vLLM up to 0.32 has.
_CUSTOM = 64


def add() -> str:
    """Make vLLM know the names; returns how."""
    from vllm.config import cache

    if hasattr(cache, "register_kv_cache_dtype"):
        for name in CACHE_DTYPES:
            cache.register_kv_cache_dtype(name)(_handler(name))
        return "official"
    _teach(cache)
    return "taught"


def _handler(cache_dtype: str) -> type:
    """Return what ``register_kv_cache_dtype`` takes: bytes that no generic kernel reads."""
    import torch
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Handler:
        name = cache_dtype

        def torch_dtype(self) -> Any:
            return torch.uint8

        def quant_mode(self) -> Any:
            return KVQuantMode.CUSTOM

    return Handler


# --- vLLM up to 0.32 ------------------------------------------------------------------------------


def _teach(cache: Any) -> None:
    import torch
    import vllm.config as config
    from vllm.utils import torch_utils
    from vllm.v1 import kv_cache_interface

    _add_mode(kv_cache_interface)
    torch_utils.STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(CACHE_DTYPES, torch.uint8))
    old = cache.CacheDType
    new = typing.Literal[(*typing.get_args(old), *CACHE_DTYPES)]  # type: ignore[valid-type]
    for module in _modules_with("CacheDType", old):  # the selector asserts, others annotate
        module.CacheDType = new  # type: ignore[attr-defined]
    for class_name, field in _FIELDS:
        _retype(getattr(config, class_name), field, old, new)
    for class_name in _HOLDERS:
        _rebuild(getattr(config, class_name))


def _modules_with(name: str, value: object) -> Iterator[ModuleType]:
    """Yield the modules of vLLM that have imported ``value`` by ``name``."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("vllm.") and vars(module).get(name) is value:
            yield module


def _retype(cls: Any, field: str, old: Any, new: Any) -> None:
    """Give a field of a pydantic dataclass the longer list of names."""
    if field not in cls.__dataclass_fields__:
        return
    found = cls.__dataclass_fields__[field].type
    wanted = new if found == old else (new | None)
    cls.__annotations__[field] = wanted
    cls.__dataclass_fields__[field].type = wanted
    # collected when the class was decorated
    if field in getattr(cls, "__pydantic_fields__", {}):
        cls.__pydantic_fields__[field].annotation = wanted
    _rebuild(cls)


def _rebuild(cls: Any) -> None:
    from pydantic.dataclasses import rebuild_dataclass

    rebuild_dataclass(cls, force=True)


def _add_mode(interface: Any) -> None:
    """Give our dtypes the mode CUSTOM that vLLM 0.33 has: both runners treat NONE as 16 bits."""
    mode = interface.KVQuantMode
    if not hasattr(mode, "CUSTOM"):
        member = int.__new__(mode, _CUSTOM)
        member._name_, member._value_ = "CUSTOM", _CUSTOM
        mode._member_map_["CUSTOM"] = member
        mode._value2member_map_[_CUSTOM] = member
        mode._member_names_.append("CUSTOM")
        type.__setattr__(mode, "CUSTOM", member)
    old = interface.get_kv_quant_mode

    @functools.wraps(old)
    def get_kv_quant_mode(kv_cache_dtype: str) -> Any:
        return mode.CUSTOM if kv_cache_dtype in CACHE_DTYPES else old(kv_cache_dtype)

    for module in _modules_with("get_kv_quant_mode", old):  # a dozen import it by name
        module.get_kv_quant_mode = get_kv_quant_mode  # type: ignore[attr-defined]
