#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run one engine through everything at once for a time, and hold it to a promise.

    python scripts/soak.py --seconds 600 --streams 256 --model smollm2 --json soak.json   # a GPU
    python scripts/soak.py --seconds 60                                        # the CPU engine

Streams of all lengths share prefixes; a third of them is cancelled at random; the cache is too
small for all, so that some are preempted; n-grams are drafted; LoRA adapters take turns; pages come
back from a KV connector; weights are loaded again, and on a GPU the engine sleeps and wakes. All
the while, whatever must not be read holds NaN (:mod:`_soak_poison`).

Canaries, requests whose answers are known, are asked alone before and after, and among the others.
The promise, of which every line is printed with its figure:

- no error: every stream ends as it should, and no log-probability is NaN;
- nothing leaks: in the end every block is free, and slots of 16-bit copies and tiles name each
  other;
- canaries after equal canaries before, within 0.002 nats;
- under load they are as close to a 16-bit cache as when alone: within 1.15 times the error, of
  new prompts or of such as are found in the prefix cache, whichever is larger;
- memory is flat;
- and all of the above happened: streams were cancelled, preempted, found prefixes, and so on.

The exit status is 0 if the promise was kept.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import _serving_models
import torch
from _soak_poison import Poison, slots_amiss
from _soak_traffic import Answer, Traffic, error
from safetensors.torch import save_file

from turbokv.integrations.vllm.window.pool import live_windows

SAME, UNDER_LOAD = 0.002, 1.15
# Of the process on a CPU, where allocators keep what they once had; of the device on a GPU.
GROWTH_BYTES, GROWTH_SHARE = 48 << 20, 0.01
TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
    "dtype": "bfloat16",
}


# What is not said, on vLLM's CPU engine and on a GPU.
SMALL: dict[str, Any] = {
    "connector": "MemoryConnector",
    "streams": 10,
    "window": 64,
    "turns": 6,
    "longest": 224,
    "block_size": 32,
}
LARGE: dict[str, Any] = {
    "connector": "OffloadingConnector",
    "streams": 256,
    "window": 128,
    "turns": 10,
    "longest": 1536,
    "block_size": 64,
}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    seconds: float
    streams: int
    model: str
    cache_dtype: str
    connector: str
    speculation: str
    adapters: int
    window: int
    turns: int
    longest: int  # tokens of a prompt
    blocks: int
    block_size: int
    seed: int

    @property
    def max_model_len(self) -> int:
        return 2 * self.longest


# --- engines --------------------------------------------------------------------------------------


def make_tiny(folder: pathlib.Path) -> None:
    """Write a small model of random weights."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    settings = {k: v for k, v in TINY.items() if k not in ("architectures", "model_type")}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**settings), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(TINY))


def make_adapter(model: pathlib.Path, folder: pathlib.Path, seed: int) -> str:
    """Write a LoRA adapter of rank 8 for the queries and values of every layer."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    rows = {"q_proj": heads * head_dim, "v_proj": config["num_key_value_heads"] * head_dim}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in rows.items():
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("A", (8, hidden)), ("B", (size, 8))):
                made = torch.randn(shape, generator=generator, dtype=torch.float32) * 0.02
                tensors[f"{base}.lora_{part}.weight"] = made.to(torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(rows)}
    (folder / "adapter_config.json").write_text(json.dumps({**said, "bias": "none"}))
    return str(folder)


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


@contextlib.contextmanager
def engine(plan: Plan, model: str, kv_cache_dtype: str, **more: Any) -> Iterator[Any]:
    """Make an engine in this process, and take it down again."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings: dict[str, Any] = {
        "model": model,
        "kv_cache_dtype": kv_cache_dtype,
        "dtype": "bfloat16",
        "block_size": plan.block_size,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.streams + 8,
        "max_num_batched_tokens": max(plan.longest, plan.streams + 8, 256),
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "enable_prefix_caching": True,
        "seed": 0,
    }
    if kv_cache_dtype != "auto":
        # of a cache as small as this a usual share holds no window
        settings["additional_config"] = {
            "turbokv": {"window": plan.window, "window_pool_fraction": 0.3}
        }
    if on_cpu():
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 29}
    else:
        settings |= {
            "gpu_memory_utilization": 0.2,
            "compilation_config": {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                # tokens of a step: one, or one and three drafts, of each stream
                "cudagraph_capture_sizes": [4 << i for i in range(9)],
            },
        }
    llm = LLM(**settings | more)
    try:
        yield llm
    finally:
        with contextlib.suppress(Exception):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def core_of(llm: Any) -> Any:
    """Return the engine core, which is in this process."""
    return llm.llm_engine.engine_core.engine_core


def layers_of(llm: Any) -> dict[str, Any]:
    found: dict[str, Any] = core_of(llm).vllm_config.compilation_config.static_forward_context
    return found


def metric(llm: Any, name: str) -> float:
    """Return one of vLLM's counters, 0 where there is none."""
    return sum(float(m.value) for m in llm.get_metrics() if m.name == name)


def memory() -> int:
    """Return the bytes that the device, or without one this process, holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- what happens ---------------------------------------------------------------------------------


class Soak:
    """An engine, its traffic, and what is done to both."""

    def __init__(self, plan: Plan, llm: Any, traffic: Traffic, loaded: list[int]) -> None:
        self.plan, self.llm, self.traffic, self.loaded = plan, llm, traffic, loaded
        self.under_load: list[tuple[int, Answer]] = []
        self.memory: list[int] = []

    def reload(self) -> None:
        """Load the weights again, requests under way: they start over.

        Where a connector loads pages beside the engine's steps, vLLM cannot take these back and
        refuses, so that requests are finished first, as it tells its users to.
        """
        if self.plan.connector not in ("none", "MemoryConnector"):
            self.traffic.run_dry()
        self.llm.collective_rpc("reload_weights")
        self.traffic.counts["reloads"] += 1

    def sleep(self) -> None:
        """Sleep and wake, after all requests are through or, the next time, cancelled."""
        if self.traffic.counts["sleeps"] % 2:
            self.traffic.cancel(list(self.traffic.streams))
        self.traffic.run_dry()
        self.llm.sleep(level=1)
        self.llm.wake_up()
        self.traffic.counts["sleeps"] += 1

    def run(self) -> None:
        """Share the time among turns, with canaries in each and something done after each."""
        acts = [self.reload, *([] if on_cpu() else [self.sleep])]
        turns = self.plan.turns
        for turn in range(turns):
            self.traffic.ask_canaries(None if turn % 2 else f"turn {turn}")
            self.traffic.busy(self.plan.streams, self.plan.seconds / turns)
            self.check_slots()
            if turn % 3 == 2:
                acts[turn // 3 % len(acts)]()
            elif turn % 3 == 1:
                gone = list(self.traffic.streams)[: self.plan.streams // 2]
                self.traffic.cancel([n for n in gone if self.traffic.streams[n].canary is None])
            self.memory.append(memory())
        self.traffic.run_dry()
        self.under_load = self.traffic.canary_answers[:]
        self.traffic.canary_answers.clear()

    def check_slots(self) -> None:
        """Look whether slots and tiles name each other."""
        for window in live_windows():
            self.traffic.problems += slots_amiss(window)

    def forget(self) -> None:
        """Forget all cached pages."""
        if not self.llm.llm_engine.reset_prefix_cache(reset_connector=True):
            self.traffic.problems.append("the prefix cache could not be reset: blocks are held")

    def leaks(self) -> dict[str, int]:
        """Return what is still held though nobody is there."""
        scheduler = core_of(self.llm).scheduler
        pool = scheduler.kv_cache_manager.block_pool
        return {
            "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "requests": len(scheduler.requests) + len(scheduler.running) + len(scheduler.waiting),
        }


def connector_of(name: str) -> dict[str, Any]:
    """Return the settings of a KV connector that brings pages back."""
    made: dict[str, Any] = {"kv_connector": name, "kv_role": "kv_both"}
    if name == "MemoryConnector":
        return {**made, "kv_connector_module_path": "_soak_connector"}
    return {**made, "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 30}}


def watch_loads() -> list[int]:
    """Return a list that grows by every block that a connector brings."""
    from turbokv.integrations.vllm import connectors

    loaded: list[int] = []
    forget = connectors.forget_copies

    def counting(blocks: Any, block_size: int) -> None:
        found = list(blocks)
        loaded.extend(found)
        forget(found, block_size)

    connectors.forget_copies = counting
    return loaded


def soak(plan: Plan, model: pathlib.Path, vocab: int, folder: pathlib.Path) -> dict[str, Any]:
    """Run everything, and return what was found."""
    from vllm.lora.request import LoRARequest

    lengths = [plan.longest // part for part in (1, 2, 3, 8)]
    tokens = 8 if on_cpu() else 16

    def traffic_of(llm: Any, adapters: list[Any]) -> Traffic:
        made = Traffic(llm, vocab, plan.longest, [], tokens, adapters, plan.seed)
        made.canaries = [made.words(length) for length in lengths]
        return made

    with engine(plan, str(model), "auto") as llm:
        exact = traffic_of(llm, []).alone()
    more: dict[str, Any] = {"num_gpu_blocks_override": plan.blocks}
    if plan.speculation == "ngram":
        more["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 2,
        }
    if plan.connector != "none":
        more["kv_transfer_config"] = connector_of(plan.connector)
    if not on_cpu():
        more["enable_sleep_mode"] = True
    seeds = range(1, plan.adapters + 1)
    adapters = [make_adapter(model, folder / f"adapter{i}", i) for i in seeds]
    if adapters:
        more |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
        more["max_cpu_loras"] = plan.adapters
    loaded = watch_loads()
    with engine(plan, str(model), plan.cache_dtype, **more) as llm:
        poison = Poison(core_of(llm), layers_of(llm))
        loras = [LoRARequest(f"lora{i}", i, path) for i, path in enumerate(adapters, 1)]
        traffic = traffic_of(llm, loras)
        run = Soak(plan, llm, traffic, loaded)
        before = [traffic.alone(), traffic.alone()]
        run.forget()
        begin = time.monotonic()
        run.run()
        seconds = time.monotonic() - begin
        run.forget()
        held = run.leaks()
        after = [traffic.alone(), traffic.alone()]
        run.check_slots()
        done = {**traffic.counts, "loaded blocks": len(loaded)}
        done["preempted"] = int(metric(llm, "vllm:num_preemptions"))
        done["drafts accepted"] = int(metric(llm, "vllm:spec_decode_num_accepted_tokens"))
        slots = [vars(window.metrics()) for window in live_windows()]
    numbers = [number for number, _ in run.under_load]
    load = [answer for _, answer in run.under_load]
    return {
        "seconds": seconds,
        "did": done,
        "poisoned": {"pages": poison.pages, "slots": poison.slots},
        "windows": slots,
        "problems": traffic.problems[:20],
        "leaks": held,
        "before and after": [error(b, a) for b, a in zip(before, after, strict=True)],
        "error alone": max(error(answers, exact) for answers in before),
        "errors alone": [error(answers, exact) for answers in (*before, *after)],
        "error under load": error(load, [exact[i] for i in numbers]),
        "canaries under load": len(load),
        "by canary": [
            {
                "tokens": len(traffic.canaries[n]),
                "cold": error([before[0][n]], [exact[n]]),
                "hit": error([before[1][n]], [exact[n]]),
                "load": [(a.cached, error([a], [exact[n]])) for m, a in run.under_load if m == n],
            }
            for n in range(len(exact))
        ],
        "memory": run.memory,
    }


# --- the promise ----------------------------------------------------------------------------------


def verdict(plan: Plan, found: dict[str, Any], cpu: bool) -> list[tuple[str, str, bool]]:
    """Return the promise line by line: what, the figure, whether it was kept."""
    same = max(found["before and after"])
    ratio = found["error under load"] / max(found["error alone"], 1e-9)
    used = found["memory"]
    settled = used[len(used) // 2 - 1 :]
    growth = max(settled) - settled[0]
    allowed = max(GROWTH_BYTES, int(GROWTH_SHARE * settled[0]))
    wanted = ["cancelled", "preempted", "cached tokens", "reloads"]
    wanted += ["lora"] if plan.adapters else []
    wanted += ["drafts accepted"] if plan.speculation != "none" else []
    wanted += ["loaded blocks"] if plan.connector != "none" else []
    wanted += [] if cpu else ["sleeps"]
    did = found["did"]
    missing = [name for name in wanted if not did.get(name)]
    return [
        ("no error", "; ".join(found["problems"]) or "none", not found["problems"]),
        ("nothing leaks", str(found["leaks"]), not any(found["leaks"].values())),
        (f"canaries after as before, within {SAME} nats", f"{same:.5f}", same <= SAME),
        (
            f"under load within {UNDER_LOAD} of the error alone",
            f"{found['error under load']:.4f} of {found['error alone']:.4f}: {ratio:.3f}",
            ratio <= UNDER_LOAD,
        ),
        ("memory is flat", f"{growth / 2**20:.1f} MiB in the second half", growth <= allowed),
        ("everything happened", f"missing: {missing}" if missing else str(did), not missing),
    ]


def main() -> int:
    """Parse the arguments, run, print the promise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--model", default="tiny", help="tiny, smollm2 or a folder with weights")
    parser.add_argument("--cache-dtype", default="tq4")
    parser.add_argument("--speculation", default="ngram", choices=("ngram", "none"))
    parser.add_argument(
        "--connector",
        help="OffloadingConnector, SimpleCPUOffloadConnector, MemoryConnector or none",
    )
    for name, meaning in (
        ("streams", "under way at a time"),
        ("window", "tokens in 16 bits"),
        ("turns", "after each of which something is done"),
        ("longest", "prompt"),
        ("block-size", "tokens"),
        ("blocks", "of the cache; by default for a third of the streams"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{meaning}; fewer on a CPU")
    parser.add_argument("--adapters", type=int, default=2, help="of LoRA, which take turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    cpu = on_cpu()
    for name, value in (SMALL if cpu else LARGE).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    each = -(-args.longest // args.block_size)
    if args.blocks is None:
        args.blocks = max(2 * each + 2, args.streams * each // 3)
    plan = Plan(**{field.name: getattr(args, field.name) for field in fields(Plan)})
    from turbokv.integrations.vllm import plugin

    plugin.register()
    plugin.require()
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        if args.model == "tiny":
            make_tiny(folder / "tiny")
        name = str(folder / "tiny") if args.model == "tiny" else args.model
        model = _serving_models.make(name, folder)
        if not model.has_weights:
            parser.error(f"--model: wanted one with weights, which are loaded again, got {name}")
        found = soak(plan, model.path, model.vocab_size, folder)
    lines = verdict(plan, found, cpu)
    print(f"soak: {plan}; {found['seconds']:.0f} s; poisoned {found['poisoned']}")
    if cpu:
        print("soak: left out: sleep and wake, which vLLM's CPU engine does not have")
    for what, figure, kept in lines:
        print(f"{'kept  ' if kept else 'BROKEN'} {what}: {figure}")
    if args.json is not None:
        said = [{"what": w, "figure": f, "kept": k} for w, f, k in lines]
        args.json.write_text(json.dumps({"plan": vars(plan), **found, "promise": said}, indent=1))
    return 0 if all(kept for _, _, kept in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
