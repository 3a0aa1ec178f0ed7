# SPDX-License-Identifier: Apache-2.0
"""What an attention layer refuses when it is made; needs vLLM."""

from __future__ import annotations

from typing import Any

import pytest

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
