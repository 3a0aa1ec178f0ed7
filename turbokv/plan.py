# SPDX-License-Identifier: Apache-2.0
"""What fits: tokens and sequences of a model in a GPU's memory, at 16 bits, fp8 and each preset.

Everything is computed from a ``config.json``; no model is loaded and nothing is downloaded. Memory
is counted in GiB, as drivers report it. Counted are the weights, a reserve for activations, and the
cache in whole tiles of 16 tokens. Not counted: an engine's own padding of pages in models that mix
kinds of layers.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from turbokv.paged import PAGE_BITS, TILE, PageLayout

GIB = 1 << 30
PRESETS = ("k8v4", "k5v5", "k5v4", "k4v4", "k5v3", "k4v3", "k3v3", "k4v2", "k3v2", "k2v2")

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
        """Whether TurboKV has pages for it: full attention, K and V of one size."""
        return self.kind == "full" and self.k_dim == self.v_dim


@dataclass(frozen=True)
class Weights:
    """Parameters and the bytes they take on the GPU; ``source`` says how they were counted."""

    num_params: int
    num_bytes: int
    source: str


@dataclass(frozen=True)
class CacheRow:
    """One cache format.

    Attributes
    ----------
    bits_per_number
        Of the layers whose cache grows with the context, scales and padding included.
    bytes_per_token
        Of the same layers, all of them: what one more token costs.
    bytes_per_sequence
        A sequence of the plan's context: whole tiles, sliding windows and constant states included.
    recent_bytes
        Set aside from the cache for the 16-bit copies of the newest tokens.
    tokens
        That fit in sequences of the plan's context, the last one cut short.
    sequences
        Whole sequences of the plan's context.
    longest_sequence
        Tokens of the longest single sequence, or None if nothing grows with the context.
    ratio
        Tokens that fit, relative to bf16.
    """

    name: str
    bits_per_number: float
    bytes_per_token: int
    bytes_per_sequence: int
    recent_bytes: int
    tokens: int
    sequences: int
    longest_sequence: int | None
    ratio: float


@dataclass(frozen=True)
class Plan:
    """The answer of :func:`plan`; all sizes in bytes.

    ``cache_bytes`` is what weights and reserve leave of the memory that may be used; ``notes`` says
    what the figures do not.
    """

    model_type: str
    layers: tuple[LayerGroup, ...]
    weights: Weights
    gpu_bytes: int
    utilisation: float
    reserve_bytes: int
    cache_bytes: int
    context: int
    rows: tuple[CacheRow, ...]
    notes: tuple[str, ...]

    def row(self, name: str) -> CacheRow:
        """Return the row of this name (``bf16``, ``fp8`` or a preset)."""
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(f"name: wanted one of {[row.name for row in self.rows]}, got {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return asdict(self)


class _Config:
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
        return self.number("num_hidden_layers")

    @property
    def num_heads(self) -> int:
        return self.number("num_attention_heads")

    @property
    def head_dim(self) -> int:
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


def _layer_groups(config: _Config) -> tuple[LayerGroup, ...]:
    counts = Counter(config.kinds()[: config.num_unshared])
    return tuple(
        LayerGroup(**{**asdict(config.layer(kind)), "num_layers": n}) for kind, n in counts.items()
    )


# --- weights --------------------------------------------------------------------------------------


def _attention_params(config: _Config, kind: Kind, holds_cache: bool) -> int:
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


def _mlp_params(config: _Config, index: int) -> int:
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


def _estimate(config: _Config) -> tuple[int, int]:
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


def _count_weights(config: _Config, folder: pathlib.Path | None, bits: int | None) -> Weights:
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


# --- cache ----------------------------------------------------------------------------------------


def _preset_bits(name: str) -> tuple[int, int]:
    match = re.fullmatch(r"k(\d)v(\d)", name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(f"presets: wanted names such as 'k4v4', got {name!r}")
    k_bits, v_bits = int(match[1]), int(match[2])
    if k_bits not in PAGE_BITS or v_bits not in PAGE_BITS:
        raise ValueError(f"presets: wanted widths of {PAGE_BITS}, got {name!r}")
    return k_bits, v_bits


@dataclass(frozen=True)
class _Format:
    """Bytes of a cache format: ``bits`` of plain numbers, or the widths of a preset."""

    name: str
    bits: int
    preset: tuple[int, int] | None = None

    def layer_tile(self, group: LayerGroup) -> int:
        """Return the bytes of a tile of 16 tokens in one layer, all heads."""
        if self.preset is not None and group.is_compressible:
            return PageLayout(group.k_dim, *self.preset, TILE, group.num_kv_heads).page_bytes
        return TILE * group.num_kv_heads * (group.k_dim + group.v_dim) * self.bits // 8

    def growing_tile(self, groups: Sequence[LayerGroup]) -> int:
        """Return the bytes of a tile in all layers whose cache grows with the context."""
        growing = (group for group in groups if group.kind in ("full", "latent"))
        return sum(group.num_layers * self.layer_tile(group) for group in growing)

    def sequence(self, groups: Sequence[LayerGroup], tokens: int) -> int:
        """Return the bytes of one sequence."""
        total = 0
        for group in groups:
            held = tokens if group.window is None else min(tokens, group.window)
            tiles = -(-held // TILE)
            total += group.num_layers * (tiles * self.layer_tile(group) + group.state_bytes)
        return total


def _longest(form: _Format, groups: Sequence[LayerGroup], budget: int) -> int | None:
    growing = form.growing_tile(groups)
    if growing == 0:
        return None
    low, high = 0, budget // growing  # in tiles: `low` fits, `high + 1` does not
    while low < high:
        middle = (low + high + 1) // 2
        fits = form.sequence(groups, middle * TILE) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * TILE


def _rows(
    groups: Sequence[LayerGroup],
    cache_bytes: int,
    context: int,
    recent_fraction: float,
    presets: Sequence[str],
) -> Iterator[CacheRow]:
    forms = [_Format("bf16", 16), _Format("fp8", 8)]
    if any(group.is_compressible for group in groups):
        forms += [_Format(name, 16, _preset_bits(name)) for name in presets]
    numbers = forms[0].growing_tile(groups) // 2
    reference = forms[0].sequence(groups, context)
    for form in forms:
        recent = int(cache_bytes * recent_fraction) if form.preset is not None else 0
        kept = 1 - recent_fraction if form.preset is not None else 1.0
        budget, sequence = cache_bytes - recent, form.sequence(groups, context)
        tile = form.growing_tile(groups)
        yield CacheRow(
            name=form.name,
            bits_per_number=8 * tile / numbers if numbers else 0.0,
            bytes_per_token=-(-tile // TILE),
            bytes_per_sequence=sequence,
            recent_bytes=recent,
            tokens=budget * context // sequence,
            sequences=budget // sequence,
            longest_sequence=_longest(form, groups, budget),
            ratio=kept * reference / sequence,
        )


# --- the plan -------------------------------------------------------------------------------------


def _read_model(
    model: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[_Config, pathlib.Path | None]:
    if isinstance(model, Mapping):
        return _Config(model), None
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
    return _Config(content), path.parent


def _check_real(name: str, value: float, low: float, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: wanted a number, got {value!r}")
    if not low <= value <= high or not math.isfinite(value):
        wanted = f"{low} to {high}" if math.isfinite(high) else f"{low} or more"
        raise ValueError(f"{name}: wanted {wanted}, got {value}")
    return float(value)


def _notes(
    config: _Config,
    groups: Sequence[LayerGroup],
    context: int,
    weights: Weights,
    cache_bytes: int,
) -> Iterator[str]:
    kinds = {group.kind for group in groups}
    if cache_bytes == 0:
        yield "weights and reserve leave no memory for a cache"
    if "latent" in kinds:
        yield "MLA keeps one latent vector per token, which TurboKV does not compress"
        if "index_head_dim" in config:
            yield "the keys of the sparse indexer are not counted"
    if "sliding" in kinds:
        yield "sliding-window layers hold at most their window, and TurboKV leaves them in 16 bits"
    if any(group.kind == "full" and not group.is_compressible for group in groups):
        yield "TurboKV has no pages for keys and values of different sizes"
    if kinds <= {"sliding", "linear"}:
        yield "no layer's cache grows with the context: TurboKV has nothing to compress"
    if "linear" in kinds:
        yield "linear-attention layers hold a constant state per sequence, not compressed"
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and context > limit:
        yield f"the context exceeds the model's max_position_embeddings, {limit}"
    if weights.source.startswith("estimated"):
        if config.has_towers:
            yield "weights of vision and audio towers are not counted"
        if config.family not in (*_DEFAULTS, *_PLAIN_TYPES):
            yield f"model_type {config.model_type} is not known: weights counted as for Llama"
        if config.checkpoint_bits() is None:
            yield "the checkpoint's quantisation is not known; set the width of the weights"


def plan(
    model: str | os.PathLike[str] | Mapping[str, Any],
    *,
    gpu_memory: float = 80.0,
    context: int = 32_768,
    utilisation: float = 0.9,
    weight_bits: int | None = None,
    activation_reserve: float = 2.0,
    recent_fraction: float = 0.02,
    presets: Sequence[str] = PRESETS,
) -> Plan:
    """Plan the cache of a model on a GPU.

    Parameters
    ----------
    model
        Path of a ``config.json``, of a folder that holds one, or the parsed config. Weights are
        counted from safetensors files beside it, else estimated from the config.
    gpu_memory
        GiB of the GPU, or of all GPUs that share the model.
    context
        Tokens of a sequence.
    utilisation
        Share of the memory that may be used at all.
    weight_bits
        16, 8 or 4 for the linear layers; embeddings, output head and norms stay at 16. None takes
        the checkpoint as it is published.
    activation_reserve
        GiB for activations, workspaces and CUDA graphs.
    recent_fraction
        Share of the cache for 16-bit copies of the newest tokens (presets only).
    presets
        Names of TurboKV presets, ``k<bits>v<bits>``.

    Returns
    -------
    Plan
        A row each for bf16, fp8 and every preset; presets are left out where no layer can be
        compressed. If nothing is left for a cache, the rows hold zero tokens and a note says so.

    Raises
    ------
    TypeError, ValueError
        Naming the argument or the config's key, what was wanted and what was got.
    """
    if isinstance(context, bool) or not isinstance(context, int):
        raise TypeError(f"context: wanted an integer, got {context!r}")
    if context < 1:
        raise ValueError(f"context: wanted 1 or more, got {context}")
    if weight_bits not in (None, 4, 8, 16):
        raise ValueError(f"weight_bits: wanted 16, 8 or 4, got {weight_bits!r}")
    gpu_bytes = int(_check_real("gpu_memory", gpu_memory, 0) * GIB)
    usable = int(gpu_bytes * _check_real("utilisation", utilisation, 0, 1))
    reserve = int(_check_real("activation_reserve", activation_reserve, 0) * GIB)
    _check_real("recent_fraction", recent_fraction, 0, 0.5)
    config, folder = _read_model(model)
    groups = _layer_groups(config)
    weights = _count_weights(config, folder, weight_bits)
    cache_bytes = max(0, usable - reserve - weights.num_bytes)
    return Plan(
        model_type=config.model_type,
        layers=groups,
        weights=weights,
        gpu_bytes=gpu_bytes,
        utilisation=utilisation,
        reserve_bytes=reserve,
        cache_bytes=cache_bytes,
        context=context,
        rows=tuple(_rows(groups, cache_bytes, context, recent_fraction, presets)),
        notes=tuple(_notes(config, groups, context, weights, cache_bytes)),
    )


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _describe(group: LayerGroup) -> str:
    if group.kind == "linear":
        return f"{group.num_layers} linear ({_size(group.state_bytes)} a sequence)"
    if group.kind == "latent":
        return f"{group.num_layers} latent ({group.k_dim} numbers a token)"
    dims = f"{group.k_dim}" if group.k_dim == group.v_dim else f"{group.k_dim}/{group.v_dim}"
    window = f", window {group.window}" if group.window else ""
    return f"{group.num_layers} {group.kind} ({group.num_kv_heads} KV heads of {dims}{window})"


def render(plan: Plan) -> Table:
    """Return the plan as a table for :mod:`rich`."""
    layers = ", ".join(_describe(group) for group in plan.layers)
    weights = plan.weights
    memory = (
        f"{_size(plan.gpu_bytes)} at {plan.utilisation:.0%}, less {_size(plan.reserve_bytes)}"
        f" reserve and {_size(weights.num_bytes)} weights ({weights.num_params / 1e9:.2f}B"
        f" parameters, {weights.source}): {_size(plan.cache_bytes)} of cache"
    )
    table = Table(
        title=f"{plan.model_type}, {plan.context:,} tokens of context",
        caption="\n".join((f"layers: {layers}", memory, *plan.notes)),
        caption_justify="left",
    )
    table.add_column("cache")
    for title in ("bits/number", "bytes/token", "per sequence", "tokens", "sequences", "longest"):
        table.add_column(title, justify="right")
    table.add_column("vs bf16", justify="right")
    for row in plan.rows:
        table.add_row(
            row.name,
            f"{row.bits_per_number:.2f}",
            f"{row.bytes_per_token:,}",
            _size(row.bytes_per_sequence),
            f"{row.tokens:,}",
            f"{row.sequences:,}",
            "any" if row.longest_sequence is None else f"{row.longest_sequence:,}",
            f"{row.ratio:.2f}x",
        )
    return table
