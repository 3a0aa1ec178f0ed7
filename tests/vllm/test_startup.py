# SPDX-License-Identifier: Apache-2.0
"""What is refused at start-up, and what options change; on stand-ins for vLLM's configuration."""

from __future__ import annotations

import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from turbokv.calibration import Calibration, Fingerprint, LayerCalibration, architecture_sha256
from turbokv.integrations.vllm import hooks, limits


class Model(SimpleNamespace):
    def get_head_size(self) -> int:
        return int(self.head_dim)

    def get_num_kv_heads(self, parallel: Any) -> int:
        return 8 // int(parallel.tensor_parallel_size)


def config(**changes: Any) -> Any:
    """Return a configuration that is fine, with ``part__field`` set otherwise."""
    found = SimpleNamespace(
        additional_config={},
        cache_config=SimpleNamespace(
            cache_dtype="tq4",
            kv_cache_dtype_skip_layers=[],
            block_size=16,
            enable_prefix_caching=True,
        ),
        model_config=Model(
            use_mla=False,
            is_encoder_decoder=False,
            is_mm_prefix_lm=False,
            is_hybrid=False,
            dtype=torch.bfloat16,
            head_dim=128,
            hf_text_config=SimpleNamespace(layer_types=None),
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=2,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            worker_cls="vllm.v1.worker.gpu_worker.Worker",
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=None, async_scheduling=True),
        attention_config=SimpleNamespace(backend=None, use_non_causal=False),
        compilation_config=SimpleNamespace(
            mode=SimpleNamespace(name="VLLM_COMPILE"),
            splitting_ops_contain_kv_cache_update=lambda: True,
        ),
        speculative_config=None,
        kv_transfer_config=None,
    )
    for name, value in changes.items():
        *parts, field = name.split("__")
        target = found
        for part in parts:
            target = getattr(target, part)
        setattr(target, field, value)
    return found


def drafting(count: int, parallel: bool = False, method: str = "eagle") -> Any:
    return SimpleNamespace(num_speculative_tokens=count, parallel_drafting=parallel, method=method)


def test_a_plain_configuration_passes() -> None:
    hooks.check_and_update_config(config())


def test_a_backend_that_vllm_itself_asks_for_is_taken() -> None:
    """Triton's, for two head sizes, where FlashAttention 4 is missing (Gemma 4)."""

    class Layers(list[Any]):
        total_num_hidden_layers = 2

    sizes = Layers(SimpleNamespace(head_size=size) for size in (256, 512))
    triton = {"attention_config__backend": SimpleNamespace(name="TRITON_ATTN")}
    gemma4 = config(model_config__model_arch_config=sizes, **triton)
    hooks.check_and_update_config(gemma4)
    assert gemma4.attention_config.backend is None
    with pytest.raises(ValueError, match="wanted TURBOKV or none, got TRITON_ATTN"):
        hooks.check_and_update_config(config(**triton))


def test_chunked_attention_needs_a_vllm_that_asks_for_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from turbokv.integrations.vllm import startup

    text = SimpleNamespace(layer_types=None, attention_chunk_size=8192)
    for patched in (False, True):
        monkeypatch.setattr(startup, "_asks_for_pages", lambda patched=patched: not patched)
        if not patched:
            hooks.check_and_update_config(config(model_config__hf_text_config=text))
            continue
        with pytest.raises(ValueError, match=r"within chunks .* use vLLM 0.28 or newer"):
            hooks.check_and_update_config(config(model_config__hf_text_config=text))


def test_images_whose_tokens_see_each_other_are_scheduled_whole() -> None:
    found = config(model_config__is_mm_prefix_lm=True)
    found.scheduler_config.disable_chunked_mm_input = False
    hooks.check_and_update_config(found)
    assert found.scheduler_config.disable_chunked_mm_input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config__use_mla": True}, "multi-head latent attention is not supported"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder models are not supported"),
        ({"model_config__dtype": torch.float32}, "activations of torch.float32 are not supported"),
        ({"model_config__head_dim": 32}, "head_dim: wanted 33 to 512, got 32"),
        ({"model_config__head_dim": 576}, "head_dim: wanted 33 to 512, got 576"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"parallel_config__enable_dbo": True}, "dual-batch overlap is not supported"),
        ({"attention_config__use_non_causal": True}, "non-causal attention is not supported"),
        (
            {"compilation_config__splitting_ops_contain_kv_cache_update": lambda: False},
            "compilation_config: wanted vllm::unified_kv_cache_update in splitting_ops",
        ),
        (
            {"attention_config__backend": SimpleNamespace(name="FLASH_ATTN")},
            "attention_backend: wanted TURBOKV or none, got FLASH_ATTN",
        ),
        (
            {"speculative_config": drafting(16)},
            "num_speculative_tokens: wanted at most 15 .*got 16",
        ),
        (
            {"speculative_config": drafting(9, True)},
            r"num_speculative_tokens: .*\(8 with parallel_drafting\), got 9",
        ),
        (
            {"speculative_config": drafting(3, True, method="dflash")},
            "speculative_config: method dflash is not supported",
        ),
        (
            {"speculative_config": drafting(3, True, method="dspark")},
            "speculative_config: method dspark is not supported",
        ),
        (
            {
                "speculative_config": drafting(3),
                "additional_config": {"turbokv": {"decode": "decompress"}},
            },
            "decode='decompress' is not supported with speculative decoding",
        ),
        (
            {
                "model_config__hf_text_config__layer_types": [
                    "sliding_attention",
                    "full_attention",
                    "sliding_attention",
                ],
                "additional_config": {"turbokv": {"skip_layers": [0, 1]}},
            },
            r"skip_layers: wanted sliding-window layers only.*got layers \[1\]",
        ),
        ({"cache_config__block_size": 24}, "block_size: wanted a multiple of 16, got 24"),
        (
            {
                "model_config__is_hybrid": True,
                "additional_config": {"turbokv": {"skip_layers": [3]}},
            },
            "skip_layers is not supported for models that mix attention with linear layers",
        ),
    ],
)
def test_what_is_not_supported_is_refused_with_a_sentence(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"kv_cache_dtype=tq4: .*{message}"):
        hooks.check_and_update_config(config(**changes))


def test_without_compilation_nothing_has_to_be_split() -> None:
    found = config(compilation_config__splitting_ops_contain_kv_cache_update=lambda: False)
    found.compilation_config.mode = SimpleNamespace(name="NONE")
    hooks.check_and_update_config(found)


def test_all_reasons_come_at_once() -> None:
    both = config(model_config__head_dim=16, parallel_config__enable_dbo=True)
    with pytest.raises(ValueError, match=r"dual-batch.*; head_dim"):
        hooks.check_and_update_config(both)


def test_other_caches_are_left_alone() -> None:
    hooks.check_and_update_config(config(cache_config__cache_dtype="fp8", model_config__use_mla=1))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wanted .*'window'.*, got"):
        hooks.check_and_update_config(config(additional_config={"turbokv": {"windw": 1}}))


def test_skip_layers_join_those_of_the_cache() -> None:
    found = config(
        additional_config={"turbokv": {"skip_layers": [0, "sliding_window"]}},
        cache_config__kv_cache_dtype_skip_layers=["0", "5"],
    )
    for _ in range(2):  # vLLM completes a configuration more than once
        hooks.check_and_update_config(found)
    assert found.cache_config.kv_cache_dtype_skip_layers == ["0", "5", "sliding_window"]


def test_our_backend_by_name_does_not_bind_layers_in_16_bits() -> None:
    found = config(attention_config__backend=SimpleNamespace(name="TURBOKV"))
    hooks.check_and_update_config(found)
    assert found.attention_config.backend is None


@pytest.mark.parametrize(
    ("speculative", "queries", "added"),
    [
        (None, 1, 0),
        (drafting(15), 16, 0),
        (drafting(15, method="mtp"), 16, 0),
        (drafting(15, method="ngram"), 16, 0),
        (drafting(15, method="draft_model"), 17, 1),
        (drafting(8, True), 17, 7),
        (drafting(8, True, method="draft_model"), 17, 8),
    ],
)
def test_speculation_within_the_limits_passes(speculative: Any, queries: int, added: int) -> None:
    found = config(speculative_config=speculative)
    hooks.check_and_update_config(found)
    assert limits.max_decode_queries(found) == queries
    assert limits.extra_draft_tokens(found) == added
    found.scheduler_config.max_num_batched_tokens = 1000
    found.scheduler_config.max_num_seqs = 10
    assert limits.max_step_tokens(found) == 1000 + 10 * added


def test_a_drafter_with_a_16_bit_cache_may_attend_as_it_likes() -> None:
    speculative = drafting(3, True, method="dflash")
    speculative.kv_cache_dtype = "auto"
    hooks.check_and_update_config(config(speculative_config=speculative))


def test_the_bytes_of_a_token_follow_the_rank() -> None:
    assert hooks.token_page_bytes(config()) == 4 * 132


# --- centred keys ---------------------------------------------------------------------------------


def calibration_file(path: pathlib.Path, **parts: torch.Tensor) -> str:
    hf_config = model_config()
    shape = Fingerprint(architecture_sha256(hf_config), tuple([0.5] * 64), "this one")
    Calibration(shape, {0: LayerCalibration(**parts)}).save(path)
    return str(path)


def model_config(layers: int = 4) -> Any:
    return SimpleNamespace(
        model_type="qwen3",
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def calibrated(path: str, layers: int = 4) -> Any:
    found = config(additional_config={"turbokv": {"calibration": path}})
    found.model_config.hf_config = model_config(layers)
    return found


def test_workers_are_made_from_the_one_that_was_chosen() -> None:
    plain = config()
    for _ in range(2):  # vLLM completes a configuration more than once
        hooks.check_and_update_config(plain)
        assert plain.parallel_config.worker_cls == (
            "turbokv.integrations.vllm.offsets.worker.vllm:v1:worker:gpu_worker:Worker"
        )
    alone = config(additional_config={"turbokv": {"calibration": "none"}})
    hooks.check_and_update_config(alone)
    assert alone.parallel_config.worker_cls == "vllm.v1.worker.gpu_worker.Worker"


def test_a_calibration_file_of_this_model_passes(tmp_path: pathlib.Path) -> None:
    hooks.check_and_update_config(calibrated(calibration_file(tmp_path / "a.safetensors")))


def test_a_calibration_file_of_another_model_is_refused_at_start(tmp_path: pathlib.Path) -> None:
    path = calibration_file(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"turbokv.calibration=.*its architecture hashes to .*one"):
        hooks.check_and_update_config(calibrated(path, layers=6))


def test_a_calibration_file_that_needs_folding_is_refused_at_start(
    tmp_path: pathlib.Path,
) -> None:
    path = calibration_file(tmp_path / "a.safetensors", k_scale=torch.ones(2, 128))
    with pytest.raises(ValueError, match=r"wanted offsets and codebooks only, got \['k_scale'\]"):
        hooks.check_and_update_config(calibrated(path))


def test_a_damaged_calibration_file_is_refused_at_start(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="wanted a safetensors file, got"):
        hooks.check_and_update_config(calibrated(str(path)))


def test_batch_invariance_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in (False, True):
        envs = SimpleNamespace(VLLM_BATCH_INVARIANT=wanted)
        monkeypatch.setitem(sys.modules, "vllm.envs", envs)
        if not wanted:
            hooks.check_and_update_config(config())
            continue
        with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT is not supported: how decode"):
            hooks.check_and_update_config(config())
