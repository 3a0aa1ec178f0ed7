# SPDX-License-Identifier: Apache-2.0
"""The attention backend TURBOKV, as vLLM asks about it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf

from turbokv.integrations.vllm.attention.impl import TurboKVImpl
from turbokv.integrations.vllm.attention.metadata import TurboKVMetadataBuilder
from turbokv.integrations.vllm.dtypes import (
    CACHE_DTYPES,
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
    slot_bytes,
)
from turbokv.paged import TILE

# Decode brings four tiles at a time, which then lie together: 2 to 5% faster than pages of 16.
PREFERRED_BLOCK_SIZE = 64


class TurboKVAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """Chosen for layers whose cache dtype is one of ours, and for no others."""

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
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        """Pages are whole tiles, of any number."""
        return [MultipleOf(TILE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Ask for pages of 64 tokens where the user names no size: one copy brings four tiles."""
        return max(default_block_size, PREFERRED_BLOCK_SIZE)

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "tq4",
    ) -> tuple[int, ...]:
        """Return the shape of a layer's pages, uint8; the last two dimensions are opaque."""
        dtype = cache_dtype_str if cache_dtype_str in CACHE_DTYPES else "tq4"
        return num_blocks, num_kv_heads, block_size, slot_bytes(dtype, head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Pages come first in memory, so that they may be padded, or hold all layers."""
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        """Whether the dtype is one of ours."""
        return kv_cache_dtype in CACHE_DTYPES

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
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Ask for sm_80 or newer, as the kernels do."""
        return bool(capability.major >= 8)
