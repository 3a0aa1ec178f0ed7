# SPDX-License-Identifier: Apache-2.0
"""The attention backend TURBOKV, as vLLM asks about it, and a class of it for each cache dtype.

An unpatched vLLM asks a backend's class for the bytes of a page and does not say of which dtype, so
that the class says it. All have one name, and one implementation that is told its dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf

from turbokv.integrations.vllm import compat, page_plan
from turbokv.integrations.vllm.attention.impl import TurboKVImpl
from turbokv.integrations.vllm.attention.metadata import TurboKVMetadataBuilder
from turbokv.integrations.vllm.dtypes import (
    CACHE_DTYPES,
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
)
from turbokv.integrations.vllm.plugin.backends import class_name
from turbokv.paged import TILE

# Decode brings four tiles at a time, which then lie together: 2 to 5% faster than pages of 16.
PREFERRED_BLOCK_SIZE = 64


class TurboKVAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """Chosen for layers whose cache dtype is one of ours, and for no others.

    ``cache_dtype`` is the one that a class is for; None in this class, which the patched vLLM 0.26
    uses for all and which newer ones know by name.
    """

    cache_dtype: ClassVar[str | None] = None
    accept_output_buffer = True
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        """Return the name of vLLM's enum member."""
        return "TURBOKV"

    @staticmethod
    def get_impl_cls() -> type[TurboKVImpl]:
        """Return the layers' implementation."""
        return TurboKVImpl

    @staticmethod
    def get_builder_cls() -> type[TurboKVMetadataBuilder]:
        """Return the builder of a step's metadata."""
        return TurboKVMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages are whole tiles, of any number."""
        return [MultipleOf(TILE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Ask for pages of 64 tokens where the user names no size: one copy brings four tiles."""
        return max(default_block_size, PREFERRED_BLOCK_SIZE)

    @classmethod
    def get_kv_cache_shape(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "tq4",
    ) -> tuple[int, ...]:
        """Return the shape of a layer's pages, uint8; the last two dimensions are opaque."""
        # what vLLM says is the model's dtype, which a drafter may not have
        dtype = cls.cache_dtype or (cache_dtype_str if cache_dtype_str in CACHE_DTYPES else "tq4")
        slot = page_plan.slot_bytes(dtype, num_kv_heads, head_size)
        return num_blocks, num_kv_heads, block_size, slot

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Pages come first in memory, so that they may be padded, or hold all layers."""
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """Take each head's tokens of a page together: heads before tokens (vLLM 0.29 and newer)."""
        return compat.page_layouts(packed=page_plan.packs_blocks())

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Give a layer's spec the bytes of our slots (vLLM 0.28 and newer).

        Raises
        ------
        ValueError
            If keys and values of the layer differ in size.
        """
        # asked of the first backend for layers in 16 bits as well
        if spec.state_content_bytes is not None or not compat.is_opaque(spec):
            return spec
        if cls.cache_dtype is None:
            raise TypeError(f"{cls.__name__}: wanted the class of one cache dtype, got that of all")
        if spec.head_size_v not in (None, spec.head_size):
            raise ValueError(compat.unequal_sizes("a layer", cls.cache_dtype, spec))
        slot = page_plan.slot_bytes(cls.cache_dtype, spec.num_kv_heads, spec.head_size)
        return dataclasses.replace(spec, state_content_bytes=slot)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Refuse drafts that are trimmed on the device: prefill is planned from host lengths."""
        return False

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        """Whether the dtype is the class's, or any of ours where it is for all."""
        return kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether there is a page for heads of this size."""
        return MIN_HEAD_DIM <= head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Take decoders only."""
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Sliding windows are supported."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Attention sinks as logits are supported."""
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Tokens of an image may see each other (Gemma 3, Gemma 4)."""
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Ask for sm_80 or newer, as the kernels do."""
        return bool(capability.major >= 8)


def _class_of(cache_dtype: str) -> type[TurboKVAttentionBackend]:
    fields = {
        "__module__": __name__,
        "__doc__": f"TURBOKV for layers of kv_cache_dtype={cache_dtype}.",
        "cache_dtype": cache_dtype,
        "supported_kv_cache_dtypes": [cache_dtype],
    }
    return type(class_name(cache_dtype), (TurboKVAttentionBackend,), fields)


BACKENDS = {name: _class_of(name) for name in CACHE_DTYPES}
# vLLM finds them by their paths
globals().update({backend.__name__: backend for backend in BACKENDS.values()})
