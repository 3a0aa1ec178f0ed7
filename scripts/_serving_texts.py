# SPDX-License-Identifier: Apache-2.0
"""What ``eval_serving.py`` asks, and how it compares answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

CONTEXTS = (1024, 2048, 4096, 7936)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_PASSAGES, PREFILL, DECODE = 4, 512, 256
_PROMPTS, _PIECE, ANSWER = 50, 480, 48
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


def text_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the text without BOS, and what the tokenizer begins a text with: one token or none."""
    from turbokv.integrations.transformers.models import english_text, leading_token

    bos = leading_token(tokenizer)
    ids = tokenizer(english_text(), add_special_tokens=False).input_ids
    return list(ids), [] if bos is None else [bos]


def passages(tokenizer: Any) -> list[list[int]]:
    """Return the passages that are fed token by token, spread over the text."""
    ids, bos = text_ids(tokenizer)
    length = PREFILL + DECODE - len(bos)
    stride = (len(ids) - length) // _PASSAGES
    return [[*bos, *ids[i * stride : i * stride + length]] for i in range(_PASSAGES)]


def prompts(tokenizer: Any) -> list[list[int]]:
    """Return chat prompts, each about its own piece of the text."""
    ids, _ = text_ids(tokenizer)
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

    ids, bos = text_ids(tokenizer)
    hay = [*bos, *ids]
    found = []
    for context in CONTEXTS:
        for depth, code in zip(DEPTHS, _CODES, strict=True):
            planted = plain(_NEEDLE.format(code))
            at = int(depth * (context - len(planted)))
            rest = hay[at : context - len(planted)]
            found.append((context, depth, code, [*hay[:at], *planted, *rest, *plain(_QUESTION)]))
    return found


# --- answers --------------------------------------------------------------------------------------


def agreement(
    answers: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Compare greedy answers with a reference's, each up to where the two part.

    After that they continue different texts, so a share of all tokens would measure when they part
    rather than how often. ``next_token_agrees`` is the share of tokens that are the reference's
    where all before were, ``first_difference`` the median place of the first that is not (the
    length of answers that are equal), ``answers_equal`` the share of those.
    """
    agreeing = [_agreeing(a, b) for a, b in zip(answers, expected, strict=True)]
    equal = [list(a) == list(b) for a, b in zip(answers, expected, strict=True)]
    compared = sum(agreeing) + equal.count(False)
    return {
        "answers_equal": equal.count(True) / len(equal),
        "next_token_agrees": sum(agreeing) / compared,
        "first_difference": statistics.median(agreeing),
        "agreeing": agreeing,
    }


def _agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
