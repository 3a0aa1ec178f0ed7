# SPDX-License-Identifier: Apache-2.0
"""What an attention layer and its metadata make of what they are given; needs vLLM."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

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


def single(**changes: Any) -> Any:
    from turbokv.integrations.vllm.attention.metadata import TurboKVMetadata

    tensor = torch.zeros(1, dtype=torch.int32, device="cpu")
    counts = {"num_decodes": 3, "num_decode_tokens": 3, "max_decode_len": 1, "num_tokens": 4}
    given = counts | changes
    return TurboKVMetadata(**given, seq_lens=tensor, block_table=tensor, query_start_loc=tensor)


def test_steps_of_single_tokens_are_known() -> None:
    assert single().is_single_tokens
    assert not single(max_decode_len=2).is_single_tokens
    assert not single(num_decodes=0, num_decode_tokens=0, max_decode_len=0).is_single_tokens
    planned = single(plan_prefill=lambda metadata: None)
    assert not planned.is_single_tokens
    assert not single(prefill=(object(),)).is_single_tokens


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("single_tokens", [False, True])
def test_decode_starts_beside_the_store_only_where_that_is_asked_for(
    overlap: bool, single_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turbokv.integrations.vllm.attention import steps_cuda

    calls: dict[str, dict[str, Any]] = {}
    for name in ("store", "decode"):
        monkeypatch.setattr(
            steps_cuda.cuda, name, lambda *a, _name=name, **given: calls.update({_name: given})
        )
    monkeypatch.setattr(steps_cuda, "OVERLAP_DECODE", overlap)
    layer = MagicMock(k_matrix=None, q_matrix=None)
    x = torch.zeros(1, 1, 64, device="cpu")
    steps_cuda.store(layer, x, x, x, x, 16, None, None, single_tokens=single_tokens)
    steps_cuda.decode(
        *(layer, x, x, 16, x, x, None, 1, None, x, None),
        sm_scale=1.0,
        sliding_window=None,
        logits_soft_cap=0.0,
        sinks=None,
        single_tokens=single_tokens,
    )
    assert calls["store"]["launch_dependents"] is (overlap and single_tokens)
    assert calls["decode"]["early_loads"] is (overlap and single_tokens)
