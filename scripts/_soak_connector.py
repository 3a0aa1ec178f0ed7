# SPDX-License-Identifier: Apache-2.0
"""A KV connector in the memory of one process: cached pages go out, and come back once evicted.

vLLM's CPU engine has none that is meant for traffic: its ``ExampleConnector`` stores a prompt's
first chunk as if it were all of it, looks for a resumed request under another name, and knows no
LoRA. This one goes by vLLM's own hashes of blocks. It makes the two promises of
:mod:`turbokv.integrations.vllm.connectors`: pages never leave the process, so their identity holds,
and copies of pages that were loaded are forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from turbokv.integrations.vllm import connectors

_MOST = 4096
# Of both roles, which are in one process.
_pages: OrderedDict[Any, dict[str, Tensor]] = OrderedDict()


@dataclass
class Moves(KVConnectorMetadata):  # type: ignore[misc]
    """What a step loads before, and stores after, its forward pass: hashes and blocks."""

    loads: list[tuple[Any, int]] = field(default_factory=list)
    stores: list[tuple[Any, int]] = field(default_factory=list)


class MemoryConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """The connector; for one group of layers and a synchronous scheduler."""

    turbokv_page_identity = True

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.block_size = int(vllm_config.cache_config.block_size)
        self.caches: dict[str, Tensor] = {}
        self.wanted: dict[str, list[Any]] = {}
        self.moves = Moves()
        self.pool: Any = None

    # --- scheduler ----------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        self.pool = kv_cache_manager.block_pool

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        first = num_computed_tokens // self.block_size
        last = (request.num_tokens - 1) // self.block_size  # one token is left to compute
        found: list[Any] = []
        for block_hash in request.block_hashes[first:last]:
            key = make_block_hash_with_group_id(block_hash, 0)
            if key not in _pages:
                break
            found.append(key)
        self.wanted[request.request_id] = found
        return len(found) * self.block_size, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        keys = self.wanted.pop(request.request_id, [])[: num_external_tokens // self.block_size]
        if not keys:
            return
        known = {key: index for index, key in enumerate(self._keys(request))}
        ids = blocks.get_block_ids()[0]
        self.moves.loads += [(key, ids[known[key]]) for key in keys]

    def _keys(self, request: Any) -> list[Any]:
        return [make_block_hash_with_group_id(h, 0) for h in request.block_hashes]

    def build_connector_meta(self, scheduler_output: Any) -> Moves:
        done, self.moves = self.moves, Moves()
        loaded = {block for _, block in done.loads}
        done.stores = [
            (block.block_hash, block.block_id)
            for block in self.pool.blocks
            if block.block_hash is not None
            and block.block_hash not in _pages
            and block.block_id not in loaded
        ]
        return done

    def reset_cache(self) -> bool:
        _pages.clear()
        return True

    # --- worker -------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        self.caches = kv_caches

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        blocks = [block for _, block in connector_metadata.loads]
        connectors.forget_copies(blocks, self.block_size)
        super().bind_connector_metadata(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for key, block in self._get_connector_metadata().loads:
            for name, page in _pages[key].items():
                self.caches[name][block].copy_(page)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        stores = self._get_connector_metadata().stores
        if not stores:
            return
        first = next(iter(self.caches.values()))
        ids = torch.tensor([block for _, block in stores], dtype=torch.int64).to(first.device)
        found = {name: cache.index_select(0, ids).cpu() for name, cache in self.caches.items()}
        for index, (key, _) in enumerate(stores):
            _pages[key] = {name: pages[index].clone() for name, pages in found.items()}
        while len(_pages) > _MOST:
            _pages.popitem(last=False)
