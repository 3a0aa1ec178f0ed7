# SPDX-License-Identifier: Apache-2.0
"""What fits: tokens and sequences of a model in a GPU's memory, at 16 bits, fp8 and each preset.

Everything is computed from a ``config.json``; no model is loaded and nothing is downloaded. Memory
is counted in GiB, as drivers report it. Counted are the weights, a reserve for activations, and the
cache in whole tiles of 16 tokens; beside that, what vLLM makes of it, whose blocks hold pages of
several layers (:mod:`turbokv.engine_pages`).
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from turbokv.core import padded_dim
from turbokv.engine_pages import BATCH_TOKENS, PageKind, vllm_tokens
from turbokv.model_config import (
    LayerGroup,
    ModelConfig,
    group_states,
    layer_groups,
    read_model,
)
from turbokv.model_weights import Rank, Weights, count_weights
from turbokv.paged import PAGE_BITS, TILE, PageLayout
from turbokv.presets import PRESETS, preset_name, preset_widths
from turbokv.window_pool import FRACTION, pool_slots, slot_bytes, whole_windows

GIB = 1 << 30


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
    whole_windows
        Running requests that these copies hold all newest tokens of; more get fewer each.
    tokens
        That fit in sequences of the plan's context, the last one cut short.
    sequences
        Whole sequences of the plan's context.
    longest_sequence
        Tokens of the longest single sequence, or None if nothing grows with the context.
    ratio
        Tokens that fit, relative to bf16.
    vllm_tokens
        What vLLM says its cache holds at this context, whole blocks and all layers' paddings
        counted; None where a model's layers are not counted so (MLA).
    """

    name: str
    bits_per_number: float
    bytes_per_token: int
    bytes_per_sequence: int
    recent_bytes: int
    whole_windows: int
    tokens: int
    sequences: int
    longest_sequence: int | None
    ratio: float
    vllm_tokens: int | None


@dataclass(frozen=True)
class Plan:
    """The answer of :func:`plan`; all sizes in bytes, of one GPU.

    Attributes
    ----------
    name
        That of the model's folder, or its type where none was given.
    layers, rank_layers
        What the whole model's layers hold, and those of the rank that has the least room: its
        stage's layers, with its own KV heads.
    weights
        Parameters of the model, and the bytes on that rank.
    cache_bytes
        What weights and reserve leave of the memory that may be used.
    notes
        What the figures do not say.
    """

    name: str
    model_type: str
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    layers: tuple[LayerGroup, ...]
    rank_layers: tuple[LayerGroup, ...]
    weights: Weights
    gpu_bytes: int
    utilisation: float
    reserve_bytes: int
    cache_bytes: int
    context: int
    max_num_seqs: int
    rows: tuple[CacheRow, ...]
    notes: tuple[str, ...]

    def row(self, name: str) -> CacheRow:
        """Return the row of this name (``bf16``, ``fp8`` or a preset)."""
        widths = preset_widths(name)
        wanted = name if widths is None else preset_name(*widths)
        for row in self.rows:
            if row.name == wanted:
                return row
        raise ValueError(f"name: wanted one of {[row.name for row in self.rows]}, got {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return asdict(self)


# --- cache ----------------------------------------------------------------------------------------


def _preset_bits(name: str) -> tuple[int, int]:
    widths = preset_widths(name)
    if widths is None:
        raise ValueError(f"presets: wanted names such as 'tq4' or 'tq_k5v3', got {name!r}")
    if not set(widths) <= set(PAGE_BITS):
        raise ValueError(f"presets: wanted widths of {PAGE_BITS}, got {name!r}")
    return widths


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


@dataclass(frozen=True)
class _Pool:
    """What the pool of 16-bit copies may take, and for how many running requests."""

    fraction: float
    max_num_seqs: int

    def of(self, groups: Sequence[LayerGroup], cache_bytes: int) -> tuple[int, int]:
        """Return its slots and bytes; sliding windows have copies, too."""
        each = sum(
            group.num_layers * slot_bytes(group.num_kv_heads, padded_dim(group.k_dim))
            for group in groups
            if group.kind in ("full", "sliding") and group.k_dim == group.v_dim > 32
        )
        slots = pool_slots(cache_bytes, each, self.max_num_seqs, fraction=self.fraction)
        return slots, slots * each


def _pages(form: _Format, groups: Sequence[LayerGroup], chunked: bool) -> list[PageKind] | None:
    """Return the layers as vLLM's pages hold them, None if there are kinds that are not counted."""
    kinds = []
    for group in groups:
        if group.kind == "latent" or (form.preset is not None and 0 < group.k_dim < 33):
            return None
        if group.kind == "linear":
            kinds.append(PageKind("state", group.num_layers, state_bytes=group.state_bytes))
            continue
        plain = (group.k_dim + group.v_dim) * 2
        size = plain * form.bits // 16
        if form.preset is not None:  # sliding windows are compressed there, too
            if group.k_dim != group.v_dim:
                return None
            size = PageLayout(group.k_dim, *form.preset, TILE, 1).bytes_per_token
        name: Literal["full", "sliding", "chunked"] = "full"
        if group.kind == "sliding":
            name = "chunked" if chunked else "sliding"
        kinds.append(
            PageKind(name, group.num_layers, group.num_kv_heads, size, plain, group.window)
        )
    states = [kind for kind in kinds if kind.kind == "state"]
    if states and len(kinds) > 2:
        return None
    return kinds or None


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
    pool: _Pool,
    presets: Sequence[str],
    chunked: bool,
) -> Iterator[CacheRow]:
    forms = [_Format("bf16", 16), _Format("fp8", 8)]
    if any(group.is_compressible for group in groups):
        widths = [_preset_bits(name) for name in presets]
        forms += [_Format(preset_name(*pair), 16, pair) for pair in widths]
    numbers = forms[0].growing_tile(groups) // 2
    reference = forms[0].sequence(groups, context)
    for form in forms:
        slots, recent = pool.of(groups, cache_bytes) if form.preset is not None else (0, 0)
        kept = 1 - recent / cache_bytes if cache_bytes else 1.0
        budget, sequence = cache_bytes - recent, form.sequence(groups, context)
        tile = form.growing_tile(groups)
        pages = _pages(form, groups, chunked)
        yield CacheRow(
            name=form.name,
            bits_per_number=8 * tile / numbers if numbers else 0.0,
            bytes_per_token=-(-tile // TILE),
            bytes_per_sequence=sequence,
            recent_bytes=recent,
            whole_windows=whole_windows(slots),
            tokens=budget * context // sequence,
            sequences=budget // sequence,
            longest_sequence=_longest(form, groups, budget),
            ratio=kept * reference / sequence,
            vllm_tokens=None
            if pages is None
            else vllm_tokens(pages, budget, context, compressed=form.preset is not None),
        )


# --- notes ----------------------------------------------------------------------------------------


def _check_real(name: str, value: float, low: float, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: wanted a number, got {value!r}")
    if not low <= value <= high or not math.isfinite(value):
        wanted = f"{low} to {high}" if math.isfinite(high) else f"{low} or more"
        raise ValueError(f"{name}: wanted {wanted}, got {value}")
    return float(value)


def _notes(
    config: ModelConfig,
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
        yield (
            "sliding-window layers hold at most their window; counted in 16 bits, as the"
            " Transformers cache keeps them (the vLLM backend compresses them too)"
        )
    if any(group.kind == "full" and not group.is_compressible for group in groups):
        yield "no TurboKV pages for heads of 32 or less, nor for keys and values of different sizes"
    if kinds <= {"sliding", "linear"}:
        yield "no layer's cache grows with the context: TurboKV has nothing to compress"
    if kinds & {"sliding", "linear"}:
        yield (
            "in vLLM: layers with a window keep the tokens of two steps of"
            f" {BATCH_TOKENS:,} as well, linear ones two states; TurboKV compresses windows, too"
        )
    if "linear" in kinds:
        yield "linear-attention layers hold a constant state per sequence, not compressed"
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and context > limit:
        yield f"the context exceeds the model's max_position_embeddings, {limit}"
    if weights.source.startswith("estimated"):
        if config.has_towers:
            yield "weights of vision and audio towers are not counted"
        if config.quantisation.bits is None:
            yield "the checkpoint's quantisation is not known; set the width of the weights"


def size_text(num_bytes: float) -> str:
    """Return bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def describe(group: LayerGroup) -> str:
    """Return layers of one kind in words."""
    if group.kind == "linear":
        return f"{group.num_layers} linear ({size_text(group.state_bytes)} per sequence)"
    if group.kind == "latent":
        return f"{group.num_layers} latent ({group.k_dim} numbers per token)"
    dims = f"{group.k_dim}" if group.k_dim == group.v_dim else f"{group.k_dim}/{group.v_dim}"
    window = f", window {group.window}" if group.window else ""
    return f"{group.num_layers} {group.kind} ({group.num_kv_heads} KV heads of {dims}{window})"


# --- ranks ----------------------------------------------------------------------------------------


def _stages(num_layers: int, count: int) -> list[range]:
    """Split layers over pipeline stages as vLLM does: what is left over goes to later stages.

    The last stage, which has the output head, gets none of it.
    """
    sizes = [num_layers // count] * count
    for i in range(2, num_layers % count + 2):
        sizes[-i] += 1
    starts = [sum(sizes[:i]) for i in range(count)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _split(groups: Sequence[LayerGroup], ranks: int) -> tuple[LayerGroup, ...]:
    """Return what one of so many ranks holds of these layers; heads and states are divided."""
    found = []
    for group in groups:
        if group.kind in ("full", "sliding"):
            group = replace(group, num_kv_heads=max(1, group.num_kv_heads // ranks))
        elif group.kind == "linear":
            group = replace(group, state_bytes=-(-group.state_bytes // ranks))
        found.append(group)
    return tuple(found)


def _ranks(config: ModelConfig, tensor: int, pipeline: int, data: int) -> list[Rank]:
    """Return one rank of every stage, or raise naming the degree that does not fit the model."""
    degrees = (("tensor_parallel", tensor), ("pipeline_parallel", pipeline))
    for name, value in (*degrees, ("data_parallel", data)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: wanted an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name}: wanted 1 or more, got {value}")
    if pipeline > config.num_layers:
        raise ValueError(
            f"pipeline_parallel: wanted at most {config.num_layers}, the layers, got {pipeline}"
        )
    heads = [config.num_heads]
    heads += [g.num_kv_heads for g in layer_groups(config) if g.kind in ("full", "sliding")]
    for number in heads:
        if number % tensor and (number == config.num_heads or tensor % number):
            raise ValueError(
                f"tensor_parallel: wanted a number that divides {config.num_heads} query heads, and"
                f" {number} KV heads or is a multiple of them, got {tensor}"
            )
    stages = _stages(config.num_layers, pipeline)
    return [
        Rank(tensor, stage, is_first=i == 0, is_last=i == pipeline - 1)
        for i, stage in enumerate(stages)
    ]


def _rank_notes(config: ModelConfig, plan: Plan) -> Iterator[str]:
    tensor, data = plan.tensor_parallel, plan.data_parallel
    shared = {g.num_kv_heads for g in plan.layers if g.kind in ("full", "sliding")}
    for number in sorted(n for n in shared if n < tensor):
        yield f"{number} KV heads on {tensor} ranks: {tensor // number} ranks hold each head"
    if tensor > 1 and any(group.kind == "latent" for group in plan.layers):
        yield f"the latent vector is held by each of {tensor} ranks"
    if plan.pipeline_parallel > 1:
        yield (
            f"of {plan.pipeline_parallel} stages the one with the least room, which bounds all;"
            " its layers: " + ", ".join(map(describe, plan.rank_layers))
        )
    if data > 1:
        yield f"figures of one of {data} replicas, which hold {data} times as much in all"
        if "num_experts" in config:
            yield "experts counted whole on each replica; expert parallelism divides them"


def _name(model: str | os.PathLike[str] | Mapping[str, Any]) -> str:
    """Return the name of a model's folder, or nothing."""
    if isinstance(model, Mapping):
        return ""
    path = pathlib.Path(model).absolute()
    return path.name if path.is_dir() else path.stem.replace("config", "")


# --- the plan -------------------------------------------------------------------------------------


def plan(
    model: str | os.PathLike[str] | Mapping[str, Any],
    *,
    gpu_memory: float = 80.0,
    context: int = 32_768,
    utilisation: float = 0.9,
    weight_bits: int | None = None,
    activation_reserve: float = 2.0,
    recent_fraction: float = FRACTION,
    max_num_seqs: int = 256,
    presets: Sequence[str] = tuple(PRESETS),
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    data_parallel: int = 1,
    model_type: str | None = None,
) -> Plan:
    """Plan the cache of a model on a GPU, or on each of several.

    Parameters
    ----------
    model
        Path of a ``config.json``, of a folder that holds one, or the parsed config. Weights are
        counted from safetensors files beside it, else estimated from the config.
    gpu_memory
        GiB of one GPU.
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
        Largest share of the cache for 16-bit copies of the newest tokens (presets only).
    max_num_seqs
        Running requests (of one copy of the model) that the copies are for; the engine's option.
    presets
        Names such as ``tq4`` and ``tq_k5v3``.
    tensor_parallel, pipeline_parallel, data_parallel
        GPUs that share every layer, stages of layers, and copies of all that. Sequences lie on all
        GPUs of one copy, so the tightest of its stages bounds them; KV heads fewer than
        ``tensor_parallel`` are held by several ranks.
    model_type
        A known type that the model is built like, if its own is not known.

    Returns
    -------
    Plan
        A row each for bf16, fp8 and every preset; presets are left out where no layer can be
        compressed. If nothing is left for a cache, the rows hold zero tokens and a note tells why.

    Raises
    ------
    TypeError, ValueError
        Naming the argument or the config's key, what was wanted and what was got; for encoders,
        encoder-decoders and models whose shape is not known.
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
    if isinstance(max_num_seqs, bool) or not isinstance(max_num_seqs, int):
        raise TypeError(f"max_num_seqs: wanted an integer, got {max_num_seqs!r}")
    if max_num_seqs < 1:
        raise ValueError(f"max_num_seqs: wanted 1 or more, got {max_num_seqs}")
    pool = _Pool(recent_fraction, max_num_seqs)
    config, folder = read_model(model, model_type)
    ranks = _ranks(config, tensor_parallel, pipeline_parallel, data_parallel)
    layers = config.layers()
    chunked = config.family == "llama4"  # the only one whose windows are chunks
    stages = []
    for rank in ranks:
        own = [layers[i] for i in rank.layers]
        groups = _split(group_states(config, own), tensor_parallel)
        weights = count_weights(config, folder, weight_bits, [rank])
        room = max(0, usable - reserve - weights.num_bytes)
        if groups or len(ranks) == 1:
            rows = tuple(_rows(groups, room, context, pool, presets, chunked))
            stages.append((groups, weights, room, rows))
    # every stage with states has to hold those of every sequence
    groups, weights, room, rows = min(stages, key=lambda stage: stage[3][0].tokens)
    found = Plan(
        name=_name(model) or config.model_type,
        model_type=config.model_type,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        data_parallel=data_parallel,
        layers=group_states(config, layers),
        rank_layers=groups,
        weights=weights,
        gpu_bytes=gpu_bytes,
        utilisation=utilisation,
        reserve_bytes=reserve,
        cache_bytes=room,
        context=context,
        max_num_seqs=max_num_seqs,
        rows=rows,
        notes=tuple(_notes(config, groups, context, weights, room)),
    )
    return replace(found, notes=(*_rank_notes(config, found), *found.notes))
