# SPDX-License-Identifier: Apache-2.0
"""Mapped keys: a linear map of each KV head's keys, undone in the query, that quantises better.

A score ``q . k`` stays what it is if keys become ``A k`` and queries ``A^-T q``. The quantiser
spreads its error evenly over the coordinates of ``A k``, with an energy in proportion to
``|A k|^2``, so that the error of scores is in proportion to ``tr(A Ck A') tr(A^-T Cq A^-1)`` with
``Ck`` and ``Cq`` the covariances of centred keys and of queries. The ``A`` that makes the product
least brings both covariances to the same diagonal.

What makes the difference is which keys and queries count: a pair counts by how much an error of its
score moves the output, ``p^2 |v - o|^2``. And as attention depends on distances only, covariances
are averaged over common shifts of position: a map of the first thousand positions alone is little
use at 6K.

Source: OSCAR (arXiv:2605.17757) turns keys by the eigenvectors of query covariances; the weights,
the map that is not orthogonal and the average over positions are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from turbokv.centring import SEGMENT, Rotary
from turbokv.core import INPUT_LIMIT

# Of the mean eigenvalue, added to every eigenvalue: directions that a calibration text hardly has
# are neither blown up nor given away.
_RIDGE = 0.01
# Positions beyond are averaged no more: by then pairs of channels have either turned many times, or
# turn so slowly that they barely have.
MAX_SHIFTED = 32_768
# Queries of a piece whose attention is held at a time.
_QUERIES = 1024
# Shifts of position that a map is judged at.
_JUDGED = 4
# fp32 matrices times their inverses are within 1e-4 of one up to condition numbers of 1e3.
_INVERSE_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class KeyMap:
    """The map of one layer's keys.

    Attributes
    ----------
    matrix
        fp32 ``[heads, head_dim, head_dim]``: a key becomes ``matrix @ key``.

    Raises
    ------
    TypeError, ValueError
        If ``matrix`` is of another dtype or shape, not finite, or has no inverse that is.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        """Check the matrices and invert them, in float64 on the CPU."""
        matrix = self.matrix
        if not isinstance(matrix, Tensor) or matrix.dtype != torch.float32:
            got = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
            raise TypeError(f"k_map: wanted a tensor of torch.float32, got {got}")
        if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2] or not matrix.numel():
            raise ValueError(
                f"k_map: wanted shape [heads, head_dim, head_dim], got {list(matrix.shape)}"
            )
        exact = matrix.detach().to("cpu", torch.float64)
        inverse, info = torch.linalg.inv_ex(exact)
        one = torch.eye(matrix.shape[1], dtype=torch.float64, device="cpu")
        rounded = inverse.to(torch.float32).to(torch.float64)
        off = (exact @ rounded - one).abs().amax((1, 2))
        # written so that NaN fails
        if bool((info != 0).any()) or not bool((off < _INVERSE_TOLERANCE).all()):
            head = int((~(off < _INVERSE_TOLERANCE)).int().argmax())
            raise ValueError(
                f"k_map: wanted finite matrices with an inverse, got {float(off[head]):.3g} from"
                f" one times its inverse in head {head}"
            )
        # inverses come out with their columns together
        kept = inverse.to(matrix.device, torch.float32).contiguous()
        object.__setattr__(self, "_inverse", kept)

    @property
    def inverse(self) -> Tensor:
        """fp32 ``[heads, head_dim, head_dim]``: a query becomes ``inverse.T @ query``."""
        inverse: Tensor = self._inverse  # type: ignore[attr-defined]
        return inverse

    @property
    def num_kv_heads(self) -> int:
        """Heads that have a matrix."""
        return int(self.matrix.shape[0])

    @property
    def head_dim(self) -> int:
        """Elements of a key."""
        return int(self.matrix.shape[1])

    def to(self, device: torch.device) -> KeyMap:
        """Return the same map on ``device``."""
        return self if self.matrix.device == device else KeyMap(self.matrix.to(device))

    def of_heads(self, heads: slice) -> KeyMap:
        """Return the map of some heads, such as a tensor-parallel rank's."""
        return KeyMap(self.matrix[heads].contiguous())

    # --- application --------------------------------------------------------------------------

    def map_keys(self, k: Tensor) -> Tensor:
        """Map keys, or vectors that are subtracted from them.

        Parameters
        ----------
        k
            ``[..., heads, tokens, head_dim]``, float32, float16 or bfloat16.

        Returns
        -------
        Tensor
            Of the same shape, float32. A key with NaN becomes NaN; infinities count as +-2^48.
        """
        self._check(k, "k")
        # finite, so that an infinity does not become NaN when it meets another sign
        x = k.to(torch.float32).clamp(-INPUT_LIMIT, INPUT_LIMIT)
        return torch.matmul(x, self.matrix.mT)

    def unmap_keys(self, k: Tensor) -> Tensor:
        """Undo :meth:`map_keys`: float32 of the same shape."""
        self._check(k, "k")
        return torch.matmul(k.to(torch.float32), self.inverse.mT)

    def map_queries(self, q: Tensor) -> Tensor:
        """Map queries ``[..., qo_heads, tokens, head_dim]`` to meet mapped keys, float32.

        ``qo_heads`` is a multiple of the map's heads, a group of neighbours to each.
        """
        heads, dim = self.num_kv_heads, self.head_dim
        if q.ndim < 3 or q.shape[-1] != dim or not q.shape[-3] or q.shape[-3] % heads:
            raise ValueError(
                f"q: wanted shape [..., a multiple of {heads}, tokens, {dim}], got {list(q.shape)}"
            )
        grouped = q.to(torch.float32).reshape(*q.shape[:-3], heads, -1, *q.shape[-2:])
        return torch.matmul(grouped, self.inverse[:, None]).flatten(-4, -3)

    def _check(self, k: Tensor, name: str) -> None:
        if k.ndim < 3 or k.shape[-1] != self.head_dim or k.shape[-3] != self.num_kv_heads:
            raise ValueError(
                f"{name}: wanted shape [..., {self.num_kv_heads}, tokens, {self.head_dim}], got"
                f" {list(k.shape)}"
            )


def best_map(k_covariance: Tensor, q_covariance: Tensor) -> Tensor:
    """Return the map that makes the expected error of scores least.

    Parameters
    ----------
    k_covariance, q_covariance
        float64 ``[heads, dim, dim]``, symmetric and not negative.

    Returns
    -------
    Tensor
        fp32 ``[heads, dim, dim]``. Both covariances become the same diagonal but for a factor,
        which keeps the energy of keys. A head without energy keeps its keys.
    """
    dead = (k_covariance.diagonal(dim1=1, dim2=2).sum(-1) <= 0) | (
        q_covariance.diagonal(dim1=1, dim2=2).sum(-1) <= 0
    )
    one = torch.eye(k_covariance.shape[-1], dtype=torch.float64, device=k_covariance.device)
    # heads that nothing was seen of keep their keys
    k, q = (_ridged(torch.where(dead[:, None, None], one, c)) for c in (k_covariance, q_covariance))
    values, vectors = torch.linalg.eigh(q)
    root = (vectors * values.clamp_min(0).sqrt()[:, None]) @ vectors.mT
    # of fp64, and far above zero by the ridge: no eigenvalue can come out negative
    shared, basis = torch.linalg.eigh(root @ k @ root)
    a: Tensor = shared.pow(-0.25)[..., None] * (basis.mT @ root)
    energy = k.diagonal(dim1=1, dim2=2).sum(-1) / shared.sqrt().sum(-1)
    a *= energy.sqrt()[:, None, None]
    return a.to(torch.float32)


def _ridged(covariance: Tensor) -> Tensor:
    dim = covariance.shape[-1]
    mean = covariance.diagonal(dim1=1, dim2=2).mean(-1)
    one = torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
    return 0.5 * (covariance + covariance.mT) + _RIDGE * mean[:, None, None] * one


def shifted_mean(covariance: Tensor, rotary: Rotary, longest: int) -> Tensor:
    """Average ``R(d) C R(d)'`` over shifts ``d`` of whole segments, from 0 up to ``longest``.

    Parameters
    ----------
    covariance
        float64 ``[heads, dim, dim]``.
    rotary
        The layer's.
    longest
        The longest context that counts, in tokens.
    """
    dim = covariance.shape[-1]
    if rotary.rotary_dim == 0:
        return covariance
    total = torch.zeros_like(covariance)
    shifts = range(0, max(longest, 1), SEGMENT)
    for shift in shifts:
        at = torch.full((dim,), shift, dtype=torch.int64, device=covariance.device)
        half = rotary.rotate(covariance, at)  # C R'
        total += rotary.rotate(half.mT.contiguous(), at)
    return total / len(shifts)


@dataclass(eq=False)
class _Sums:
    """Weighted sums of one layer's outer products, float64 ``[heads, dim, dim]``."""

    k: Tensor
    q: Tensor
    weight: float = 0.0


@dataclass(frozen=True, eq=False)
class _Text:
    """What attention of one layer gets for a text, and its options, as in ``update``."""

    q: Tensor
    k: Tensor
    v: Tensor
    sm_scale: float
    logits_soft_cap: float
    sinks: Tensor | None


def _energy(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def _stored_energy(k: Tensor, offset: Tensor) -> Tensor:
    """Return the energy of keys as they are stored: uncentred where that is shorter."""
    return torch.minimum(_energy(k), _energy(k - offset))


class KeyMapCalibrator:
    """Collects attention-weighted covariances by layer and turns them into maps.

    Parameters
    ----------
    window, sinks
        Newest and first tokens that caches keep in 16 bits: their errors do not count.
    """

    def __init__(self, window: int, sinks: int) -> None:
        self.window = window
        self.sinks = sinks
        self._sums: dict[int, _Sums] = {}
        self._costs: dict[int, Tensor] = {}

    def layers(self) -> list[int]:
        """Return the layers with anything collected, in order."""
        return sorted(index for index, sums in self._sums.items() if sums.weight > 0)

    def update(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offset: Tensor,
        *,
        sm_scale: float,
        logits_soft_cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> None:
        """Add a text that begins with its first token.

        Parameters
        ----------
        layer
            Index.
        q
            ``[num_qo_heads, tokens, head_dim]``, with their positions embedded.
        k, v
            ``[num_kv_heads, tokens, head_dim]``, keys with their positions embedded.
        offset
            fp32 ``[num_kv_heads, tokens, head_dim]``: what is subtracted from keys.
        sm_scale, logits_soft_cap, sinks
            Of the layer's attention, as for :meth:`turbokv.paged.PagedKVCache.attention`; ``sinks``
            are logits ``[num_qo_heads]`` of a token without value.
        """
        heads, _, dim = k.shape
        zeros = torch.zeros((heads, dim, dim), dtype=torch.float64, device="cpu")
        sums = self._sums.setdefault(layer, _Sums(zeros, zeros.clone()))
        centred = k.float() - offset
        text = _Text(q.float(), k.float(), v.float(), sm_scale, logits_soft_cap, sinks)
        for head in range(heads):
            seen = torch.zeros(k.shape[1], dtype=torch.float32, device=k.device)
            for own, weight in self._pairs(text, head):
                seen += weight.sum((0, 1))
                by_query = weight.sum(-1).double()[..., None] * own
                sums.q[head] += torch.einsum("gid,gie->de", by_query, own.double()).cpu()
            by_key = seen.double()[:, None] * centred[head]
            sums.k[head] += (by_key.T @ centred[head].double()).cpu()
            sums.weight += float(seen.sum())

    def _pairs(self, text: _Text, head: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield queries of a KV head ``[group, rows, dim]``, and how much each key counts for them.

        Weights are ``[group, rows, tokens]``.
        """
        group, tokens = text.q.shape[0] // text.k.shape[0], text.k.shape[1]
        heads = slice(head * group, (head + 1) * group)
        k, v = text.k[head], text.v[head]
        token = torch.arange(tokens, dtype=torch.int64, device=k.device)
        lengths = v.square().sum(-1)
        for first in range(0, tokens, _QUERIES):
            rows = slice(first, min(first + _QUERIES, tokens))
            own = text.q[heads, rows]
            logits = own @ k.T * text.sm_scale
            if text.logits_soft_cap > 0:
                logits = text.logits_soft_cap * torch.tanh(logits / text.logits_soft_cap)
            ahead = token - token[rows, None]
            logits.masked_fill_(ahead > 0, -math.inf)
            total = logits.logsumexp(-1)
            if text.sinks is not None:
                total = torch.logaddexp(total, text.sinks.float()[heads, None])
            p = torch.exp(logits - total[..., None])
            o = p @ v
            # |v - o|^2, which rounding may make negative where v is o
            away = lengths - 2 * (o @ v.T) + o.square().sum(-1)[..., None]
            counts = (ahead <= -self.window) & (token >= self.sinks)
            yield own, p.square() * away.clamp_min(0) * counts

    def judge(
        self,
        layer: int,
        key_map: KeyMap,
        rotary: Rotary,
        longest: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offset: Tensor,
        *,
        sm_scale: float,
        logits_soft_cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> None:
        """Add a text to what errors of outputs are expected to be, with ``key_map`` and without.

        The sum over pairs of weight, ``|A k|^2`` and ``|A^-T q|^2``, of which the product of traces
        that :func:`best_map` makes least is only an estimate: large keys may meet small queries.
        Averaged over some shifts of position up to ``longest``; other arguments as in
        :meth:`update`.
        """
        text = _Text(q.float(), k.float(), v.float(), sm_scale, logits_soft_cap, sinks)
        key_map = key_map.to(k.device)
        heads = k.shape[0]
        costs = self._costs.setdefault(
            layer, torch.zeros((2, heads), dtype=torch.float64, device="cpu")
        )
        step = max(longest // _JUDGED // SEGMENT, 1) * SEGMENT
        plain = _energy(text.q), _stored_energy(text.k, offset)
        mapped = []
        for shift in range(0, max(longest, 1), step):
            turned = []
            for x in (text.q, text.k, offset):
                at = torch.full((x.shape[1],), shift, dtype=torch.int64, device=x.device)
                turned.append(rotary.rotate(x, at))
            own_q, own_k, own_offset = turned
            keys = key_map.map_keys(own_k), key_map.map_keys(own_offset)
            mapped.append((_energy(key_map.map_queries(own_q)), _stored_energy(*keys)))
        group = q.shape[0] // heads
        for head in range(heads):
            first = 0
            for own, weight in self._pairs(text, head):
                rows = slice(first, first + own.shape[1])
                first = rows.stop
                group_rows = slice(head * group, (head + 1) * group), rows
                for kind, energies in ((0, [plain]), (1, mapped)):
                    for of_q, of_k in energies:
                        seen = torch.einsum("grt,gr->t", weight, of_q[group_rows])
                        costs[kind, head] += float(seen @ of_k[head]) / len(energies)

    def accepted(self, layer: int, key_map: KeyMap) -> KeyMap:
        """Return ``key_map`` with heads left as they are where it was judged not to help."""
        costs = self._costs[layer]
        is_worse = (costs[1] >= costs[0]).to(key_map.matrix.device)
        one = torch.eye(key_map.head_dim, dtype=torch.float32, device=key_map.matrix.device)
        return KeyMap(torch.where(is_worse[:, None, None], one, key_map.matrix))

    def key_map(self, layer: int, rotary: Rotary, longest: int) -> KeyMap:
        """Return the map of a layer, for contexts of up to ``longest`` tokens.

        Raises
        ------
        ValueError
            If nothing was collected that counts: every text ended within window and sinks.
        """
        sums = self._sums.get(layer)
        if sums is None or sums.weight <= 0:
            raise ValueError(
                f"layer: wanted one with texts of more than {self.window + self.sinks} tokens"
                f" collected, got {layer}"
            )
        k, q = (shifted_mean(c, rotary, longest) for c in (sums.k, sums.q))
        return KeyMap(best_map(k, q))
