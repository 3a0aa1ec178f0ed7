# SPDX-License-Identifier: Apache-2.0
"""The demo: one chat answer with and without compression, measured side by side."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from turbokv.integrations.transformers.cache import TurboKVCache, cache_nbytes
from turbokv.integrations.transformers.models import LoadedModel, english_text

PROMPT_TOPIC = "with"
QUESTION = "Explain in a few sentences what the with statement does and why it is useful."


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes
    ----------
    cache_bytes
        Bytes of tensor storage the cache held at the end.
    tokens_per_second
        Of decoding; the prompt's pass is not counted. None for a single token.
    """

    text: str
    tokens: int
    cache_bytes: int
    tokens_per_second: float | None
    seconds_to_first_token: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo shows.

    Attributes
    ----------
    agreeing_tokens
        Tokens equal, position by position, of two independent greedy answers.
    kl
        KL(full || compressed) a token along the uncompressed answer, nats.
    top1
        Share of those tokens where both would pick the same.
    """

    model: str
    prompt_tokens: int
    full: Answer
    compressed: Answer
    agreeing_tokens: int
    kl: float
    top1: float

    @property
    def bytes_ratio(self) -> float:
        """Cache bytes without over with compression."""
        return self.full.cache_bytes / self.compressed.cache_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return everything by name."""
        return {**asdict(self), "bytes_ratio": self.bytes_ratio}


def default_prompt() -> str:
    """Return a document and a question: a prompt longer than the recent window."""
    from pydoc_data.topics import topics

    document = topics.get(PROMPT_TOPIC) or english_text()[:2000]
    return f"{document.strip()}\n\n{QUESTION}"


def encode_chat(loaded: LoadedModel, prompt: str) -> Tensor:
    """Return the token ids of a chat with one user message (plain text without a template)."""
    tokenizer = loaded.tokenizer
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    else:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    return ids.to(loaded.device)


@torch.inference_mode()
def generate_greedy(
    loaded: LoadedModel, ids: Tensor, cache: Cache, max_new_tokens: int
) -> tuple[Tensor, Tensor, Answer]:
    """Decode greedily with ``generate``'s own loop reduced to what is timed.

    Returns
    -------
    tuple
        New token ids ``[new]``, their log-probability rows ``[new, vocabulary]``, and the answer.
    """
    stop = loaded.model.generation_config.eos_token_id
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    rows: list[Tensor] = []
    tokens: list[int] = []
    begin = time.perf_counter()
    logits = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
    rows.append(torch.log_softmax(logits.float(), -1))
    first = time.perf_counter()
    while True:
        tokens.append(int(rows[-1].argmax()))
        if tokens[-1] in stops or len(tokens) >= max_new_tokens:
            break
        step = torch.tensor([[tokens[-1]]], dtype=torch.int64, device=loaded.device)
        logits = loaded.model(input_ids=step, past_key_values=cache, use_cache=True).logits[0, -1]
        rows.append(torch.log_softmax(logits.float(), -1))
    seconds = time.perf_counter() - first
    text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    speed = (len(tokens) - 1) / seconds if len(tokens) > 1 else None
    answer = Answer(text.strip(), len(tokens), cache_nbytes(cache), speed, first - begin)
    ids = torch.tensor(tokens, dtype=torch.int64, device="cpu")
    return ids, torch.stack(rows), answer


@torch.inference_mode()
def forced_rows(loaded: LoadedModel, ids: Tensor, answer: Tensor, cache: Cache) -> Tensor:
    """Return log-probability rows of ``cache`` along a given answer, one token at a time."""
    logits = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
    rows = [torch.log_softmax(logits.float(), -1)]
    for token in answer[:-1].tolist():
        step = torch.tensor([[token]], dtype=torch.int64, device=loaded.device)
        logits = loaded.model(input_ids=step, past_key_values=cache, use_cache=True).logits[0, -1]
        rows.append(torch.log_softmax(logits.float(), -1))
    return torch.stack(rows)


def run_demo(
    loaded: LoadedModel,
    *,
    prompt: str | None = None,
    max_new_tokens: int = 64,
    **cache_options: Any,
) -> DemoResult:
    """Answer one prompt with and without compression.

    Parameters
    ----------
    loaded
        From :func:`models.load_model`.
    prompt
        The user's message; default a page of Python's documentation and a question about it.
    max_new_tokens
        Longest answer.
    cache_options
        For :class:`TurboKVCache`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: wanted 1 or more, got {max_new_tokens}")
    config = loaded.model.config
    cache_options.setdefault("k_bits", 4)
    ids = encode_chat(loaded, default_prompt() if prompt is None else prompt)
    # the first pass of a process pays for allocation and threads: neither side should
    generate_greedy(loaded, ids[:, :32], DynamicCache(config=config), 2)
    full_ids, full_rows, full = generate_greedy(
        loaded, ids, DynamicCache(config=config), max_new_tokens
    )
    ours_ids, _, compressed = generate_greedy(
        loaded, ids, TurboKVCache(loaded.model, **cache_options), max_new_tokens
    )
    forced = forced_rows(loaded, ids, full_ids, TurboKVCache(loaded.model, **cache_options))
    kl = (full_rows.exp() * (full_rows - forced)).sum(-1).mean()
    top1 = (full_rows.argmax(-1) == forced.argmax(-1)).float().mean()
    shared = min(len(full_ids), len(ours_ids))
    agreeing = int((full_ids[:shared] == ours_ids[:shared]).sum())
    return DemoResult(loaded.name, ids.shape[1], full, compressed, agreeing, float(kl), float(top1))
