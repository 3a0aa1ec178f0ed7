# SPDX-License-Identifier: Apache-2.0
"""The window's counters on a Prometheus page, in one process and across two."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from turbokv.integrations.vllm.window import metrics
from turbokv.integrations.vllm.window.pool import RecentWindow

ROOT = Path(__file__).parents[2]


def step(window: RecentWindow, length: int) -> None:
    table = torch.tensor([[1, 2, 3, 4]], dtype=torch.int32)
    lens = torch.tensor([length], dtype=torch.int32)
    window.refresh(table, lens, lens)


def value(name: str, group: int) -> float | None:
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value(name, {"group": str(group)})


def test_counters_follow_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_POLL_SECONDS", 0.0)
    window = RecentWindow(10, 16, 2, 48, 4, "cpu")
    metrics.watch(window)
    names = [f"turbokv:window_{name}_total" for name in ("tiles", "compressed", "refused")]
    # an engine's window of this process may have had the number before
    before = [value(name, window.number) or 0.0 for name in names]

    def counted() -> list[float]:
        return [(value(n, window.number) or 0.0) - b for n, b in zip(names, before, strict=True)]

    step(window, 64)
    assert counted() == [4, 2, 2]
    assert value("turbokv:window_slots_in_use", window.number) == 2
    assert value("turbokv:window_slots", window.number) == 2
    step(window, 64)
    assert counted()[0] == 8


def test_reports_come_about_once_a_second() -> None:
    window = RecentWindow(10, 16, 8, 48, 4, "cpu")
    metrics.watch(window)
    before = value("turbokv:window_tiles_total", window.number) or 0.0
    for _ in range(50):
        step(window, 64)
    tiles = value("turbokv:window_tiles_total", window.number)
    assert tiles is not None
    assert tiles - before < 50 * 4


def test_the_log_says_what_share_was_read_compressed(caplog: pytest.LogCaptureFixture) -> None:
    window = RecentWindow(10, 16, 2, 48, 4, "cpu")
    step(window, 64)
    reporter = metrics.WindowReporter(0)
    with caplog.at_level("INFO", logger="vllm.turbokv"):
        reporter.log(window.metrics())
        reporter.log(window.metrics())  # nothing new, nothing said
    assert [record.getMessage() for record in caplog.records] == [
        "TurboKV window: 2 of 2 slots in use, 50.0% of window tiles read compressed"
    ]


@pytest.mark.parametrize("folder", [None, "somewhere"])
def test_the_log_says_once_what_puts_them_on_the_page(
    folder: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    if folder is not None:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", folder)
    metrics._say_where.cache_clear()
    with caplog.at_level("INFO", logger="vllm.turbokv"):
        for _ in range(2):
            metrics.watch(RecentWindow(10, 16, 2, 48, 4, "cpu"))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (folder is None)
    assert all("set PROMETHEUS_MULTIPROC_DIR to an empty folder" in text for text in said)


def test_another_process_sees_them(tmp_path: Path) -> None:
    """As vLLM does it: the engine counts, the web server shows."""
    worker = textwrap.dedent("""
        import torch
        from turbokv.integrations.vllm.window import metrics
        from turbokv.integrations.vllm.window.pool import RecentWindow
        window = RecentWindow(10, 16, 2, 48, 4, "cpu")
        metrics.watch(window)
        lens = torch.tensor([64], dtype=torch.int32)
        window.refresh(torch.tensor([[1, 2, 3, 4]], dtype=torch.int32), lens, lens)
    """)
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", worker], env=environment, check=True)
    server = textwrap.dedent("""
        from prometheus_client import CollectorRegistry, generate_latest, multiprocess
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        print(generate_latest(registry).decode())
    """)
    page = subprocess.run(
        [sys.executable, "-c", server], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert 'turbokv:window_compressed_total{group="0"} 2.0' in page
    assert 'turbokv:window_slots{group="0"} 2.0' in page


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    board = json.loads((ROOT / "examples" / "turbokv-dashboard.json").read_text())
    shown = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"turbokv:\w+", target["expr"])
    }
    counted = {f"turbokv:window_{name}_total" for name in metrics.COUNTERS}
    assert shown == counted | {"turbokv:window_slots", "turbokv:window_slots_in_use"}
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len({p["id"] for p in board["panels"]}) == len(board["panels"])
