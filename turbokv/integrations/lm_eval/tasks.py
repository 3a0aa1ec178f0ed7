# SPDX-License-Identifier: Apache-2.0
"""Tasks that need no download: retrieval as in RULER, and verbatim recall after long reasoning.

Both are made by a seeded generator, so that every cache and every server gets the same questions.
Lengths are in characters (four make about a token of English), since a server's tokenizer need not
be at hand.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Sequence
from typing import Any

RETRIEVAL, RECALL = "retrieval", "recall"
LOCAL = (RETRIEVAL, RECALL)
_CHARACTERS = 4  # a token of English
_ADJECTIVES = [
    "amber",
    "brisk",
    "calm",
    "dusty",
    "eager",
    "faint",
    "green",
    "hollow",
    "icy",
    "jolly",
    "keen",
    "lucid",
    "mellow",
]
_NOUNS = [
    "anchor",
    "basket",
    "candle",
    "dolphin",
    "engine",
    "falcon",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
]
_NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "The train leaves at noon, and whoever is late has to wait for the next one.",
    "Some of the shelves are empty, others hold more than anyone could read.",
)
_ENTRIES = 12


def _name(numbers: random.Random) -> str:
    return f"{numbers.choice(_ADJECTIVES)}-{numbers.choice(_NOUNS)}-{numbers.randrange(10, 100)}"


def retrieval_docs(context: int, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return questions for the number of one of many keys that are spread over ``context`` tokens.

    As RULER's ``niah_multikey``: eight keys of one form, one of which is asked for.
    """
    numbers = random.Random(f"{RETRIEVAL} {context} {seed}")
    found = []
    for _ in range(count):
        keys: dict[str, int] = {}
        while len(keys) < 8:
            keys[_name(numbers)] = numbers.randrange(1_000_000, 10_000_000)
        lines: list[str] = []
        while sum(len(line) + 1 for line in lines) < context * _CHARACTERS - 800:
            lines.append(numbers.choice(_NOISE))
        for key, value in keys.items():
            line = f"One of the special magic numbers for {key} is: {value}."
            lines.insert(numbers.randrange(len(lines) + 1), line)
        asked = numbers.choice(list(keys))
        text = "\n".join(lines)
        found.append(
            {
                "input": "Some special magic numbers are hidden in the following text. Remember"
                f" them.\n{text}\nWhat is the special magic number for {asked} in the text above?"
                f" The special magic number for {asked} in the text above is:",
                "target": str(keys[asked]),
            }
        )
    return found


def recall_docs(context: int, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return questions for one of twelve sentences, word by word, after ``context`` tokens of sums.

    What is asked for was read long ago, and everything since was reasoning of one's own: the case
    in which errors of a cache that add up during decoding would show.
    """
    numbers = random.Random(f"{RECALL} {context} {seed}")
    found = []
    for _ in range(count):
        entries = [
            f"the {_name(numbers)} was moved by the {_name(numbers)} to room"
            f" {numbers.randrange(100, 1000)} with code {numbers.getrandbits(32):08x}"
            for _ in range(_ENTRIES)
        ]
        listed = "\n".join(f"Entry {i + 1}: {entry}." for i, entry in enumerate(entries))
        steps: list[str] = []
        total = numbers.randrange(10, 100)
        length = 0
        while length < context * _CHARACTERS - len(listed):
            more = numbers.randrange(2, 90)
            steps.append(f"Adding {more} to {total} gives {total + more}, so we continue.")
            total = (total + more) % 1000
            length += len(steps[-1]) + 1
        asked = numbers.randrange(_ENTRIES)
        found.append(
            {
                "input": f"{listed}\n\nLet us work out a long sum first.\n"
                + "\n".join(steps)
                + "\n\nNow the list from the beginning is repeated word by word."
                f"\nEntry {asked + 1}:",
                "target": f"{entries[asked]}.",
            }
        )
    return found


def score(doc: dict[str, str], results: Sequence[str]) -> dict[str, float]:
    """Compare an answer with its target: begins with it, and how alike the two are (0 to 1)."""
    answer = results[0].strip()
    target = doc["target"]
    alike = difflib.SequenceMatcher(None, answer[: len(target)], target, autojunk=False).ratio()
    return {"exact": float(answer.startswith(target)), "similarity": alike}


def local_task(kind: str, context: int, count: int) -> dict[str, Any]:
    """Return the harness's description of one of :data:`LOCAL`."""
    make: Callable[[int, int], list[dict[str, str]]] = {
        RETRIEVAL: retrieval_docs,
        RECALL: recall_docs,
    }[kind]

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset
        from datasets.table import InMemoryTable

        docs = make(context, count)
        columns = {name: [doc[name] for doc in docs] for name in docs[0]}
        # with a fingerprint of its own, as computing one pickles PyArrow's modules
        name = f"turbokv-{kind}-{context}-{count}"
        return {"test": Dataset(InMemoryTable.from_pydict(columns), fingerprint=name)}

    metrics = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("exact", "similarity")
    ]
    return {
        "task": f"turbokv_{kind}_{context}",
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{input}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": " ",
        "process_results": score,
        "metric_list": metrics,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64, "do_sample": False},
        "metadata": {"version": 1.0},
    }
