# SPDX-License-Identifier: Apache-2.0
"""Run vLLM in this process and compare what it answers."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turbokv.integrations.vllm import plugin

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
TOP = 20
# Newer CPU engines take multiples of 32 only.
CPU_BLOCK = 32


@dataclass(frozen=True)
class Answer:
    """Greedy tokens of one request, and the most likely tokens at each with their logprobs."""

    tokens: tuple[int, ...]
    top: tuple[dict[int, float], ...]


@contextlib.contextmanager
def engine(model: str, kv_cache_dtype: str = "auto", **overrides: Any) -> Iterator[Any]:
    """Make an engine without compilation, and take it down again."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "model": model,
        "kv_cache_dtype": kv_cache_dtype,
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 30,
        "max_logprobs": TOP,
        "seed": 0,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
        },
    }
    if not on_cpu():
        settings["gpu_memory_utilization"] = 0.1  # only asked for, as the cache's size is given
    # FlashInfer's kernel for linear attention needs CUTLASS's Python package, which hosts may lack.
    settings["additional_config"] = {"gdn_prefill_backend": "triton"}
    ours = overrides.pop("turbokv", {})
    if kv_cache_dtype != "auto":
        settings["additional_config"]["turbokv"] = ours
    settings.update(overrides)
    _choose_backend(kv_cache_dtype)
    llm = LLM(**settings)
    try:
        yield llm
    finally:
        with contextlib.suppress(Exception):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        _take_down()


def why_not() -> str | None:
    """Return why our cache dtypes cannot be tested in this process, or None; registers them.

    A vLLM that is there and does not take them is no reason to leave a test out, but an error.
    """
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    plugin.register()
    plugin.require()
    return None


def why_no_engine() -> str | None:
    """Return why no engine can be run in this process, or None."""
    reason = why_not()
    if reason is not None or on_cpu():
        return reason
    if not torch.cuda.is_available():
        return "neither vLLM's CPU engine nor a GPU"
    if os.environ.get("TRITON_INTERPRET") == "1":  # vLLM's own kernels need the compiler
        return "Triton interprets in this run; a GPU's is one of -m gpu"
    return None


def on_cpu() -> bool:
    """Whether this vLLM runs on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def has_v2_runner_on_cpu() -> bool:
    """Whether vLLM's CPU engine has the V2 model runner, which needs Triton or its interpreter."""
    from vllm.triton_utils import HAS_TRITON

    return HAS_TRITON and importlib.util.find_spec("vllm.v1.worker.cpu.model_runner") is not None


def _choose_backend(kv_cache_dtype: str) -> None:
    """Put our backend in the place of the only one that the patched vLLM's CPU platform knows."""
    if not on_cpu() or not plugin.is_patched():
        return
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    place = AttentionBackendEnum.CPU_ATTN
    if kv_cache_dtype == "auto":
        place.clear_override()
    else:
        register_backend(place, AttentionBackendEnum.TURBOKV.value)
    selector._cached_get_attn_backend.cache_clear()


def _take_down() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    cleanup_dist_env_and_memory()
    # the pool of CUDA graphs dies with the last of them, but its handle stays
    type(current_platform)._global_graph_pool = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prompts(lengths: Sequence[int], vocab: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Return random prompts, the first ``shared`` tokens of all of them equal."""
    rng = random.Random(seed)
    common = [rng.randrange(3, vocab) for _ in range(shared)]
    return [
        (common + [rng.randrange(3, vocab) for _ in range(max(0, length - shared))])[:length]
        for length in lengths
    ]


def ask(
    llm: Any, requests: Sequence[Sequence[int]], max_tokens: int = 16, **sampling: Any
) -> list[Answer]:
    """Answer requests greedily, all submitted at once."""
    outputs = llm.generate(
        [{"prompt_token_ids": list(ids)} for ids in requests],
        _greedy(max_tokens, **sampling),
        use_tqdm=False,
    )
    return [_answer(output) for output in outputs]


def cached_tokens(llm: Any, requests: Sequence[Sequence[int]]) -> list[int]:
    """Return how many tokens of each prompt are found in the prefix cache."""
    outputs = llm.generate(
        [{"prompt_token_ids": list(ids)} for ids in requests], _greedy(1), use_tqdm=False
    )
    return [int(output.num_cached_tokens) for output in outputs]


def _greedy(max_tokens: int, **sampling: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0,
        logprobs=TOP,
        detokenize=False,
        ignore_eos=True,
        **sampling,
    )


def _answer(output: Any) -> Answer:
    found = output.outputs[0]
    return Answer(
        tuple(found.token_ids),
        tuple({t: p.logprob for t, p in step.items()} for step in found.logprobs),
    )


def ask_in_turn(
    llm: Any, requests: Sequence[Sequence[int]], starts: Sequence[int], max_tokens: int = 16
) -> list[Answer]:
    """Answer requests greedily, request ``i`` arriving before step ``starts[i]`` of the engine."""
    params = _greedy(max_tokens)
    core, step = llm.llm_engine, 0
    waiting = sorted(range(len(requests)), key=lambda i: starts[i])
    answers: dict[int, Answer] = {}
    while waiting or core.has_unfinished_requests():
        while waiting and starts[waiting[0]] <= step:
            index = waiting.pop(0)
            core.add_request(str(index), {"prompt_token_ids": list(requests[index])}, params)
        for output in core.step():
            if output.finished:
                answers[int(output.request_id.split("-")[0])] = _answer(output)
        step += 1
    return [answers[i] for i in range(len(requests))]


@dataclass(frozen=True)
class Difference:
    """How far answers are from a reference, where both had the same tokens before.

    ``error`` is the mean difference of logprobs over the reference's most likely tokens,
    ``worst`` the largest mean of one position, ``agreed`` the share of compared positions whose
    token is the same, ``positions`` how many were compared.
    """

    error: float
    worst: float
    agreed: float
    positions: int


def compare(got: Sequence[Answer], wanted: Sequence[Answer], top: int = 5) -> Difference:
    """Compare position by position until the tokens part."""
    errors: list[float] = []
    same = 0
    for a, b in zip(got, wanted, strict=True):
        for step, (token, want) in enumerate(zip(a.tokens, b.tokens, strict=False)):
            likely = sorted(b.top[step].items(), key=lambda item: -item[1])[:top]
            floor = min(a.top[step].values())
            parts = [abs(a.top[step].get(t, floor) - p) for t, p in likely]
            errors.append(sum(parts) / len(parts))
            same += token == want
            if token != want:
                break
    return Difference(sum(errors) / len(errors), max(errors), same / len(errors), len(errors))
