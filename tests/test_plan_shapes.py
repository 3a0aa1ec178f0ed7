# SPDX-License-Identifier: Apache-2.0
"""Plans of odd shapes: multi-query heads, wide windows, quantised checkpoints, several GPUs."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from turbokv.model_config import ModelConfig
from turbokv.model_modules import modules
from turbokv.plan import _stages, plan
from turbokv.plan_report import render as render_plan

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
# As published: tiiuae/falcon-7b, falcon-40b and falcon-180B.
FALCON_7B: dict[str, Any] = {
    "model_type": "falcon",
    "alibi": False,
    "bias": False,
    "hidden_size": 4544,
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "vocab_size": 65024,
}
FALCON_40B = {
    **FALCON_7B,
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
PHI_35_MINI: dict[str, Any] = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "sliding_window": 262144,
    "vocab_size": 32064,
}


# --- heads, windows, MLPs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "heads", "layers", "params"),
    [
        (FALCON_7B, 1, 32, 6_921_720_704),
        ({**FALCON_7B, "num_kv_heads": 71}, 1, 32, 6_921_720_704),  # older files say so
        ({**FALCON_7B, "multi_query": False}, 71, 32, None),
        (FALCON_40B, 8, 60, 41_303_293_952),
        ({**FALCON_40B, "num_kv_heads": None}, 128, 60, None),
    ],
)
def test_falcon_has_the_kv_heads_of_its_generation(
    config: dict[str, Any], heads: int, layers: int, params: int | None
) -> None:
    found = plan(config, gpu_memory=320)
    assert [(g.num_layers, g.num_kv_heads, g.k_dim) for g in found.layers] == [(layers, heads, 64)]
    assert found.row("bf16").bytes_per_token == layers * heads * 64 * 4
    if params is not None:
        assert found.weights.num_params == pytest.approx(params, rel=0.001)


def test_a_window_that_no_context_exceeds_is_full_attention() -> None:
    found = plan(PHI_35_MINI)
    assert [group.kind for group in found.layers] == ["full"]
    assert found.row("k4v4").ratio > 2.7  # heads of 96 are stored as 128, 5% of 16-bit copies
    assert not any("nothing to compress" in note for note in found.notes)
    narrow = plan({**PHI_35_MINI, "sliding_window": 2047})
    assert [group.kind for group in narrow.layers] == ["sliding"]


def test_a_missing_mlp_width_is_an_error_and_not_no_mlp() -> None:
    without = {key: value for key, value in LLAMA_8B.items() if key != "intermediate_size"}
    with pytest.raises(ValueError, match=r"config\.intermediate_size: wanted an integer"):
        plan(without)
    assert plan({**FALCON_7B, "ffn_hidden_size": 4 * 4544}).weights == plan(FALCON_7B).weights


def test_an_unknown_type_may_be_named_like_a_known_one() -> None:
    novel = {**LLAMA_8B, "model_type": "novel"}
    with pytest.raises(ValueError, match=r"got novel, which is not \(name a family"):
        plan(novel)
    assert plan(novel, model_type="llama") == plan(LLAMA_8B)


def test_layers_may_hold_attention_and_a_state() -> None:
    falcon_h1 = {
        "model_type": "falcon_h1",
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "mamba_d_ssm": 1536,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "mamba_n_heads": 24,
        "num_attention_heads": 8,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "vocab_size": 32784,
    }
    found = {group.kind: group for group in plan(falcon_h1).layers}
    assert (found["full"].num_layers, found["linear"].num_layers) == (36, 36)
    # three inputs of 1536 + 2 x 128 channels, and 1536 x 128 numbers, all at 16 bits
    assert found["linear"].state_bytes == 1792 * 3 * 2 + 1536 * 128 * 2


# --- quantised checkpoints ------------------------------------------------------------------------

INT4 = {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 128}}
MIXED = {"_type": "Int8DynamicActivationInt4WeightConfig"}
FLOAT8 = {"_type": "Float8DynamicActivationFloat8WeightConfig"}
UINT4 = [{"dtype": "uint4", "group_size": 128}]
NVFP4_GROUP = {"g": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}
HQQ = {"weight_quant_params": {"nbits": 3, "group_size": 64}, "scale_quant_params": None}


@pytest.mark.parametrize(
    ("quantised", "bits"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, 4.5),
        ({"quant_method": "torchao", "quant_type": {"default": INT4}}, 4.25),
        ({"quant_method": "torchao", "quant_type": {"default": MIXED}}, 4.25),
        ({"quant_method": "torchao", "quant_type": {"default": FLOAT8}}, 8),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, 8),
        ({"quant_method": "hqq", "quant_config": HQQ}, 3.25),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}, 8),
        ({"quant_method": "quark", "global_quant_config": {"weight": UINT4}}, 4.25),
        ({"quant_method": "gptq", "bits": 3}, 3.25),
        ({"quant_method": "gptq", "bits": 2}, 2.25),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}, 8),
        ({"quant_method": "fbgemm_fp8"}, 8),
        ({"quant_method": "mxfp8"}, 8),
        ({"quant_method": "quanto", "weights": "int2", "activations": "float8"}, 2.25),
        ({"quant_method": "bitnet"}, 2.25),
        ({"quant_method": "eetq", "weights": "int8"}, 8),
        ({"quant_method": "aqlm", "in_group_size": 8, "nbits_per_codebook": 16}, 2.25),
        ({"quant_method": "fp_quant", "forward_dtype": "mxfp4"}, 4.25),
        ({"quant_method": "auto-round", "bits": 4}, 4.25),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, 4.25),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": NVFP4_GROUP,
            },
            4.5,
        ),
    ],
)
def test_published_widths(quantised: dict[str, Any], bits: float) -> None:
    found = ModelConfig({**LLAMA_8B, "quantization_config": quantised}).quantisation
    assert found.bits_of("model.layers.0.mlp.up_proj") == bits
    weights = plan({**LLAMA_8B, "quantization_config": quantised}).weights
    other = 2 * 128256 * 4096 + 65 * 4096
    linear = weights.num_params - other
    assert weights.num_bytes == pytest.approx(linear * bits / 8 + 2 * other, rel=1e-6)


@pytest.mark.parametrize(
    ("key", "pattern", "skipped"),
    [
        ("modules_to_not_convert", "self_attn", "self_attn"),
        ("modules_to_not_convert", "model.layers.3.mlp", "layers.3.mlp"),
        ("modules_to_not_convert", "model.language_model.layers.3", "layers.3."),
        ("llm_int8_skip_modules", "o_proj", "o_proj"),
        ("ignore", "re:.*self_attn.*", "self_attn"),
        ("ignore", "model.layers.*.self_attn", "self_attn"),
        ("exclude_modules", "*down_proj*", "down_proj"),
        ("exclude", "model.layers.0*", "layers.0."),
    ],
)
def test_modules_that_are_not_converted_stay_at_16_bits(
    key: str, pattern: str, skipped: str
) -> None:
    quantised = {"quant_method": "fp8", key: ["lm_head", pattern]}
    every = list(modules(ModelConfig(LLAMA_8B)))
    kept = sum(m.params for m in every if m.is_linear and skipped in m.name)
    assert kept > 0
    whole = plan({**LLAMA_8B, "quantization_config": {"quant_method": "fp8"}}).weights
    found = plan({**LLAMA_8B, "quantization_config": quantised}).weights
    assert found.num_bytes == whole.num_bytes + kept


def test_patterns_that_match_nothing_change_nothing() -> None:
    for pattern in ("layers.1.mlp_extra", "elf_attn", "re:(", "vision_tower"):
        quantised = {"quant_method": "fp8", "modules_to_not_convert": [pattern]}
        whole = plan({**LLAMA_8B, "quantization_config": {"quant_method": "fp8"}}).weights
        assert plan({**LLAMA_8B, "quantization_config": quantised}).weights == whole


# --- several GPUs ---------------------------------------------------------------------------------


def test_tensor_parallel_ranks_hold_their_heads_and_their_weights() -> None:
    one, four = plan(LLAMA_8B), plan(LLAMA_8B, tensor_parallel=4)
    assert [group.num_kv_heads for group in four.rank_layers] == [2]
    assert four.layers == one.layers
    assert four.row("bf16").bytes_per_token * 4 == one.row("bf16").bytes_per_token
    norms = 65 * 4096
    split = one.weights.num_params - norms
    assert four.weights.num_bytes == split * 2 // 4 + norms * 2
    assert four.weights.num_params == one.weights.num_params
    assert not four.notes


def test_heads_are_copied_where_ranks_outnumber_them() -> None:
    eight, sixteen = plan(LLAMA_8B, tensor_parallel=8), plan(LLAMA_8B, tensor_parallel=16)
    assert eight.row("k4v4").bytes_per_token == sixteen.row("k4v4").bytes_per_token
    assert [group.num_kv_heads for group in sixteen.rank_layers] == [1]
    assert any("8 KV heads on 16 ranks: 2 ranks hold each head" in n for n in sixteen.notes)
    # keys' and values' projections are copied with their heads
    kv = 32 * 2 * 4096 * 1024
    norms = 65 * 4096
    rest = sixteen.weights.num_params - norms - kv
    assert sixteen.weights.num_bytes == rest * 2 // 16 + kv * 2 // 8 + norms * 2


def test_the_fullest_stage_bounds_a_pipeline() -> None:
    assert [len(stage) for stage in _stages(32, 3)] == [11, 11, 10]
    assert [len(stage) for stage in _stages(33, 4)] == [8, 8, 9, 8]
    assert [len(stage) for stage in _stages(61, 8)] == [7, 7, 8, 8, 8, 8, 8, 7]
    found = plan(LLAMA_8B, pipeline_parallel=3)
    assert [group.num_layers for group in found.rank_layers] == [11]
    assert found.row("bf16").bytes_per_token == 11 * 8 * 512
    # the first stage has the embeddings beside as many layers as the second
    layer = (plan(LLAMA_8B).weights.num_params - 2 * 128256 * 4096 - 4096) // 32
    assert found.weights.num_bytes == 2 * (11 * layer + 128256 * 4096)
    assert any("of 3 stages" in note for note in found.notes)


def test_a_tied_embedding_is_held_by_both_ends_of_a_pipeline() -> None:
    tied = {**LLAMA_8B, "tie_word_embeddings": True}
    first, last = plan(LLAMA_8B, pipeline_parallel=2), plan(tied, pipeline_parallel=2)
    assert last.weights.num_bytes == first.weights.num_bytes


def test_replicas_are_noted_not_multiplied() -> None:
    one, two = plan(LLAMA_8B), plan(LLAMA_8B, data_parallel=2)
    assert one.rows == two.rows
    assert any("one of 2 replicas" in note for note in two.notes)
    shown = Console(width=120, file=io.StringIO())
    shown.print(render_plan(plan(LLAMA_8B, tensor_parallel=2, data_parallel=2)))
    assert ", tp 2, dp 2" in shown.file.getvalue()


def test_latents_are_held_by_every_rank() -> None:
    mla = {
        **LLAMA_8B,
        "model_type": "deepseek_v3",
        "kv_lora_rank": 512,
        "num_key_value_heads": 32,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    one, four = plan(mla), plan(mla, tensor_parallel=4)
    assert one.row("bf16").bytes_per_token == four.row("bf16").bytes_per_token == 32 * 576 * 2
    assert any("the latent vector is held by each of 4 ranks" in note for note in four.notes)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tensor_parallel": 3}, ValueError, "tensor_parallel: wanted a number that divides 32"),
        ({"tensor_parallel": 0}, ValueError, "tensor_parallel: wanted 1 or more, got 0"),
        ({"tensor_parallel": 2.0}, TypeError, "tensor_parallel: wanted an integer, got 2.0"),
        ({"pipeline_parallel": 33}, ValueError, "pipeline_parallel: wanted at most 32"),
        ({"data_parallel": -1}, ValueError, "data_parallel: wanted 1 or more, got -1"),
    ],
)
def test_degrees_that_do_not_fit_are_named(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as raised:
        plan(LLAMA_8B, **options)
    assert words in str(raised.value)
