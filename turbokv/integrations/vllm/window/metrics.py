# SPDX-License-Identifier: Apache-2.0
"""The 16-bit window's counters, in vLLM's log and on its ``/metrics`` page.

vLLM serves ``/metrics`` from another process than the one that runs the model. Prometheus' client
bridges processes by files in ``PROMETHEUS_MULTIPROC_DIR``, which vLLM supports, so with that
variable set to an empty folder (``turbokv serve`` does it) the counters appear on the page without
a change to vLLM. Without it they are in the log alone, once a minute while there is work.

==================================  ==============================================================
``turbokv:window_tiles_total``      tiles of newest tokens and sinks that requests had, all steps
``turbokv:window_compressed_total`` of these, tiles without a 16-bit copy: read compressed
``turbokv:window_refused_total``    new tiles that found no free slot
``turbokv:window_evicted_total``    first tiles of absent requests that gave up their slot
``turbokv:window_slots_in_use``     slots that hold a copy
``turbokv:window_slots``            all slots
==================================  ==============================================================
"""

from __future__ import annotations

import functools
import logging
import os
import time
from typing import Any

import torch

from turbokv.integrations.vllm.window.pool import RecentWindow, WindowMetrics

COUNTERS = ("tiles", "compressed", "refused", "evicted")
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_POLL_SECONDS = 1.0
_LOG_SECONDS = 60.0
logger = logging.getLogger("vllm.turbokv")


@functools.cache
def _instruments() -> dict[str, Any]:
    """Return the process's Prometheus instruments, made once."""
    from prometheus_client import Counter, Gauge

    labels = ["group"]
    helps = {
        "tiles": "Tiles of newest tokens and sinks that requests had, over all steps.",
        "compressed": "Of these, tiles without a 16-bit copy, which were read compressed.",
        "refused": "New tiles that found no free slot of the 16-bit pool.",
        "evicted": "First tiles of absent requests that gave up their slot.",
    }
    made: dict[str, Any] = {
        name: Counter(f"turbokv:window_{name}", helps[name], labels) for name in COUNTERS
    }
    # ranks of tensor parallelism hold the same tiles: the newest figure stands for all
    for name, text in (
        ("slots_in_use", "Slots of the 16-bit pool that hold a copy."),
        ("slots", "Slots of the 16-bit pool."),
    ):
        made[name] = Gauge(f"turbokv:window_{name}", text, labels, multiprocess_mode="mostrecent")
    return made


class WindowReporter:
    """Reports one window about once a second, from within its refreshes and without waiting."""

    def __init__(self, group: int) -> None:
        self.group = str(group)
        self.last = WindowMetrics()
        self.logged = WindowMetrics()
        self._poll_at = 0.0
        self._log_at = time.monotonic() + _LOG_SECONDS

    def __call__(self, window: RecentWindow) -> None:
        """Take the counters if it is time and they have arrived."""
        now = time.monotonic()
        # a copy and its event must not become part of a CUDA graph
        if now < self._poll_at or _is_capturing(window.device):
            return
        found = window.poll()
        if found is None:
            return
        self._poll_at = now + _POLL_SECONDS
        self.report(found)
        if now >= self._log_at:
            self._log_at = now + _LOG_SECONDS
            self.log(found)

    def report(self, found: WindowMetrics) -> None:
        """Bring the instruments up to ``found``."""
        made = _instruments()
        for name in COUNTERS:
            increase = getattr(found, name) - getattr(self.last, name)
            if increase > 0:
                made[name].labels(self.group).inc(increase)
        made["slots_in_use"].labels(self.group).set(found.in_use)
        made["slots"].labels(self.group).set(found.slots)
        self.last = found

    def log(self, found: WindowMetrics) -> None:
        """Write a line on what happened since the last one, if anything did."""
        tiles = found.tiles - self.logged.tiles
        if tiles:
            compressed = found.compressed - self.logged.compressed
            logger.info(
                "TurboKV window: %d of %d slots in use, %.1f%% of window tiles read compressed",
                found.in_use,
                found.slots,
                100 * compressed / tiles,
            )
        self.logged = found


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def watch(window: RecentWindow) -> None:
    """Report ``window`` from now on, if this is the first process of its model.

    Ranks of tensor parallelism hold the same tiles, so that counting each would multiply them.
    """
    if os.environ.get("RANK", "0") == "0" and _rank() == 0:
        window.on_refresh = WindowReporter(window.number)
        _say_where()


@functools.cache
def _say_where() -> None:
    """Say once a process where the counters are, and what puts them on the page."""
    if _FOLDER in os.environ:
        return
    logger.info(
        "TurboKV: the 16-bit window's counters are in this log, once a minute, and not on /metrics."
        " To have them there, set %s to an empty folder before the server starts, or use"
        " `turbokv serve`, which does it.",
        _FOLDER,
    )


def _rank() -> int:
    distributed = torch.distributed
    is_up = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if is_up else 0
