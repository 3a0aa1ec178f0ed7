# SPDX-License-Identifier: Apache-2.0
"""What ``eval_serving.py`` is to expect: the same scores with Transformers, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _serving_texts import ANSWER, DECODE, PREFILL, agreement, passages, prompts
from bench_serving import options_of
from torch import Tensor


def divergence(reference: Tensor, ours: Tensor) -> tuple[float, float]:
    """Return mean KL(reference || ours), and how often the top token agrees."""
    kl = (reference.exp() * (reference - ours)).sum(-1).mean()
    return float(kl), float((reference.argmax(-1) == ours.argmax(-1)).float().mean())


def cache_of(name: str, model: Any) -> Callable[[], Any]:
    """Return what makes the caches of a configuration's name (as in ``bench_serving.py``)."""
    from transformers.cache_utils import DynamicCache

    from turbokv.integrations.transformers.cache import TurboKVCache
    from turbokv.integrations.vllm.dtypes import cache_widths

    options = options_of(name)
    if options["kv_cache_dtype"] == "auto":
        return lambda: DynamicCache(config=model.config)
    chosen = options.get("additional_config", {}).get("turbokv", {})
    k_bits, v_bits = cache_widths(options["kv_cache_dtype"])
    window = {key: chosen[key] for key in ("window", "sinks") if key in chosen}
    calibration = chosen.get("calibration", "auto")
    return lambda: TurboKVCache(model, k_bits, v_bits, calibration=calibration, **window)


@torch.inference_mode()
def decode_logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Return log-probabilities ``[passages, decode, vocab]`` of decode steps along a text."""
    model(input_ids=ids[:, :PREFILL], past_key_values=cache, use_cache=True)
    steps = []
    for at in range(PREFILL, PREFILL + DECODE - 1):
        out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        steps.append(out.logits[:, -1].float().log_softmax(-1))
    return torch.stack(steps, 1)


@torch.inference_mode()
def answer(model: Any, prompt: list[int], cache: Any, stop: set[int]) -> list[int]:
    """Return a greedy answer, the token that ends it included."""
    ids = torch.tensor([prompt], device=model.device)
    found: list[int] = []
    while len(found) < ANSWER:
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = int(out.logits[0, -1].argmax())
        found.append(token)
        if token in stop:
            break
        ids = ids.new_tensor([[token]])
    return found


def with_transformers(names: list[str], device: str, asked: int | None) -> dict[str, Any]:
    """Return ``kl`` and the scores of greedy answers of each configuration.

    Parameters
    ----------
    names
        Of configurations.
    device
        Where to run.
    asked
        How many of the prompts to answer; None for all.
    """
    from turbokv.integrations.transformers.models import load_model

    loaded = load_model(None, device=device)
    model = loaded.model
    ids = torch.tensor(passages(loaded.tokenizer), device=device)
    stop = {int(loaded.tokenizer.eos_token_id)}
    requests = prompts(loaded.tokenizer)[:asked]

    def score(name: str) -> tuple[Tensor, list[list[int]]]:
        make = cache_of(name, model)
        logits = decode_logits(model, ids, make())
        return logits, [answer(model, prompt, make(), stop) for prompt in requests]

    reference, expected = score("bf16")
    found = {}
    for name in names:
        logits, answers = score(name)
        kl, top1 = divergence(reference, logits)
        found[name] = {"kl": kl, "top1": top1, **agreement(answers, expected)}
        print(name, found[name], flush=True)
    return found
