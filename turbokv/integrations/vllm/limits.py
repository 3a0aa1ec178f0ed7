# SPDX-License-Identifier: Apache-2.0
"""How many queries of one request the decode kernel takes, and how many a step may have.

Start-up refuses what does not fit, and a step's metadata decides by the same figures which rows are
decodes, so they are written once, here.
"""

from __future__ import annotations

from typing import Any

# The kernel takes any number, in blocks of up to 16 rows, a row for each query and head of a group,
# and reads the pages once for each block. Answers are tested up to these numbers of rows, the time
# that they take is not measured yet (scripts/bench_verify.py).
MAX_DRAFT_TOKENS = 15
# Queries of one request that decode attends with in one call; longer rows are prefill. A draft
# model reads the sampled token and the drafts of a step, and one more token.
MAX_DECODE_QUERIES = MAX_DRAFT_TOKENS + 2
# Queries of a row where prefill is cut into rows for decode.
SLICE_QUERIES = 8


def extra_draft_tokens(config: Any) -> int:
    """Return how many tokens a drafter's first pass adds to every row of the step before it.

    A draft model of its own also reads the sampled token; a drafter that is fed hidden states
    (EAGLE, MTP) has it in the place of the row's first. In parallel it drafts in the same pass.
    """
    speculative = config.speculative_config
    if speculative is None or not speculative.num_speculative_tokens:
        return 0
    parallel = getattr(speculative, "parallel_drafting", False)
    read = int(speculative.num_speculative_tokens) if parallel else 1
    return read if speculative.method == "draft_model" else read - 1


def max_step_tokens(config: Any) -> int:
    """Return the most queries of a step: vLLM's bound, and what a drafter's first pass adds."""
    scheduler = config.scheduler_config
    extra = extra_draft_tokens(config) * int(scheduler.max_num_seqs)
    return int(scheduler.max_num_batched_tokens) + extra


def max_decode_queries(config: Any) -> int:
    """Return the most queries of one request in a step of pure decoding, a drafter's included.

    One, the drafts, and what else a drafter reads; where it drafts in parallel vLLM takes rows
    of one and twice the drafts for decodes.
    """
    speculative = config.speculative_config
    if speculative is None or speculative.num_speculative_tokens is None:
        return 1
    drafts = int(speculative.num_speculative_tokens)
    if getattr(speculative, "parallel_drafting", False):
        return 1 + 2 * drafts
    return 1 + drafts + extra_draft_tokens(config)
