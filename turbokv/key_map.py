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
        heads, tokens, dim = k.shape
        q, k, v = q.float(), k.float(), v.float()
        group = q.shape[0] // heads
        zeros = torch.zeros((heads, dim, dim), dtype=torch.float64, device="cpu")
        sums = self._sums.setdefault(layer, _Sums(zeros, zeros.clone()))
        token = torch.arange(tokens, dtype=torch.int64, device=k.device)
        centred = k - offset
        lengths = v.square().sum(-1)
        logit_of_sink = None if sinks is None else sinks.float().view(heads, group)
        for head in range(heads):
            seen = torch.zeros(tokens, dtype=torch.float32, device=k.device)
            for first in range(0, tokens, _QUERIES):
                rows = slice(first, min(first + _QUERIES, tokens))
                own = q[head * group : (head + 1) * group, rows]
                logits = own @ k[head].T * sm_scale
                if logits_soft_cap > 0:
                    logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
                ahead = token - token[rows, None]
                logits.masked_fill_(ahead > 0, -math.inf)
                total = logits.logsumexp(-1)
                if logit_of_sink is not None:
                    total = torch.logaddexp(total, logit_of_sink[head, :, None])
                p = torch.exp(logits - total[..., None])
                o = p @ v[head]
                # |v - o|^2, which rounding may make negative where v is o
                away = lengths[head] - 2 * (o @ v[head].T) + o.square().sum(-1)[..., None]
                counts = (ahead <= -self.window) & (token >= self.sinks)
                weight = p.square() * away.clamp_min(0) * counts
                seen += weight.sum((0, 1))
                by_query = weight.sum(-1).double()[..., None] * own
                sums.q[head] += torch.einsum("gid,gie->de", by_query, own.double()).cpu()
            by_key = seen.double()[:, None] * centred[head]
            sums.k[head] += (by_key.T @ centred[head].double()).cpu()
            sums.weight += float(seen.sum())

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
