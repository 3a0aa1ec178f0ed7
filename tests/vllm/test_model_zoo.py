# SPDX-License-Identifier: Apache-2.0
"""Architectures of the zoo: served as a 16-bit cache serves them, or refused with a reason.

``scripts/model_zoo.py`` serves more of them and writes what came out into ``docs/model-zoo.md``.
"""

from __future__ import annotations

import pathlib

import pytest
import torch

from tests.vllm import engine as e
from tests.vllm import zoo

if (reason := e.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

if not e.on_cpu() and not torch.cuda.is_available():
    pytest.skip("neither vLLM's CPU engine nor a GPU", allow_module_level=True)
pytestmark = [pytest.mark.slow, *([] if e.on_cpu() else [pytest.mark.gpu])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parametrize("name", zoo.TESTED)
def test_served_as_with_16_bits_or_refused(name: str, folder: pathlib.Path) -> None:
    entry = zoo.ZOO[name]
    found = zoo.measure(name, folder)
    print(found)
    if found.no_reference is not None:
        pytest.skip(f"vLLM itself: {found.no_reference}")
    assert found.failure is None
    if entry.refusal is not None:
        assert found.refusal is not None
        assert entry.refusal in found.refusal
        return
    assert found.refusal is None
    assert found.error is not None
    assert found.other_tokens is not None
    assert found.error < zoo.LIMIT
    # else the model would not notice what it reads, nor the test
    assert found.other_tokens > 2 * zoo.LIMIT
