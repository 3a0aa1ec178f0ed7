#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Score SmolLM2 through vLLM with compressed caches against vLLM's 16-bit cache.

    python scripts/eval_serving.py --transformers expected.json     # once, on any machine
    python scripts/eval_serving.py --expected expected.json         # on a GPU with vLLM

Each configuration (names as in ``bench_serving.py``) is an engine in a process of its own, with
prefix caching on. It is asked for

- the KL divergence of its decode logits: passages of text are fed to it token by token (what it
  samples is replaced), after a real prefill of their beginning; once with a cold prefix cache, and
  once more when the beginning is found in it;
- greedy answers to 50 prompts about pieces of text, compared with the 16-bit engine's up to where
  they part, log-probabilities included (the first row answers twice, the second time from its
  prefix cache: what differs between equal caches is arithmetic);
- a code planted at five depths of contexts to 8K.

``--transformers`` computes the same divergence, and the same comparison of greedy answers, with
``TurboKVCache`` in fp32, which is what the engine's are measured against. Activations are float16,
whose rounding hides less than bfloat16's.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import time
from typing import Any

import torch
from _serving_expected import divergence, with_transformers
from _serving_process import in_turn, wait_for_turn
from _serving_texts import ANSWER, DECODE, PREFILL, agreement, needles, passages, prompts
from bench_serving import options_of
from torch import Tensor

CONFIGS = "bf16,tq4,tq_k5v3,tq3,tq2"  # vLLM's fp8 cache does not take float16
# the window's share of it holds the newest tokens of all prompts at once
_CACHE_BYTES = 10 << 30


# --- one engine -----------------------------------------------------------------------------------


class Scorer:
    """An engine in this process whose logits are read, and whose samples can be replaced."""

    def __init__(self, name: str, model: Any) -> None:
        from transformers import AutoTokenizer
        from vllm import LLM

        wait_for_turn()
        options = options_of(name)
        extra: dict[str, Any] = {}
        if "additional_config" in options:
            extra["additional_config"] = options["additional_config"]
        self.tokenizer = AutoTokenizer.from_pretrained(model.path)
        self.llm = LLM(
            str(model.path),
            dtype="float16",
            kv_cache_dtype=options["kv_cache_dtype"],
            max_model_len=model.max_model_len,
            max_num_seqs=64,
            # given, so that an engine beside this one does not confuse vLLM's profiling
            gpu_memory_utilization=0.3,
            kv_cache_memory_bytes=_CACHE_BYTES,
            enable_prefix_caching=True,
            compilation_config={
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
            },
            seed=0,
            **extra,
        )
        core = self.llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        self.forced: list[int] | None = None
        self.logits: list[Tensor] = []
        inner = runner.model.compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> Tensor | None:
            logits: Tensor | None = inner(*args, **kwargs)
            if self.forced is None or logits is None:
                return logits
            assert logits.shape[0] == 1, "one request at a time"
            self.logits.append(logits[0].float().log_softmax(-1))
            # past the last one, an asynchronous scheduler may run a step that nobody reads
            token = self.forced[min(len(self.logits), len(self.forced)) - 1]
            return torch.full_like(logits, -1e4).index_fill_(
                1, torch.tensor([token], device=logits.device), 0.0
            )

        runner.model.compute_logits = compute_logits

    def _generate(self, ids: list[list[int]], **params: Any) -> list[Any]:
        from vllm import SamplingParams

        outputs: list[Any] = self.llm.generate(
            [{"prompt_token_ids": x} for x in ids],
            SamplingParams(temperature=0.0, **params),
            use_tqdm=False,
        )
        return outputs

    def decode_logits(self, passage: list[int]) -> tuple[Tensor, int]:
        """Return log-probabilities ``[decode, vocab]`` of decode steps, and cached tokens."""
        self.forced, self.logits = passage[PREFILL:], []
        (output,) = self._generate(
            [passage[:PREFILL]], max_tokens=DECODE, ignore_eos=True, detokenize=False
        )
        fed = list(output.outputs[0].token_ids)
        self.forced = None
        if fed != passage[PREFILL:]:
            raise RuntimeError("the engine did not take the tokens that it was given")
        # the first logits come from the prefill, which attends to 16-bit keys and values
        return torch.stack(self.logits[1:DECODE]), int(output.num_cached_tokens or 0)

    def answers(self) -> tuple[list[list[int]], list[list[float]]]:
        """Return tokens of greedy answers, and the log-probability of each."""
        outputs = self._generate(
            prompts(self.tokenizer), max_tokens=ANSWER, logprobs=0, detokenize=False
        )
        found = [output.outputs[0] for output in outputs]
        tokens = [list(one.token_ids) for one in found]
        return tokens, [
            [step[token].logprob for step, token in zip(one.logprobs, ids, strict=True)]
            for one, ids in zip(found, tokens, strict=True)
        ]

    def needle(self) -> list[dict[str, Any]]:
        cells = needles(self.tokenizer)
        outputs = self._generate([cell[3] for cell in cells], max_tokens=8)
        return [
            {"context": context, "depth": depth, "found": code in output.outputs[0].text}
            for (context, depth, code, _), output in zip(cells, outputs, strict=True)
        ]


def child(args: argparse.Namespace) -> None:
    """Score one configuration; the first one leaves what the others are compared with."""
    from _serving_models import make

    begin = time.monotonic()
    scorer = Scorer(args.child, make("smollm2", args.models))
    reference_file = args.folder / "reference.pt"
    pieces = passages(scorer.tokenizer)
    cold = [scorer.decode_logits(piece) for piece in pieces]
    warm = [scorer.decode_logits(piece) for piece in pieces]
    result: dict[str, Any] = {
        "config": args.child,
        "cached_tokens": [min(c for _, c in cold), min(c for _, c in warm)],
    }
    if not args.kl_only:
        result["needle"] = scorer.needle()
        answers, sureness = scorer.answers()
    if not reference_file.is_file():
        reference: dict[str, Any] = {"logits": torch.stack([logits for logits, _ in cold]).cpu()}
        if not args.kl_only:
            reference |= {"answers": answers, "log_probabilities": sureness}
            answers, sureness = scorer.answers()
        torch.save(reference, reference_file)
    reference = torch.load(reference_file)
    for name, runs in (("cold", cold), ("prefix_hit", warm)):
        scores = [
            divergence(expected.to(logits.device), logits)
            for expected, (logits, _) in zip(reference["logits"], runs, strict=True)
        ]
        result[f"kl_{name}"] = sum(kl for kl, _ in scores) / len(scores)
        result[f"top1_{name}"] = sum(top for _, top in scores) / len(scores)
    if not args.kl_only:
        result |= agreement(answers, reference["answers"])
        errors = [
            abs(x - y)
            for count, ours, theirs in zip(
                result["agreeing"], sureness, reference["log_probabilities"], strict=True
            )
            for x, y in zip(ours[:count], theirs[:count], strict=True)
        ]
        result["log_probability_error"] = sum(errors) / len(errors)
    try:
        from turbokv.integrations.vllm.window.pool import live_windows

        result["window"] = next((vars(window.metrics()) for window in live_windows()), None)
    except ImportError:
        result["window"] = None
    result["seconds"] = time.monotonic() - begin
    (args.folder / f"{args.child}.json").write_text(json.dumps(result))
    os._exit(0)  # vLLM's shutdown takes seconds


# --- all of them ----------------------------------------------------------------------------------


def run(configs: list[str], args: argparse.Namespace, expected: dict[str, Any]) -> list[Any]:
    """Score configurations, the first of which leaves the reference."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        script = str(pathlib.Path(__file__).resolve())
        commands = [
            (name, [script, "--child", name, "--folder", folder, "--models", str(args.models)])
            for name in configs
        ]
        if args.kl_only:
            commands = [(name, [*command, "--kl-only"]) for name, command in commands]
        deadline = time.monotonic() + args.limit
        for process in in_turn(commands, timeout=args.timeout, deadline=deadline, logs=args.logs):
            file = pathlib.Path(folder) / f"{process.name}.json"
            found = {"config": process.name}
            if file.is_file():
                found = json.loads(file.read_text())
            else:
                process.explain()
            results.append(found)
            if args.json is not None:
                args.json.write_text(json.dumps({"expected": expected, "results": results}))
    return results


def table(results: list[dict[str, Any]], expected: dict[str, Any]) -> str:
    """Return a Markdown table, a row a configuration; Transformers' own figures in parentheses."""
    lines = [
        "| cache | KL, cold | KL, prefix hit | x Transformers' | top-1 | next token agrees"
        " | first difference, median | answers equal | log-probability error | needles found |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base: list[dict[str, Any]] = next((row["needle"] for row in results if row.get("needle")), [])
    findable = {_place(cell) for cell in base if cell["found"]}
    for row in results:
        if "kl_cold" not in row:
            lines.append(f"| {row['config']} | failed | | | | | | | | |")
            continue
        theirs = expected.get(row["config"], {})

        def beside(key: str, form: str, theirs: dict[str, Any] = theirs) -> str:
            return f" ({theirs[key]:{form}})" if key in theirs else ""

        ratio = ""
        if theirs:
            ratio = (
                f"{row['kl_cold'] / theirs['kl']:.2f}, {row['kl_prefix_hit'] / theirs['kl']:.2f}"
            )
        line = (
            f"| {row['config']} | {row['kl_cold']:.5f} | {row['kl_prefix_hit']:.5f} | {ratio}"
            f" | {row['top1_cold']:.3f}{beside('top1', '.3f')}"
        )
        if "needle" not in row:
            lines.append(f"{line} | | | | | |")
            continue
        found = sum(cell["found"] for cell in row["needle"] if _place(cell) in findable)
        lines.append(
            f"{line} | {row['next_token_agrees']:.3f}{beside('next_token_agrees', '.3f')}"
            f" | {row['first_difference']:g}{beside('first_difference', 'g')}"
            f" | {row['answers_equal']:.0%}{beside('answers_equal', '.0%')}"
            f" | {row['log_probability_error']:.4f} | {found} of {len(findable)} |"
        )
    if base:
        lines.append(f"\nNeedles: of the {len(base)} planted, those that the first row finds.")
    return "\n".join(lines)


def _place(cell: dict[str, Any]) -> tuple[int, float]:
    return cell["context"], cell["depth"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", default=CONFIGS, help="the first is the reference")
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path("/tmp/turbokv-models"))
    parser.add_argument("--transformers", type=pathlib.Path, help="compute what to expect, here")
    parser.add_argument("--device", default="cpu", help="where --transformers runs")
    parser.add_argument("--prompts", type=int, help="answer so many only, for --transformers")
    parser.add_argument("--expected", type=pathlib.Path, help="what --transformers wrote")
    parser.add_argument("--kl-only", action="store_true", help="no answers and no needles")
    parser.add_argument("--timeout", type=float, default=180, help="seconds a configuration")
    parser.add_argument("--limit", type=float, default=1800, help="seconds altogether")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--logs", type=pathlib.Path, help="keep each engine's output here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    configs = args.configs.split(",")
    if args.transformers is not None:
        ours = [name for name in configs if name.startswith("tq")]
        found = with_transformers(ours, args.device, args.prompts)
        args.transformers.write_text(json.dumps(found, indent=2))
        return
    expected = json.loads(args.expected.read_text()) if args.expected is not None else {}
    from _serving_models import make

    make("smollm2", args.models)
    results = run(configs, args, expected)
    print(table(results, expected))


if __name__ == "__main__":
    main()
