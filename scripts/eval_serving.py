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
- greedy answers to 50 prompts about pieces of text, and its log-probabilities of the 16-bit
  engine's answers;
- a code planted at five depths of contexts to 8K.

``--transformers`` computes the same divergence with ``TurboKVCache`` in fp32, which is what the
engine's is measured against. Activations are float16, whose rounding hides less than bfloat16's.
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
from _serving_process import in_turn, wait_for_turn
from bench_serving import options_of
from torch import Tensor

CONFIGS = "bf16,fp8,tq4,tq_k5v3,tq3,tq2"
CONTEXTS = (1024, 2048, 4096, 7936)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_PASSAGES, _PREFILL, _DECODE = 4, 512, 256
_PROMPTS, _PIECE, _ANSWER = 50, 480, 48
_CACHE_BYTES = 4 << 30
_NEEDLE = "\n\nThe secret code of the blue warehouse is: {}.\n\n"
_QUESTION = "\n\nThe secret code of the blue warehouse is:"
_CODES = ("48213", "90517", "27364", "61985", "35072")
_ASKED = (
    "Summarise the text above in one sentence.",
    "What is the text above about?",
    "List three words that matter in the text above.",
    "Explain the text above to a beginner.",
    "Write a title for the text above.",
)


# --- texts ----------------------------------------------------------------------------------------


def text_ids(tokenizer: Any) -> list[int]:
    from turbokv.integrations.transformers.models import english_text

    return list(tokenizer(english_text()).input_ids)


def passages(tokenizer: Any) -> list[list[int]]:
    """Return the passages that are fed token by token, spread over the text."""
    ids = text_ids(tokenizer)
    length = _PREFILL + _DECODE
    stride = (len(ids) - length) // _PASSAGES
    return [ids[i * stride : i * stride + length] for i in range(_PASSAGES)]


def prompts(tokenizer: Any) -> list[list[int]]:
    """Return chat prompts, each about its own piece of the text."""
    ids = text_ids(tokenizer)
    stride = (len(ids) - _PIECE) // _PROMPTS
    found = []
    for i in range(_PROMPTS):
        piece = tokenizer.decode(ids[i * stride : i * stride + _PIECE])
        message = f"{piece}\n\n{_ASKED[i % len(_ASKED)]}"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        found.append(list(tokenizer(text, add_special_tokens=False).input_ids))
    return found


def needles(tokenizer: Any) -> list[tuple[int, float, str, list[int]]]:
    """Return (context, depth, code, prompt) of every cell of the grid."""

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    hay = text_ids(tokenizer)
    found = []
    for context in CONTEXTS:
        for depth, code in zip(DEPTHS, _CODES, strict=True):
            planted = plain(_NEEDLE.format(code))
            at = int(depth * (context - len(planted)))
            rest = hay[at : context - len(planted)]
            found.append((context, depth, code, [*hay[:at], *planted, *rest, *plain(_QUESTION)]))
    return found


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
        self.forced, self.logits = passage[_PREFILL:], []
        (output,) = self._generate(
            [passage[:_PREFILL]], max_tokens=_DECODE, ignore_eos=True, detokenize=False
        )
        fed = list(output.outputs[0].token_ids)
        self.forced = None
        if fed != passage[_PREFILL:]:
            raise RuntimeError("the engine did not take the tokens that it was given")
        # the first logits come from the prefill, which attends to 16-bit keys and values
        return torch.stack(self.logits[1:_DECODE]), int(output.num_cached_tokens or 0)

    def answers(self) -> list[list[int]]:
        outputs = self._generate(prompts(self.tokenizer), max_tokens=_ANSWER, detokenize=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def log_probabilities(self, answers: list[list[int]]) -> list[list[float]]:
        """Return the log-probability of every token of given answers."""
        asked = prompts(self.tokenizer)
        whole = [[*prompt, *answer] for prompt, answer in zip(asked, answers, strict=True)]
        outputs = self._generate(whole, max_tokens=1, prompt_logprobs=0, detokenize=False)
        found = []
        for prompt, ids, output in zip(asked, whole, outputs, strict=True):
            steps = output.prompt_logprobs[len(prompt) :]
            tokens = ids[len(prompt) :]
            found.append([step[t].logprob for step, t in zip(steps, tokens, strict=True)])
        return found

    def needle(self) -> list[dict[str, Any]]:
        cells = needles(self.tokenizer)
        outputs = self._generate([cell[3] for cell in cells], max_tokens=8)
        return [
            {"context": context, "depth": depth, "found": code in output.outputs[0].text}
            for (context, depth, code, _), output in zip(cells, outputs, strict=True)
        ]


def divergence(reference: Tensor, ours: Tensor) -> tuple[float, float]:
    """Return mean KL(reference || ours), and how often the top token agrees."""
    kl = (reference.exp() * (reference - ours)).sum(-1).mean()
    return float(kl), float((reference.argmax(-1) == ours.argmax(-1)).float().mean())


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
        "needle": scorer.needle(),
    }
    answers = scorer.answers()
    if not reference_file.is_file():
        reference = {
            "logits": torch.stack([logits for logits, _ in cold]).cpu(),
            "answers": answers,
            "log_probabilities": scorer.log_probabilities(answers),
        }
        torch.save(reference, reference_file)
    reference = torch.load(reference_file)
    for name, runs in (("cold", cold), ("prefix_hit", warm)):
        scores = [
            divergence(expected.to(logits.device), logits)
            for expected, (logits, _) in zip(reference["logits"], runs, strict=True)
        ]
        result[f"kl_{name}"] = sum(kl for kl, _ in scores) / len(scores)
        result[f"top1_{name}"] = sum(top for _, top in scores) / len(scores)
    result["answers_equal"] = sum(
        a == b for a, b in zip(answers, reference["answers"], strict=True)
    ) / len(answers)
    result["tokens_agreeing"] = sum(
        _agreeing(a, b) for a, b in zip(answers, reference["answers"], strict=True)
    ) / sum(map(len, reference["answers"]))
    ours = scorer.log_probabilities(reference["answers"])
    pairs = [
        (x, y)
        for a, b in zip(ours, reference["log_probabilities"], strict=True)
        for x, y in zip(a, b, strict=True)
    ]
    result["log_probability_error"] = sum(abs(x - y) for x, y in pairs) / len(pairs)
    try:
        from turbokv.integrations.vllm.window import live_windows

        result["window"] = next((vars(window.metrics()) for window in live_windows()), None)
    except ImportError:
        result["window"] = None
    result["seconds"] = time.monotonic() - begin
    (args.folder / f"{args.child}.json").write_text(json.dumps(result))
    os._exit(0)  # vLLM's shutdown takes seconds


def _agreeing(a: list[int], b: list[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


# --- the same with Transformers -------------------------------------------------------------------


@torch.inference_mode()
def with_transformers(names: list[str], device: str) -> dict[str, float]:
    """Return the mean KL of decode logits for each preset, with ``TurboKVCache`` in fp32."""
    from transformers.cache_utils import DynamicCache

    from turbokv.integrations.transformers.cache import TurboKVCache
    from turbokv.integrations.transformers.models import load_model
    from turbokv.integrations.vllm.dtypes import cache_widths

    loaded = load_model(None, device=device)
    model = loaded.model
    ids = torch.tensor(passages(loaded.tokenizer), device=device)

    def logits(cache: Any) -> Tensor:
        model(input_ids=ids[:, :_PREFILL], past_key_values=cache, use_cache=True)
        steps = []
        for at in range(_PREFILL, _PREFILL + _DECODE - 1):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits[:, -1].float().log_softmax(-1))
        return torch.stack(steps, 1)

    reference = logits(DynamicCache(config=model.config))
    found = {}
    for name in names:
        options = options_of(name)
        chosen = options.get("additional_config", {}).get("turbokv", {})
        k_bits, v_bits = cache_widths(options["kv_cache_dtype"])
        window = {key: chosen[key] for key in ("window", "sinks") if key in chosen}
        calibration = None
        if "calibration" in chosen:
            from turbokv.calibration import Calibration

            calibration = Calibration.load(chosen["calibration"])
        cache = TurboKVCache(model.config, k_bits, v_bits, calibration=calibration, **window)
        found[name] = divergence(reference, logits(cache))[0]
        print(f"{name}: KL {found[name]:.5f}", flush=True)
    return found


# --- all of them ----------------------------------------------------------------------------------


def run(configs: list[str], args: argparse.Namespace, expected: dict[str, float]) -> list[Any]:
    """Score configurations, the first of which leaves the reference."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        script = str(pathlib.Path(__file__).resolve())
        commands = [
            (name, [script, "--child", name, "--folder", folder, "--models", str(args.models)])
            for name in configs
        ]
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


def table(results: list[dict[str, Any]], expected: dict[str, float]) -> str:
    """Return a Markdown table, a row a configuration."""
    lines = [
        "| cache | KL, cold | KL, prefix hit | x Transformers' | top-1 | answers equal"
        " | tokens agreeing | log-probability error | needles found |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        if "kl_cold" not in row:
            lines.append(f"| {row['config']} | failed | | | | | | | |")
            continue
        ratio = ""
        if expected.get(row["config"]):
            base = expected[row["config"]]
            ratio = f"{row['kl_cold'] / base:.2f}, {row['kl_prefix_hit'] / base:.2f}"
        found = sum(cell["found"] for cell in row["needle"])
        lines.append(
            f"| {row['config']} | {row['kl_cold']:.5f} | {row['kl_prefix_hit']:.5f} | {ratio}"
            f" | {row['top1_cold']:.4f} | {row['answers_equal']:.0%} | {row['tokens_agreeing']:.0%}"
            f" | {row['log_probability_error']:.4f} | {found}/{len(row['needle'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", default=CONFIGS, help="the first is the reference")
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path("/tmp/turbokv-models"))
    parser.add_argument("--transformers", type=pathlib.Path, help="compute what to expect, here")
    parser.add_argument("--device", default="cpu", help="where --transformers runs")
    parser.add_argument("--expected", type=pathlib.Path, help="what --transformers wrote")
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
        args.transformers.write_text(json.dumps(with_transformers(ours, args.device), indent=2))
        return
    expected = json.loads(args.expected.read_text()) if args.expected is not None else {}
    from _serving_models import make

    make("smollm2", args.models)
    results = run(configs, args, expected)
    print(table(results, expected))


if __name__ == "__main__":
    main()
