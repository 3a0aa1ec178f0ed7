# SPDX-License-Identifier: Apache-2.0
"""Static statistics per channel: mean pre-rotary keys, channel scales, value shifts.

All three leave attention unchanged before quantisation: a key offset cancels in the softmax, a
channel scale of K is undone in the query and one of V in the output, a shift of V passes through
because probabilities sum to 1. What they change is what the quantiser sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The first tokens of a text are outliers (attention sinks): they would pull the mean towards
# themselves, and caches keep them in 16 bits anyway.
SKIP_TOKENS = 4
# What engines take without a calibration file: on SmolLM2 as good as four times as many random
# tokens, and a tenth of the KL better than half as many.
AUTO_TOKENS = 1024
AUTO_CONTEXT = 512
# Scales beyond this would trade one channel's error for another's overflow.
_SCALE_RANGE = 16.0


def random_ids(config: Any, count: int, seed: int = 0) -> Tensor:
    """Return random token ids, int64 ``[1, count]`` on the CPU; the same in every process.

    Parameters
    ----------
    config
        A text config: names the size of the vocabulary and the padding token, which is left out,
        since some models divide by the length of its embedding, which is zero.
    count
        Of tokens.
    seed
        Of the generator.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    size, vocab_size = (1, count), int(config.vocab_size)
    ids = torch.randint(0, vocab_size, size, generator=generator, dtype=torch.int64, device="cpu")
    padding = getattr(config, "pad_token_id", None)
    return ids if padding is None else torch.where(ids == padding, (ids + 1) % vocab_size, ids)


def split_text(ids: Tensor, context: int, bos: int | None) -> list[Tensor]:
    """Cut ``ids`` ``[1, tokens]`` into pieces of ``context`` tokens that begin with ``bos``."""
    if bos is None:
        return [p for p in torch.split(ids, context, dim=1) if p.shape[1] > SKIP_TOKENS]
    pieces = torch.split(ids, context - 1, dim=1)
    return [
        torch.cat([piece.new_full((1, 1), bos), piece], dim=1)
        for piece in pieces
        if piece.shape[1] >= SKIP_TOKENS
    ]


def config_bos(config: Any) -> int | None:
    """Return the BOS that a text config names, where no tokenizer is at hand."""
    bos = getattr(config, "bos_token_id", None)
    return bos if isinstance(bos, int) and 0 <= bos < config.vocab_size else None


@dataclass(eq=False)
class _Moments:
    """Running sums of ``[heads, head_dim]`` channels in float64."""

    total: Tensor
    squares: Tensor
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Add ``[heads, tokens, head_dim]``."""
        x = x.to("cpu", torch.float64)
        self.total += x.sum(1)
        self.squares += x.square().sum(1)
        self.count += x.shape[1]

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def rms(self) -> Tensor:
        return (self.squares / self.count).sqrt()


class StaticCalibrator:
    """Collects channel statistics by layer and turns them into calibrations.

    :meth:`update` may be called any number of times; results do not compound.
    """

    def __init__(self) -> None:
        self._moments: dict[tuple[int, str], _Moments] = {}

    def update(self, layer: int, **tensors: Tensor) -> None:
        """Add tokens of one layer.

        Parameters
        ----------
        layer
            Index.
        tensors
            Any of ``k`` (as stored), ``k_pre`` (before rotary embedding), ``v`` and ``q`` (as it
            meets ``k``), each ``[num_kv_heads, tokens, head_dim]``; for ``q`` the query heads of a
            group are more tokens.
        """
        for name, x in tensors.items():
            if name not in ("k", "k_pre", "v", "q"):
                raise ValueError(f"tensors: wanted k, k_pre, v or q, got {name}")
            if x.ndim != 3:
                raise ValueError(
                    f"{name}: wanted shape [heads, tokens, head_dim], got {list(x.shape)}"
                )
            key = (layer, name)
            if key not in self._moments:
                zeros = torch.zeros((x.shape[0], x.shape[2]), dtype=torch.float64, device="cpu")
                self._moments[key] = _Moments(zeros, zeros.clone())
            self._moments[key].add(x)

    def layers(self) -> list[int]:
        """Return the layers with anything collected, in order."""
        return sorted({layer for layer, _ in self._moments})

    def _get(self, layer: int, name: str) -> _Moments:
        moments = self._moments.get((layer, name))
        if moments is None or moments.count == 0:
            raise ValueError(f"layer: wanted collected {name} of layer {layer}, got none")
        return moments

    def k_mean(self, layer: int) -> Tensor:
        """Return the mean key before rotary embedding: fp32 ``[heads, head_dim]``."""
        return self._get(layer, "k_pre").mean.float()

    def k_spread(self, layer: int) -> Tensor:
        """Return the mean of ``|k_pre - mean|^2``: fp32 ``[heads]``."""
        moments = self._get(layer, "k_pre")
        variance = (moments.squares / moments.count - moments.mean.square()).clamp_min(0)
        return variance.sum(-1).float()

    def v_shift(self, layer: int) -> Tensor:
        """Return the mean value: fp32 ``[heads, head_dim]``."""
        return self._get(layer, "v").mean.float()

    def k_scale(self, layer: int) -> Tensor:
        """Return the channel scales of K that minimise the expected score error.

        With scale c, the rotated quantiser spreads an error proportional to ``mean(k^2 / c^2)``
        evenly, and the query weighs channel j by ``q_j^2 c_j^2``; by Cauchy-Schwarz the product is
        least at ``c = sqrt(rms(k) / rms(q))``.
        """
        return _normalised(self._get(layer, "k").rms / self._get(layer, "q").rms.clamp_min(1e-12))

    def v_scale(self, layer: int) -> Tensor:
        """Return the channel scales of V for outputs whose channels weigh the same."""
        moments = self._get(layer, "v")
        centred = (moments.rms.square() - moments.mean.square()).clamp_min(0).sqrt()
        return _normalised(centred)


def _normalised(ratio: Tensor) -> Tensor:
    """Square root, geometric mean 1 per head, bounded; a dead channel gets scale 1."""
    scale = torch.where(ratio > 0, ratio, torch.ones_like(ratio)).sqrt()
    scale = scale / scale.log().mean(-1, keepdim=True).exp()
    return scale.clamp(1 / _SCALE_RANGE, _SCALE_RANGE).float()
