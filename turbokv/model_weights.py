# SPDX-License-Identifier: Apache-2.0
"""The bytes that a model's weights take on one rank.

Counted from safetensors headers that lie beside the config, else from the config.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from turbokv.model_config import ModelConfig
from turbokv.model_modules import Module, modules
from turbokv.model_quantisation import overhead

_DTYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16}


@dataclass(frozen=True)
class Weights:
    """Parameters of the whole model, and the bytes they take on the fullest rank.

    ``source`` says how they were counted.
    """

    num_params: int
    num_bytes: int
    source: str


@dataclass(frozen=True)
class Rank:
    """What one rank of tensor and pipeline parallelism holds.

    Attributes
    ----------
    tensor_parallel
        Ranks that share every layer.
    layers
        Indices of the layers of the rank's stage.
    is_first, is_last
        Whether the stage has the embeddings, and the output head.
    """

    tensor_parallel: int
    layers: range
    is_first: bool = True
    is_last: bool = True

    def share(self, module: Module, num_kv_heads: int, tied: bool) -> float:
        """Return the part of a module's parameters that the rank holds."""
        if module.layer < 0:
            # a tied embedding is the output head of the last stage as well
            held = self.is_first or (self.is_last and tied and module.name == "model.embed_tokens")
        elif module.layer in self.layers:
            held = True
        else:
            held = self.is_last and module.layer >= self.layers.stop
        if not held:
            return 0.0
        if module.split == "copies":
            return 1.0
        if module.split == "kv_heads":
            return max(1, num_kv_heads // self.tensor_parallel) / num_kv_heads
        return 1 / self.tensor_parallel


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


def _module_bits(config: ModelConfig, bits: int | None) -> Callable[[Module], float]:
    """Return what gives the bits of a weight of a module, scales included."""
    published = config.quantisation

    def of(module: Module) -> float:
        if not module.is_linear:
            return 16.0
        if bits is None:
            return published.bits_of(module.name)
        return bits + overhead(bits)

    return of


def _fullest(
    config: ModelConfig, parts: list[Module], ranks: Sequence[Rank], bits: Callable[[Module], float]
) -> float:
    """Return the bytes of the rank that holds most."""
    heads, tied = config.num_kv_heads, config.tied
    return (
        max(
            sum(part.params * bits(part) * rank.share(part, heads, tied) for part in parts)
            for rank in ranks
        )
        / 8
    )


def count_weights(
    config: ModelConfig,
    folder: pathlib.Path | None,
    bits: int | None,
    ranks: Sequence[Rank] | None = None,
) -> Weights:
    """Return the weights: counted from ``folder``'s safetensors, else estimated.

    Parameters
    ----------
    config, folder
        From :func:`turbokv.model_config.read_model`.
    bits
        The width to assume for linear layers; None takes the checkpoint as published.
    ranks
        One rank of every stage; None is one rank that holds the whole model.
    """
    published = config.quantisation
    whole = Rank(1, range(config.num_layers))
    ranks = [whole] if ranks is None else ranks
    part = 1.0
    if list(ranks) != [whole]:
        counted, of = list(modules(config)), _module_bits(config, bits)
        part = _fullest(config, counted, ranks, of) / _fullest(config, counted, [whole], of)
    shards, total_size = _shards(folder) if folder is not None else ([], None)
    linear, other, stored = 0, 0, 0
    for shard in shards:
        for name, entry in _read_header(shard).items():
            count = math.prod(entry["shape"])
            width = _DTYPE_BITS.get(entry["dtype"], 8)
            # engines load plain fp32 checkpoints at 16 bits
            stored += count * (min(width, 16) if published.bits == 16 else width) // 8
            if len(entry["shape"]) > 1 and not re.search(r"embed_tokens|lm_head", name):
                linear += count
            else:
                other += count
    if shards and bits is None:
        source = "counted from safetensors headers"
        return Weights(linear + other, math.ceil(stored * part), source)
    if shards and published.bits == 16 and bits is not None:
        source = f"counted from safetensors headers, linear layers at {bits} bits"
        narrow = linear * (bits + overhead(bits)) / 8 + 2 * other
        return Weights(linear + other, math.ceil(narrow * part), source)
    # a quantised checkpoint packs its numbers, so parameters are not what its headers list
    counted, of = list(modules(config)), _module_bits(config, bits)
    params = sum(module.params for module in counted)
    if total_size is not None and bits is None:
        size = math.ceil(total_size * part)
        return Weights(params, size, "total of model.safetensors.index.json")
    used = bits or published.bits or 16
    source = f"estimated from the config, linear layers at {used} bits"
    return Weights(params, math.ceil(_fullest(config, counted, ranks, of)), source)
