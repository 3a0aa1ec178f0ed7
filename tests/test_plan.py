# SPDX-License-Identifier: Apache-2.0
"""Plans against figures worked out by hand, and against parameter counts of published models."""

from __future__ import annotations

import io
import json
import pathlib
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from turbokv import core, plan_report
from turbokv.plan import GIB, Plan, plan

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
QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 36,
    "tie_word_embeddings": False,
}
QWEN3_NEXT_80B: dict[str, Any] = {
    "model_type": "qwen3_next",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "vocab_size": 151936,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 512,
    "num_experts": 512,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
}
# As published: nested, and most of the attention's shape left to Transformers' defaults.
GEMMA3_4B: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "quantization_config": {"quant_method": "fp8"},
}
GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
    "vocab_size": 262144,
}
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "sliding_window": None,
    "vocab_size": 32000,
}


def groups(found: Plan) -> dict[str, tuple[int, int, int, int | None]]:
    return {g.kind: (g.num_layers, g.num_kv_heads, g.k_dim, g.window) for g in found.layers}


def test_llama_agrees_with_the_hand_calculation() -> None:
    found = plan(LLAMA_8B, gpu_memory=80, context=32768)
    assert groups(found) == {"full": (32, 8, 128, None)}
    assert found.weights.num_params == 8_030_261_248
    assert found.weights.num_bytes == 16_060_522_496
    # 80 GiB * 0.9 - 2 GiB - weights
    assert found.cache_bytes == 77_309_411_328 - 2 * GIB - 16_060_522_496
    bf16, fp8, tq4 = found.row("bf16"), found.row("fp8"), found.row("k4v4")
    # 32 layers x 8 heads x 2 x 128 numbers
    assert (bf16.bytes_per_token, fp8.bytes_per_token) == (131_072, 65_536)
    # 64 + 64 bytes of codes and 4 of scales, per head and layer
    assert tq4.bytes_per_token == 32 * 8 * 132
    assert tq4.bits_per_number == pytest.approx(4.125)
    assert bf16.tokens == 59_101_405_184 // 131_072
    assert bf16.sequences == 59_101_405_184 // (131_072 * 32768)
    slot = 32 * 8 * 2 * 16 * 128 * 2
    assert tq4.recent_bytes == int(0.05 * 59_101_405_184) // slot * slot
    assert tq4.whole_windows == tq4.recent_bytes // slot // 10
    assert tq4.tokens == (59_101_405_184 - tq4.recent_bytes) // (32 * 8 * 132)
    assert tq4.ratio == pytest.approx(512 / 132 * (1 - tq4.recent_bytes / found.cache_bytes))
    assert found.notes == ()


@pytest.mark.parametrize(
    ("name", "token_bytes"),
    [
        ("k8v4", 128 + 64 + 4),
        ("k5v5", 80 + 80 + 4),
        ("k5v4", 80 + 64 + 4),
        ("k4v4", 64 + 64 + 4),
        ("k5v3", 80 + 48 + 4),
        ("k4v3", 64 + 48 + 4),
        ("k3v3", 48 + 48 + 4),
        ("k4v2", 64 + 32 + 4),
        ("k3v2", 48 + 32 + 4),
        ("k2v2", 32 + 32 + 4),
    ],
)
def test_qwen3_presets_agree_with_the_hand_calculation(name: str, token_bytes: int) -> None:
    found = plan(QWEN3_8B, recent_fraction=0)
    row = found.row(name)
    assert row.bytes_per_token == 36 * 8 * token_bytes
    assert row.bytes_per_sequence == 32768 * 36 * 8 * token_bytes
    assert row.ratio == pytest.approx(512 / token_bytes)
    assert found.weights.num_params == 8_190_735_360


def test_hybrid_counts_full_layers_and_a_constant_state() -> None:
    found = plan(QWEN3_NEXT_80B, gpu_memory=320, context=100_000)
    assert groups(found)["full"] == (12, 2, 256, None)
    linear = next(group for group in found.layers if group.kind == "linear")
    assert linear.num_layers == 36
    # (2 x 2048 + 4096) channels x 3 inputs, and 32 heads x 128 x 128, in 16 bits as engines do
    assert linear.state_bytes == 49_152 + 1_048_576
    bf16 = found.row("bf16")
    assert bf16.bytes_per_token == 12 * 2 * 512 * 2
    assert bf16.bytes_per_sequence == 100_000 * 24_576 + 36 * 1_097_728
    tq4 = found.row("k4v4")
    assert tq4.bytes_per_sequence == 100_000 * 12 * 2 * 260 + 36 * 1_097_728
    assert found.weights.num_params == 79_674_391_296


def test_hybrid_reads_layer_types_and_the_state_dtype_of_nested_configs() -> None:
    text = {
        **QWEN3_NEXT_80B,
        "model_type": "qwen3_5_text",
        "num_experts": None,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 16,
        "mamba_ssm_dtype": "float32",
    }
    found = plan({"model_type": "qwen3_5", "text_config": text})
    assert groups(found)["full"][0] == 16
    linear = next(group for group in found.layers if group.kind == "linear")
    assert (linear.num_layers, linear.state_bytes) == (32, 49_152 + 2_097_152)


def test_gemma3_sliding_layers_stop_at_their_window_and_stay_at_16_bits() -> None:
    found = plan(GEMMA3_4B, context=32768)
    assert groups(found) == {"sliding": (29, 4, 256, 1024), "full": (5, 4, 256, None)}
    sliding = 29 * 4 * 2 * 256 * 2 * 1024
    assert found.row("bf16").bytes_per_sequence == sliding + 5 * 4 * 2 * 256 * 2 * 32768
    assert found.row("fp8").bytes_per_sequence == found.row("bf16").bytes_per_sequence // 2
    assert found.row("k4v4").bytes_per_sequence == sliding + 5 * 4 * 260 * 32768
    assert found.weights.num_params == 3_880_263_168
    assert any("vision" in note for note in found.notes)


def test_short_contexts_do_not_fill_a_sliding_window() -> None:
    row = plan(GEMMA3_4B, context=100).row("bf16")
    assert row.bytes_per_sequence == 34 * 4 * 2 * 256 * 2 * 112  # seven tiles of 16


def test_gemma4_mixes_head_sizes_and_shares_caches() -> None:
    found = plan(GEMMA4)
    assert groups(found) == {"sliding": (25, 4, 256, 512), "full": (5, 4, 512, None)}
    assert found.weights.num_params == 5_077_177_856
    assert found.row("k4v4").bytes_per_token == 5 * 4 * (256 + 256 + 4)
    shared = plan({**GEMMA4, "num_kv_shared_layers": 18})
    assert {g.kind: g.num_layers for g in shared.layers} == {"sliding": 10, "full": 2}
    doubled = plan({**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 2})
    assert groups(doubled)["full"] == (5, 2, 512, None)


def test_mla_offers_no_preset_and_says_why() -> None:
    found = plan(DEEPSEEK_V3, gpu_memory=8 * 140)
    assert [row.name for row in found.rows] == ["bf16", "fp8"]
    # 61 layers x (512 + 64) numbers x 2 bytes
    assert found.row("bf16").bytes_per_token == 70_272
    assert any("MLA" in note for note in found.notes)
    assert found.weights.num_params == 671_026_404_352
    assert "8 bits" in found.weights.source


def test_all_sliding_mistral_has_nothing_to_compress() -> None:
    found = plan({**LLAMA_8B, "model_type": "mistral", "sliding_window": 4096})
    assert groups(found) == {"sliding": (32, 8, 128, 4096)}
    assert [row.name for row in found.rows] == ["bf16", "fp8"]
    assert found.row("bf16").longest_sequence is None
    assert any("nothing to compress" in note for note in found.notes)


def test_qwen2_window_applies_from_max_window_layers_only_when_in_use() -> None:
    config = {**LLAMA_8B, "model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 28}
    assert groups(plan(config)) == {"full": (32, 8, 128, None)}
    found = plan({**config, "use_sliding_window": True})
    assert groups(found) == {"full": (28, 8, 128, None), "sliding": (4, 8, 128, 4096)}


def test_mixture_of_experts_counts_every_expert() -> None:
    assert plan(MIXTRAL, gpu_memory=160).weights.num_params == 46_702_792_704


def test_head_sizes_are_padded_as_the_codec_pads_them() -> None:
    found = plan({**QWEN3_8B, "head_dim": 96}, recent_fraction=0)
    assert found.row("k4v4").bytes_per_token == 36 * 8 * (64 + 64 + 4)
    codes = core.packed_dim(96, 5) + core.packed_dim(96, 3)
    assert found.row("k5v3").bytes_per_token == 36 * 8 * (codes + 4)


def test_heads_of_two_sizes_are_left_alone() -> None:
    found = plan({**QWEN3_8B, "head_dim": 192, "v_head_dim": 128})
    assert found.row("bf16").bytes_per_token == 36 * 8 * 320 * 2
    assert [row.name for row in found.rows] == ["bf16", "fp8"]
    assert any("different sizes" in note for note in found.notes)


def test_small_heads_are_left_alone() -> None:
    found = plan({**LLAMA_8B, "head_dim": 32})
    assert any("32 or less" in note for note in found.notes)
    assert [row.name for row in found.rows] == ["bf16", "fp8"]


def test_longest_sequence_is_the_last_that_fits() -> None:
    for config in (LLAMA_8B, GEMMA3_4B, QWEN3_NEXT_80B):
        found = plan(config, gpu_memory=240)
        for row in found.rows:
            assert row.longest_sequence is not None
            longer = plan(config, gpu_memory=240, context=row.longest_sequence + 16).row(row.name)
            exact = plan(config, gpu_memory=240, context=row.longest_sequence).row(row.name)
            assert (longer.sequences, exact.sequences) == (0, 1)


def test_narrow_weights_keep_embeddings_at_16_bits() -> None:
    embeddings_and_norms = 2 * 128256 * 4096 + 65 * 4096
    linear = 8_030_261_248 - embeddings_and_norms
    eight, four = (plan(LLAMA_8B, weight_bits=bits).weights.num_bytes for bits in (8, 4))
    assert eight == linear + 2 * embeddings_and_norms
    assert four == linear * 4.25 / 8 + 2 * embeddings_and_norms


@pytest.mark.parametrize(
    ("quantised", "bits"),
    [
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "mxfp4"}, 4),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
            },
            8,
        ),
    ],
)
def test_published_width_is_read_from_the_config(quantised: dict[str, Any], bits: int) -> None:
    found = plan({**LLAMA_8B, "quantization_config": quantised})
    assert found.weights.num_bytes == plan(LLAMA_8B, weight_bits=bits).weights.num_bytes


def test_unknown_quantisation_is_reported() -> None:
    found = plan({**LLAMA_8B, "quantization_config": {"quant_method": "novel"}})
    assert found.weights.num_bytes == 16_060_522_496
    assert any("quantisation is not known" in note for note in found.notes)


def write_model(folder: pathlib.Path, shards: int) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    names: dict[str, str] = {}
    for index in range(shards):
        name = f"model-{index}.safetensors" if shards > 1 else "model.safetensors"
        tensors = {
            f"{index}.embed_tokens.weight": torch.zeros(10, 4, dtype=torch.bfloat16),
            f"{index}.mlp.weight": torch.zeros(8, 4, dtype=torch.bfloat16),
            f"{index}.norm.weight": torch.zeros(4, dtype=torch.float32),
        }
        save_file(tensors, folder / name)
        names.update(dict.fromkeys(tensors, name))
    if shards > 1:
        index_file = {"metadata": {"total_size": 1234}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_are_counted_from_safetensors(tmp_path: pathlib.Path, shards: int) -> None:
    write_model(tmp_path, shards)
    weights = plan(tmp_path).weights
    assert weights.num_params == shards * (40 + 32 + 4)
    assert weights.num_bytes == 2 * weights.num_params  # fp32 is loaded at 16 bits
    assert plan(str(tmp_path / "config.json"), weight_bits=8).weights.num_bytes == shards * (
        32 + 2 * 44
    )


def test_index_without_its_shards_still_gives_the_bytes(tmp_path: pathlib.Path) -> None:
    write_model(tmp_path, 2)
    (tmp_path / "model-1.safetensors").unlink()
    assert plan(tmp_path).weights.num_bytes == 1234


def test_damaged_safetensors_are_named(tmp_path: pathlib.Path) -> None:
    write_model(tmp_path, 1)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(ValueError, match=r"model: wanted safetensors, got model\.safetensors"):
        plan(tmp_path)


def test_small_gpu_gives_a_plan_with_nothing_in_it() -> None:
    found = plan(LLAMA_8B, gpu_memory=8)
    assert found.cache_bytes == 0
    assert {row.tokens for row in found.rows} == {0}
    assert any("leave no memory" in note for note in found.notes)


def test_context_beyond_the_model_is_noted() -> None:
    assert any("131072" in note for note in plan(LLAMA_8B, context=250_000).notes)


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        ("Qwen/Qwen3-8B", {}, ValueError, "model: wanted the path of a config.json"),
        (7, {}, TypeError, "model: wanted a path or a dict, got int"),
        (LLAMA_8B, {"context": 0}, ValueError, "context: wanted 1 or more, got 0"),
        (LLAMA_8B, {"context": 1.5}, TypeError, "context: wanted an integer, got 1.5"),
        (LLAMA_8B, {"gpu_memory": -1}, ValueError, "gpu_memory: wanted 0 or more, got -1"),
        (LLAMA_8B, {"gpu_memory": "80"}, TypeError, "gpu_memory: wanted a number, got '80'"),
        (LLAMA_8B, {"utilisation": 1.1}, ValueError, "utilisation: wanted 0 to 1, got 1.1"),
        (LLAMA_8B, {"activation_reserve": float("nan")}, ValueError, "activation_reserve"),
        (LLAMA_8B, {"recent_fraction": 0.9}, ValueError, "recent_fraction: wanted 0 to 0.5"),
        (LLAMA_8B, {"weight_bits": 5}, ValueError, "weight_bits: wanted 16, 8 or 4, got 5"),
        (LLAMA_8B, {"presets": ["fast"]}, ValueError, "presets: wanted names such as 'tq4'"),
        (LLAMA_8B, {"presets": ["k6v4"]}, ValueError, "presets: wanted widths of (2, 3, 4, 5, 8)"),
        ({}, {}, ValueError, "model_type: wanted a decoder of a family whose shape is known"),
        ({"model_type": "llama"}, {}, ValueError, "config.num_hidden_layers: wanted an integer"),
        ({**LLAMA_8B, "num_hidden_layers": "32"}, {}, TypeError, "config.num_hidden_layers"),
        ({**LLAMA_8B, "num_attention_heads": 0}, {}, ValueError, "wanted at least 1, got 0"),
        ({**LLAMA_8B, "num_attention_heads": 33}, {}, ValueError, "config.head_dim: wanted it"),
        ({**LLAMA_8B, "layer_types": ["full_attention"]}, {}, ValueError, "wanted 32 entries"),
        ({**LLAMA_8B, "layer_types": ["novel"] * 32}, {}, ValueError, "got 'novel'"),
        ({**LLAMA_8B, "layer_types": 3}, {}, TypeError, "config.layer_types: wanted a list"),
        ({**LLAMA_8B, "num_kv_shared_layers": 32}, {}, ValueError, "fewer than the 32 layers"),
        ({**LLAMA_8B, "head_dim": 1024}, {}, ValueError, "head_dim: wanted 8 to 512, got 1024"),
        ({"text_config": 1}, {}, TypeError, "config.text_config: wanted an object"),
        ({**LLAMA_8B, "mamba_d_state": 16}, {}, ValueError, "got mamba_d_state"),
        (
            {**LLAMA_8B, "layer_types": ["sliding_attention"] * 32},
            {},
            ValueError,
            "config.sliding_window",
        ),
    ],
)
def test_bad_input_is_named(
    model: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as raised:
        plan(model, **options)
    assert words in str(raised.value)


def test_broken_config_file_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.json"
    for content in (b"{", b"\xff\xfe\x00", b"[]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model: wanted"):
            plan(path)


def test_unknown_row_is_named() -> None:
    with pytest.raises(ValueError, match="name: wanted one of"):
        plan(LLAMA_8B).row("k9v9")


def test_plan_is_json_and_renders() -> None:
    found = plan(GEMMA3_4B, context=250_000)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["context"] == 250_000
    console = Console(width=160, record=True, file=io.StringIO())
    for config in (LLAMA_8B, GEMMA3_4B, QWEN3_NEXT_80B, DEEPSEEK_V3):
        console.print(plan_report.render(plan(config)))
    text = console.export_text()
    for words in ("tq4", "window 1024", "36 linear", "61 latent", "of cache"):
        assert words in text
