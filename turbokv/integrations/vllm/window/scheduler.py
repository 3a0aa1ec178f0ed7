# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers, whose prefix hits end before the 16-bit window.

:mod:`turbokv.integrations.vllm.window.prefix_hits` says why and by how much.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec

from turbokv.integrations.vllm.window.prefix_hits import (
    recomputed_tokens,
    shorten_hits,
    shorten_loads,
)

# Connectors that warn of each request of which they found tokens that are not loaded.
_WARNS = ("SimpleCPUOffloadConnector",)
# Of vLLM's coordinator; the second one, of vLLM 0.28 and newer, is asked for hybrid models whose
# pages a KV connector brings, and not every coordinator has it.
_FINDERS = ("find_longest_cache_hit", "find_longest_cache_hit_per_group")


class WindowScheduler(Scheduler):  # type: ignore[misc]
    """The scheduler of vLLM with shorter hits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tokens = recomputed_tokens(self.vllm_config)
        if not tokens:
            return
        if self.connector is not None and self._holds_all_tokens():
            match = self.connector.get_num_new_matched_tokens
            asked = type(self.connector).__name__ not in _WARNS
            shortened = shorten_loads(match, tokens, self.block_size, is_asked_in_vain=asked)
            self.connector.get_num_new_matched_tokens = shortened
        coordinator = self.kv_cache_manager.coordinator
        for name in _FINDERS:
            find = getattr(coordinator, name, None)
            if find is not None:
                setattr(coordinator, name, shorten_hits(find, tokens))

    def _holds_all_tokens(self) -> bool:
        """Whether a load may end at any block: not where layers keep a window or a state of it."""
        groups = self.kv_cache_config.kv_cache_groups
        return all(isinstance(group.kv_cache_spec, FullAttentionSpec) for group in groups)


class AsyncWindowScheduler(WindowScheduler, AsyncScheduler):  # type: ignore[misc]
    """The asynchronous scheduler of vLLM with shorter hits."""
