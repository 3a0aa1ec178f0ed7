# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the text-generation architectures that Transformers and vLLM both have.

:func:`measure` serves one with a 16-bit cache and with a compressed one and compares the answers.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tests.vllm import engine as e

VOCAB = 512
# Large enough for attention to look at particular tokens, small enough for logits to stay sane.
SPREAD = 0.05

# What every configuration gets that has such a field; its own settings come on top.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": SPREAD,
    "sliding_window": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # Mamba
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "mamba_d_ssm": 512,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "ssm_state_size": 16,
    "n_groups": 1,
    # gated delta rule
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    Attributes
    ----------
    model_type
        Of Transformers' configuration.
    settings
        On top of what all get.
    refusal
        Words of the sentence that refuses it, or None where it is served.
    engine
        More arguments for vLLM.
    unscaled
        Whether scores are not divided by the root of the head size: trained weights of the queries'
        norm are small then, and so are these.
    unavailable
        Why this vLLM cannot run it on its CPU engine even with a 16-bit cache, or None.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    unscaled: bool = False
    unavailable: str | None = None


_MLA = "multi-head latent attention is not supported"
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_THREE_TO_ONE = {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
# Its experts' kernel, or that of linear attention, leaves what was in memory.
_NO_NUMBERS = "vLLM's CPU engine gives no numbers, or others each time"

ZOO: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama"),
    "MistralForCausalLM": Architecture("mistral"),
    "Ministral3ForCausalLM": Architecture("ministral3"),
    "MixtralForCausalLM": Architecture("mixtral"),
    "Llama4ForCausalLM": Architecture(
        "llama4_text",
        {
            "attention_chunk_size": 128,
            "num_experts_per_tok": 1,
            "no_rope_layers": [1, 1, 1, 0],
            "moe_layers": [0, 1, 2, 3],
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
            "intermediate_size_mlp": 256,
        },
    ),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen2MoeForCausalLM": Architecture("qwen2_moe"),
    "Qwen3MoeForCausalLM": Architecture("qwen3_moe"),
    "Qwen3NextForCausalLM": Architecture("qwen3_next", _THREE_TO_ONE, unavailable=_NO_NUMBERS),
    "Qwen3_5ForCausalLM": Architecture("qwen3_5_text", _THREE_TO_ONE),
    "Qwen3_5MoeForCausalLM": Architecture("qwen3_5_moe_text", _THREE_TO_ONE),
    "GemmaForCausalLM": Architecture("gemma"),
    "Gemma2ForCausalLM": Architecture("gemma2", {**_WINDOWS, "query_pre_attn_scalar": 64}),
    "Gemma3ForCausalLM": Architecture("gemma3_text", {**_WINDOWS, "query_pre_attn_scalar": 64}),
    "Gemma3nForCausalLM": Architecture(
        "gemma3n_text",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "intermediate_size": [256] * 6,
            "activation_sparsity_pattern": [0.0] * 6,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 16,
        },
        unscaled=True,
    ),
    "Gemma4ForCausalLM": Architecture(
        "gemma4_text",
        {
            **_WINDOWS,
            "head_dim": 64,
            "global_head_dim": 128,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCAB,
            "num_experts": None,
            "moe_intermediate_size": None,
        },
        unscaled=True,
    ),
    "GptOssForCausalLM": Architecture("gpt_oss", _WINDOWS, unavailable=_NO_NUMBERS),
    "Phi3ForCausalLM": Architecture("phi3", {"sliding_window": None}),
    "GraniteForCausalLM": Architecture("granite", {"attention_multiplier": 0.125}),
    "GraniteMoeForCausalLM": Architecture("granitemoe", {"attention_multiplier": 0.125}),
    "GraniteMoeHybridForCausalLM": Architecture(
        "granitemoehybrid", {"layer_types": ["mamba", "mamba", "mamba", "attention"]}
    ),
    "NemotronForCausalLM": Architecture("nemotron"),
    "NemotronHForCausalLM": Architecture(
        "nemotron_h", {"layers_block_type": ["mamba", "attention", "mlp", "attention"]}
    ),
    "FalconForCausalLM": Architecture(
        "falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}
    ),
    "FalconH1ForCausalLM": Architecture("falcon_h1"),
    "Zamba2ForCausalLM": Architecture(
        "zamba2",
        {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    ),
    "JambaForCausalLM": Architecture("jamba"),
    "Glm4ForCausalLM": Architecture("glm4"),
    "Glm4MoeForCausalLM": Architecture("glm4_moe"),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "OlmoeForCausalLM": Architecture("olmoe"),
    "DeepseekV2ForCausalLM": Architecture("deepseek_v2", refusal=_MLA),
    "DeepseekV3ForCausalLM": Architecture("deepseek_v3", refusal=_MLA),
    "CohereForCausalLM": Architecture("cohere", {"logit_scale": 1.0}),
    "Cohere2ForCausalLM": Architecture("cohere2", {**_WINDOWS, "logit_scale": 1.0}),
    "Starcoder2ForCausalLM": Architecture("starcoder2"),
    "GPT2LMHeadModel": Architecture("gpt2"),
    "GPTJForCausalLM": Architecture("gptj"),
    "OPTForCausalLM": Architecture("opt"),
    "BloomForCausalLM": Architecture("bloom", {"n_head": 4}, refusal="alibi_slopes"),
    "StableLmForCausalLM": Architecture("stablelm"),
    "ApertusForCausalLM": Architecture("apertus"),
    "Ernie4_5ForCausalLM": Architecture("ernie4_5"),
    "Exaone4ForCausalLM": Architecture("exaone4", _WINDOWS),
    "Lfm2ForCausalLM": Architecture(
        "lfm2", {"layer_types": ["conv", "conv", "conv", "full_attention"]}
    ),
    "MiniCPM3ForCausalLM": Architecture("minicpm3"),
    "MiniMaxM2ForCausalLM": Architecture("minimax_m2"),
}


# The architectures that tests serve; scripts/model_zoo.py serves all.
TESTED = (
    "LlamaForCausalLM",
    "Llama4ForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3nForCausalLM",
    "Gemma4ForCausalLM",
    "GptOssForCausalLM",
    "Phi3ForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "NemotronHForCausalLM",
    "FalconH1ForCausalLM",
    "Glm4ForCausalLM",
    "Olmo2ForCausalLM",
    "DeepseekV2ForCausalLM",
    "CohereForCausalLM",
    "Starcoder2ForCausalLM",
)


def small_config(name: str) -> Any:
    """Return a small configuration of an architecture."""
    from transformers import AutoConfig

    entry = ZOO[name]
    plain = AutoConfig.for_model(entry.model_type)
    known = plain.to_dict()
    fields = {key: value for key, value in _SMALL.items() if key in known}
    config = AutoConfig.for_model(entry.model_type, **(fields | entry.settings))
    config.architectures = [name]
    return config


def make(name: str, folder: pathlib.Path, seed: int = 0) -> str:
    """Write a small random model of an architecture to ``folder`` once, and return its path."""
    path = folder / name
    if not (path / "config.json").exists():
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        config, entry = small_config(name), ZOO[name]
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for key, weight in model.named_parameters():
            # what some classes leave as the allocator gave it
            if not weight.isfinite().all() or weight.abs().max() > 8:
                torch.nn.init.normal_(weight, std=SPREAD)
            # Gemma 3n divides by the norm of an embedding, and engines warm up with token 0, the
            # padding, whose row is zero: NaN, from which a GPU samples tokens that do not exist
            if key.endswith("embed_tokens.weight"):
                zero = ~weight.data.any(dim=-1)
                weight.data[zero] = torch.randn_like(weight.data[zero]) * SPREAD
            if entry.unscaled and key.endswith("q_norm.weight"):
                weight.data.mul_(weight.numel() ** -0.5)
        model.save_pretrained(path)
        written = json.loads((path / "config.json").read_text())
        written.pop("transformers_version", None)
        written["architectures"] = [name]
        (path / "config.json").write_text(json.dumps(written))
    return str(path)


# --- serving --------------------------------------------------------------------------------------

KV_CACHE_DTYPE = "tq_k8v4"
# Most tokens are read compressed, the newest and the first in 16 bits.
OPTIONS = {"window": 32, "sinks": 4}
LENGTHS = (200, 40, 5, 130)
TOKENS = 8
# Mean difference of the five best log-probabilities that a served model may have, in nats.
LIMIT = 0.05


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture.

    Attributes
    ----------
    name
        Of the architecture.
    error, agreed
        Difference to the 16-bit cache in nats, and the share of tokens that are the same; None
        unless it was served.
    other_tokens
        The same difference where the older half of each prompt has other tokens: what an error of
        reading the wrong tokens looks like.
    refusal
        The sentence that refused it, or None.
    failure
        Any other error of the compressed cache, or None.
    no_reference
        Why this vLLM does not serve the model with a 16-bit cache here, or None.
    """

    name: str
    error: float | None = None
    agreed: float | None = None
    other_tokens: float | None = None
    refusal: str | None = None
    failure: str | None = None
    no_reference: str | None = None

    def to_json(self) -> str:
        """Return a line of JSON."""
        return json.dumps(asdict(self))


def _serve(
    model: str, kv_cache_dtype: str, entry: Architecture, requests: list[list[int]]
) -> list[e.Answer]:
    settings: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 64}
    if e.on_cpu():
        settings |= {"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 1 << 27}
    if kv_cache_dtype != "auto":
        settings["turbokv"] = OPTIONS
    with e.engine(model, kv_cache_dtype, **(settings | entry.engine)) as llm:
        return e.ask(llm, requests, TOKENS)


def measure(name: str, folder: pathlib.Path) -> Outcome:
    """Serve a tiny model of an architecture with and without compression, and compare."""
    entry, model = ZOO[name], make(name, folder)
    if e.on_cpu() and entry.unavailable is not None:
        return Outcome(name, no_reference=entry.unavailable)
    requests = e.prompts(LENGTHS, VOCAB)
    half = [
        [*others[: len(ids) // 2], *ids[len(ids) // 2 :]]
        for others, ids in zip(e.prompts(LENGTHS, VOCAB, seed=1), requests, strict=True)
    ]
    other_tokens = None
    try:
        plain = _serve(model, "auto", entry, requests + half)
    except Exception as error:  # vLLM's reasons are of all kinds
        if entry.refusal is None:
            return Outcome(name, no_reference=_reason(error))
        plain = []  # ours comes first
    else:
        # what vLLM's CPU engine gives for some: no numbers, or such as no probability has
        if not all(-1e3 < p < 1 for answer in plain for top in answer.top for p in top.values()):
            return Outcome(name, no_reference="its answers are not numbers on this engine")
        wanted, others = plain[: len(requests)], plain[len(requests) :]
        other_tokens = e.compare(others, wanted).error
        if other_tokens <= 2 * LIMIT:  # an error could not be told from none
            return Outcome(name, no_reference="its answers hardly depend on older tokens here")
    try:
        got = _serve(model, KV_CACHE_DTYPE, entry, requests)
    except Exception as error:
        reason = _reason(error)
        is_sentence = f"kv_cache_dtype={KV_CACHE_DTYPE}" in reason
        return Outcome(
            name,
            other_tokens=other_tokens,
            refusal=reason if is_sentence else None,
            failure=None if is_sentence else reason,
        )
    if not plain:
        return Outcome(name, failure="served, though it should have been refused")
    found = e.compare(got, wanted)
    return Outcome(name, found.error, found.agreed, other_tokens)


def _reason(error: Exception) -> str:
    """Return the sentence of ours in an error, or its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if f"kv_cache_dtype={KV_CACHE_DTYPE}" in line]
    text = (ours or lines or [""])[-1 if not ours else 0]
    text = text.split(" [type=")[0].removeprefix("Value error, ")  # pydantic's
    return text[:400] if ours else f"{type(error).__name__}: {text}"[:400]
