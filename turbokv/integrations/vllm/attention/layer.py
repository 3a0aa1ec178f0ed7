# SPDX-License-Identifier: Apache-2.0
"""What one attention layer keeps for the cache: formats, offsets of centred keys, 16-bit copies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from turbokv import core
from turbokv.calibration import CalibrationError, LayerCalibration
from turbokv.centring import SEGMENT, KeyOffsets
from turbokv.codec import DEFAULT_K_RULE, DEFAULT_V_RULE
from turbokv.core import Codebook, VectorFormat
from turbokv.integrations.vllm.dtypes import cache_widths
from turbokv.key_map import KeyMap
from turbokv.paged import SCALE_BYTES, TILE


@dataclass(frozen=True)
class AttentionShape:
    """What an attention layer computes, apart from where its cache lies.

    Attributes
    ----------
    num_qo_heads, num_kv_heads
        Of this rank.
    head_dim
        Elements of a query, key or value.
    sm_scale
        Factor of the scores.
    sliding_window
        Tokens that a query sees, its own included; None for all.
    logits_soft_cap
        Bound of the scores by tanh, or 0 for none.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    sm_scale: float
    sliding_window: int | None
    logits_soft_cap: float


@dataclass(eq=False)
class AttentionSinks:
    """A layer's attention sinks, one for all that attend for the layer.

    Attributes
    ----------
    logits
        float32 ``[num_qo_heads]``, contiguous: a logit that takes part in each head's softmax;
        None in a model that has none, and before weights are loaded.
    """

    logits: Tensor | None = None

    def load(self, weights: Tensor) -> None:
        """Take the logits from a model's weights, in place after the first time.

        Captured graphs hold the address, so weights that are loaded again must not move it.
        """
        if self.logits is None:
            self.logits = torch.empty(weights.shape, dtype=torch.float32, device=weights.device)
        self.logits.copy_(weights.detach())


def apply_attention_sinks(out: Tensor, lse: Tensor, logits: Tensor) -> None:
    """Let sinks take their share of probabilities that were computed without them.

    Parameters
    ----------
    out
        ``[tokens, num_qo_heads, head_dim]``, changed in place.
    lse
        float32 ``[num_qo_heads, tokens]``: natural log-sum-exp of the scores without sinks.
    logits
        float32 ``[num_qo_heads]``.
    """
    share = torch.sigmoid(lse - logits[:, None]).t()[..., None]
    out.mul_(share)  # multiplied in float32, rounded once


@dataclass(eq=False)
class CacheLayer:
    """One layer's side of the compressed cache.

    Attributes
    ----------
    k_format, v_format
        What fixes the bytes. They hold codebooks and rotation as host data, so nothing of them is
        lost when device memory is (sleep mode).
    num_kv_heads
        Of this rank.
    offsets
        What the tables of offsets are made from, of this rank's heads; on the host.
    k_offset, k_offset_rotated
        float32 ``[num_segments, num_kv_heads, head_dim]`` and ``padded_dim``: what is subtracted
        from keys, by 256 logical positions; None where keys are stored as they are. Of a layer with
        a map they are mapped.
    copies
        float16 ``[num_slots, num_kv_heads, 2, 16, padded_dim]``: 16-bit copies of tiles, or None;
        of mapped keys where there is a map, so that one query serves both kinds of tile.
    key_map
        What the matrices are made from, of this rank's heads; on the host.
    k_matrix, q_matrix
        float32 ``[num_kv_heads, head_dim, head_dim]``: rows of keys, and of the queries that meet
        them, are multiplied by these; None where keys are not mapped.
    """

    k_format: VectorFormat
    v_format: VectorFormat
    num_kv_heads: int
    offsets: KeyOffsets | None = field(default=None, repr=False)
    k_offset: Tensor | None = None
    k_offset_rotated: Tensor | None = None
    copies: Tensor | None = field(default=None, repr=False)
    key_map: KeyMap | None = field(default=None, repr=False)
    k_matrix: Tensor | None = field(default=None, repr=False)
    q_matrix: Tensor | None = field(default=None, repr=False)

    @classmethod
    def create(
        cls,
        cache_dtype: str,
        head_dim: int,
        num_kv_heads: int,
        calibration: LayerCalibration | None = None,
    ) -> CacheLayer:
        """Make the formats of a layer, with calibrated codebooks where there are some."""
        k_bits, v_bits = cache_widths(cache_dtype)
        k_book = calibration.k_codebook if calibration is not None else None
        v_book = calibration.v_codebook if calibration is not None else None
        made = {}
        for role, bits, rule, book in (
            ("k", k_bits, DEFAULT_K_RULE, k_book),
            ("v", v_bits, DEFAULT_V_RULE, v_book),
        ):
            made[role] = VectorFormat.create(
                role,  # type: ignore[arg-type]
                head_dim,
                Codebook.gaussian(bits) if book is None else book,
                scale_rule=rule,
                norm_dtype=torch.float16,
                seed=core.DEFAULT_SEED,
                device=torch.device("cpu"),
            )
        return cls(made["k"], made["v"], num_kv_heads)

    @property
    def head_dim(self) -> int:
        """Elements of a key or value."""
        return self.k_format.head_dim

    def pages(self, kv_cache: Tensor) -> Tensor:
        """View a cache, uint8 ``[pages, heads, tokens, bytes]``, as the kernels read pages.

        Tokens may take more bytes in the cache than codes and scales do, so that pages of different
        layers divide; what is left of a head's part of a page is at its end, and not in the view.
        """
        used = self.k_format.packed_dim + self.v_format.packed_dim + 2 * SCALE_BYTES
        return kv_cache.flatten(2)[..., : kv_cache.shape[2] * used]

    def copy_bytes(self) -> int:
        """Return the bytes of one tile's 16-bit copies in this layer."""
        return self.num_kv_heads * 2 * TILE * self.k_format.padded_dim * 2

    def make_copies(self, num_slots: int, device: torch.device) -> None:
        """Allocate the 16-bit copies of ``num_slots`` tiles."""
        shape = (num_slots, self.num_kv_heads, 2, TILE, self.k_format.padded_dim)
        self.copies = torch.zeros(shape, dtype=torch.float16, device=device)

    def reserve_offsets(self, max_tokens: int, device: torch.device) -> None:
        """Have offsets of zero for every segment up to ``max_tokens`` positions.

        Tables that exist stay where they are, since captured graphs hold the addresses.
        """
        if self.k_offset is not None and self.k_offset_rotated is not None:
            self.k_offset.zero_()
            self.k_offset_rotated.zero_()
            return
        shape = (-(-max_tokens // SEGMENT), self.num_kv_heads)
        self.k_offset = torch.zeros((*shape, self.head_dim), dtype=torch.float32, device=device)
        padded = (*shape, self.k_format.padded_dim)
        self.k_offset_rotated = torch.zeros(padded, dtype=torch.float32, device=device)

    def set_map(self, key_map: KeyMap, device: torch.device) -> None:
        """Map keys from now on; before :meth:`set_offsets`, and again after a wake.

        Parameters
        ----------
        key_map
            Of this rank's heads. Kept on the host, where sleep does not reach.
        device
            Where the matrices are made.
        """
        wanted = [self.num_kv_heads, self.head_dim, self.head_dim]
        if list(key_map.matrix.shape) != wanted:
            raise CalibrationError(
                f"calibration k_map: wanted shape {wanted} for this rank, got"
                f" {list(key_map.matrix.shape)}"
            )
        self.key_map = key_map.to(torch.device("cpu"))
        if self.k_matrix is None or self.q_matrix is None:
            self.k_matrix, self.q_matrix = (
                torch.empty(wanted, dtype=torch.float32, device=device) for _ in "kq"
            )
        # in place, since captured graphs hold the addresses
        self.k_matrix.copy_(self.key_map.matrix.mT)
        self.q_matrix.copy_(self.key_map.inverse)

    def drop_offsets(self) -> None:
        """Store keys as they are; only before anything is stored or captured."""
        self.offsets = self.k_offset = self.k_offset_rotated = None

    def set_offsets(self, offsets: KeyOffsets, max_tokens: int, device: torch.device) -> None:
        """Compute the offsets of every segment up to ``max_tokens`` positions; again after a wake.

        Parameters
        ----------
        offsets
            Of this rank's heads. Kept on the host, where sleep does not reach.
        max_tokens
            The longest request.
        device
            Where the tables are made.
        """
        if offsets.mu.shape != (self.num_kv_heads, self.head_dim):
            raise CalibrationError(
                f"calibration offsets: wanted shape {[self.num_kv_heads, self.head_dim]} for this"
                f" rank, got {list(offsets.mu.shape)}"
            )
        self.offsets = offsets.to(torch.device("cpu"))
        segments = -(-max_tokens // SEGMENT)
        table = self.offsets.rotary.segment_means(self.offsets.mu, 0, segments)
        if self.key_map is not None:
            table = self.key_map.map_keys(table.transpose(0, 1)).transpose(0, 1)
        rotated = core.rotate(table.reshape(-1, self.head_dim), self.k_format)
        rotated = rotated.view(segments, self.num_kv_heads, self.k_format.padded_dim)
        if self.k_offset is None or self.k_offset_rotated is None:
            self.reserve_offsets(max_tokens, device)
        assert self.k_offset is not None
        assert self.k_offset_rotated is not None
        # in place, since captured graphs hold the addresses
        self.k_offset.copy_(table)
        self.k_offset_rotated.copy_(rotated)


def head_slice(total_heads: int, rank_heads: int, rank: int, world: int) -> slice:
    """Return which of the model's KV heads a tensor-parallel rank holds.

    vLLM splits heads evenly, and gives the same head to several ranks where there are fewer.
    """
    first = rank * rank_heads if total_heads >= world else rank * total_heads // world
    return slice(first, first + rank_heads)


def total_copy_bytes(layers: list[Any]) -> int:
    """Return the bytes of one tile's copies in all ``layers``."""
    return sum(layer.copy_bytes() for layer in layers)
