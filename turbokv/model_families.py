# SPDX-License-Identifier: Apache-2.0
"""What tells the shape of a decoder beside the numbers of its config, by family.

Families are ``model_type`` without ``_text``. A family is here if the parameters that a plan counts
are within 1% of the model that Transformers builds from its config (``tests/test_plan_models.py``);
every other one is refused by name, since a wrong shape is planned wrongly in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# What a layer holds in place of, or beside, attention.
Linear = Literal["gated_delta", "mamba1", "mamba2", "short_conv", "lightning"]


@dataclass(frozen=True)
class Family:
    """Facts of a family.

    Attributes
    ----------
    defaults
        What published configs leave to Transformers, and keys that its code fixes.
    gated
        Whether a dense MLP has a gate beside its two matrices.
    mlp_ratio
        Width of the MLP over the hidden size, where the config gives no width.
    norms
        Vectors of the hidden size that norms hold in one layer, biases of norms included.
    qk_norm
        Weights of the norms of queries and keys: of a head, of all heads, or none.
    linear
        What ``linear_attention`` means.
    learned_positions
        Rows of the table of positions beyond the longest context, or None without a table.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = True
    mlp_ratio: int | None = None
    norms: int = 2
    qk_norm: Literal["none", "head", "all"] = "none"
    linear: Linear = "gated_delta"
    learned_positions: int | None = None


_TIED = {"tie_word_embeddings": True}
_GATED_DELTA: dict[str, Any] = {
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
}
_GEMMA4: dict[str, Any] = {
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_size_per_layer_input": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "vocab_size": 262_144,
    "vocab_size_per_layer_input": 262_144,
}
_GEMMA3N: dict[str, Any] = {
    "altup_num_inputs": 4,
    "head_dim": 256,
    "hidden_size_per_layer_input": 256,
    "laurel_rank": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 15,
    "sliding_window": 512,
    "sliding_window_pattern": 5,
    "tie_word_embeddings": True,
    "vocab_size": 262_400,
    "vocab_size_per_layer_input": 262_144,
}
_LLAMA4: dict[str, Any] = {
    "attention_chunk_size": 8192,
    "chunked_attention_pattern": 4,
    "head_dim": 128,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "interleave_moe_layer_step": 1,
    "moe_intermediate_size": None,
    "n_shared_experts": 1,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 202_048,
}
_QWEN_MOE = {"attention_bias": True, "use_sliding_window": False}
_GPT = Family(
    {**_TIED, "attention_bias": True, "mlp_bias": True}, gated=False, mlp_ratio=4, norms=4
)

FAMILIES: dict[str, Family] = {
    # like Llama in all that is counted
    **dict.fromkeys(
        (
            *("bitnet", "cwm", "dots1", "exaone4", "exaone_moe", "flint", "glm4_moe", "granite"),
            *("granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense"),
            *("hy_v3", "hyperclovax", "kolibri1", "llama", "mellum", "minimax_m2", "ministral"),
            *("ministral3", "mistral", "mixtral", "olmo", "olmoe", "phi3", "phimoe", "seed_oss"),
            *("solar_open", "stablelm"),
        ),
        Family(),
    ),
    **dict.fromkeys(("ernie4_5", "granite_swa", "smollm3"), Family(_TIED)),
    # multi-head latent attention
    **dict.fromkeys(
        ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
        Family(),
    ),
    **dict.fromkeys(("minicpm3", "youtu"), Family(_TIED)),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), Family(_TIED, norms=1)),
    "gemma": Family({**_TIED, "head_dim": 256}),
    **dict.fromkeys(("olmo2", "olmo3", "flex_olmo"), Family(qk_norm="all")),
    "glm": Family({"head_dim": 128}),
    "glm4": Family({"head_dim": 128}, norms=4),
    "gpt_oss": Family({"attention_bias": True, "head_dim": 64}),
    "ernie4_5_moe": Family(_TIED),
    "llama4": Family(_LLAMA4),
    **dict.fromkeys(
        ("gemma2", "vaultgemma"),
        Family({**_TIED, "head_dim": 256, "sliding_window_pattern": 2}, norms=4),
    ),
    "gemma3": Family(
        {
            "head_dim": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
            "vocab_size": 262_208,
        },
        norms=4,
        qk_norm="head",
    ),
    "gemma3n": Family(_GEMMA3N, norms=8, qk_norm="head"),
    "gemma4": Family(_GEMMA4, norms=4, qk_norm="head"),
    # Qwen
    **dict.fromkeys(
        ("qwen2", "qwen2_vl", "qwen2_5_vl"),
        Family({"attention_bias": True, "use_sliding_window": False}),
    ),
    "qwen2_moe": Family(_QWEN_MOE),
    **dict.fromkeys(
        ("qwen3", "qwen3_vl"),
        Family({"head_dim": 128, "use_sliding_window": False}, qk_norm="head"),
    ),
    **dict.fromkeys(
        ("qwen3_moe", "qwen3_vl_moe"), Family({"use_sliding_window": False}, qk_norm="head")
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), Family(_GATED_DELTA, qk_norm="head")),
    # two matrices in an MLP
    "falcon": Family(_TIED, gated=False, mlp_ratio=4, norms=2),
    **dict.fromkeys(
        ("gpt2", "gpt_bigcode"), Family(_GPT.defaults, False, 4, 4, learned_positions=0)
    ),
    **dict.fromkeys(("gptj", "codegen"), Family({}, False, 4, 2)),
    "gpt_neo": Family(_TIED, False, 4, 4, learned_positions=0),
    "gpt_neox": Family({"attention_bias": True}, False, 4, 4),
    "bloom": _GPT,
    "mpt": Family(_TIED, False, 4, 2),
    "opt": Family({**_TIED, "attention_bias": True}, False, None, 4, learned_positions=2),
    **dict.fromkeys(("phi", "persimmon"), Family({"attention_bias": True}, False, None, 2)),
    "starcoder2": Family({**_TIED, "attention_bias": True}, False, None, 4),
    **dict.fromkeys(("arcee", "apertus"), Family(gated=False)),
    "nemotron": Family({"head_dim": 128}, False, None, 4),
    # attention and recurrent states
    "bamba": Family({"mamba_expand": 2, "mamba_d_conv": 4}, linear="mamba2"),
    "falcon_h1": Family({"mamba_expand": 2, "mamba_d_conv": 4}, linear="mamba2"),
    "granitemoehybrid": Family({"mamba_expand": 2, "mamba_d_conv": 4}, linear="mamba2"),
    "jamba": Family(
        {"attn_layer_offset": 4, "attn_layer_period": 8, "mamba_d_conv": 4, "mamba_expand": 2},
        linear="mamba1",
    ),
    "lfm2": Family(_TIED, linear="short_conv", qk_norm="head"),
    "minimax": Family(linear="lightning"),
    "nemotron_h": Family(gated=False, norms=1, linear="mamba2"),
    "olmo_hybrid": Family(qk_norm="all"),
    "zamba2": Family({**_TIED, "mamba_d_conv": 4, "mamba_expand": 2}, linear="mamba2"),
}

# What else there is, for a sentence that says why it is refused.
ENCODERS = frozenset(
    {
        *("albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert"),
        *("electra", "ernie", "longformer", "modernbert", "mpnet", "nomic_bert", "rembert"),
        *("roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)
ENCODER_DECODERS = frozenset(
    {
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fsmt", "led", "longt5"),
        *("m2m_100", "marian", "mbart", "moonshine", "mt5", "mvp", "nllb-moe", "pegasus"),
        *("pegasus_x", "plbart", "prophetnet", "seamless_m4t", "speech_to_text", "t5", "t5gemma"),
        *("trocr", "umt5", "vision-encoder-decoder", "whisper"),
    }
)
RECURRENT = frozenset({"falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm"})
