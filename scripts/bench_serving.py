#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time vLLM with TurboKV's caches against its own: decode, prefill, first token, capacity.

    python scripts/bench_serving.py --model qwen3-8b --configs bf16,fp8,tq4 --cells 16x16K,full@32K

Each configuration is an engine of its own in a process of its own, on the same memory. Decode cells
fill the pages without a prefill (``_serving_fill.py``), wait for the first tokens, and time steps;
``full@32K`` is the largest batch whose contexts the cache holds. ``prefill`` is a real one.
Unless a configuration says ``defaults``, engines run without compilation and with full CUDA graphs
for decode, so that they start in seconds.

A configuration is a cache dtype of vLLM (``bf16`` for 16 bits), then options after ``+``:
``+flash_attn`` and other paths of TurboKV, ``+nowindow``, ``+calibration=FILE``, ``+defaults``
(everything as ``vllm serve`` has it), ``+fa3`` (upstream's ``turboquant_*`` without the
FlashAttention-2 that vLLM forces, for hosts that have only version 3), ``+overlap`` (decode starts
while the store before it runs, in steps of single tokens). After ``:`` it may name
cells of its own: ``int4_per_token_head:16x16K/1x120K``.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import tempfile
import time
from typing import Any

from _serving_process import in_turn, wait_for_turn

CONFIGS = "bf16,fp8,turboquant_4bit_nc+fa3,int4_per_token_head,tq4,tq_k5v3,tq3,tq2"
CELLS = "prefill@16K,16x16K,64x4K,1x120K,full@32K"
_CELL = re.compile(r"(prefill|full|\d+)[x@](\d+)(K?)")
_PATHS = ("native_tq", "flash_attn", "flashinfer")
_MAX_NUM_SEQS = 128
_PREFILLS = 3


def options_of(name: str) -> dict[str, Any]:
    """Return engine arguments and flags of a configuration's name."""
    dtype, *words = name.split("+")
    ours: dict[str, Any] = {}
    found: dict[str, Any] = {
        "kv_cache_dtype": "auto" if dtype == "bf16" else dtype,
        "defaults": False,
        "fa3": False,
        "overlap": False,
    }
    for word in words:
        key, _, value = word.partition("=")
        if key in _PATHS:
            ours["path"] = key
        elif key == "nowindow":
            ours.update(window=0, sinks=0)
        elif key == "decompress":
            ours["decode"] = "decompress"
        elif key in ("calibration", "window", "window_pool_fraction", "recompute_window") and value:
            ours[key] = value if key == "calibration" else json.loads(value)
        elif key in ("defaults", "fa3", "overlap"):
            found[key] = True
        else:
            raise ValueError(f"configs: wanted known options in {name!r}, got +{word}")
    if ours:
        found["additional_config"] = {"turbokv": ours}
    return found


def parse_config(text: str, cells: str) -> tuple[str, list[str]]:
    """Return (name, cells) of an item of ``--configs``."""
    name, _, own = text.partition(":")
    options_of(name)
    chosen = own.split("/") if own else cells.split(",")
    for cell in chosen:
        parse_cell(cell)
    return name, chosen


def parse_cell(text: str) -> tuple[str, int]:
    """Return (``prefill``, ``full`` or a batch size, context) of a cell's name."""
    match = _CELL.fullmatch(text)
    if match is None:
        raise ValueError(f"cells: wanted names like 16x16K, full@32K or prefill@16K, got {text!r}")
    return match[1], int(match[2]) * (1024 if match[3] else 1)


def capture_sizes(cells: list[str]) -> list[int]:
    """Return the batches that need a CUDA graph."""
    kinds = {parse_cell(cell)[0] for cell in cells}
    sizes = {1, *(int(kind) for kind in kinds if kind.isdigit())}
    if "full" in kinds:
        sizes |= set(range(8, 65, 8)) | set(range(80, _MAX_NUM_SEQS + 1, 16))
    return sorted(sizes)


# --- one engine -----------------------------------------------------------------------------------


class Bench:
    """An engine in this process, and what is measured on it."""

    def __init__(self, name: str, model: Any, args: argparse.Namespace) -> None:
        options = options_of(name)
        if options["fa3"]:
            _unforce_flash_attention_2()
        if options["overlap"]:
            from turbokv.integrations.vllm.attention import steps_cuda

            steps_cuda.OVERLAP_DECODE = True
        import torch
        from vllm import LLM

        wait_for_turn()
        self.torch = torch
        self.steps = args.steps
        extra: dict[str, Any] = {}
        if not options["defaults"]:
            extra = {
                "compilation_config": {
                    "mode": 0,
                    "cudagraph_mode": "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": capture_sizes(args.cells.split(",")),
                },
                "max_num_seqs": _MAX_NUM_SEQS,
                "enable_prefix_caching": False,
            }
        if "additional_config" in options:
            extra["additional_config"] = options["additional_config"]
        begin = time.monotonic()
        self.llm = LLM(
            str(model.path),
            load_format="auto" if model.has_weights else "dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            kv_cache_dtype=options["kv_cache_dtype"],
            max_model_len=model.max_model_len,
            # by itself vLLM takes twice as many in a script as the server does
            max_num_batched_tokens=args.max_num_batched_tokens,
            gpu_memory_utilization=args.gpu_memory_utilization,
            disable_log_stats=False,
            seed=0,
            **extra,
        )
        self.start_seconds = time.monotonic() - begin
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        cache = self.core.vllm_config.cache_config
        self.capacity = int(cache.num_gpu_blocks) * int(cache.block_size)
        self.vocab = model.vocab_size
        self.max_model_len = model.max_model_len
        self.device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.filler: Any = None
        self.number = 0

    def _add(self, tokens: int, new: int) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.number += 1
        name = str(self.number)
        ids = self.torch.randint(0, self.vocab, (tokens,)).tolist()
        params = SamplingParams(
            temperature=0.0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(name, {"prompt_token_ids": ids}, params)
        return name

    def _abort(self, names: list[str]) -> None:
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def decode(self, batch: int | None, context: int) -> dict[str, Any]:
        """Time decode steps of ``batch`` requests (None: as many as fit) at ``context`` tokens."""
        from _serving_fill import PageFiller

        warm = 8
        new = 2 * warm + self.steps
        if batch is None:
            # blocks are handed out whole, one is vLLM's own, and the window is inside the cell
            batch = min((self.capacity - 64) // (context + 64), _MAX_NUM_SEQS)
        if context + new > self.max_model_len or batch * (context + new) > self.capacity:
            return {"batch": batch, "skipped": f"the cache holds {self.capacity} tokens"}
        self.filler = self.filler or PageFiller(self.core)
        self.core.scheduler.connector = self.filler
        names = [self._add(context, new) for _ in range(batch)]
        got = dict.fromkeys(names, 0)
        begin = end = 0.0
        counted = 0
        preempted = False
        while min(got.values()) < warm + self.steps:
            outputs = self.engine.step()
            now = time.monotonic()
            fresh = 0
            for output in outputs:
                fresh += len(output.outputs[0].token_ids)
                got[output.request_id] += len(output.outputs[0].token_ids)
                preempted |= output.finished and got[output.request_id] < new
            if begin:
                counted += fresh
                end = now
            elif min(got.values()) >= warm:
                begin = now
        self._abort(names)
        self.core.scheduler.connector = None
        seconds = end - begin
        return {
            "batch": batch,
            "tokens_per_second": counted / seconds,
            "tpot_ms": 1e3 * seconds * batch / counted,
            "cut_short": bool(preempted),
        }

    def prefill(self, context: int) -> dict[str, Any]:
        """Time the first token of one request, and the prefill of several at once."""
        self._run([256])
        first = self._run([context])
        seconds = self._run([context] * _PREFILLS)
        return {"ttft_ms": 1e3 * first, "tokens_per_second": _PREFILLS * context / seconds}

    def _run(self, prompts: list[int]) -> float:
        begin = time.monotonic()
        for tokens in prompts:
            self._add(tokens, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.monotonic() - begin

    def window(self) -> dict[str, Any] | None:
        """Return what the 16-bit window did, or None without one."""
        try:
            from turbokv.integrations.vllm.window.pool import live_windows
        except ImportError:
            return None
        return next((vars(window.metrics()) for window in live_windows()), None)


def _unforce_flash_attention_2() -> None:
    """Undo vLLM's choice of FlashAttention-2 for its own ``turboquant_*``, which is to its good."""
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        config.attention_config.flash_attn_version = 3
        return config

    EngineArgs.create_engine_config = patched


def child(args: argparse.Namespace) -> None:
    """Measure one configuration and write its results."""
    from _serving_models import make

    bench = Bench(args.child, make(args.model, args.models), args)
    result: dict[str, Any] = {
        "config": args.child,
        "start_seconds": bench.start_seconds,
        "capacity": bench.capacity,
        "device": bench.device,
        "cells": {},
    }
    for cell in args.cells.split(","):
        kind, context = parse_cell(cell)
        begin = time.monotonic()
        if kind == "prefill":
            found = bench.prefill(context)
        else:
            found = bench.decode(None if kind == "full" else int(kind), context)
        found["wall_seconds"] = time.monotonic() - begin
        result["cells"][cell] = found
        # after every cell, so that what was measured outlives a time limit
        result["window"] = bench.window()
        args.result.write_text(json.dumps(result))
    os._exit(0)  # vLLM's shutdown takes seconds, and nothing is left to save


# --- all of them ----------------------------------------------------------------------------------


def run(configs: list[tuple[str, list[str]]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run configurations; what went wrong with one is in its result."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder) / f"{number}.json" for number in range(len(configs))]
        commands = []
        for (name, cells), file in zip(configs, files, strict=True):
            command = [str(pathlib.Path(__file__).resolve()), "--child", name]
            command += ["--result", str(file), "--model", args.model, "--cells", ",".join(cells)]
            command += ["--models", str(args.models), "--steps", str(args.steps)]
            command += ["--gpu-memory-utilization", str(args.gpu_memory_utilization)]
            command += ["--max-num-batched-tokens", str(args.max_num_batched_tokens)]
            commands.append((name, command))
        deadline = time.monotonic() + args.limit
        ended = in_turn(commands, timeout=args.timeout, deadline=deadline, logs=args.logs)
        for process, file, (_, cells) in zip(ended, files, configs, strict=True):
            found: dict[str, Any] = {"config": process.name, "cells": {}}
            if file.is_file():
                found = json.loads(file.read_text())
            if len(found["cells"]) < len(cells):
                found["error"] = process.reason
                process.explain()
            results.append(found)
            if args.json is not None:
                args.json.write_text(json.dumps({"model": args.model, "results": results}))
    return results


def table(results: list[dict[str, Any]], cells: list[str]) -> str:
    """Return a Markdown table: a row a configuration, ratios to bf16 where it ran."""
    base = next((r for r in results if r["config"] == "bf16"), None)

    def ratio(value: float, *keys: str) -> str:
        other: Any = base
        for key in keys:
            other = other.get(key) if isinstance(other, dict) else None
        return f" ({value / other:.2f}x)" if other else ""

    lines = ["| cache | capacity, tokens |", "|---|---|"]
    for cell in cells:
        lines[0] += f" {cell} |"
        lines[1] += "---|"
    for row in results:
        line = f"| {row['config']} |"
        if "capacity" in row:
            line += f" {row['capacity']:,}{ratio(row['capacity'], 'capacity')}"
        line += " |"
        for cell in cells:
            found = row["cells"].get(cell)
            if found is None:
                line += f" {row.get('error', '')} |"
            elif "skipped" in found:
                line += f" {found['skipped']} |"
            else:
                rate = found["tokens_per_second"]
                line += f" {rate:,.0f} tok/s{ratio(rate, 'cells', cell, 'tokens_per_second')}"
                if "ttft_ms" in found:
                    line += f", first token {found['ttft_ms']:.0f} ms"
                if "tpot_ms" in found:
                    line += f", {found['tpot_ms']:.1f} ms x {found['batch']}"
                line += " |"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-8b", help="qwen3-8b, smollm2, or a folder")
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path("/tmp/turbokv-models"))
    parser.add_argument("--configs", default=CONFIGS)
    parser.add_argument("--cells", default=CELLS)
    parser.add_argument("--steps", type=int, default=48, help="timed decode steps a cell")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--timeout", type=float, default=300, help="seconds a configuration")
    parser.add_argument("--limit", type=float, default=3600, help="seconds altogether")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--logs", type=pathlib.Path, help="keep each engine's output here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    configs = [parse_config(text, args.cells) for text in args.configs.split(",")]
    cells = list(dict.fromkeys(cell for _, chosen in configs for cell in chosen))
    from _serving_models import make

    make(args.model, args.models)
    results = run(configs, args)
    print(f"{args.model}: {results[0].get('device', '')}")
    print(table(results, cells))


if __name__ == "__main__":
    main()
