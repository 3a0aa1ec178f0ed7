# SPDX-License-Identifier: Apache-2.0
"""Methods of vLLM's platform, wrapped: each calls the original and adds to what it answers.

``get_attn_backend_cls`` and ``check_and_update_config`` are what vLLM documents for platforms.
``_find_non_ssm_backends`` (``_find_non_ssm_backend`` up to vLLM 0.30),
``update_block_size_for_backend`` and ``_align_hybrid_block_size`` are where the sizes of blocks
come from.
"""

from __future__ import annotations

from typing import Any

from turbokv.integrations.vllm import hooks
from turbokv.integrations.vllm.dtypes import CACHE_DTYPES
from turbokv.integrations.vllm.plugin import backends, engine

_MARK = "_turbokv_extended"


def extend(platform: type | None = None) -> str:
    """Extend a platform's class, by default the class of vLLM's current one; returns its name.

    A platform plugin that replaces vLLM's own can call this for its class.
    """
    if platform is None:
        from vllm.platforms import current_platform

        platform = type(current_platform)
    if _MARK not in vars(platform):
        _extend(platform)
    return platform.__name__


def _extend(platform: Any) -> None:
    choose, check = platform.get_attn_backend_cls, platform.check_and_update_config

    @classmethod  # type: ignore[misc]
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Choose TURBOKV for our dtypes; vLLM validates what it chose."""
        dtype = attn_selector_config.kv_cache_dtype
        if dtype not in CACHE_DTYPES:
            return choose(selected_backend, attn_selector_config, *args, **kwargs)
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        if not current_platform.is_cpu():
            choose(AttentionBackendEnum[backends.NAME], attn_selector_config, *args, **kwargs)
        # else: vLLM's CPU platform knows one backend and takes no other
        return backends.path_of(dtype)

    @classmethod  # type: ignore[misc]
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        """Refuse what cannot work with our dtypes, after vLLM's own checks."""
        check(vllm_config)
        if hooks.uses_turbokv(vllm_config):
            from turbokv.integrations.vllm import plugin

            plugin.require()
            engine.wrap()
            hooks.check_and_update_config(vllm_config)

    platform.get_attn_backend_cls = get_attn_backend_cls
    platform.check_and_update_config = check_and_update_config
    if hasattr(platform, "_find_non_ssm_backends"):  # 0.31 and newer
        _order_all(platform)
    else:
        _order_one(platform)
    _size_pages(platform)
    setattr(platform, _MARK, True)


def _size_pages(platform: Any) -> None:
    update, align = platform.update_block_size_for_backend, platform._align_hybrid_block_size

    @classmethod  # type: ignore[misc]
    def update_block_size_for_backend(cls: Any, vllm_config: Any) -> None:
        """Let pages of layers that differ divide, before vLLM asks how large they are."""
        if hooks.uses_turbokv(vllm_config) and vllm_config.model_config is not None:
            from turbokv.integrations.vllm import page_plan

            page_plan.choose_slots(vllm_config)
        update(vllm_config)

    @classmethod  # type: ignore[misc]
    def _align_hybrid_block_size(cls: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        """Let a block hold several states of linear layers, rather than a page hold one."""
        if vllm_config.cache_config.cache_dtype not in CACHE_DTYPES:
            align(vllm_config, *args, **kwargs)
            return
        from turbokv.integrations.vllm import page_plan

        if not page_plan.align_hybrid(vllm_config):
            align(vllm_config, *args, **kwargs)
        page_plan.say_step(vllm_config)

    platform.update_block_size_for_backend = update_block_size_for_backend
    platform._align_hybrid_block_size = _align_hybrid_block_size


def _order_all(platform: Any) -> None:
    find = platform._find_non_ssm_backends

    @classmethod  # type: ignore[misc]
    def _find_non_ssm_backends(cls: Any, vllm_config: Any) -> Any:
        """Return ours first: pages are sized by the first one, where layer 0 has 16 bits, too."""
        dtype = vllm_config.cache_config.cache_dtype
        found = find(vllm_config)
        if dtype not in CACHE_DTYPES:
            return found
        ours = [backend for backend in found if _serves(backend, dtype)]
        # chunked layers (Llama 4) have a class derived from ours, whose pages are the same
        return [*ours[:1], *(backend for backend in found if backend not in ours)]

    platform._find_non_ssm_backends = _find_non_ssm_backends


def _order_one(platform: Any) -> None:
    find = platform._find_non_ssm_backend

    @classmethod  # type: ignore[misc]
    def _find_non_ssm_backend(cls: Any, vllm_config: Any) -> Any:
        """Return ours where there is a layer of ours."""
        dtype = vllm_config.cache_config.cache_dtype
        if dtype in CACHE_DTYPES:
            for layer in vllm_config.compilation_config.static_forward_context.values():
                get = getattr(layer, "get_attn_backend", None)
                if get is not None and _serves(get(), dtype):
                    return get()
        return find(vllm_config)

    platform._find_non_ssm_backend = _find_non_ssm_backend


def _serves(backend: Any, cache_dtype: str) -> bool:
    """Whether a backend is our class for this dtype: a drafter may have another of ours."""
    return getattr(backend, "cache_dtype", None) == cache_dtype
