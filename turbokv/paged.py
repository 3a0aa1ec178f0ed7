# SPDX-License-Identifier: Apache-2.0
"""The paged compressed cache: append, gather and attention.

:class:`PagedKVCache` is the plain reference that kernels are tested against: clear, and in float64
where it matters, but not fast. ``page_layout.py`` says where the bytes lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from turbokv import core
from turbokv.centring import SEGMENT
from turbokv.codec import TurboKVCodec
from turbokv.key_map import KeyMap
from turbokv.page_layout import FORMAT_VERSION as FORMAT_VERSION
from turbokv.page_layout import MIN_PADDED_DIM as MIN_PADDED_DIM
from turbokv.page_layout import PAGE_BITS as PAGE_BITS
from turbokv.page_layout import SCALE_BYTES as SCALE_BYTES
from turbokv.page_layout import TILE as TILE
from turbokv.page_layout import PageLayout as PageLayout
from turbokv.page_layout import check_count

Stored = tuple[Tensor, Tensor, Tensor, Tensor]
Dtypes = tuple[torch.dtype, ...]
_INTS = (torch.int32, torch.int64)


def _check_values(x: Tensor, name: str, low: int, high: int) -> None:
    least, most = (int(x.min()), int(x.max())) if x.numel() else (low, high)
    if least < low or most > high:
        raise ValueError(f"{name}: wanted values from {low} to {high}, got {least} to {most}")


class PagedKVCache:
    """Compressed pages of one layer: append, gather and attention as a plain reference.

    Parameters
    ----------
    codec
        Fixes head size, widths and rotation; its scales must be float16.
    num_pages, num_kv_heads, page_size
        Shape of the cache.
    pages
        Storage to adopt, uint8 ``[num_pages, num_kv_heads, page_head_bytes]``, any strides.
        Allocated and zeroed if absent.
    key_map
        Maps keys and offsets before they are stored, and queries to meet them. Offsets of all
        methods are in original space.

    Notes
    -----
    Methods check values of index tensors, so on a GPU they synchronise and no CUDA graph captures
    them. Bad input raises TypeError or ValueError naming the argument, wanted and got.
    """

    def __init__(
        self,
        codec: TurboKVCodec,
        num_pages: int,
        num_kv_heads: int,
        page_size: int = TILE,
        *,
        pages: Tensor | None = None,
        key_map: KeyMap | None = None,
    ) -> None:
        check_count(num_pages, "num_pages")
        norm_dtype = codec.vector_format("k").norm_dtype
        if norm_dtype != torch.float16:
            raise ValueError(f"codec: wanted norm_dtype torch.float16, got {norm_dtype}")
        self.codec = codec
        self.num_pages = num_pages
        self.layout = PageLayout(
            codec.head_dim, codec.k_bits, codec.v_bits, page_size, num_kv_heads
        )
        shape = self.layout.shape(num_pages)
        if pages is None:
            pages = torch.zeros(shape, dtype=torch.uint8, device=codec.device)
        self._check(pages, "pages", shape, (torch.uint8,))
        self.pages = pages
        if key_map is not None:
            wanted = (num_kv_heads, codec.head_dim, codec.head_dim)
            self._check(key_map.matrix, "key_map", wanted)
        self.key_map = key_map

    def _mapped(self, k: Tensor) -> Tensor:
        """Map ``[..., num_kv_heads, head_dim]`` as keys are."""
        if self.key_map is None:
            return k
        return self.key_map.map_keys(k.unsqueeze(-2)).squeeze(-2)

    def append(
        self, k: Tensor, v: Tensor, slot_mapping: Tensor, k_offset: Tensor | None = None
    ) -> None:
        """Compress new tokens and write them to their slots; no other byte changes.

        Parameters
        ----------
        k, v
            ``[nnz, num_kv_heads, head_dim]``, float32, float16 or bfloat16, any strides.
        slot_mapping
            int64 ``[nnz]``: ``page * page_size + token``, or -1 to skip. Slots must differ.
        k_offset
            Broadcastable to ``k``, subtracted from keys (:meth:`TurboKVCodec.compress_k`).
        """
        self._check(slot_mapping, "slot_mapping", (None,), (torch.int64,))
        shape = (slot_mapping.shape[0], self.layout.num_kv_heads, self.codec.head_dim)
        self._check(k, "k", shape)
        self._check(v, "v", shape)
        limit = self.num_pages * self.layout.page_size
        _check_values(slot_mapping, "slot_mapping", -1, limit - 1)
        keep = slot_mapping >= 0
        k = self._mapped(k)
        if k_offset is not None and self.key_map is not None:
            k_offset = self._mapped(k_offset.expand(k.shape))
        k_packed, k_norms = self.codec.compress_k(k, offset=k_offset)
        v_packed, v_norms = self.codec.compress_v(v)
        slots = slot_mapping[keep]
        self.layout.scatter(self.pages, slots, "k", k_packed[keep], k_norms[keep])
        self.layout.scatter(self.pages, slots, "v", v_packed[keep], v_norms[keep])

    def slots(self, kv_indices: Tensor, length: int) -> Tensor:
        """Return the slots of the first ``length`` tokens in pages ``kv_indices``, int64."""
        self._check(kv_indices, "kv_indices", (None,), _INTS)
        _check_values(kv_indices, "kv_indices", 0, self.num_pages - 1)
        page_size = self.layout.page_size
        if not 0 <= length <= kv_indices.shape[0] * page_size:
            room = kv_indices.shape[0] * page_size
            raise ValueError(f"length: wanted 0 to {room}, got {length}")
        token = torch.arange(length, dtype=torch.int64, device=kv_indices.device)
        page = kv_indices.to(torch.int64)[token // page_size]
        return page * page_size + token % page_size

    def gather_packed(self, kv_indices: Tensor, length: int) -> Stored:
        """Read tokens in the codec's flat form: ``(k_packed, k_norms, v_packed, v_norms)``.

        Shapes are ``[length, num_kv_heads, packed_dim]`` and ``[length, num_kv_heads]``.
        """
        slots = self.slots(kv_indices, length)
        keys = self.layout.gather(self.pages, slots, "k")
        return *keys, *self.layout.gather(self.pages, slots, "v")

    def gather(
        self, kv_indices: Tensor, length: int, *, k_offset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decompress tokens to ``(k, v)``, both float32 ``[length, num_kv_heads, head_dim]``.

        Parameters
        ----------
        kv_indices, length
            Pages of a request in order, int32 or int64, and the tokens to read.
        k_offset
            ``[num_segments, num_kv_heads, head_dim]``: the offset of each 256 logical positions.
        """
        k_packed, k_norms, v_packed, v_norms = self.gather_packed(kv_indices, length)
        offset = self._token_offsets(k_offset, length)
        k = self.codec.decompress_k(k_packed, k_norms, offset=offset, dtype=torch.float32)
        if self.key_map is not None:
            k = self.key_map.unmap_keys(k.unsqueeze(-2)).squeeze(-2)
        return k, self.codec.decompress_v(v_packed, v_norms, dtype=torch.float32)

    def attention(
        self,
        q: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_last_page_len: Tensor,
        sm_scale: float | None = None,
        *,
        qo_indptr: Tensor | None = None,
        causal: bool = True,
        logits_soft_cap: float = 0.0,
        window_left: int = -1,
        k_offset: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend to compressed pages in rotated space, in float64.

        Parameters
        ----------
        q
            ``[nnz_qo, num_qo_heads, head_dim]``; ``num_qo_heads`` a multiple of ``num_kv_heads``.
        kv_indptr, kv_indices, kv_last_page_len
            int32 or int64 ``[batch_size + 1]``, ``[kv_indptr[-1]]`` or more, ``[batch_size]``: the
            pages of each request, and the tokens in its last one (ignored if it has no page).
        sm_scale
            Multiplies scores; default ``1 / sqrt(head_dim)``.
        qo_indptr
            int32 or int64 ``[batch_size + 1]``: queries of each request, its newest tokens; default
            one each.
        causal, window_left
            Whether a query sees no token after its own; how many before it (-1: all).
        logits_soft_cap
            If positive, scores become ``cap * tanh(score / cap)``.
        k_offset
            As in :meth:`gather`.
        return_lse
            Also return the log-sum-exp, float32 ``[nnz_qo, num_qo_heads]``, base 2 as FlashInfer's.

        Returns
        -------
        Tensor or tuple
            ``[nnz_qo, num_qo_heads, head_dim]`` in ``q``'s dtype. A query that sees no token gets
            zeros, and minus infinity.
        """
        core.check_vectors(q, self.codec.head_dim, "q")
        self._check(q, "q", (None, None, self.codec.head_dim))
        num_qo_heads, num_kv_heads = q.shape[1], self.layout.num_kv_heads
        group_size, rest = divmod(num_qo_heads, num_kv_heads)
        if rest or not group_size:
            raise ValueError(f"q: wanted a multiple of {num_kv_heads} heads, got {num_qo_heads}")
        scale = 1.0 / math.sqrt(self.codec.head_dim) if sm_scale is None else sm_scale
        asked = q.to(torch.float32)
        if self.key_map is not None:
            asked = self.key_map.map_queries(asked.unsqueeze(-2)).squeeze(-2)
        rotated = self.codec.rotate_query(asked).to(torch.float64)
        rotated = rotated.view(q.shape[0], num_kv_heads, group_size, self.codec.padded_dim)
        out = torch.zeros(rotated.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(out.shape[:-1], -math.inf, dtype=torch.float32, device=q.device)
        tables = (kv_indptr, kv_indices, kv_last_page_len, qo_indptr)
        for rows, pages, length in self._requests(q.shape[0], *tables):
            k_packed, k_norms, v_packed, v_norms = self.gather_packed(pages, length)
            offset = self._token_offsets(k_offset, length)
            k = self.codec.decompress_k_raw(k_packed, k_norms, offset=offset, dtype=torch.float32)
            v = self.codec.decompress_v_raw(v_packed, v_norms, dtype=torch.float32)
            k, v = k.to(torch.float64), v.to(torch.float64)
            logits = torch.einsum("qhgd,khd->qhgk", rotated[rows], k) * scale
            if logits_soft_cap > 0:
                logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
            first = length - logits.shape[0]
            own = torch.arange(first, length, dtype=torch.int64, device=q.device)
            ahead = torch.arange(length, dtype=torch.int64, device=q.device) - own[:, None]
            hidden = (ahead > 0) & causal
            if window_left >= 0:
                hidden |= ahead < -window_left
            logits.masked_fill_(hidden[:, None, None, :], -math.inf)
            total = logits.logsumexp(-1)
            # the clamp keeps a row without visible tokens from subtracting infinities
            weights = torch.exp(logits - total.clamp(min=-1e300)[..., None])
            out[rows] = torch.einsum("qhgk,khd->qhgd", weights, v).float()
            lse[rows] = (total / math.log(2.0)).float()
        result = self.codec.unrotate_output(out.flatten(1, 2)).to(q.dtype)
        return (result, lse.flatten(1, 2)) if return_lse else result

    def _requests(
        self, nnz: int, kv_indptr: Tensor, kv_indices: Tensor, last: Tensor, qo: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, int]]:
        """Check the tables; yield query rows, pages and length of each request that has both."""
        self._check(kv_indptr, "kv_indptr", (None,), _INTS)
        self._check(kv_indices, "kv_indices", (None,), _INTS)
        batch_size = kv_indptr.shape[0] - 1
        self._check(last, "kv_last_page_len", (batch_size,), _INTS)
        if qo is None:
            qo = torch.arange(batch_size + 1, dtype=torch.int32, device=kv_indptr.device)
        self._check(qo, "qo_indptr", (batch_size + 1,), _INTS)
        for name, starts in (("kv_indptr", kv_indptr), ("qo_indptr", qo)):
            if int(starts[0]) != 0 or bool((starts.diff() < 0).any()):
                raise ValueError(f"{name}: wanted ascending from 0, got {starts.tolist()}")
        if int(qo[-1]) != nnz:
            raise ValueError(f"q: wanted {int(qo[-1])} query tokens, got {nnz}")
        _check_values(kv_indptr[-1:], "kv_indptr", 0, kv_indices.shape[0])
        _check_values(last[kv_indptr.diff() > 0], "kv_last_page_len", 1, self.layout.page_size)
        for i in range(batch_size):
            pages = kv_indices[int(kv_indptr[i]) : int(kv_indptr[i + 1])]
            if pages.numel() and qo[i] < qo[i + 1]:
                length = (pages.numel() - 1) * self.layout.page_size + int(last[i])
                yield slice(int(qo[i]), int(qo[i + 1])), pages, length

    def _token_offsets(self, k_offset: Tensor | None, length: int) -> Tensor | None:
        """Return ``k_offset`` per token, ``[length, num_kv_heads, head_dim]``."""
        if k_offset is None:
            return None
        self._check(k_offset, "k_offset", (None, self.layout.num_kv_heads, self.codec.head_dim))
        needed = -(-length // SEGMENT)
        if k_offset.shape[0] < needed:
            raise ValueError(f"k_offset: wanted {needed} segments, got {k_offset.shape[0]}")
        token = torch.arange(length, dtype=torch.int64, device=k_offset.device)
        return self._mapped(k_offset)[token // SEGMENT]

    def _check(
        self, x: Tensor, name: str, shape: tuple[int | None, ...], dtypes: Dtypes = ()
    ) -> None:
        """Raise unless ``x`` is such a tensor on the codec's device (None: any extent)."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: wanted a torch.Tensor, got {type(x).__name__}")
        if dtypes and x.dtype not in dtypes:
            raise TypeError(f"{name}: wanted {' or '.join(map(str, dtypes))}, got {x.dtype}")
        fits = [want is None or want == got for want, got in zip(shape, x.shape, strict=False)]
        if x.ndim != len(shape) or not all(fits):
            wanted = ["*" if want is None else want for want in shape]
            raise ValueError(f"{name}: wanted shape {wanted}, got {list(x.shape)}")
        if x.device != self.codec.device:
            raise ValueError(f"{name}: wanted device {self.codec.device}, got {x.device}")
