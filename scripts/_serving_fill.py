# SPDX-License-Identifier: Apache-2.0
"""Fill requests' pages with made-up bytes, so that decode can be measured without a prefill.

The idea is vLLM's ``DecodeBenchConnector``: the scheduler is told that all but the last token of a
prompt were computed elsewhere. That one fills floats; pages of compressed caches are opaque bytes,
and a cache of constants draws less power than a real one. So every byte is drawn at random, from
values whose 16-bit and 8-bit floats are all finite and small, whatever a byte means. It lives in
the scheduler alone (one process runs both): with no connector in the worker, the engine runs as
it does without one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)

# Of a byte: fp16 up to 0.11, float8 e4m3 up to 0.94, bf16 up to 1.6e-10.
_MASK = 0x2F
_BLOCKS = 128


class PageFiller(KVConnectorBase_V1):  # type: ignore[misc]
    """Stands in for a connector on the scheduler's side; see the module."""

    def __init__(self, core: Any) -> None:
        # not the base's constructor, which wants a transfer configuration
        self.block_size = int(core.vllm_config.cache_config.block_size)
        context = core.vllm_config.compilation_config.static_forward_context
        self.caches: list[Tensor] = [
            layer.kv_cache
            for layer in context.values()
            if isinstance(getattr(layer, "kv_cache", None), Tensor)
        ]
        if not self.caches:
            raise ValueError("core: wanted layers with a KV cache, got none")
        # a block of the scheduler's may be several of a kernel's
        self.ratio = self.caches[0].shape[0] // int(core.vllm_config.cache_config.num_gpu_blocks)
        self.filled: set[str] = set()
        self.pending: list[tuple[list[int], int]] = []
        self.patterns = {_kind(cache): _pattern(cache) for cache in self.caches}

    # --- scheduler ---

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if request.request_id in self.filled:
            return 0, False
        return max(0, request.num_tokens - num_computed_tokens - 1), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            (ids,) = blocks.get_block_ids()
            self.pending.append((list(ids), num_external_tokens))
            self.filled.add(request.request_id)

    @torch.inference_mode()  # the worker's tensors are of this mode
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if self.pending:
            for ids, tokens in self.pending:
                self._fill(ids[: -(-tokens // self.block_size)])
            _give_windows(self.pending, self.block_size)
            self.pending.clear()
            if self.caches[0].is_cuda:
                torch.cuda.synchronize()
        return KVConnectorMetadata()

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.filled.discard(request.request_id)
        return False, None

    def _fill(self, ids: list[int]) -> None:
        ids = [block * self.ratio + part for block in ids for part in range(self.ratio)]
        for first in range(0, len(ids), _BLOCKS):
            some = ids[first : first + _BLOCKS]
            where = torch.tensor(some, device=self.caches[0].device)
            for cache in self.caches:
                cache[where] = self.patterns[_kind(cache)][: len(some)]

    # --- worker: never asked ---

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        raise AssertionError("the filler has no worker side")

    def wait_for_layer_load(self, layer_name: str) -> None:
        raise AssertionError("the filler has no worker side")

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        raise AssertionError("the filler has no worker side")

    def wait_for_save(self) -> None:
        raise AssertionError("the filler has no worker side")


def _kind(cache: Tensor) -> tuple[torch.Size, torch.dtype]:
    return cache.shape, cache.dtype


def _pattern(cache: Tensor) -> Tensor:
    """Return made-up content of some blocks, in the cache's own dtype."""
    shape = (_BLOCKS, *cache.shape[1:])
    if cache.dtype in (torch.bfloat16, torch.float16):
        return torch.randn(shape, dtype=cache.dtype, device=cache.device)
    size = cache[0].numel() * cache.element_size() * _BLOCKS
    drawn = torch.randint(0, 256, (size,), dtype=torch.uint8, device=cache.device) & _MASK
    return drawn.view(cache.dtype).view(shape)


def _give_windows(filled: list[tuple[list[int], int]], block_size: int) -> None:
    """Give the filled requests the 16-bit copies they would have after a real prefill."""
    try:
        from turbokv.integrations.vllm.window.pool import live_windows
    except ImportError:  # no TurboKV beside this vLLM: rivals have no windows
        return
    for window in live_windows():
        ratio = block_size // window.page_size
        width = max(len(ids) for ids, _ in filled) * ratio
        rows = [[i * ratio + j for i in ids for j in range(ratio)] for ids, _ in filled]
        table = torch.zeros(len(rows), width, dtype=torch.int32)
        for row, ids in zip(table, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
        # with the token that the first step writes
        lens = torch.tensor([tokens + 1 for _, tokens in filled], dtype=torch.int32)
        lens = lens.to(window.device)
        window.refresh(table.to(window.device), lens, lens)
