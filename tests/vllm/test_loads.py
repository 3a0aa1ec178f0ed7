# SPDX-License-Identifier: Apache-2.0
"""Pages that a connector loads, and the 16-bit window: loads answer what hits answer."""

from __future__ import annotations

import pathlib
import sys

import pytest

from tests.vllm import engine as e
from tests.vllm import models

if (reason := e.why_no_engine()) is not None:
    pytest.skip(reason, allow_module_level=True)
from tests.vllm.test_engine import CPU, TOKENS, close, folder, run  # noqa: F401 (a fixture)
from turbokv.integrations.vllm.window.pool import live_windows

ROOT = pathlib.Path(__file__).parents[2]
if not CPU:
    pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recompute", [True, False])
def test_loads_leave_no_token_of_the_window_compressed(
    recompute: bool,
    folder: pathlib.Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "scripts")])
    model = models.make_tiny("dense", folder / "dense")
    length, newest = 150, 32
    requests = e.prompts((length,), models.VOCAB, 1)
    # without sinks: the first tokens' copies do not come back with their page
    turbokv = {"window": newest, "sinks": 0, "window_pool_fraction": 0.02}
    turbokv |= {"recompute_window": recompute}
    connector = {
        "kv_connector": "MemoryConnector",
        "kv_connector_module_path": "_soak_connector",
        "kv_role": "kv_both",
    }
    settings = {"enable_prefix_caching": True, "async_scheduling": False}
    with run(model, "tq2", turbokv=turbokv, kv_transfer_config=connector, **settings) as llm:
        cold = e.ask(llm, requests, newest + 16)
        window = live_windows()[-1]
        assert llm.reset_prefix_cache()  # of the engine; the connector keeps its pages
        before = window.metrics().compressed
        loaded = e.ask(llm, requests, TOKENS)
        compressed = window.metrics().compressed - before
        assert llm.reset_prefix_cache()
        cached = e.cached_tokens(llm, requests)
        page = llm.llm_engine.vllm_config.cache_config.block_size
        assert llm.llm_engine.reset_prefix_cache(reset_connector=True)
    computed = newest if recompute else 1
    assert cached == [(length - computed) // page * page]
    assert (compressed == 0) == recompute
    if recompute:
        close(loaded, [e.Answer(a.tokens[:TOKENS], a.top[:TOKENS]) for a in cold])
