# SPDX-License-Identifier: Apache-2.0
"""Prefix hits that end before the 16-bit window.

Copies of a request's newest tokens leave the pool as its window moves on, so a request that finds
its prompt in the prefix cache would read even the newest tokens compressed until new ones fill the
window. Hits that end ``window`` tokens before the end of the prompt make the step compute these
tokens anew, into pages of the request's own, and so into slots: what a hit answers no longer
depends on which copies the pool still holds. The price is at most ``window`` tokens more to
prefill, which takes the time of reading the weights once, as the last token alone does, and their
pages, which are not shared. What a KV connector could load ends there, too.

vLLM takes a scheduler by name (``scheduler_cls``), in this version and in later ones.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from turbokv.integrations.vllm import connectors
from turbokv.integrations.vllm.options import Options

logger = logging.getLogger("vllm.turbokv")

# Names rather than classes: configurations are made where no scheduler is ever needed.
_SYNC = "turbokv.integrations.vllm.window.scheduler.WindowScheduler"
_ASYNC = "turbokv.integrations.vllm.window.scheduler.AsyncWindowScheduler"


def recomputed_tokens(vllm_config: Any) -> int:
    """Return how many of a prompt's newest tokens are computed even if they are cached.

    0 where no token is kept in 16 bits, no prefix is looked for, or the option is off.
    """
    options = Options.from_config(vllm_config.additional_config)
    if (
        not options.recompute_window
        or not options.keeps_window
        or not connectors.keeps_window(vllm_config)
        or not vllm_config.cache_config.enable_prefix_caching
    ):
        return 0
    return options.window


def choose_scheduler(vllm_config: Any) -> None:
    """Let vLLM take one of our schedulers, unless there is nothing to recompute."""
    scheduler = vllm_config.scheduler_config
    if not recomputed_tokens(vllm_config) or scheduler.scheduler_cls in (_SYNC, _ASYNC):
        return
    if scheduler.scheduler_cls is not None:
        logger.warning(
            "TurboKV: scheduler_cls is %s, so prompts found in the prefix cache are read compressed"
            " until new tokens fill the 16-bit window.",
            scheduler.scheduler_cls,
        )
        return
    scheduler.scheduler_cls = _ASYNC if scheduler.async_scheduling else _SYNC


def shorten_hits(find: Callable[..., Any], tokens: int) -> Callable[..., Any]:
    """Return ``find_longest_cache_hit`` that ends ``tokens`` before the request's last token.

    Raises
    ------
    TypeError
        If it does not take the length that a hit may have.
    """
    if "max_cache_hit_length" not in inspect.signature(find).parameters:
        raise TypeError(
            f"find_longest_cache_hit: wanted a parameter max_cache_hit_length, got"
            f" {inspect.signature(find)}"
        )

    def shortened(block_hashes: Any, max_cache_hit_length: int) -> Any:
        # vLLM itself leaves the last token to be computed: one of ours
        return find(block_hashes, max_cache_hit_length=max(max_cache_hit_length + 1 - tokens, 0))

    return shortened


def shorten_loads(
    match: Callable[..., Any], tokens: int, block_size: int, *, is_asked_in_vain: bool = True
) -> Callable[..., Any]:
    """Return a connector's ``get_num_new_matched_tokens`` that ends where hits do.

    Pages that are loaded have no 16-bit copies, so a load of the newest tokens would undo what
    :func:`shorten_hits` is for. vLLM's connectors load as many tokens as they are asked for in the
    end, which may be fewer than they found.

    Parameters
    ----------
    match
        Of the connector: tokens that it has beyond those computed (None: ask again later), and
        whether they arrive beside the engine's steps.
    tokens, block_size
        How many of the newest tokens to leave, and what a load is a multiple of.
    is_asked_in_vain
        Whether the connector is to be asked where nothing can be loaded, since it begins to keep
        account of the request then.
    """

    def shortened(request: Any, num_computed_tokens: int, *args: Any, **kwargs: Any) -> Any:
        room = max(request.num_tokens - tokens - num_computed_tokens, 0) // block_size * block_size
        if not room and not is_asked_in_vain:
            return 0, False
        found, is_async = match(request, num_computed_tokens, *args, **kwargs)
        if not found:
            return found, is_async
        kept = min(found, room)
        return kept, is_async and kept > 0

    return shortened
