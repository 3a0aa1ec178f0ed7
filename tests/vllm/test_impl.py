# SPDX-License-Identifier: Apache-2.0
"""What an attention layer and its metadata make of what they are given; needs vLLM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.vllm import engine

if (reason := engine.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("alibi_slopes", [0.5, 0.25]), ("attn_type", "encoder"), ("qk_clip", 1.0)],
)
def test_what_it_does_not_do_is_refused_by_name(name: str, value: Any) -> None:
    from turbokv.integrations.vllm.attention.impl import TurboKVImpl

    with pytest.raises(ValueError, match=f"{name}: wanted .*, got"):
        TurboKVImpl(2, 64, 0.125, 2, kv_cache_dtype="tq4", **{name: value})


def test_counts_of_a_step_are_plain_integers() -> None:
    # vLLM's virtual batches of chunked local attention carry NumPy's, which operators refuse
    from turbokv.integrations.vllm.attention.metadata import TurboKVMetadata

    tensor = torch.zeros(1, dtype=torch.int32, device="cpu")
    counts = {"num_decodes": 1, "num_decode_tokens": 2, "max_decode_len": 2, "num_tokens": 3}
    given = {name: np.int32(value) for name, value in counts.items()}
    found = TurboKVMetadata(**given, seq_lens=tensor, block_table=tensor, query_start_loc=tensor)
    for name, value in counts.items():
        assert type(getattr(found, name)) is int
        assert getattr(found, name) == value
