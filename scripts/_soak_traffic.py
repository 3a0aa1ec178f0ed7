# SPDX-License-Identifier: Apache-2.0
"""What the soak asks: streams of all kinds at once, canaries among them, and what came back."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TOP = 5
Step = dict[int, float]


@dataclass
class Answer:
    """Tokens of one request, and the most likely ones at each with their log-probabilities."""

    tokens: list[int] = field(default_factory=list)
    top: list[Step] = field(default_factory=list)
    cached: int = 0


def error(got: Sequence[Answer], wanted: Sequence[Answer]) -> float:
    """Mean difference of ``wanted``'s TOP log-probabilities, in nats, until tokens part."""
    found: list[float] = []
    for a, b in zip(got, wanted, strict=True):
        for step, (token, want) in enumerate(zip(a.tokens, b.tokens, strict=False)):
            likely = sorted(b.top[step].items(), key=lambda item: -item[1])[:TOP]
            floor = min(a.top[step].values())
            found.append(sum(abs(a.top[step].get(t, floor) - p) for t, p in likely) / TOP)
            if token != want:
                break
    return sum(found) / len(found)


@dataclass
class Stream:
    """A request under way."""

    name: str
    cancel_at: int | None  # once it has so many tokens
    canary: int | None = None
    answer: Answer = field(default_factory=Answer)


class Traffic:
    """Keeps an engine busy, and reads what it answers.

    Parameters
    ----------
    llm
        vLLM's ``LLM``, its engine in this process.
    vocab, longest
        Tokens to draw from, and the most of a prompt.
    canaries
        Prompts whose answers are known.
    adapters
        LoRA requests to take turns with; none where there are none.
    """

    def __init__(
        self,
        llm: Any,
        vocab: int,
        longest: int,
        canaries: list[list[int]],
        canary_tokens: int,
        adapters: Sequence[Any],
        seed: int,
    ) -> None:
        self.engine = llm.llm_engine
        self.rng = random.Random(seed)
        self.vocab, self.longest = vocab, longest
        self.canaries, self.canary_tokens = canaries, canary_tokens
        self.adapters = list(adapters)
        self.prefixes = [self.words(longest // 2) for _ in range(4)]
        self.streams: dict[str, Stream] = {}
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.canary_answers: list[tuple[int, Answer]] = []
        self._number = 0

    def words(self, count: int) -> list[int]:
        """Draw tokens, with passages that come again: n-grams are drafted from these."""
        found: list[int] = []
        while len(found) < count:
            passage = [self.rng.randrange(3, self.vocab) for _ in range(self.rng.randint(4, 12))]
            found += passage * self.rng.randint(1, 4)
        return found[:count]

    # --- asking -------------------------------------------------------------------------------

    def submit(self) -> None:
        """Add one stream: any length, often with a shared prefix, a third to be cancelled."""
        rng = self.rng
        prompt = self.words(rng.randint(1, self.longest // 2))
        if rng.random() < 0.6:
            prefix = rng.choice(self.prefixes)
            prompt = prefix[: rng.randint(1, len(prefix))] + prompt
        tokens = rng.randint(1, max(2, self.longest // 4))
        cancel_at = rng.randint(0, tokens) if rng.random() < 1 / 3 else None
        adapter = rng.choice([None, *self.adapters])
        self.counts["lora"] += adapter is not None
        # no seed of its own: vLLM's CPU engine fails with one when a chunk of a prompt ends early
        sampling = {"temperature": rng.choice((0.0, 0.0, 1.0))}
        self._add(prompt, tokens, cancel_at, adapter, None, None, sampling)

    def ask_canaries(self, salt: str | None) -> None:
        """Add every canary; a ``salt`` of its own keeps it from finding its prefix."""
        for number, prompt in enumerate(self.canaries):
            self._add(prompt, self.canary_tokens, None, None, number, salt, {"temperature": 0.0})

    def _add(
        self,
        prompt: list[int],
        tokens: int,
        cancel_at: int | None,
        adapter: Any,
        canary: int | None,
        salt: str | None,
        sampling: dict[str, Any],
    ) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=4 * TOP if canary is not None else 1,
            **sampling,
        )
        name = f"soak{self._number}"
        self._number += 1
        asked: dict[str, Any] = {"prompt_token_ids": prompt}
        if salt is not None:
            asked["cache_salt"] = salt
        self.streams[name] = Stream(name, cancel_at, canary)
        self.counts["asked"] += 1
        self.engine.add_request(name, asked, params, lora_request=adapter)

    # --- answers ------------------------------------------------------------------------------

    def step(self) -> None:
        """Let the engine take a step, and cancel whoever is due."""
        for output in self.engine.step():
            self._take(output)
        due = [
            s.name
            for s in self.streams.values()
            if s.cancel_at is not None and len(s.answer.tokens) >= s.cancel_at
        ]
        # not at once, or a stream would never be seen with as few tokens as it was drawn to have
        self.cancel([name for name in due if self.rng.random() < 0.5])

    def cancel(self, names: Sequence[str]) -> None:
        """Cancel streams by name."""
        if names:
            self.engine.abort_request(list(names))
            self.counts["cancelled"] += len(names)
            for name in names:
                del self.streams[name]

    def _take(self, output: Any) -> None:
        stream = self.streams.get(output.request_id)
        if stream is None:  # cancelled while its step ran
            return
        found = output.outputs[0]
        answer = stream.answer
        answer.tokens = list(found.token_ids)
        new = (found.logprobs or [])[len(answer.top) :]
        answer.top += [{t: p.logprob for t, p in step.items()} for step in new]
        for step in answer.top[len(answer.top) - len(new) :]:
            if not all(math.isfinite(p) or p == -math.inf for p in step.values()):
                self.problems.append(f"{stream.name}: log-probabilities {step}")
        if output.finished:
            answer.cached = int(output.num_cached_tokens or 0)
            self.counts["finished"] += 1
            self.counts["tokens"] += len(answer.tokens)
            self.counts["cached tokens"] += answer.cached
            if found.finish_reason != "length":
                self.problems.append(f"{stream.name}: finish_reason {found.finish_reason}")
            if stream.canary is not None:
                self.canary_answers.append((stream.canary, answer))
            del self.streams[stream.name]

    def run_dry(self) -> None:
        """Step until nothing is under way."""
        while self.streams or self.engine.has_unfinished_requests():
            self.step()

    def alone(self, salt: str | None = None) -> list[Answer]:
        """Ask the canaries one after the other, nobody beside them."""
        found = []
        for number, prompt in enumerate(self.canaries):
            self._add(prompt, self.canary_tokens, None, None, number, salt, {"temperature": 0.0})
            self.run_dry()
            found.append(self.canary_answers.pop()[1])
        return found

    def busy(self, streams: int, seconds: float) -> None:
        """Keep ``streams`` under way for a time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while len(self.streams) < streams:
                self.submit()
            self.step()
