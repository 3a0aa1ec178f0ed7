# SPDX-License-Identifier: Apache-2.0
"""What a model's ``config.json`` says of its layers and of the cache that each holds.

No model is loaded and nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from turbokv.model_families import ENCODER_DECODERS, ENCODERS, FAMILIES, RECURRENT, Family
from turbokv.model_quantisation import Quantisation, read_quantisation

Kind = Literal["full", "sliding", "latent", "linear"]
Attention = Literal["full", "sliding", "latent"]
# Named in messages; all are in turbokv.model_families.
_COMMON = ("deepseek_v3", "gemma3", "gpt_oss", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
# Other families' names for what Llama's config calls it.
_ALIASES: dict[str, tuple[str, ...]] = {
    "head_dim": ("attention_head_dim",),
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "layer_types": ("layers_block_type", "attention_layers"),
    "linear_conv_kernel_dim": ("conv_kernel", "mamba_d_conv", "conv_L_cache"),
    "mamba_d_head": ("mamba_head_dim", "mamba_headdim"),
    "mamba_d_state": ("ssm_state_size",),
    "mamba_expand": ("expand",),
    "mamba_n_groups": ("n_groups", "mamba_ngroups"),
    "mamba_n_heads": ("mamba_num_heads", "n_mamba_heads"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length", "model_max_length"),
    "n_shared_experts": ("num_shared_experts", "moe_num_shared_experts"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "sliding_window": ("window_size",),
}
# Transformers' names of layer types, those of older configs included. Attention, whether there is a
# recurrent state, and whether there is an MLP.
_LAYER_TYPES: dict[str, tuple[Attention | None, bool, bool]] = {
    "attention": ("full", False, True),
    "chunked_attention": ("sliding", False, True),
    "conv": (None, True, True),
    "full_attention": ("full", False, True),
    "global": ("full", False, True),
    "hybrid": ("full", True, True),
    "linear_attention": (None, True, True),
    "local": ("sliding", False, True),
    "mamba": (None, True, True),
    "mamba2": (None, True, True),
    "mlp": (None, False, True),
    "moe": (None, False, True),
    "sliding_attention": ("sliding", False, True),
}
# Layouts with states that a family of plain attention does not have.
_FOREIGN_KEYS = ("hybrid_override_pattern", "linear_attn_config", "mamba_d_state", "ssm_cfg")
_PATTERN_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}  # of Nemotron-H


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
class Layer:
    """What one decoder layer is made of; layers may hold attention and a recurrent state."""

    index: int
    attention: Attention | None
    linear: bool
    mlp: Literal["dense", "sparse"] | None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Return the states that the layer holds."""
        attention: tuple[Kind, ...] = () if self.attention is None else (self.attention,)
        return (*attention, "linear") if self.linear else attention


class ModelConfig:
    """A decoder's config: what the file says, else what Transformers would assume.

    Parameters
    ----------
    raw
        The parsed ``config.json``.
    model_type
        Taken for the file's own, where a model is built as that one is.
    """

    def __init__(self, raw: Mapping[str, Any], model_type: str | None = None) -> None:
        nested = raw.get("text_config")
        if nested is not None and not isinstance(nested, Mapping):
            raise TypeError(f"config.text_config: wanted an object, got {nested!r}")
        self._raw = raw
        self._text = raw if nested is None else nested
        found = self._text.get("model_type") or raw.get("model_type") or "unknown"
        self.model_type = str(model_type or found)
        bare = self.model_type.removesuffix("_text")
        self.family = bare if bare in FAMILIES else self.model_type
        self.facts: Family = _known_family(self.family, raw)
        foreign = [key for key in _FOREIGN_KEYS if self._text.get(key)]
        if foreign and not self.facts.linear.startswith("mamba"):
            raise ValueError(
                f"model: wanted {self.family} without other states than keys and values, got"
                f" {foreign[0]}"
            )
        self.has_towers = any(key in raw for key in ("vision_config", "audio_config"))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value; null and absent are the same."""
        for source in (self._text, self.facts.defaults):
            for name in (key, *_ALIASES.get(key, ())):
                if source.get(name) is not None:
                    return source[name]
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

    def entries(self, key: str, *, or_number: bool = False) -> list[Any] | None:
        """Return a list of one entry a layer, or None; also for a number if that may be."""
        value = self.get(key)
        if value is None or (or_number and isinstance(value, int)):
            return None
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"config.{key}: wanted a list, got {value!r}")
        if len(value) != self.num_layers:
            raise ValueError(f"config.{key}: wanted {self.num_layers} entries, got {len(value)}")
        return list(value)

    # --- numbers ------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Number of layers, of every kind."""
        for key in ("layers_block_type", "hybrid_override_pattern"):
            listed = self.get(key)
            if self.family == "nemotron_h" and isinstance(listed, (list, str)):
                return len(listed)
        return self.number("num_hidden_layers")

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return self.number("num_attention_heads")

    @property
    def num_kv_heads(self) -> int:
        """Number of heads of keys and values, as engines cache them."""
        if self.family == "gpt_bigcode":
            return 1 if self.get("multi_query", True) else self.num_heads
        if self.family == "falcon":
            # older checkpoints give num_kv_heads without meaning it
            if self.get("new_decoder_architecture"):
                return self.number("num_kv_heads", self.get("n_head_kv", self.num_heads))
            return 1 if self.get("multi_query", True) else self.num_heads
        return self.number("num_key_value_heads", self.num_heads)

    @property
    def head_dim(self) -> int:
        """Elements of a head, from the hidden size where the config does not say."""
        if self.get("head_dim") is None:
            hidden = self.number("hidden_size")
            if self.family == "zamba2":  # attends over the states and the embeddings
                hidden *= 2
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
        for source in (self._text, self._raw, self.facts.defaults):
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

    @property
    def quantisation(self) -> Quantisation:
        """The width of the weights as published."""
        for source in (self._text, self._raw):
            if source.get("quantization_config"):
                return read_quantisation(source["quantization_config"])
        return Quantisation(16)

    # --- layers -------------------------------------------------------------------------------

    def layers(self) -> list[Layer]:
        """Return what every layer is made of."""
        found = []
        for index, name in enumerate(self._layer_types()):
            attention, linear, has_mlp = _LAYER_TYPES[name]
            if self.is_latent and attention is not None:
                attention = "latent"
            if attention == "sliding" and self._window_holds_all():
                attention = "full"
            if self.family == "zamba2":
                # recurrent everywhere; the shared attention comes with an MLP
                linear, has_mlp = True, attention is not None
            if self.family == "falcon_h1":
                linear = True
            if self.family == "nemotron_h":
                has_mlp = name in ("mlp", "moe")
            sparse = name == "moe" or (name != "mlp" and self._is_sparse(index))
            mlp: Literal["dense", "sparse"] = "sparse" if sparse else "dense"
            found.append(Layer(index, attention, linear, mlp if has_mlp else None))
        return found

    def _window_holds_all(self) -> bool:
        """Whether no context of the model is longer than the window, which then never slides."""
        limit = self.get("max_position_embeddings")
        return isinstance(limit, int) and limit <= self._window()

    def _window(self) -> int:
        if "attention_chunk_size" in self and self.family == "llama4":
            return self.number("attention_chunk_size")
        return self.number("sliding_window", self.get("attention_chunk_size"))

    def _layer_types(self) -> list[str]:
        """Return a name of :data:`_LAYER_TYPES` for every layer."""
        count = self.num_layers
        pattern = self.get("hybrid_override_pattern")
        if isinstance(pattern, str):
            unknown = sorted(set(pattern) - set(_PATTERN_LETTERS))
            if unknown:
                wanted = "".join(_PATTERN_LETTERS)
                raise ValueError(
                    f"config.hybrid_override_pattern: wanted letters of {wanted!r}, got"
                    f" {unknown[0]!r}"
                )
            return [_PATTERN_LETTERS[letter] for letter in pattern]
        if self.is_latent:  # whose layer types name ways to choose among latents
            return ["full_attention"] * count
        types = self.entries("layer_types")
        if types is not None:
            unknown = sorted({str(t) for t in types} - set(_LAYER_TYPES))
            if unknown:
                names = sorted(_LAYER_TYPES)
                raise ValueError(f"config.layer_types: wanted {names}, got {unknown[0]!r}")
            return [str(t) for t in types]
        own: list[int]
        if self.family == "bamba":
            own = self.get("attn_layer_indices", [])
            return ["attention" if i in own else "mamba" for i in range(count)]
        if "attn_layer_period" in self:
            every, first = self.number("attn_layer_period"), self.number("attn_layer_offset", 0, 0)
            return ["attention" if i % every == first else "mamba" for i in range(count)]
        if self.family == "lfm2":
            whole = self.get("full_attn_idxs")
            own = list(range(count)) if whole is None else whole
            return ["attention" if i in own else "conv" for i in range(count)]
        if "full_attention_interval" in self:
            every = self.number("full_attention_interval")
            return _every(count, every, "full_attention", "linear_attention")
        if "chunked_attention_pattern" in self:
            every = self.number("chunked_attention_pattern")
            return _every(count, every, "full_attention", "chunked_attention")
        return self._window_types(count)

    def _window_types(self, count: int) -> list[str]:
        """As :meth:`_layer_types`, for configs that speak of windows only."""
        if self.get("sliding_window") is None or not self.get("use_sliding_window", True):
            return ["full_attention"] * count
        if "sliding_window_pattern" in self:
            every = self.number("sliding_window_pattern")
            kinds = _every(count, every, "full_attention", "sliding_attention")
            if self.family == "gemma4":
                kinds[-1] = "full_attention"
            return kinds
        first = self.number("max_window_layers", 0, least=0) if "use_sliding_window" in self else 0
        return ["full_attention" if i < first else "sliding_attention" for i in range(count)]

    def _is_sparse(self, index: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        if "num_experts" not in self or not self.get("enable_moe_block", True):
            return False
        if self.number("num_experts", least=0) == 0:
            return False
        types = self.entries("mlp_layer_types")
        if types is not None:
            return bool(types[index] == "sparse")
        chosen = self.get("moe_layers")
        if isinstance(chosen, list):
            return index in chosen
        frequency = self.entries("moe_layer_freq", or_number=True)
        if frequency is not None:
            return bool(frequency[index])
        if "expert_layer_period" in self:
            offset = self.number("expert_layer_offset", 0, least=0)
            return index % self.number("expert_layer_period") == offset
        if "moe_layer_start_index" in self:
            first = self.number("moe_layer_start_index", least=0)
            last = self.number("moe_layer_end_index", self.num_layers - 1, least=-1)
            last = self.num_layers - 1 if last < 0 else last
            every = self.number("moe_layer_interval", 1)
            return first <= index <= last and (index + 1) % every == 0
        step = self.number("decoder_sparse_step", self.get("interleave_moe_layer_step", 1))
        return (
            index >= self.number("first_k_dense_replace", 0, least=0)
            and index not in (self.get("mlp_only_layers") or [])
            and (index + 1) % step == 0
        )

    # --- states -------------------------------------------------------------------------------

    def state(self, kind: Kind) -> LayerGroup:
        """Return the state of this kind that one layer holds."""
        if kind == "latent":
            numbers = self.number("kv_lora_rank") + self.number("qk_rope_head_dim")
            return LayerGroup("latent", 1, num_kv_heads=1, k_dim=numbers)
        if kind == "linear":
            return LayerGroup("linear", 1, state_bytes=self._state_bytes())
        heads, dim = self.num_kv_heads, self.head_dim
        if kind == "full":
            dim = self.number("global_head_dim", dim)
            # Gemma 4 has another head count only where keys double as values
            if self.family != "gemma4" or self.get("attention_k_eq_v"):
                heads = self.number("num_global_key_value_heads", heads)
        v_dim = self.number("v_head_dim", dim)
        window = self._window() if kind == "sliding" else None
        return LayerGroup(kind, 1, num_kv_heads=heads, k_dim=dim, v_dim=v_dim, window=window)

    def _state_bytes(self) -> int:
        """Return the bytes of a recurrent state: the last inputs of a convolution, and a matrix."""
        facts = self.facts.linear
        if facts == "lightning":
            return self.num_heads * self.head_dim**2 * 4
        steps = self.number("linear_conv_kernel_dim") - 1
        if facts == "short_conv":
            return steps * self.number("hidden_size") * 2
        # engines keep states at the model's width unless the config asks for more
        width = 4 if self.get("mamba_ssm_dtype") == "float32" else 2
        if facts == "gated_delta":
            k_dim, v_dim = self.linear_dims()
            state = v_dim * self.number("linear_key_head_dim") * width
            return (2 * k_dim + v_dim) * steps * 2 + state
        width = 4 if self.get("mamba_ssm_cache_dtype") == "float32" else 2
        inner, groups = self.mamba_dims()
        conv = inner + 2 * groups * (self.number("mamba_d_state") if groups else 0)
        return conv * steps * 2 + inner * self.number("mamba_d_state") * width

    def linear_dims(self) -> tuple[int, int]:
        """Return the widths of all keys and of all values of a gated-delta layer."""
        return (
            self.number("linear_num_key_heads") * self.number("linear_key_head_dim"),
            self.number("linear_num_value_heads") * self.number("linear_value_head_dim"),
        )

    def mamba_dims(self) -> tuple[int, int]:
        """Return the inner width of a Mamba layer and its groups (0 of Mamba 1)."""
        expanded = self.number("mamba_expand", 2) * self.number("hidden_size")
        if self.facts.linear == "mamba1":
            return expanded, 0
        if self.family == "nemotron_h":
            expanded = self.number("mamba_n_heads") * self.number("mamba_d_head")
        return self.number("mamba_d_ssm", expanded), self.number("mamba_n_groups", 1)


def _every(count: int, every: int, chosen: str, other: str) -> list[str]:
    return [chosen if (i + 1) % every == 0 else other for i in range(count)]


def _known_family(family: str, raw: Mapping[str, Any]) -> Family:
    """Return the facts of a family, or raise ValueError saying what it is instead."""
    if raw.get("is_encoder_decoder") or family in ENCODER_DECODERS:
        what = "an encoder-decoder model"
    elif family in ENCODERS:
        what = "an encoder"
    elif family in RECURRENT:
        what = "a model without attention, which has no cache to compress"
    elif family not in FAMILIES:
        what = "which is not (name a family that it is built like, if there is one)"
    else:
        return FAMILIES[family]
    raise ValueError(
        "model_type: wanted a decoder of a family whose shape is known"
        f" ({', '.join(_COMMON)} and {len(FAMILIES) - len(_COMMON)} more), got {family}, {what}"
    )


def group_states(config: ModelConfig, layers: list[Layer]) -> tuple[LayerGroup, ...]:
    """Return the state that some of a model's layers hold, grouped by what it is."""
    unshared = config.num_unshared
    counts = Counter(kind for layer in layers if layer.index < unshared for kind in layer.kinds)
    return tuple(replace(config.state(kind), num_layers=n) for kind, n in counts.items())


def layer_groups(config: ModelConfig) -> tuple[LayerGroup, ...]:
    """Return the state that all layers hold, grouped by what it is."""
    return group_states(config, config.layers())


def read_model(
    model: str | os.PathLike[str] | Mapping[str, Any], model_type: str | None = None
) -> tuple[ModelConfig, pathlib.Path | None]:
    """Read a config.

    Parameters
    ----------
    model
        Path of a ``config.json``, of a folder that holds one, or the parsed config.
    model_type
        Taken for the file's own.

    Returns
    -------
    tuple
        The config and the folder it came from, None for a parsed one.

    Raises
    ------
    TypeError, ValueError
        If there is no such file, it holds no JSON object, or the model is none that can be planned.
    """
    if isinstance(model, Mapping):
        return ModelConfig(model, model_type), None
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
    return ModelConfig(content, model_type), path.parent
