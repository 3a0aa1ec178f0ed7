# SPDX-License-Identifier: Apache-2.0
"""What an attention layer refuses when it is made; needs the patched vLLM."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
if importlib.util.find_spec("vllm.turbokv_hooks") is None:
    pytest.skip("this vLLM is not the patched one", allow_module_level=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("alibi_slopes", [0.5, 0.25]), ("attn_type", "encoder"), ("qk_clip", 1.0)],
)
def test_what_it_does_not_do_is_refused_by_name(name: str, value: Any) -> None:
    from turbokv.integrations.vllm.attention.impl import TurboKVImpl

    with pytest.raises(ValueError, match=f"{name}: wanted .*, got"):
        TurboKVImpl(2, 64, 0.125, 2, kv_cache_dtype="tq4", **{name: value})
