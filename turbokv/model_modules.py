# SPDX-License-Identifier: Apache-2.0
"""The parameters of a decoder, module by module, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from turbokv.model_config import Layer, ModelConfig

# How ranks of tensor parallelism share a module: equal parts, whole KV heads, or a copy each.
Split = Literal["parts", "kv_heads", "copies"]


@dataclass(frozen=True)
class Module:
    """Parameters that are stored and split alike.

    Attributes
    ----------
    name
        Path as in checkpoints.
    layer
        Index, -1 for what comes before the layers, or the number of layers for what follows.
    params
        How many.
    is_linear
        Whether quantisers take it: matrices, and neither embeddings nor routers nor norms.
    split
        How ranks of tensor parallelism share it.
    """

    name: str
    layer: int
    params: int
    is_linear: bool = True
    split: Split = "parts"


def modules(config: ModelConfig) -> Iterator[Module]:
    """Yield all modules of the decoder; towers for images and audio are not counted."""
    hidden, layers = config.number("hidden_size"), config.layers()
    yield from _embeddings(config, len(layers))
    seen_shared = 0
    for layer in layers:
        at = f"model.layers.{layer.index}"
        if config.family == "zamba2" and layer.attention is not None:
            yield from _zamba_shared(config, layer, seen_shared)
            seen_shared += 1
        else:
            if layer.attention == "latent":
                yield from _latent(config, layer, f"{at}.self_attn")
            elif layer.attention is not None:
                yield from _attention(config, layer, f"{at}.self_attn")
            yield from _mlp(config, layer, at)
        if layer.linear:
            yield from _LINEAR[config.facts.linear](config, layer, f"{at}.mixer")
        if config.family == "gemma3n":
            yield from _gemma3n(config, layer, at)
        yield Module(f"{at}.norms", layer.index, config.facts.norms * hidden, False, "copies")
    yield Module("model.norm", len(layers), hidden, False, "copies")


# --- embeddings -----------------------------------------------------------------------------------


def _embeddings(config: ModelConfig, count: int) -> Iterator[Module]:
    hidden, vocabulary = config.number("hidden_size"), config.number("vocab_size")
    # OPT-350M embeds fewer numbers than its layers have
    width = config.number("word_embed_proj_dim", hidden)
    yield Module("model.embed_tokens", -1, vocabulary * width, False)
    if width != hidden:
        yield Module("model.project_in", -1, 2 * width * hidden)
    if not config.tied:
        yield Module("lm_head", count, vocabulary * hidden, False)
    extra_rows = config.facts.learned_positions
    if extra_rows is not None:
        rows = config.number("max_position_embeddings") + extra_rows
        yield Module("model.embed_positions", -1, rows * hidden, False, "copies")
    extra = config.number("hidden_size_per_layer_input", 0, least=0)
    if extra:  # Gemma 4 and 3n: a second embedding, one slice for every layer
        rows = config.number("vocab_size_per_layer_input")
        yield Module("model.embed_tokens_per_layer", -1, rows * count * extra, False)
        yield Module("model.per_layer_model_projection", -1, hidden * count * extra)
        yield Module("model.per_layer_projection_norm", -1, extra, False, "copies")
        for index in range(count):
            at = f"model.layers.{index}"
            yield Module(f"{at}.per_layer_input_gate", index, hidden * extra)
            yield Module(f"{at}.per_layer_projection", index, hidden * extra)
            yield Module(f"{at}.post_per_layer_input_norm", index, hidden, False, "copies")
    if config.family == "gemma3n":
        streams = config.number("altup_num_inputs") - 1
        yield Module("model.altup_projections", -1, 2 * streams * hidden**2)


# --- attention ------------------------------------------------------------------------------------


def _attention(config: ModelConfig, layer: Layer, at: str) -> Iterator[Module]:
    assert layer.attention is not None
    hidden, heads, index = config.number("hidden_size"), config.num_heads, layer.index
    state = config.state(layer.attention)
    holds_cache = index < config.num_unshared
    q_out = heads * state.k_dim * (2 if config.get("attn_output_gate") else 1)
    bias = 1 if config.get("attention_bias") or config.get("use_bias") or config.get("bias") else 0
    yield Module(f"{at}.q_proj", index, (hidden + bias) * q_out)
    if holds_cache:
        k_out, v_out = state.num_kv_heads * state.k_dim, state.num_kv_heads * state.v_dim
        yield Module(f"{at}.k_proj", index, (hidden + bias) * k_out, split="kv_heads")
        if not (config.get("attention_k_eq_v") and layer.attention == "full"):
            yield Module(f"{at}.v_proj", index, (hidden + bias) * v_out, split="kv_heads")
    o_bias = 0 if config.family.startswith("qwen2") else bias * hidden
    yield Module(f"{at}.o_proj", index, heads * state.v_dim * hidden + o_bias)
    norm = {"none": 0, "head": state.k_dim, "all": (heads + state.num_kv_heads) // 2 * state.k_dim}
    norms = norm[config.facts.qk_norm] * (2 if holds_cache else 1)
    yield Module(f"{at}.qk_norm", index, norms, False, "copies")


def _latent(config: ModelConfig, layer: Layer, at: str) -> Iterator[Module]:
    hidden, heads, index = config.number("hidden_size"), config.num_heads, layer.index
    rank, rope = config.number("kv_lora_rank"), config.number("qk_rope_head_dim")
    nope, v_dim = config.number("qk_nope_head_dim"), config.number("v_head_dim")
    q_out, q_rank = heads * (nope + rope), config.number("q_lora_rank", 0, least=0)
    if q_rank:
        yield Module(f"{at}.q_a_proj", index, hidden * q_rank + q_rank, split="copies")
        yield Module(f"{at}.q_b_proj", index, q_rank * q_out)
    else:
        yield Module(f"{at}.q_proj", index, hidden * q_out)
    down = hidden * (rank + rope) + rank
    yield Module(f"{at}.kv_a_proj_with_mqa", index, down, split="copies")
    yield Module(f"{at}.kv_b_proj", index, rank * heads * (nope + v_dim))
    yield Module(f"{at}.o_proj", index, heads * v_dim * hidden)
    if "index_head_dim" in config and q_rank:  # DeepSeek's sparse indexer
        dim, own = config.number("index_head_dim"), config.number("index_n_heads")
        params = q_rank * own * dim + hidden * (dim + own) + 2 * dim
        yield Module(f"{at}.indexer", index, params, split="copies")


# --- MLPs -----------------------------------------------------------------------------------------


def _mlp(config: ModelConfig, layer: Layer, at: str) -> Iterator[Module]:
    if layer.mlp is None:
        return
    hidden, index = config.number("hidden_size"), layer.index
    is_sparse = layer.mlp == "sparse"
    # Gemma 4 has its experts beside an MLP, Granite's hybrids beside a shared one
    if not is_sparse or config.family == "gemma4":
        yield from _dense(config, layer, f"{at}.mlp")
    if not is_sparse:
        return
    matrices = 3 if config.facts.gated else 2
    experts = config.number("num_experts")
    inner = config.number("moe_latent_size", hidden)
    width = config.number("moe_intermediate_size", config.get("intermediate_size"))
    bias = (inner + 2 * width) if config.family == "gpt_oss" else 0
    yield Module(f"{at}.mlp.gate", index, hidden * experts, False, "copies")
    per_expert = matrices * inner * width + bias
    yield Module(f"{at}.mlp.experts", index, experts * per_expert)
    if inner != hidden:
        yield Module(f"{at}.mlp.latent_proj", index, 2 * hidden * inner)
    shared = config.number("n_shared_experts", 0, least=0) * width
    shared = config.number("moe_shared_expert_intermediate_size", shared, least=0)
    yield Module(f"{at}.mlp.shared_experts", index, matrices * hidden * shared)
    gated_shared = config.number("shared_expert_intermediate_size", 0, least=0)
    if gated_shared:
        params = 3 * hidden * gated_shared
        yield Module(f"{at}.mlp.shared_expert", index, params)
        yield Module(f"{at}.mlp.shared_expert_gate", index, hidden, False, "copies")
    always = config.number("shared_intermediate_size", 0, least=0)
    yield Module(f"{at}.shared_mlp", index, 3 * hidden * always)


def _dense(config: ModelConfig, layer: Layer, at: str) -> Iterator[Module]:
    hidden, width = config.number("hidden_size"), _dense_width(config, layer.index)
    if config.get("use_double_wide_mlp") and layer.index >= config.num_unshared:
        width *= 2
    has_bias = config.get("mlp_bias") or config.get("use_bias")
    if not config.facts.gated:
        bias = width + hidden if has_bias or config.get("attention_bias") else 0
        yield Module(f"{at}.up_proj", layer.index, hidden * width + bias)
    else:
        bias = 2 * width + hidden if has_bias else 0
        yield Module(f"{at}.gate_proj", layer.index, hidden * width + bias)
        yield Module(f"{at}.up_proj", layer.index, hidden * width)
    yield Module(f"{at}.down_proj", layer.index, hidden * width)


def _dense_width(config: ModelConfig, index: int) -> int:
    """Return the inner width of a layer's MLP, or raise if the config does not give it."""
    if config.family == "granitemoehybrid":
        return config.number("shared_intermediate_size", config.get("intermediate_size"))
    if config.family == "llama4":
        return config.number("intermediate_size_mlp")
    widths = config.get("intermediate_size")
    if isinstance(widths, list):  # Gemma 3n
        entries = config.entries("intermediate_size")
        assert entries is not None
        return int(entries[index])
    ratio = config.facts.mlp_ratio
    default = None if ratio is None else ratio * config.number("hidden_size")
    if config.family == "mpt":
        default = config.number("expansion_ratio", 4) * config.number("hidden_size")
    width = config.number("intermediate_size", default)
    if config.family == "lfm2" and config.get("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        multiple = config.number("block_multiple_of", 256)
        width = int(config.get("block_ffn_dim_multiplier", 1.0) * width)
        width = -(-width // multiple) * multiple
    return width


# --- recurrent layers -----------------------------------------------------------------------------


def _gated_delta(config: ModelConfig, layer: Layer, at: str) -> Iterator[Module]:
    hidden, index = config.number("hidden_size"), layer.index
    k_dim, v_dim = config.linear_dims()
    v_heads, conv = config.number("linear_num_value_heads"), 2 * k_dim + v_dim
    projections = hidden * (conv + v_dim + 2 * v_heads) + v_dim * hidden
    small = conv * config.number("linear_conv_kernel_dim") + 2 * v_heads
    yield Module(f"{at}.projections", index, projections)
    yield Module(f"{at}.conv1d", index, small + config.number("linear_value_head_dim"), False)


def _mamba2(config: ModelConfig, layer: Layer, at: str) -> Iterator[Module]:
    hidden, index = config.number("hidden_size"), layer.index
    inner, groups = config.mamba_dims()
    heads = config.number("mamba_n_heads", inner // config.number("mamba_d_head", 64))
    conv = inner + 2 * groups * config.number("mamba_d_state")
    yield Module(f"{at}.in_proj", index, hidden * (inner + conv + heads))
    yield Module(f"{at}.out_proj", index, inner * hidden)
    small = conv * (config.number("linear_conv_kernel_dim") + 1) + 3 * heads + inner
    yield Module(f"{at}.conv1d", index, small, False)


def _mamba1(config: ModelConfig, layer: Layer, at: str) -> Iterator[Module]:
    hidden, index = config.number("hidden_size"), layer.index
    inner, state = config.mamba_dims()[0], config.number("mamba_d_state")
    rank = config.get("mamba_dt_rank")
    rank = rank if isinstance(rank, int) else -(-hidden // 16)
    yield Module(f"{at}.in_proj", index, 2 * hidden * inner)
    yield Module(f"{at}.x_proj", index, inner * (rank + 2 * state))
    yield Module(f"{at}.dt_proj", index, (rank + 1) * inner)
    yield Module(f"{at}.out_proj", index, inner * hidden)
    small = inner * (config.number("linear_conv_kernel_dim") + 2 + state) + rank + 2 * state
    yield Module(f"{at}.conv1d", index, small, False)


def _short_conv(config: ModelConfig, layer: Layer, at: str) -> Iterator[Module]:
    hidden, index = config.number("hidden_size"), layer.index
    yield Module(f"{at}.in_proj", index, 3 * hidden**2)
    yield Module(f"{at}.out_proj", index, hidden**2)
    small = hidden * config.number("linear_conv_kernel_dim")
    yield Module(f"{at}.conv", index, small, False)


def _lightning(config: ModelConfig, layer: Layer, at: str) -> Iterator[Module]:
    width = config.num_heads * config.head_dim
    params = config.number("hidden_size") * width * 5  # queries, keys, values, a gate, the output
    yield Module(f"{at}.projections", layer.index, params)
    yield Module(f"{at}.norm", layer.index, width, False, "copies")


_LINEAR = {
    "gated_delta": _gated_delta,
    "lightning": _lightning,
    "mamba1": _mamba1,
    "mamba2": _mamba2,
    "short_conv": _short_conv,
}


# --- families with parts of their own -------------------------------------------------------------


def _zamba_shared(config: ModelConfig, layer: Layer, number: int) -> Iterator[Module]:
    """Blocks of attention and MLP that layers share, and what each layer has of its own."""
    hidden, index = config.number("hidden_size"), layer.index
    at = f"model.layers.{index}"
    wide, out = 2 * hidden, config.num_heads * config.head_dim
    width = config.number("intermediate_size")
    if number < config.number("num_mem_blocks", 1):
        kv = config.num_kv_heads * config.head_dim
        yield Module(
            f"{at}.shared_transformer.self_attn", index, wide * (out + 2 * kv) + out * hidden
        )
        yield Module(f"{at}.shared_transformer.feed_forward", index, 3 * hidden * width)
        yield Module(f"{at}.shared_transformer.norms", index, wide + hidden, False, "copies")
    rank = config.number("adapter_rank", 128)
    # every use of a block has adapters of its own
    adapters = rank * (hidden + 2 * width)
    if config.get("use_shared_attention_adapter"):
        adapters += 3 * 2 * wide * rank
    yield Module(f"{at}.adapters", index, adapters)
    yield Module(f"{at}.linear", index, hidden**2)


def _gemma3n(config: ModelConfig, layer: Layer, at: str) -> Iterator[Module]:
    hidden, index = config.number("hidden_size"), layer.index
    streams = config.number("altup_num_inputs")
    yield Module(f"{at}.laurel", index, 2 * hidden * config.number("laurel_rank"))
    altup = streams**2 + streams**3 + hidden * streams + hidden
    yield Module(f"{at}.altup", index, altup, False, "copies")
