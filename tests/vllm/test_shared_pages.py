# SPDX-License-Identifier: Apache-2.0
"""Who shares a map of 16-bit copies: all builders of layers whose copies are the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from turbokv.integrations.vllm.attention.shared_pages import shared_pages


def layer(is_draft: bool = False) -> Any:
    impl = SimpleNamespace(is_draft=is_draft, shared_pages=None)
    return SimpleNamespace(impl=impl, kv_cache=torch.zeros(4, 2, 16, 8, dtype=torch.uint8))


def test_a_drafter_shares_with_the_runner_that_serves_its_layer_too() -> None:
    target, draft = layer(), layer(is_draft=True)
    of_runner = shared_pages([target, draft])
    assert of_runner.has_target_layers
    assert shared_pages([draft]) is of_runner
    assert shared_pages([target, draft]) is of_runner


def test_a_drafter_with_pages_of_its_own_has_a_map_of_its_own() -> None:
    target, drafts = layer(), [layer(is_draft=True), layer(is_draft=True)]
    of_target, of_drafts = shared_pages([target]), shared_pages(drafts)
    assert of_target is not of_drafts
    assert not of_drafts.has_target_layers
    assert shared_pages(drafts[1:]) is of_drafts


def test_a_builder_of_more_layers_takes_the_others_along() -> None:
    target, draft = layer(), layer(is_draft=True)
    early = shared_pages([draft])
    of_all = shared_pages([target, draft])
    assert of_all is not early
    assert shared_pages([draft]) is of_all


def test_new_caches_are_not_those_that_a_profile_used() -> None:
    target = layer()
    before = shared_pages([target])
    target.kv_cache = torch.zeros_like(target.kv_cache)
    after = shared_pages([target])
    assert after is not before
    assert shared_pages([target]) is after


def test_old_caches_are_not_kept_alive() -> None:
    target = layer()
    made = shared_pages([target])
    target.kv_cache = None
    assert not made.serves(SimpleNamespace(kv_cache=None))
    assert all(cache() is None for cache in made._caches.values())
