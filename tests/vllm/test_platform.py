# SPDX-License-Identifier: Apache-2.0
"""What the patched vLLM makes of our dtypes, on a pretended H100: no GPU, no weights."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow
_process: list[subprocess.Popen[str]] = []

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
if importlib.util.find_spec("vllm.turbokv_hooks") is None:
    pytest.skip("this vLLM is not the patched one", allow_module_level=True)
if importlib.util.find_spec("vllm._C_stable_libtorch") is None:
    pytest.skip("this vLLM is not the one for CUDA", allow_module_level=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    from tests.vllm.models import TINY, tiny_config

    folder = tmp_path_factory.mktemp("configs")
    for kind in TINY:
        tiny_config(kind).save_pretrained(folder / kind)
        path = folder / kind / "config.json"
        names = {"mixed": "Gemma3ForCausalLM", "hybrid": "Qwen3NextForCausalLM"}
        config = json.loads(path.read_text())
        config |= {
            "architectures": [names.get(kind, "Qwen3ForCausalLM")],
            "dtype": "bfloat16",
        }
        path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session", autouse=True)
def pretended() -> Iterator[None]:
    """Keep one process, since importing vLLM takes most of the time."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    environment.pop("TRITON_INTERPRET", None)
    _process.append(
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/vllm/fake_cuda.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    yield
    _process.pop().communicate()


def _ask(folder: pathlib.Path, dtype: str, arguments: dict[str, Any]) -> dict[str, Any]:
    process = _process[0]
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([str(folder), dtype, arguments]) + "\n")
    process.stdin.flush()
    for line in process.stdout:  # libraries may print, too
        if line.startswith(('{"found"', '{"error"')):
            answer: dict[str, Any] = json.loads(line)
            return answer
    raise RuntimeError(f"the process ended with {process.wait()}")


def describe(folder: pathlib.Path, dtype: str, **arguments: Any) -> Any:
    answer = _ask(folder, dtype, arguments)
    assert "found" in answer, answer
    return answer["found"]


def refused(folder: pathlib.Path, dtype: str, **arguments: Any) -> str:
    answer = _ask(folder, dtype, arguments)
    assert "error" in answer, answer
    return str(answer["error"])


def test_the_dtype_chooses_the_backend(models: pathlib.Path) -> None:
    found = describe(models / "dense", "tq4")
    assert set(found["backends"]) == {"TURBOKV"}
    assert found["pages"] == [2 * 64 * 132]
    assert found["shapes"] == [[[2, 64, 132], "torch.uint8"]]
    assert found["graphs"] == "UNIFORM_BATCH"
    # two decodes, and a prefill of 32 tokens after 32 older ones
    assert found["steps"] == [[2, 2, 1, [[32]]]]


def test_a_page_has_the_size_that_the_user_names(models: pathlib.Path) -> None:
    assert describe(models / "dense", "tq4")["block_size"] == 64
    assert describe(models / "dense", "tq4", block_size=16)["pages"] == [2 * 16 * 132]


def test_without_compilation(models: pathlib.Path) -> None:
    assert set(describe(models / "dense", "tq4", enforce_eager=True)["backends"]) == {"TURBOKV"}
    without = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    found = describe(models / "dense", "tq4", compilation_config=without)
    assert set(found["backends"]) == {"TURBOKV"}


def test_widths_of_keys_and_values_differ(models: pathlib.Path) -> None:
    assert describe(models / "dense", "tq_k5v3")["pages"] == [2 * 64 * 132]
    assert describe(models / "dense", "tq_k4v2")["pages"] == [2 * 64 * 100]
    assert describe(models / "dense", "tq_k8v4")["pages"] == [2 * 64 * 196]


def test_other_dtypes_are_as_before(models: pathlib.Path) -> None:
    found = describe(models / "dense", "auto")
    assert set(found["backends"]) == {"FLASH_ATTN"}
    assert found["pages"] == [2 * 16 * 512]
    assert found["steps"] == []


def test_a_head_that_is_no_power_of_two_is_padded(models: pathlib.Path) -> None:
    assert describe(models / "head96", "tq4")["pages"] == [2 * 64 * 132]


def test_sliding_windows_and_full_attention_share_pages(models: pathlib.Path) -> None:
    found = describe(models / "mixed", "tq4")
    assert set(found["backends"]) == {"TURBOKV"}
    assert {name for name, _ in found["groups"]} == {"SlidingWindowSpec", "TQFullAttentionSpec"}
    assert found["pages"] == [2 * 64 * 132]


def test_without_the_hybrid_manager_windows_are_full_specs(models: pathlib.Path) -> None:
    found = describe(models / "mixed", "tq4", disable_hybrid_kv_cache_manager=True)
    names = {name for name, _ in found["groups"]}
    assert names <= {"TQFullAttentionSpec", "UniformTypeKVCacheSpecs"}
    assert found["pages"] == [2 * 64 * 132]


@pytest.mark.parametrize("skip", [["sliding_window"], [1], [0, 4]])
def test_skipped_layers_get_another_backend(skip: list[Any], models: pathlib.Path) -> None:
    options = {"turbokv": {"skip_layers": skip}}
    found = describe(models / "mixed", "tq4", additional_config=options)
    kinds = (["sliding"] * 2 + ["full"]) * 2
    for i, (kind, backend) in enumerate(zip(kinds, found["backends"], strict=True)):
        is_skipped = i in skip or (skip == ["sliding_window"] and kind == "sliding")
        assert backend == ("FLASH_ATTN" if is_skipped else "TURBOKV")
    assert len(found["pages"]) == 1


def test_a_full_layer_among_sliding_ones_is_not_skipped(models: pathlib.Path) -> None:
    options = {"turbokv": {"skip_layers": [2]}}
    message = refused(models / "mixed", "tq4", additional_config=options)
    assert "skip_layers: wanted sliding-window layers only" in message


@pytest.mark.parametrize("dtype", ["tq4", "tq2"])
def test_hybrid_models_get_pages_of_one_size(dtype: str, models: pathlib.Path) -> None:
    found = describe(models / "hybrid", dtype)
    assert found["block_size"] % 16 == 0
    assert len(found["pages"]) == 1
    assert ["TQFullAttentionSpec", 1] in found["groups"]


def test_a_backend_by_name_is_checked(models: pathlib.Path) -> None:
    assert "TURBOKV" in describe(models / "dense", "tq4", attention_backend="TURBOKV")["backends"]
    message = refused(models / "dense", "tq4", attention_backend="FLASH_ATTN")
    assert "attention_backend: wanted TURBOKV or none, got FLASH_ATTN" in message


def test_unknown_options_stop_the_start(models: pathlib.Path) -> None:
    message = refused(models / "dense", "tq4", additional_config={"turbokv": {"windows": 3}})
    assert "additional_config['turbokv']" in message
    assert "got ['windows']" in message


def test_flashinfer_is_asked_for_before_it_is_needed(models: pathlib.Path) -> None:
    if importlib.util.find_spec("flashinfer") is not None:
        pytest.skip("FlashInfer is installed")
    options = {"turbokv": {"path": "flashinfer"}}
    message = refused(models / "dense", "tq4", additional_config=options)
    assert "needs the patched FlashInfer" in message
