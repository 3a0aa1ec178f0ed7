# SPDX-License-Identifier: Apache-2.0
"""Processes of the serving scripts: one engine after the other, each importing ahead of its turn.

Importing vLLM takes seconds and no GPU, so the next process does it while the one before measures;
then it waits for a line on its standard input.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ENVIRONMENT = {
    # the engine in the script's own process, whose insides the scripts use
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
_TAIL = 15


@dataclass
class Ended:
    """A process that ended.

    Attributes
    ----------
    name
        As given.
    reason
        None for exit status 0, else what went wrong.
    """

    name: str
    reason: str | None
    output: str

    def explain(self) -> None:
        """Print the end of its output."""
        print(f"{self.name}: {self.reason}", *self.output.splitlines()[-_TAIL:], sep="\n  ")
        sys.stdout.flush()


def wait_for_turn() -> None:
    """Return when it is this process's turn."""
    sys.stdin.readline()


def in_turn(
    commands: Sequence[tuple[str, Sequence[str]]],
    *,
    timeout: float,
    deadline: float,
    logs: pathlib.Path | None,
) -> Iterator[Ended]:
    """Run ``(name, arguments of Python)`` one after the other and yield each as it ends.

    Parameters
    ----------
    timeout
        Seconds for each.
    deadline
        When all must have ended (``time.monotonic``).
    logs
        Folder for their output, or None.
    """
    environment = {**os.environ, **ENVIRONMENT}
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with tempfile.TemporaryDirectory() as folder:

        def start(number: int) -> subprocess.Popen[bytes]:
            with (pathlib.Path(folder) / str(number)).open("wb") as output:
                return subprocess.Popen(
                    [sys.executable, *commands[number][1]],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )

        upcoming = start(0)
        for number, (name, _) in enumerate(commands):
            process = upcoming
            if number + 1 < len(commands):
                upcoming = start(number + 1)
            limit = max(0.0, min(timeout, deadline - time.monotonic()))
            reason = None
            try:
                process.communicate(b"\n", timeout=limit)
                if process.returncode:
                    reason = f"exit status {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                reason = f"out of time after {limit:.0f} s"
            output = (pathlib.Path(folder) / str(number)).read_text(errors="replace")
            if logs is not None:
                logs.mkdir(parents=True, exist_ok=True)
                (logs / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}.log").write_text(output)
            yield Ended(name, reason, output)
