# SPDX-License-Identifier: Apache-2.0
"""The demo: one chat answer with and without compression, measured side by side."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from turbokv.integrations.transformers.cache import TurboKVCache, cache_nbytes
from turbokv.integrations.transformers.calibration_choice import choose_calibration
from turbokv.integrations.transformers.models import LoadedModel, english_text

PROMPT_TOPIC = "with"
QUESTION = "Explain in a few sentences what the with statement does and why it is useful."
# Called with what is done, and with how much of it is done of how much.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes
    ----------
    prompt_bytes, cache_bytes
        Bytes of tensor storage that the cache held after the prompt, and at the end.
    tokens_per_second
        Of decoding; the prompt's pass is not counted. None for a single token.
    """

    text: str
    tokens: int
    prompt_bytes: int
    cache_bytes: int
    tokens_per_second: float | None
    seconds_to_first_token: float

    def bytes_at(self, held: int, tokens: int) -> int | None:
        """Return the cache's bytes at so many ``tokens``; ``held`` are those it held at the end.

        By what a token of the answer added; None for an answer of one token, which added nothing.
        """
        if self.tokens < 2:
            return None
        slope = (self.cache_bytes - self.prompt_bytes) / (self.tokens - 1)
        return round(self.cache_bytes + slope * (tokens - held))


@dataclass(frozen=True)
class DemoResult:
    """What the demo shows.

    Attributes
    ----------
    full, compressed
        The two answers; ``full`` had a cache in the model's own dtype.
    sixteen_bit_share
        Bytes of a 16-bit cache over those of ``full``.
    same_tokens
        Tokens at the beginning that both answers share.
    agreeing_tokens
        Tokens equal, position by position, of two independent greedy answers.
    kl
        KL(full || compressed) per token along the uncompressed answer, nats.
    top1
        Share of those tokens where both would pick the same.
    """

    model: str
    prompt_tokens: int
    full: Answer
    compressed: Answer
    sixteen_bit_share: float
    same_tokens: int
    agreeing_tokens: int
    kl: float
    top1: float

    @property
    def bytes_ratio(self) -> float:
        """Bytes of a 16-bit cache over those with compression, each per token that it holds."""
        tokens = [self.prompt_tokens + each.tokens - 1 for each in (self.full, self.compressed)]
        full = self.full.cache_bytes * self.sixteen_bit_share / tokens[0]
        return full / (self.compressed.cache_bytes / tokens[1])

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


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the model's longest list of modules: its layers."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=len, default=()))


@contextlib.contextmanager
def _counted(model: torch.nn.Module, report: Callable[[int], None]) -> Iterator[None]:
    """Report layers as they are run: one pass over a prompt takes seconds."""
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        report(done)

    handles = [layer.register_forward_hook(count) for layer in _layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def prefill(
    loaded: LoadedModel, ids: Tensor, cache: Cache, report: Callable[[int], None]
) -> Tensor:
    """Run a prompt and return the log-probability row of the next token."""
    with _counted(loaded.model, report):
        logits = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return torch.log_softmax(logits[0, -1].float(), -1)


@torch.inference_mode()
def generate_greedy(
    loaded: LoadedModel,
    first: Tensor,
    cache: Cache,
    max_new_tokens: int,
    seconds_to_first_token: float = 0.0,
    report: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, Tensor, Answer]:
    """Decode greedily with ``generate``'s own loop reduced to what is timed.

    It ends at the model's own end, at ``max_new_tokens``, or at the end of a sentence once three
    fifths of these are there.

    Parameters
    ----------
    loaded
        A model and its tokenizer.
    first
        The log-probability row of the first token, from :func:`prefill` with the same cache.
    cache
        The cache after the prompt.
    max_new_tokens
        Longest answer.
    seconds_to_first_token
        For the answer.
    report
        Called with the number of tokens.

    Returns
    -------
    tuple
        New token ids ``[new]``, their log-probability rows ``[new, vocabulary]``, and the answer.
    """
    stop = loaded.model.generation_config.eos_token_id
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    rows, tokens = [first], [int(first.argmax())]
    prompt_bytes = cache_nbytes(cache)
    begin = time.perf_counter()
    while tokens[-1] not in stops and len(tokens) < max_new_tokens:
        if 5 * len(tokens) >= 3 * max_new_tokens and ends_sentence(loaded.tokenizer.decode(tokens)):
            break
        step = torch.tensor([[tokens[-1]]], dtype=torch.int64, device=loaded.device)
        logits = loaded.model(input_ids=step, past_key_values=cache, use_cache=True).logits[0, -1]
        rows.append(torch.log_softmax(logits.float(), -1))
        tokens.append(int(rows[-1].argmax()))
        report(len(tokens))
    seconds = time.perf_counter() - begin
    text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    speed = (len(tokens) - 1) / seconds if len(tokens) > 1 else None
    answer = Answer(
        text.strip(),
        len(tokens),
        prompt_bytes,
        cache_nbytes(cache),
        speed,
        seconds_to_first_token,
    )
    ids = torch.tensor(tokens, dtype=torch.int64, device="cpu")
    return ids, torch.stack(rows), answer


def ends_sentence(text: str) -> bool:
    """Whether a text ends where a sentence does."""
    return text.rstrip().endswith((".", "!", "?", '."', ".)"))


@torch.inference_mode()
def forced_rows(loaded: LoadedModel, first: Tensor, answer: Tensor, cache: Cache) -> Tensor:
    """Return log-probability rows of ``cache`` along a given answer, which is run at once."""
    if len(answer) == 1:
        return first[None]
    step = answer[None, :-1].to(loaded.device)
    logits = loaded.model(input_ids=step, past_key_values=cache, use_cache=True).logits[0]
    return torch.cat([first[None], torch.log_softmax(logits.float(), -1)])


def run_demo(
    loaded: LoadedModel,
    *,
    prompt: str | None = None,
    max_new_tokens: int = 80,
    progress: Progress | None = None,
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
    progress
        Called with what is done, and with how much of it is done of how much.
    cache_options
        For :class:`TurboKVCache`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: wanted 1 or more, got {max_new_tokens}")
    model = loaded.model
    cache_options.setdefault("k_bits", 4)
    ids = encode_chat(loaded, default_prompt() if prompt is None else prompt)
    count = len(_layers(model))

    def reporter(what: str, before: int, total: int) -> Callable[[int], None]:
        def report(done: int) -> None:
            if progress is not None:
                progress(what, min(before + done, total), total)

        return report

    with _counted(model, reporter("measuring the mean keys of the model", 0, count)):
        choose_calibration(  # kept with the model, for the cache below
            model,
            cache_options.get("calibration", "auto"),
            cache_options["k_bits"],
            cache_options.get("v_bits") or cache_options["k_bits"],
        )
    # the first pass of a process pays for allocation and threads: neither side should
    prefill(loaded, ids[:, :32], DynamicCache(config=model.config), lambda done: None)

    def answer(what: str, cache: Cache) -> tuple[Tensor, Tensor, Answer, Cache]:
        total = count + max_new_tokens
        begin = time.perf_counter()
        first = prefill(loaded, ids, cache, reporter(what, 0, total))
        seconds = time.perf_counter() - begin
        # what the prompt left, for the comparison along the other answer
        kept = copy.deepcopy(cache) if isinstance(cache, TurboKVCache) else cache
        report = reporter(what, count, total)
        found = generate_greedy(loaded, first, cache, max_new_tokens, seconds, report)
        return (*found, kept)

    full_ids, full_rows, full, _ = answer(
        "answering without compression", DynamicCache(config=model.config)
    )
    ours_ids, ours_rows, compressed, kept = answer(
        "answering with TurboKV", TurboKVCache(model, **cache_options)
    )
    with _counted(model, reporter("comparing the two, token by token", 0, count)):
        forced = forced_rows(loaded, ours_rows[0], full_ids, kept)
    kl = (full_rows.exp() * (full_rows - forced)).sum(-1).mean()
    top1 = (full_rows.argmax(-1) == forced.argmax(-1)).float().mean()
    shared = min(len(full_ids), len(ours_ids))
    equal = full_ids[:shared] == ours_ids[:shared]
    return DemoResult(
        model=loaded.name,
        prompt_tokens=ids.shape[1],
        full=full,
        compressed=compressed,
        sixteen_bit_share=2 / model.dtype.itemsize,
        same_tokens=int(equal.int().cumprod(0).sum()),
        agreeing_tokens=int(equal.sum()),
        kl=float(kl),
        top1=float(top1),
    )
