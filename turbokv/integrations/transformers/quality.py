# SPDX-License-Identifier: Apache-2.0
"""Quality of a cache on a real model: teacher-forced divergence from the full-precision cache.

The text is fed in chunks. Within a chunk the new keys and values are exact; the past is what the
cache hands back. Logits are compared with those of the same chunks over an uncompressed cache,
token by token, from the second chunk on.

One passage of a text is a small sample: between passages of a thousand tokens the ratio of two
caches' divergences has a standard deviation of 6 to 25%. Several passages, each a text of its own
that starts with empty caches, give the mean over all their tokens and its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from turbokv.integrations.transformers.baselines import Baseline
from turbokv.integrations.transformers.layers import sees_everything
from turbokv.integrations.transformers.side_by_side import can_stand_side_by_side, side_by_side

CacheFactory = Callable[[], Cache]
_TOGETHER = 8  # caches of one forward pass


class SimulatedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer whose past went through a rival's quantiser; the current chunk stays exact.

    With ``window`` and ``sinks`` it is treated as
    :class:`turbokv.integrations.transformers.layers.TurboKVLayer` treats our own codes: the newest
    and the first tokens are also held in 16 bits.
    """

    def __init__(self, baseline: Baseline, window: int = 0, sinks: int = 0) -> None:
        super().__init__()
        self._baseline = baseline
        self._window = window
        self._sinks = sinks
        self._quantised = 0  # older tokens: what is read back no longer changes
        self.keys: Tensor
        self.values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the quantised past and the exact new tokens; keep the latter quantised."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        old, end = self._quantised, max(self._quantised, keys.shape[-2] - self._window)
        start = max(old, min(self._sinks, end))
        parts = [old, start - old, end - start, keys.shape[-2] - end]

        def held(x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
            past, first, leaving, newest = torch.split(x, parts, dim=-2)
            read_back = quantize(leaving).to(self.dtype)
            return torch.cat([past, _in_16_bits(first), read_back, _in_16_bits(newest)], dim=-2)

        self.keys = held(keys, self._baseline.quantize_k)
        self.values = held(values, self._baseline.quantize_v)
        self._quantised = end
        return keys, values


def _in_16_bits(x: Tensor) -> Tensor:
    """Round as the window of our own cache does: 16-bit dtypes stay, others become fp16."""
    if x.dtype.itemsize == 2:
        return x
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).to(torch.float16).to(x.dtype)


def simulated_cache(config: Any, baseline: Baseline, window: int = 0, sinks: int = 0) -> Cache:
    """Return a cache whose full-attention layers hold what ``baseline`` would give back.

    Parameters
    ----------
    config
        Of the model.
    baseline
        The rival.
    window, sinks
        Newest and first tokens that are read back in 16 bits.
    """
    layers = []
    for layer in DynamicCache(config=config).layers:
        if sees_everything(layer, config):
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                raise ValueError(
                    "config: wanted layers of attention alone, as rivals are simulated so, got"
                    f" {type(config).__name__} with a recurrent state beside it"
                )
            layer = SimulatedLayer(baseline, window, sinks)
        layers.append(layer)
    return Cache(layers=layers)


@dataclass(frozen=True)
class Divergence:
    """Distance from full precision, averaged over the scored tokens.

    Attributes
    ----------
    kl
        KL(full || cache), nats per token.
    one_minus_tv
        1 - total variation distance.
    top1
        Share of tokens whose most likely next token is the same.
    perplexity_ratio
        Perplexity on the text over that of full precision.
    tokens
        Tokens scored.
    labelled
        Of these, those whose next token is known: all but the last of a text.
    """

    kl: float
    one_minus_tv: float
    top1: float
    perplexity_ratio: float
    tokens: int
    labelled: int

    def to_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)


def pool(passages: Sequence[Divergence]) -> Divergence:
    """Return the divergence over all tokens of all passages."""
    scored = sum(p.tokens for p in passages)
    labelled = sum(p.labelled for p in passages)
    lost = sum(p.labelled * math.log(p.perplexity_ratio) for p in passages)
    return Divergence(
        kl=sum(p.tokens * p.kl for p in passages) / scored,
        one_minus_tv=sum(p.tokens * p.one_minus_tv for p in passages) / scored,
        top1=sum(p.tokens * p.top1 for p in passages) / scored,
        perplexity_ratio=math.exp(lost / labelled),
        tokens=scored,
        labelled=labelled,
    )


def ratio_of_means(
    above: Sequence[float], below: Sequence[float] | None = None
) -> tuple[float, float | None]:
    """Divide the means of two figures of the same passages, of equal length.

    Parameters
    ----------
    above, below
        One figure a passage, in the same order. Without ``below``, of the mean of ``above`` itself.

    Returns
    -------
    tuple
        The ratio, and its standard error over passages: to first order, as of a ratio estimator,
        so that what makes a passage hard for both cancels. None for one passage, which tells
        nothing about spread.
    """
    below = [1.0] * len(above) if below is None else below
    if not above or len(above) != len(below):
        raise ValueError(
            f"below: wanted one figure for each of at least one passage, got {len(above)} and"
            f" {len(below)}"
        )
    count = len(above)
    ratio = sum(above) / sum(below)
    if count == 1:
        return ratio, None
    squares = sum((a - ratio * b) ** 2 for a, b in zip(above, below, strict=True))
    return ratio, math.sqrt(squares * count / (count - 1)) / sum(below)


def _chunks(
    model: Any, ids: Tensor, cache: Cache, chunk: int, first_position: int, score_every: int
) -> Iterator[tuple[int, Tensor]]:
    """Feed ``ids`` ``[caches, tokens]`` to a model; yield chunk starts and log-probabilities.

    Those are of every ``score_every``-th token of the chunk, from its first on: fp32 ``[caches,
    tokens, vocabulary]``.
    """
    for start in range(0, ids.shape[1], chunk):
        piece = ids[:, start : start + chunk]
        first = first_position + start
        positions = torch.arange(
            first, first + piece.shape[1], dtype=torch.int64, device=ids.device
        )
        fewer = {}
        if score_every > 1:
            fewer["logits_to_keep"] = torch.arange(
                0, piece.shape[1], score_every, dtype=torch.int64, device=ids.device
            )
        logits = model(
            input_ids=piece,
            position_ids=positions.expand(ids.shape[0], -1),
            past_key_values=cache,
            use_cache=True,
            **fewer,
        ).logits
        yield start, torch.log_softmax(logits.float(), dim=-1)


def _groups(caches: Mapping[str, Cache], together: int) -> list[list[str]]:
    """Return which caches run in one forward pass, in groups of almost one size."""
    names = list(caches)
    if not all(can_stand_side_by_side(cache) for cache in caches.values()):
        together = 1
    count = -(-len(names) // together)
    return [names[i * len(names) // count : (i + 1) * len(names) // count] for i in range(count)]


@torch.inference_mode()
def compare(
    model: Any,
    ids: Tensor,
    factories: Mapping[str, CacheFactory],
    *,
    chunk: int = 64,
    first_position: int = 0,
    score_every: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Divergence]:
    """Score caches against full precision on one text.

    Parameters
    ----------
    model
        A Transformers causal language model.
    ids
        int64 ``[1, tokens]``, more than one chunk.
    factories
        By name: makes an empty cache.
    chunk
        Tokens per forward pass. The first chunk is not scored: it has no past.
    first_position
        Position of the first token.
    score_every
        Score every such token of a chunk only. All tokens are attended to, but logits of the others
        are not computed, which with a large vocabulary are most of the work.
    progress
        Called with each cache's name when it is done.

    Returns
    -------
    dict
        Divergence by name.

    Notes
    -----
    All caches advance chunk by chunk together, so only one chunk of reference logits is held, and
    that of eight caches, which share a forward pass where the model has no recurrent state.
    """
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] <= chunk:
        raise ValueError(f"ids: wanted shape [1, more than {chunk}], got {list(ids.shape)}")
    caches = {name: factory() for name, factory in factories.items()}
    runs = []
    for names in _groups(caches, _TOGETHER):
        cache = side_by_side([caches[name] for name in names]) if len(names) > 1 else None
        cache = caches[names[0]] if cache is None else cache
        batch = ids.expand(len(names), -1)
        runs.append((names, _chunks(model, batch, cache, chunk, first_position, score_every)))
    sums = {name: torch.zeros(4, dtype=torch.float64, device="cpu") for name in caches}
    scored = labelled = 0
    full = DynamicCache(config=model.config)
    for start, (expected,) in _chunks(model, ids, full, chunk, first_position, score_every):
        # the last token of the text has no next token to score
        labels = ids[0, start + 1 : start + 1 + chunk][::score_every]
        for names, run in runs:
            _, found = next(run)
            for name, got in zip(names, found, strict=True):
                if start:
                    sums[name] += _distances(expected, got, labels)
        if start:
            scored += expected.shape[0]
            labelled += labels.shape[0]
        if progress is not None:
            progress(f"{min(start + chunk, ids.shape[1])} of {ids.shape[1]} tokens")
    return {
        name: Divergence(
            kl=float(total[0]) / scored,
            one_minus_tv=1.0 - float(total[1]) / scored,
            top1=float(total[2]) / scored,
            perplexity_ratio=math.exp(float(total[3]) / labelled),
            tokens=scored,
            labelled=labelled,
        )
        for name, total in sums.items()
    }


def _distances(expected: Tensor, got: Tensor, labels: Tensor) -> Tensor:
    """Sum KL, total variation, top-1 agreement and lost log-likelihood over tokens."""
    p = expected.exp()
    kl = (p * (expected - got)).sum(-1)
    tv = 0.5 * (p - got.exp()).abs().sum(-1)
    top1 = expected.argmax(-1) == got.argmax(-1)
    rows = torch.arange(labels.shape[0], dtype=torch.int64, device=labels.device)
    lost = expected[rows, labels] - got[rows, labels]
    sums = [x.to(torch.float64).sum() for x in (kl, tv, top1, lost)]
    return torch.stack(sums).cpu()
