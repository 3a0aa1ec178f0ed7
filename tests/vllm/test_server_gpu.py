# SPDX-License-Identifier: Apache-2.0
"""``turbokv serve`` on a GPU: concurrent streams, cancelled ones among them, against 16 bits."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

ROOT = pathlib.Path(__file__).parents[2]
START_SECONDS = 240
NAME = "smollm2"
MAX_TOKENS = 32
# What a request that will be cancelled asks for: seconds of decoding, so that it really is.
CANCELLED_TOKENS = 2000
# No compilation, so that servers start in seconds; one test has all of vLLM's defaults.
FAST = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    pytest.importorskip("vllm")
    pytest.importorskip("openai")
    spec = importlib.util.spec_from_file_location(
        "_serving_models", ROOT / "scripts" / "_serving_models.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    shared = pathlib.Path("/tmp/turbokv-models")
    root = shared if (shared / NAME / "config.json").is_file() else tmp_path_factory.mktemp("m")
    path: pathlib.Path = module.make(NAME, root).path
    return path


@dataclass
class Server:
    url: str
    log: pathlib.Path
    process: subprocess.Popen[bytes]

    def get(self, page: str) -> str:
        with urllib.request.urlopen(f"{self.url}{page}", timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def metric(self, name: str) -> float:
        """Return the sum of a metric's samples on the page."""
        found = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", self.get("/metrics"), re.M)
        assert found, f"no {name} on /metrics"
        return sum(map(float, found))


@contextlib.contextmanager
def serving(command: list[str], log: pathlib.Path, *, fast: bool) -> Iterator[Server]:
    """Start a server, and stop it with everything it started; :func:`wait_for` waits for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*command, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    # memory given in bytes: two servers start at once, which would confuse vLLM's profiling
    words += ["--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(4 << 30)]
    words += ["--max-model-len", "4096"]
    if fast:
        words += ["--compilation-config", json.dumps(FAST), "--max-num-seqs", "32"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            words, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", log, process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(server: Server) -> None:
    """Return when the server answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        ended = server.process.poll() is not None
        assert not ended, f"the server ended:\n{server.log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"no server:\n{server.log.read_text()[-4000:]}"
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            server.get("/health")
            return
        time.sleep(0.5)


def turbokv(model: pathlib.Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "turbokv.cli", "serve", str(model), *words]


def plain(model: pathlib.Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *words]


def questions() -> list[str]:
    """Short ones, which stay in the 16-bit window, and long ones, which do not."""
    from turbokv.integrations.transformers.models import english_text

    text = english_text()
    short = [f"Name {n} things that are {c}." for n in ("two", "three") for c in ("red", "round")]
    long = [
        f"{text[i * 9000 : i * 9000 + 2400]}\n\nSummarise the text above in one sentence."
        for i in range(12)
    ]
    return [*short, *long]


async def ask(client: Any, question: str, stop_after: int | None = None) -> list[tuple[str, float]]:
    """Stream an answer as (token, log-probability); after ``stop_after`` tokens hang up."""
    stream = await client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": question}],
        max_tokens=MAX_TOKENS if stop_after is None else CANCELLED_TOKENS,
        temperature=0.0,
        logprobs=True,
        stream=True,
        extra_body={"ignore_eos": stop_after is not None},
    )
    got: list[tuple[str, float]] = []
    async for chunk in stream:
        for choice in chunk.choices:
            content = choice.logprobs.content if choice.logprobs else None
            got += [(item.token, item.logprob) for item in content or ()]
        if stop_after is not None and len(got) >= stop_after:
            await stream.close()
            break
    return got


async def ask_all(server: Server, cancelled: tuple[int, ...] = ()) -> list[list[tuple[str, float]]]:
    import openai

    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    async with client:
        asked = [
            ask(client, question, 5 if number in cancelled else None)
            for number, question in enumerate(questions())
        ]
        return list(await asyncio.gather(*asked))


def assert_close(
    ours: list[list[tuple[str, float]]], theirs: list[list[tuple[str, float]]]
) -> None:
    """Compare answers up to where each pair parts ways, which greedy decoding does sooner or later.

    At 4 bits with the window the mean KL is 0.003 nats, which moves a log-probability by some
    0.05 on average; a cache that is read wrongly parts at once, or is off by whole nats.
    """
    agreeing, parted, errors = 0, 0, []
    for mine, other in zip(ours, theirs, strict=True):
        for (token, probability), (expected, reference) in zip(mine, other, strict=False):
            if token != expected:
                parted += 1
                break
            agreeing += 1
            errors.append(abs(probability - reference))
    total = sum(map(len, theirs))
    print(
        f"{agreeing} of {total} tokens agree before {parted} of {len(theirs)} answers part,"
        f" mean error {sum(errors) / len(errors):.4f}"
    )
    # Of tokens before which all were equal, so that it does not matter how long answers are.
    assert agreeing >= 0.9 * (agreeing + parted)
    assert sum(errors) / len(errors) < 0.1


def test_streams_cancels_and_answers_like_16_bits(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    cancelled = (1, 5, 6, 11)
    with (
        serving(plain(model), tmp_path / "bf16", fast=True) as reference,
        serving(turbokv(model, "--preset", "tq4"), tmp_path / "tq4", fast=True) as server,
    ):
        wait_for(server)
        first = asyncio.run(ask_all(server, cancelled))
        for number in cancelled:
            assert 5 <= len(first[number]) < CANCELLED_TOKENS // 2
        deadline = time.monotonic() + 10
        while server.metric("vllm:num_requests_running"):
            assert time.monotonic() < deadline, "cancelled requests still run"
            time.sleep(0.1)
        # the engine stopped them: nobody decoded on to the end unheard
        produced = server.metric("vllm:generation_tokens_total")
        assert produced < len(first) * MAX_TOKENS + len(cancelled) * CANCELLED_TOKENS // 2
        wait_for(reference)
        expected = asyncio.run(ask_all(reference))
        # the window reports about once a second, from within a step: by now the next one will
        again = asyncio.run(ask_all(server))
        asyncio.run(ask_all(server))
        finished = [n for n in range(len(first)) if n not in cancelled]
        assert_close([first[n] for n in finished], [expected[n] for n in finished])
        # nothing of the cancelled ones is left, and prefixes are found in the cache
        assert_close(again, expected)
        assert server.metric("vllm:prefix_cache_hits_total") > 0
        assert server.metric("turbokv:window_slots") > 0
        assert server.metric("turbokv:window_tiles_total") > 0


@pytest.mark.slow
def test_plain_serve_with_all_defaults(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """``vllm serve MODEL --kv-cache-dtype tq4``: compilation, prefix caching, async scheduling."""
    command = plain(model, "--kv-cache-dtype", "tq4")
    with (
        serving(plain(model), tmp_path / "bf16", fast=True) as reference,
        serving(command, tmp_path / "tq4", fast=False) as server,
    ):
        wait_for(reference)
        expected = asyncio.run(ask_all(reference))
        wait_for(server)
        assert_close(asyncio.run(ask_all(server)), expected)
