# SPDX-License-Identifier: Apache-2.0
"""What a model's ``config.json`` says of its memory: layers that hold a cache, and weights.

No model is loaded and nothing is downloaded. Weights are counted from safetensors headers that lie
beside the config, else estimated from it.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["full", "sliding", "latent", "linear"]
# Transformers' names of layer types, the two of older configs included.
_KINDS: dict[str, Kind] = {
    "attention": "full",
    "chunked_attention": "sliding",
    "full_attention": "full",
    "linear_attention": "linear",
    "sliding_attention": "sliding",
}
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
# What published configs leave to Transformers' defaults, by model_type without "_text".
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 256, "sliding_window_pattern": 2, "tie_word_embeddings": True},
    "gemma3": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "vocab_size": 262_208,
    },
    "gemma4": {
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
    },
    "qwen2": {"attention_bias": True, "use_sliding_window": False},
    "qwen2_moe": {"attention_bias": True, "use_sliding_window": False},
    "qwen3": {"head_dim": 128, "use_sliding_window": False},
    "qwen3_moe": {"head_dim": 128, "use_sliding_window": False},
    "qwen3_next": _GATED_DELTA,
    "qwen3_5": _GATED_DELTA,
    "qwen3_5_moe": _GATED_DELTA,
}
_PLAIN_TYPES = ("llama", "mistral", "mixtral", "deepseek_v2", "deepseek_v3", "smollm3", "glm4_moe")
KNOWN_TYPES = (*_DEFAULTS, *_PLAIN_TYPES)
# Layouts with other state than keys and values, which would be planned wrongly in silence.
_FOREIGN_KEYS = ("hybrid_override_pattern", "linear_attn_config", "mamba_d_state", "ssm_cfg")
_DTYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16}


@dataclass(frozen=True)
class LayerGroup:
    """Layers that hold the same state.

    Attributes
    ----------
    kind
        ``full`` attention; ``sliding`` (and chunked), whose cache stops growing at ``window``
        tokens; ``latent`` (MLA: one vector per token); ``linear``, a constant ``state_bytes`` per
        sequence.
    num_layers
        How many.
    num_kv_heads, k_dim, v_dim
        Per layer; a latent is one head with ``v_dim`` 0.
    """

    kind: Kind
    num_layers: int
    num_kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    window: int | None = None
    state_bytes: int = 0

    @property
    def is_compressible(self) -> bool:
        """Whether TurboKV has pages for it: full attention, K and V of one size above 32."""
        return self.kind == "full" and self.k_dim == self.v_dim and self.k_dim > 32


@dataclass(frozen=True)
class Weights:
    """Parameters and the bytes they take on the GPU; ``source`` says how they were counted."""

    num_params: int
    num_bytes: int
    source: str


class ModelConfig:
    """A decoder's config: what the file says, else what Transformers would assume."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        nested = raw.get("text_config")
        if nested is not None and not isinstance(nested, Mapping):
            raise TypeError(f"config.text_config: wanted an object, got {nested!r}")
        self._raw = raw
        self._text = raw if nested is None else nested
        self.model_type = str(self._text.get("model_type") or raw.get("model_type") or "unknown")
        self.family = self.model_type.removesuffix("_text")
        self._defaults = _DEFAULTS.get(self.family, {})
        self.has_towers = any(key in raw for key in ("vision_config", "audio_config"))
        foreign = [key for key in _FOREIGN_KEYS if self._text.get(key)]
        if foreign:
            raise ValueError(
                f"model: wanted attention layers that can be planned, got {foreign[0]}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value; null and absent are the same."""
        for source in (self._text, self._defaults):
            if source.get(key) is not None:
                return source[key]
        return default

    def __contains__(self, key: str) -> bool:
        """Return whether the key has a value, given or assumed."""
        return self.get(key) is not None

    def number(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return an integer of at least ``least``, or raise naming the key."""
        value = self.get(key, default)
        if value is None:
            raise ValueError(f"config.{key}: wanted an integer, got a {self.model_type} without it")
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"config.{key}: wanted an integer, got {value!r}")
        if value < least:
            raise ValueError(f"config.{key}: wanted at least {least}, got {value}")
        return value

    @property
    def num_layers(self) -> int:
        """Number of layers, of every kind."""
        return self.number("num_hidden_layers")

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return self.number("num_attention_heads")

    @property
    def head_dim(self) -> int:
        """Elements of a head, from the hidden size where the config does not say."""
        if self.get("head_dim") is None:
            hidden = self.number("hidden_size")
            if hidden % self.num_heads:
                raise ValueError(
                    f"config.head_dim: wanted it, because hidden_size {hidden} is no multiple of"
                    f" {self.num_heads} heads, got none"
                )
            return hidden // self.num_heads
        return self.number("head_dim")

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding; nested configs may say it outside."""
        for source in (self._text, self._raw, self._defaults):
            if source.get("tie_word_embeddings") is not None:
                return bool(source["tie_word_embeddings"])
        return False

    @property
    def is_latent(self) -> bool:
        """Whether attention is multi-head latent (MLA)."""
        return self.get("kv_lora_rank") is not None

    @property
    def num_unshared(self) -> int:
        """Layers that hold a cache: the last ``num_kv_shared_layers`` read an earlier one."""
        shared = self.number("num_kv_shared_layers", 0, least=0)
        if shared >= self.num_layers:
            wanted = f"fewer than the {self.num_layers} layers"
            raise ValueError(f"config.num_kv_shared_layers: wanted {wanted}, got {shared}")
        return self.num_layers - shared

    def checkpoint_bits(self) -> int | None:
        """Return the width of the linear layers' weights as published; None if it is not known."""
        quantised = self._text.get("quantization_config") or self._raw.get("quantization_config")
        if not quantised:
            return 16
        if not isinstance(quantised, Mapping):
            raise TypeError(f"config.quantization_config: wanted an object, got {quantised!r}")
        groups = quantised.get("config_groups") or {}
        weights = [(group.get("weights") or {}).get("num_bits") for group in groups.values()]
        method = str(quantised.get("quant_method", ""))
        named = 8 if "fp8" in method or quantised.get("load_in_8bit") else None
        named = 4 if "fp4" in method or quantised.get("load_in_4bit") else named
        for bits in (quantised.get("bits"), *weights, named):
            if bits in (4, 8):
                return int(bits)
        return None

    def kinds(self) -> list[Kind]:
        """Return the kind of every layer."""
        count = self.num_layers
        if self.is_latent:
            return ["latent"] * count
        types = self.get("layer_types")
        if types is not None:
            if not isinstance(types, list):
                raise TypeError(f"config.layer_types: wanted a list, got {types!r}")
            if len(types) != count:
                raise ValueError(f"config.layer_types: wanted {count} entries, got {len(types)}")
            unknown = sorted({str(t) for t in types} - set(_KINDS))
            if unknown:
                raise ValueError(f"config.layer_types: wanted {sorted(_KINDS)}, got {unknown[0]!r}")
            return [_KINDS[t] for t in types]
        if self.get("full_attention_interval") is not None:
            every = self.number("full_attention_interval")
            return ["full" if (i + 1) % every == 0 else "linear" for i in range(count)]
        if self.get("sliding_window") is None or not self.get("use_sliding_window", True):
            return ["full"] * count
        if self.get("sliding_window_pattern") is not None:
            every = self.number("sliding_window_pattern")
            kinds: list[Kind] = ["sliding" if (i + 1) % every else "full" for i in range(count)]
            if self.family == "gemma4":
                kinds[-1] = "full"
            return kinds
        first = self.number("max_window_layers", 0, least=0) if "use_sliding_window" in self else 0
        return ["full" if i < first else "sliding" for i in range(count)]

    def layer(self, kind: Kind) -> LayerGroup:
        """Return the state that one layer of this kind holds."""
        if kind == "latent":
            numbers = self.number("kv_lora_rank") + self.number("qk_rope_head_dim")
            return LayerGroup("latent", 1, num_kv_heads=1, k_dim=numbers)
        if kind == "linear":
            k_dim, v_dim = self.linear_dims()
            # the convolution keeps its last inputs at 16 bits; the state is fp32 unless the config
            # says otherwise
            conv = (2 * k_dim + v_dim) * (self.number("linear_conv_kernel_dim") - 1) * 2
            width = 2 if self.get("mamba_ssm_dtype") in ("bfloat16", "float16") else 4
            state = v_dim * self.number("linear_key_head_dim") * width
            return LayerGroup("linear", 1, state_bytes=conv + state)
        heads, dim = self.number("num_key_value_heads", self.num_heads), self.head_dim
        if kind == "full":
            dim = self.number("global_head_dim", dim)
            # Gemma 4 has another head count only where keys double as values
            if self.family != "gemma4" or self.get("attention_k_eq_v"):
                heads = self.number("num_global_key_value_heads", heads)
        v_dim = self.number("v_head_dim", dim)
        window = None
        if kind == "sliding":
            window = self.number("sliding_window", self.get("attention_chunk_size"))
        return LayerGroup(kind, 1, num_kv_heads=heads, k_dim=dim, v_dim=v_dim, window=window)

    def linear_dims(self) -> tuple[int, int]:
        """Return the widths of all keys and of all values of a linear-attention layer."""
        return (
            self.number("linear_num_key_heads") * self.number("linear_key_head_dim"),
            self.number("linear_num_value_heads") * self.number("linear_value_head_dim"),
        )


def layer_groups(config: ModelConfig) -> tuple[LayerGroup, ...]:
    """Return the layers that hold state, grouped by what they hold."""
    counts = Counter(config.kinds()[: config.num_unshared])
    return tuple(
        LayerGroup(**{**asdict(config.layer(kind)), "num_layers": n}) for kind, n in counts.items()
    )


# --- weights --------------------------------------------------------------------------------------


def _attention_params(config: ModelConfig, kind: Kind, holds_cache: bool) -> int:
    """Return the parameters of one layer's token mixer, biases and inner norms included."""
    hidden, heads = config.number("hidden_size"), config.num_heads
    layer = config.layer(kind)
    if kind == "latent":
        rank, rope = config.number("kv_lora_rank"), config.number("qk_rope_head_dim")
        nope, v_dim = config.number("qk_nope_head_dim"), config.number("v_head_dim")
        q_out = heads * (nope + rope)
        q_rank = config.number("q_lora_rank", 0, least=0)
        q = hidden * q_rank + q_rank + q_rank * q_out if q_rank else hidden * q_out
        kv = hidden * (rank + rope) + rank + rank * heads * (nope + v_dim)
        return q + kv + heads * v_dim * hidden
    if kind == "linear":
        k_dim, v_dim = config.linear_dims()
        v_heads, conv = config.number("linear_num_value_heads"), 2 * k_dim + v_dim
        projections = hidden * (conv + v_dim + 2 * v_heads) + v_dim * hidden
        small = conv * config.number("linear_conv_kernel_dim") + 2 * v_heads
        return projections + small + config.number("linear_value_head_dim")
    q_out = heads * layer.k_dim
    k_out, v_out = layer.num_kv_heads * layer.k_dim, layer.num_kv_heads * layer.v_dim
    if config.get("attention_k_eq_v") and kind == "full":
        v_out = 0
    kv_out = k_out + v_out if holds_cache else 0
    gate = q_out if config.get("attn_output_gate") else 0
    params = hidden * (q_out + gate + kv_out) + heads * layer.v_dim * hidden
    if config.family.startswith(("qwen3", "gemma3", "gemma4")):  # norms of q and k
        params += layer.k_dim * (2 if holds_cache else 1)
    if config.get("attention_bias"):
        params += q_out + kv_out + (0 if config.family.startswith("qwen2") else hidden)
    return params


def _mlp_params(config: ModelConfig, index: int) -> int:
    """Return the parameters of one layer's gated MLP, or of its experts and router."""
    hidden = config.number("hidden_size")
    dense = 3 * hidden * config.number("intermediate_size", 0, least=0)
    if config.get("use_double_wide_mlp") and index >= config.num_unshared:
        dense *= 2
    experts = next(
        (
            config.number(k)
            for k in ("num_experts", "num_local_experts", "n_routed_experts")
            if k in config
        ),
        0,
    )
    is_sparse = (
        experts > 0
        and index >= config.number("first_k_dense_replace", 0, least=0)
        and index not in config.get("mlp_only_layers", [])
        and (index + 1) % config.number("decoder_sparse_step", 1) == 0
        and config.get("enable_moe_block", True)
    )
    if not is_sparse:
        return dense
    width = config.number("moe_intermediate_size", config.get("intermediate_size"))
    shared = config.number("n_shared_experts", 0, least=0) * width
    gated_shared = config.number("shared_expert_intermediate_size", 0, least=0)
    params = 3 * hidden * (experts * width + shared + gated_shared) + hidden * experts
    if gated_shared:
        params += hidden
    return params + (dense if config.family == "gemma4" else 0)


def _estimate(config: ModelConfig) -> tuple[int, int]:
    """Return the parameters of linear layers, and of embeddings, output head and norms."""
    hidden, count = config.number("hidden_size"), config.num_layers
    vocabulary = config.number("vocab_size")
    linear = sum(
        _attention_params(config, kind, i < config.num_unshared) + _mlp_params(config, i)
        for i, kind in enumerate(config.kinds())
    )
    norms = 4 if config.family.startswith("gemma") else 2
    other = vocabulary * hidden * (1 if config.tied else 2) + (norms * count + 1) * hidden
    extra = config.number("hidden_size_per_layer_input", 0, least=0)
    if extra:  # Gemma 4 and 3n: a second embedding, one slice for every layer
        other += config.number("vocab_size_per_layer_input") * count * extra
        other += count * hidden + extra
        linear += 3 * hidden * count * extra
    return linear, other


def _read_header(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON header of a safetensors file."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > 100 << 20:  # the format's own limit
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
    except ValueError as error:
        raise ValueError(f"model: wanted safetensors, got {path.name}: {error}") from error
    header.pop("__metadata__", None)
    return dict(header)


def _shards(folder: pathlib.Path) -> tuple[list[pathlib.Path], int | None]:
    """Return the folder's safetensors files and, if some are absent, the bytes its index gives."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("model*.safetensors")), None
    content = json.loads(index.read_text(encoding="utf-8"))
    shards = [folder / name for name in sorted(set(content.get("weight_map", {}).values()))]
    if shards and all(shard.is_file() for shard in shards):
        return shards, None
    total = content.get("metadata", {}).get("total_size")
    return [], int(total) if total is not None else None


def _narrow_bytes(linear: int, other: int, bits: int) -> int:
    """Return the bytes of weights whose linear layers have ``bits`` and the rest 16.

    Four bits carry a 16-bit scale and zero for every 128 weights, as AWQ and GPTQ store them.
    """
    per_weight = bits + 32 / 128 if bits == 4 else bits
    return math.ceil(linear * per_weight / 8) + 2 * other


def count_weights(config: ModelConfig, folder: pathlib.Path | None, bits: int | None) -> Weights:
    """Return the weights: counted from ``folder``'s safetensors, else estimated.

    ``bits`` is the width to assume for linear layers; None takes the checkpoint as published.
    """
    published = config.checkpoint_bits()
    shards, total_size = _shards(folder) if folder is not None else ([], None)
    linear, other, stored = 0, 0, 0
    for shard in shards:
        for name, entry in _read_header(shard).items():
            count = math.prod(entry["shape"])
            width = _DTYPE_BITS.get(entry["dtype"], 8)
            # engines load plain fp32 checkpoints at 16 bits
            stored += count * (min(width, 16) if published == 16 else width) // 8
            if len(entry["shape"]) > 1 and not re.search(r"embed_tokens|lm_head", name):
                linear += count
            else:
                other += count
    if shards and bits is None:
        return Weights(linear + other, stored, "counted from safetensors headers")
    if shards and published == 16 and bits is not None:
        source = f"counted from safetensors headers, linear layers at {bits} bits"
        return Weights(linear + other, _narrow_bytes(linear, other, bits), source)
    # a quantised checkpoint packs its numbers, so parameters are not what its headers list
    linear, other = _estimate(config)
    if total_size is not None and bits is None:
        return Weights(linear + other, total_size, "total of model.safetensors.index.json")
    used = bits or published or 16
    source = f"estimated from the config, linear layers at {used} bits"
    return Weights(linear + other, _narrow_bytes(linear, other, used), source)


def read_model(
    model: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[ModelConfig, pathlib.Path | None]:
    """Read a config.

    Parameters
    ----------
    model
        Path of a ``config.json``, of a folder that holds one, or the parsed config.

    Returns
    -------
    tuple
        The config and the folder it came from, None for a parsed one.

    Raises
    ------
    TypeError, ValueError
        If there is no such file or it holds no JSON object.
    """
    if isinstance(model, Mapping):
        return ModelConfig(model), None
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model: wanted a path or a dict, got {type(model).__name__}")
    path = pathlib.Path(model)
    path = path / "config.json" if path.is_dir() else path
    wanted = "the path of a config.json or of a folder that holds one (nothing is downloaded)"
    if not path.is_file():
        raise ValueError(f"model: wanted {wanted}, got {str(model)!r}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON, or bytes that are no text
        raise ValueError(f"model: wanted {wanted}, got {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"model: wanted a JSON object, got {type(content).__name__} in {path}")
    return ModelConfig(content), path.parent
