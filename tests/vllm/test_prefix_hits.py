# SPDX-License-Identifier: Apache-2.0
"""Which scheduler is asked for, and where its prefix hits end; without vLLM."""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from tests.vllm.test_startup import config
from turbokv.integrations.vllm import hooks
from turbokv.integrations.vllm.window import prefix_hits

SYNC = "turbokv.integrations.vllm.window.scheduler.WindowScheduler"
ASYNC = "turbokv.integrations.vllm.window.scheduler.AsyncWindowScheduler"


def scheduler_of(**changes: Any) -> Any:
    found = config(**changes)
    hooks.check_and_update_config(found)
    return found.scheduler_config.scheduler_cls


def turbokv(**options: Any) -> dict[str, Any]:
    return {"turbokv": options}


def test_the_scheduler_is_of_the_kind_that_vllm_would_take() -> None:
    assert scheduler_of() == ASYNC
    assert scheduler_of(scheduler_config__async_scheduling=False) == SYNC


def test_a_second_check_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert scheduler_of(scheduler_config__scheduler_cls=ASYNC) == ASYNC
    assert not caplog.records


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_config__enable_prefix_caching": False},
        {"cache_config__cache_dtype": "fp8"},
        {"additional_config": turbokv(recompute_window=False)},
        {"additional_config": turbokv(window=0)},
        {"additional_config": turbokv(window_pool_fraction=0)},
        {"model_config": None},
    ],
)
def test_vllm_keeps_its_own_where_nothing_is_to_be_recomputed(changes: dict[str, Any]) -> None:
    assert scheduler_of(**changes) is None


def test_a_scheduler_of_the_user_stays_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert scheduler_of(scheduler_config__scheduler_cls="mine.Scheduler") == "mine.Scheduler"
    assert "scheduler_cls is mine.Scheduler" in caplog.text


@pytest.mark.parametrize(
    ("request_tokens", "window", "longest"),
    [(512, 128, 384), (129, 128, 1), (128, 128, 0), (5, 128, 0), (512, 1, 511)],
)
def test_hits_end_a_window_before_the_last_token(
    request_tokens: int, window: int, longest: int
) -> None:
    asked = []

    def find(block_hashes: list[str], max_cache_hit_length: int) -> str:
        asked.append((block_hashes, max_cache_hit_length))
        return "found"

    # what vLLM asks for: all but the last token
    assert prefix_hits.shorten_hits(find, window)(["a"], request_tokens - 1) == "found"
    assert asked == [(["a"], longest)]


@pytest.mark.parametrize(
    ("found", "computed", "wanted"),
    [
        (None, 0, (None, True)),  # not known yet
        (0, 0, (0, True)),
        (64, 0, (64, True)),
        (480, 0, (384, True)),
        (480, 32, (352, True)),  # 384 tokens, both together
        (128, 384, (0, False)),  # all that could be loaded is computed anew
        (64, 448, (0, False)),
    ],
)
def test_loads_end_where_hits_do(
    found: int | None, computed: int, wanted: tuple[int | None, bool]
) -> None:
    shortened = prefix_hits.shorten_loads(lambda request, count: (found, True), 128, 32)
    assert shortened(SimpleNamespace(num_tokens=513), computed) == wanted


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_connector_that_would_warn_is_not_asked_in_vain(is_asked: bool) -> None:
    asked: list[int] = []

    def match(request: Any, computed: int) -> tuple[int, bool]:
        asked.append(computed)
        return 64, True

    shortened = prefix_hits.shorten_loads(match, 128, 32, is_asked_in_vain=is_asked)
    assert shortened(SimpleNamespace(num_tokens=159), 0) == (0, False)
    assert asked == ([0] if is_asked else [])
    assert shortened(SimpleNamespace(num_tokens=160), 0) == (32, True)


def test_another_vllm_is_noticed_at_start_up() -> None:
    with pytest.raises(TypeError, match="find_longest_cache_hit: wanted a parameter max_cache"):
        prefix_hits.shorten_hits(lambda hashes, limit: None, 128)


def test_the_names_are_those_of_classes() -> None:
    pytest.importorskip("vllm")
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    for name, base in ((SYNC, Scheduler), (ASYNC, AsyncScheduler)):
        module, _, attribute = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), attribute), base)


def test_every_way_to_look_for_a_hit_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from vllm.v1.core.sched.scheduler import Scheduler

    from turbokv.integrations.vllm.window.scheduler import WindowScheduler

    asked: list[tuple[str, int]] = []

    class Coordinator:
        def find_longest_cache_hit(self, block_hashes: Any, max_cache_hit_length: int) -> None:
            asked.append(("all", max_cache_hit_length))

        def find_longest_cache_hit_per_group(
            self, block_hashes: Any, max_cache_hit_length: int
        ) -> None:
            asked.append(("each", max_cache_hit_length))

    def make(self: Any) -> None:
        self.vllm_config = config(additional_config=turbokv(window=128))
        self.kv_cache_manager = SimpleNamespace(coordinator=Coordinator())
        self.connector = None

    monkeypatch.setattr(Scheduler, "__init__", make)
    coordinator = WindowScheduler().kv_cache_manager.coordinator
    coordinator.find_longest_cache_hit([], 511)
    coordinator.find_longest_cache_hit_per_group([], 511)
    assert asked == [("all", 384), ("each", 384)]
