# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as checked Python functions; see the package for what they share."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from turbokv.core import VectorFormat
from turbokv.kernels import arguments
from turbokv.kernels.cuda import library
from turbokv.kernels.cuda.build import Variant
from turbokv.kernels.cuda.library import format_text

Body = Literal["auto", "bulk", "cp_async"]

SEGMENT = 256  # logical positions that share an offset of centred keys
_TILE = 16
_PAGE_BITS = (2, 3, 4, 5, 8)
_MIN_PADDED_DIM = 64
_SCALE_BYTES = 2
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_HALVES = (torch.float16, torch.bfloat16)
_INT32_MAX = 2**31 - 1

Dtypes = tuple[torch.dtype, ...]
Shape = tuple[int | None, ...]


# --- checks ---------------------------------------------------------------------------------------


def _count(value: int, name: str, least: int, most: int = _INT32_MAX) -> None:
    # symbolic ints of traced code are no int
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: wanted an int, got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name}: wanted {least} to {most}, got {value}")


def _tensor(
    x: Tensor, name: str, dtypes: Dtypes, shape: Shape, device: torch.device | None = None
) -> None:
    """Raise unless ``x`` is such a CUDA tensor whose last dimension is contiguous."""
    arguments.check_plain(x, name)
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: wanted {' or '.join(map(str, dtypes))}, got {x.dtype}")
    fits = x.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, x.shape, strict=True)
    )
    if not fits:
        wanted = ["*" if want is None else int(want) for want in shape]
        raise ValueError(f"{name}: wanted shape {wanted}, got {list(x.shape)}")
    if x.device.type != "cuda":
        raise ValueError(f"{name}: wanted a CUDA tensor, got device {x.device}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: wanted device {device}, got {x.device}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name}: wanted a contiguous last dimension, got strides {tuple(x.stride())}"
        )


def _packed(
    x: Tensor, name: str, dtypes: Dtypes, shape: Shape, device: torch.device | None = None
) -> None:
    """As :func:`_tensor`, and contiguous throughout."""
    _tensor(x, name, dtypes, shape, device)
    if not x.is_contiguous():
        raise ValueError(f"{name}: wanted a contiguous tensor, got strides {tuple(x.stride())}")


def _format(fmt: VectorFormat, name: str, head_dim: int | None = None) -> None:
    if not isinstance(fmt, VectorFormat):
        raise TypeError(f"{name}: wanted a VectorFormat, got {type(fmt).__name__}")
    if head_dim is not None and fmt.head_dim != head_dim:
        raise ValueError(f"{name}: wanted head_dim {head_dim}, got {fmt.head_dim}")
    if fmt.padded_dim < _MIN_PADDED_DIM:
        raise ValueError(
            f"{name}: wanted head_dim of {_MIN_PADDED_DIM // 2 + 1} or more for pages,"
            f" got {fmt.head_dim}"
        )
    if fmt.bits not in _PAGE_BITS:
        raise ValueError(f"{name}: wanted one of {_PAGE_BITS} bits for pages, got {fmt.bits}")
    if not fmt.codebook.is_lattice:
        raise ValueError(f"{name}: wanted integer magnitudes, got {fmt.codebook.magnitudes}")
    if fmt.codebook.is_mid_tread != (fmt.bits == 8):
        wanted = "zero" if fmt.bits == 8 else "more than zero"
        raise ValueError(
            f"{name}: wanted a first magnitude of {wanted} at {fmt.bits} bits,"
            f" got {fmt.codebook.magnitudes[0]}"
        )
    if fmt.norm_dtype != torch.float16:
        raise ValueError(f"{name}: wanted norm_dtype torch.float16, got {fmt.norm_dtype}")


def _formats(k_format: VectorFormat, v_format: VectorFormat) -> None:
    _format(k_format, "k_format")
    _format(v_format, "v_format", k_format.head_dim)


def _pages(
    pages: Tensor,
    k_format: VectorFormat,
    v_format: VectorFormat,
    page_size: int,
    num_kv_heads: int | None = None,
) -> None:
    _count(page_size, "page_size", _TILE)
    if page_size % _TILE:
        raise ValueError(f"page_size: wanted a multiple of {_TILE}, got {page_size}")
    token_bytes = k_format.packed_dim + v_format.packed_dim + 2 * _SCALE_BYTES
    _tensor(pages, "pages", (torch.uint8,), (None, num_kv_heads, page_size * token_bytes))
    _aligned(pages, "pages")


def _aligned(x: Tensor, name: str) -> None:
    """Raise unless rows start at multiples of 16 bytes, as far as strides can tell."""
    # where a dimension has one entry its stride is never used, and may be anything
    strides = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    # which Dynamo cannot trace; the operator looks at the address itself
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
    if any(n * x.element_size() % 16 for n in (*strides, offset)):
        raise ValueError(
            f"{name}: wanted strides and a storage offset that are multiples of 16 bytes, got"
            f" {tuple(x.stride())} and {offset} elements of {x.element_size()}"
        )


def _copies(
    tile_slots: Tensor | None,
    window: Tensor | None,
    pages: Tensor,
    fmt: VectorFormat,
    page_size: int,
) -> None:
    """Check the 16-bit copies of tiles, which come together or not at all."""
    if tile_slots is None and window is None:
        return
    if tile_slots is None or window is None:
        missing = "tile_slots" if tile_slots is None else "window"
        other = "window" if tile_slots is None else "tile_slots"
        raise ValueError(f"{missing}: wanted a tensor, as {other} is given, got None")
    shape = (pages.shape[0], page_size // _TILE)
    _packed(tile_slots, "tile_slots", (torch.int32,), shape, pages.device)
    shape5 = (None, pages.shape[1], 2, _TILE, fmt.padded_dim)
    _packed(window, "window", (torch.float16,), shape5, pages.device)


def _lookup2(*formats: VectorFormat) -> bool:
    """Whether a 2-bit codebook is not ``{m, 3 m}``, which decode expands without lookups."""
    return any(
        fmt.bits == 2 and fmt.codebook.magnitudes[1] != 3 * fmt.codebook.magnitudes[0]
        for fmt in formats
    )


# Traced code takes this for a constant: it loads libraries, and may compile one.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _ensure(
    kind: str | None, padded_dim: int = 0, k_bits: int = 0, v_bits: int = 0, lookup2: bool = False
) -> None:
    """Make the operators exist, and the variant launchable."""
    loaded = library.load()
    if kind is not None:
        loaded.require(Variant(kind, padded_dim, k_bits, v_bits, lookup2))


def prepare(
    kind: Literal["store", "decompress", "decode"],
    k_format: VectorFormat,
    v_format: VectorFormat,
) -> None:
    """Make a kernel ready to launch, so that a later call neither compiles nor synchronises.

    The kernels do this themselves when they are first called. Call this, or them, once before
    capturing a CUDA graph, before ``torch.compile(fullgraph=True)`` traces them, and before the
    first request that should be fast.

    Parameters
    ----------
    kind
        Which kernel.
    k_format, v_format
        What it will be called with.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got.
    BackendUnavailableError
        If the library is not built, or lacks this variant and it cannot be compiled here.
    """
    if kind not in ("store", "decompress", "decode"):
        raise ValueError(f"kind: wanted 'store', 'decompress' or 'decode', got {kind!r}")
    _formats(k_format, v_format)
    _require(kind, k_format, v_format)
    format_text(k_format)
    format_text(v_format)


def _require(kind: str, k_format: VectorFormat, v_format: VectorFormat) -> None:
    if kind == "decode":
        lookup2 = _lookup2(k_format, v_format)
        _ensure(kind, k_format.padded_dim, k_format.bits, v_format.bits, lookup2)
    else:
        _ensure(kind, k_format.padded_dim)


# --- store ----------------------------------------------------------------------------------------


def store(
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    pages: Tensor,
    k_format: VectorFormat,
    v_format: VectorFormat,
    page_size: int,
    *,
    positions: Tensor | None = None,
    k_offset: Tensor | None = None,
    k_rotated: Tensor | None = None,
    v_rotated: Tensor | None = None,
    tile_slots: Tensor | None = None,
    window: Tensor | None = None,
    launch_dependents: bool = False,
) -> None:
    """Compress new tokens and write them to their slots in one launch; no other byte changes.

    Parameters
    ----------
    k, v
        ``[nnz, num_kv_heads, head_dim]``, float32, float16 or bfloat16 (both the same), last
        dimension contiguous.
    slot_mapping
        int64, ``nnz`` or more: ``page * page_size + token``, or -1 to skip. Slots must differ.
    pages
        uint8 ``[num_pages, num_kv_heads, page_head_bytes]``, 16-byte aligned, other strides
        multiples of 16. Written.
    k_format, v_format
        What fixes the bytes (:meth:`TurboKVCodec.vector_format`); scales in float16.
    page_size
        Tokens per page, a multiple of 16.
    positions
        int64, ``nnz`` or more: logical positions; needed with ``k_offset``.
    k_offset
        float32 ``[num_segments, num_kv_heads, head_dim]``, contiguous: subtracted from keys, by
        ``positions // 256``, where that makes them shorter.
    k_rotated, v_rotated
        Outputs ``[nnz, num_kv_heads, padded_dim]``, float16 or bfloat16: the rotated vectors, not
        centred; written for skipped slots too.
    tile_slots, window
        int32 ``[num_pages, page_size // 16]`` and float16 ``[num_slots, num_kv_heads, 2, 16,
        padded_dim]``, contiguous: a token whose tile has a slot of 0 or more is written there too.
    launch_dependents
        Whether the next kernel in the stream may start while this one runs, once the kernel before
        has ended (sm_90 and up; not after a batch of some hundred tokens). It then has to wait
        (``griddepcontrol.wait``) before it reads what this call writes: :func:`decode` with
        ``early_loads`` reads other things before it waits. Kernels that know nothing of it start
        as ever.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got.
    BackendUnavailableError
        If the library is not built, or lacks this variant and it cannot be compiled here.

    Notes
    -----
    Allocates nothing and does not synchronise; may be captured in a CUDA graph after a first call.
    Values of ``slot_mapping``, ``positions`` and ``tile_slots`` are not checked.
    """
    _formats(k_format, v_format)
    head_dim, padded_dim = k_format.head_dim, k_format.padded_dim
    _tensor(k, "k", _FLOATS, (None, None, head_dim))
    nnz, num_kv_heads = k.shape[0], k.shape[1]
    device = k.device
    _tensor(v, "v", (k.dtype,), (nnz, num_kv_heads, head_dim), device)
    _pages(pages, k_format, v_format, page_size, num_kv_heads)
    _tensor(pages, "pages", (torch.uint8,), (None, None, None), device)
    _at_least(slot_mapping, "slot_mapping", nnz, device)
    if positions is not None:
        _at_least(positions, "positions", nnz, device)
    if k_offset is not None:
        if positions is None:
            raise ValueError("positions: wanted a tensor, as k_offset is given, got None")
        _packed(k_offset, "k_offset", (torch.float32,), (None, num_kv_heads, head_dim), device)
    for name, rotated in (("k_rotated", k_rotated), ("v_rotated", v_rotated)):
        if rotated is not None:
            _tensor(rotated, name, _HALVES, (nnz, num_kv_heads, padded_dim), device)
            _aligned(rotated, name)
    if k_rotated is not None and v_rotated is not None and k_rotated.dtype != v_rotated.dtype:
        raise TypeError(f"v_rotated: wanted {k_rotated.dtype}, as k_rotated, got {v_rotated.dtype}")
    _copies(tile_slots, window, pages, k_format, page_size)
    _require("store", k_format, v_format)
    torch.ops.turbokv.store(
        k,
        v,
        slot_mapping,
        pages,
        format_text(k_format),
        format_text(v_format),
        page_size,
        positions,
        k_offset,
        k_rotated,
        v_rotated,
        tile_slots,
        window,
        launch_dependents,
    )


def _at_least(x: Tensor, name: str, count: int, device: torch.device) -> None:
    _packed(x, name, (torch.int64,), (None,), device)
    if x.shape[0] < count:
        raise ValueError(f"{name}: wanted at least {count} elements, got {x.shape[0]}")


# --- decompress -----------------------------------------------------------------------------------


def decompress(
    pages: Tensor,
    k_format: VectorFormat,
    v_format: VectorFormat,
    page_size: int,
    kv_indices: Tensor,
    out_k: Tensor | None,
    out_v: Tensor | None,
    *,
    first_token: int = 0,
    token_begin: Tensor | None = None,
    out_indptr: Tensor | None = None,
    kv_indptr: Tensor | None = None,
    rotated: bool = False,
    k_offset: Tensor | None = None,
    tile_slots: Tensor | None = None,
    window: Tensor | None = None,
) -> None:
    """Expand tokens of compressed pages to 16 bits in one launch.

    Parameters
    ----------
    pages
        uint8 ``[num_pages, num_kv_heads, page_head_bytes]``, 16-byte aligned, other strides
        multiples of 16.
    k_format, v_format
        What fixes the bytes (:meth:`TurboKVCodec.vector_format`); scales in float16.
    page_size
        Tokens per page, a multiple of 16.
    kv_indices
        int32, the pages of each request in order: a table ``[batch_size, max_pages]``, rows any
        distance apart; ``[max_pages]`` for one request; or ``[num_indices]`` with ``kv_indptr``.
    out_k, out_v
        Outputs ``[num_rows, num_kv_heads, head_dim]``, or ``padded_dim`` if ``rotated``; float16 or
        bfloat16 (both the same), last dimension contiguous. Either may be None.
    first_token, token_begin
        First token to expand: of every request, or int32 ``[batch_size]``.
    out_indptr
        int32 ``[batch_size + 1]``: request ``b`` fills rows ``out_indptr[b]`` to ``out_indptr[b +
        1] - 1``. Needed for more than one request; one alone fills all rows.
    kv_indptr
        int32 ``[batch_size + 1]``: request ``b`` owns ``kv_indices[kv_indptr[b]:kv_indptr[b +
        1]]``.
    rotated
        Whether to stay in rotated space.
    k_offset
        float32 ``[num_segments, num_kv_heads, head_dim]``, or ``padded_dim`` if ``rotated``;
        contiguous: offsets of centred keys in the space of ``out_k``, for every 256 tokens.
    tile_slots, window
        16-bit copies that are read instead of codes, as :func:`store` wrote them.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got.
    BackendUnavailableError
        If the library is not built, or lacks this variant and it cannot be compiled here.

    Notes
    -----
    Allocates nothing and does not synchronise; may be captured in a CUDA graph after a first call.
    Values of index tensors are not checked.
    """
    _formats(k_format, v_format)
    _pages(pages, k_format, v_format, page_size)
    device, num_kv_heads = pages.device, pages.shape[1]
    dim = k_format.padded_dim if rotated else k_format.head_dim
    some = out_k if out_k is not None else out_v
    if some is None:
        raise ValueError("out_k: wanted a tensor, as out_v is not given, got None")
    for name, out in (("out_k", out_k), ("out_v", out_v)):
        if out is not None:
            _tensor(out, name, _HALVES, (None, num_kv_heads, dim), device)
            if out.dtype != some.dtype:
                raise TypeError(f"{name}: wanted {some.dtype}, as out_k, got {out.dtype}")
            if out.shape[0] != some.shape[0]:
                raise ValueError(
                    f"{name}: wanted {some.shape[0]} tokens, as out_k, got {out.shape[0]}"
                )
    if kv_indptr is None and isinstance(kv_indices, Tensor) and kv_indices.ndim == 1:
        _tensor(kv_indices, "kv_indices", (torch.int32,), (None,), device)
        batch_size = 1
    else:
        batch_size = _tables(kv_indices, kv_indptr, device)
    _count(first_token, "first_token", 0)
    int32 = (torch.int32,)
    if token_begin is not None:
        _packed(token_begin, "token_begin", int32, (batch_size,), device)
    if out_indptr is not None:
        _packed(out_indptr, "out_indptr", int32, (batch_size + 1,), device)
    elif batch_size != 1:
        raise ValueError(
            f"out_indptr: wanted a tensor, as there are {batch_size} requests, got None"
        )
    last = first_token + some.shape[0]
    is_known = token_begin is None and out_indptr is None
    if is_known and kv_indptr is None and last > kv_indices.shape[-1] * page_size:
        raise ValueError(
            f"kv_indices: wanted pages for {last} tokens, got {kv_indices.shape[-1]} of {page_size}"
        )
    if k_offset is not None:
        _packed(k_offset, "k_offset", (torch.float32,), (None, num_kv_heads, dim), device)
        segments = -(-last // SEGMENT)
        if is_known and k_offset.shape[0] < segments:
            raise ValueError(f"k_offset: wanted {segments} segments, got {k_offset.shape[0]}")
    _copies(tile_slots, window, pages, k_format, page_size)
    _require("decompress", k_format, v_format)
    torch.ops.turbokv.decompress(
        pages,
        format_text(k_format),
        format_text(v_format),
        page_size,
        kv_indices,
        out_k,
        out_v,
        first_token,
        token_begin,
        out_indptr,
        kv_indptr,
        rotated,
        k_offset,
        tile_slots,
        window,
    )


# --- decode ---------------------------------------------------------------------------------------


def decode(
    q: Tensor,
    pages: Tensor,
    k_format: VectorFormat,
    v_format: VectorFormat,
    page_size: int,
    kv_indices: Tensor,
    *,
    kv_lens: Tensor | None = None,
    kv_indptr: Tensor | None = None,
    kv_last_page_len: Tensor | None = None,
    qo_indptr: Tensor | None = None,
    max_q_len: int = 1,
    causal: bool = True,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    rotated_output: bool = False,
    rotated_query: bool = False,
    tile_slots: Tensor | None = None,
    window: Tensor | None = None,
    k_offset: Tensor | None = None,
    workspace: Tensor | None = None,
    body: Body = "auto",
    num_ctas: int = 0,
    early_loads: bool = False,
) -> Tensor:
    """Attend to compressed pages in one launch: rotate, attend, combine and un-rotate.

    Parameters
    ----------
    q
        ``[nnz, num_qo_heads, head_dim]``, float32, float16 or bfloat16, last dimension contiguous;
        ``num_qo_heads`` a multiple of ``num_kv_heads``. With ``rotated_query`` its last dimension
        is ``padded_dim``.
    pages
        uint8 ``[num_pages, num_kv_heads, page_head_bytes]``, 16-byte aligned, other strides
        multiples of 16.
    k_format, v_format
        What fixes the bytes (:meth:`TurboKVCodec.vector_format`); scales in float16.
    page_size
        Tokens per page, a multiple of 16.
    kv_indices
        int32: a table ``[batch_size, max_pages]``, rows any distance apart; or with ``kv_indptr``
        ``[num_indices]``. Entries past a request's pages are not read.
    kv_lens
        int32 ``[batch_size]``: tokens of each request, its newest queries' own included.
    kv_indptr, kv_last_page_len
        int32 ``[batch_size + 1]`` and ``[batch_size]``: in place of a table and ``kv_lens``
        (``kv_lens``, if given as well, counts).
    qo_indptr
        int32 ``[batch_size + 1]``: queries of each request, its newest tokens. Default:
        ``max_q_len`` each.
    max_q_len
        The most queries of any request.
    causal, window_left
        Whether a query sees no token after its own; how many before it (-1: all).
    sm_scale
        Multiplies scores; default ``1 / sqrt(head_dim)``.
    logits_soft_cap
        If positive, scores become ``cap * tanh(score / cap)``.
    sinks
        float32 ``[num_qo_heads]``: logit (natural units) of a token without value, for each head.
    out
        Output ``[nnz, num_qo_heads, head_dim]``, or ``padded_dim`` with ``rotated_output``;
        float32, float16 or bfloat16, last dimension contiguous. Allocated in ``q``'s dtype if
        absent.
    lse
        Output float32 ``[nnz, num_qo_heads]``, last dimension contiguous: log-sum-exp, base 2.
    rotated_output, rotated_query
        Whether to leave the output in V's rotated space; whether ``q`` comes in K's.
    tile_slots, window
        16-bit copies that are read instead of codes, as :func:`store` wrote them.
    k_offset
        float32 ``[num_segments, num_kv_heads, padded_dim]``, contiguous, 16-byte aligned: offsets
        of centred keys in rotated space, for every 256 tokens.
    workspace
        uint8, :func:`decode_workspace_bytes` or more, 16-byte aligned, zeros before its first use;
        every call leaves it ready for the next on the same stream, of another batch size as well
        as of other lengths. Allocated and zeroed if absent.
    body
        How tiles reach shared memory: ``bulk`` (sm_90 and up), ``cp_async``, or ``auto``.
    num_ctas
        Thread blocks, up to 32768; 0 for as many as run at a time.
    early_loads
        Whether lengths, page tables, ``qo_indptr``, ``tile_slots`` and codes of old tokens may be
        read before the kernel before it in the stream has ended (sm_90 and up; elsewhere nothing is
        read early). That kernel, and any that it overlaps, must not write them. It may write ``q``,
        ``k_offset``, ``window`` and the codes of the tokens that are queries themselves: a
        :func:`store` of just these is such a kernel, a store of a whole prompt is not.

    Returns
    -------
    Tensor
        ``out``. A query that sees no token gets zeros, and minus infinity.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got.
    BackendUnavailableError
        If the library is not built, or lacks this variant and it cannot be compiled here.

    Notes
    -----
    Does not synchronise, and allocates only ``out`` and ``workspace`` where they are absent. May be
    captured in a CUDA graph after a first call; replays read lengths and tables of that moment.
    Values of index tensors are not checked.
    """
    _formats(k_format, v_format)
    head_dim, padded_dim = k_format.head_dim, k_format.padded_dim
    _tensor(q, "q", _FLOATS, (None, None, padded_dim if rotated_query else head_dim))
    nnz, num_qo_heads, device = q.shape[0], q.shape[1], q.device
    _pages(pages, k_format, v_format, page_size)
    _tensor(pages, "pages", (torch.uint8,), (None, None, None), device)
    num_kv_heads = pages.shape[1]
    if num_kv_heads < 1 or num_qo_heads < 1 or num_qo_heads % num_kv_heads:
        raise ValueError(f"q: wanted a multiple of {num_kv_heads} heads, got {num_qo_heads}")
    batch_size = _tables(kv_indices, kv_indptr, device)
    for name, lens in (("kv_lens", kv_lens), ("kv_last_page_len", kv_last_page_len)):
        if lens is not None:
            _packed(lens, name, (torch.int32,), (batch_size,), device)
    if kv_lens is None and (kv_indptr is None or kv_last_page_len is None):
        missing = "kv_lens" if kv_indptr is None else "kv_last_page_len"
        raise ValueError(f"{missing}: wanted a tensor, for the lengths of requests, got None")
    _count(max_q_len, "max_q_len", 1)
    if qo_indptr is not None:
        _packed(qo_indptr, "qo_indptr", (torch.int32,), (batch_size + 1,), device)
    elif nnz != batch_size * max_q_len:
        raise ValueError(
            f"q: wanted {batch_size * max_q_len} tokens, max_q_len for each of {batch_size}"
            f" requests as qo_indptr is None, got {nnz}"
        )
    _count(window_left, "window_left", -1)
    _count(num_ctas, "num_ctas", 0, 1 << 15)
    if body not in get_args(Body):
        raise ValueError(f"body: wanted one of {get_args(Body)}, got {body!r}")
    if not logits_soft_cap >= 0:
        raise ValueError(f"logits_soft_cap: wanted 0 or more, got {logits_soft_cap}")
    if sinks is not None:
        _packed(sinks, "sinks", (torch.float32,), (num_qo_heads,), device)
    if k_offset is not None:
        shape = (None, num_kv_heads, padded_dim)
        _packed(k_offset, "k_offset", (torch.float32,), shape, device)
        _aligned(k_offset, "k_offset")
    _copies(tile_slots, window, pages, k_format, page_size)
    out_shape = (nnz, num_qo_heads, padded_dim if rotated_output else head_dim)
    if out is None:
        out = torch.empty(out_shape, dtype=q.dtype, device=device)
    else:
        _tensor(out, "out", _FLOATS, out_shape, device)
    if lse is not None:
        _tensor(lse, "lse", (torch.float32,), (nnz, num_qo_heads), device)
    if workspace is not None:
        _packed(workspace, "workspace", (torch.uint8,), (None,), device)
        _aligned(workspace, "workspace")
        # in traced code sizes may be symbols; the operator checks again, with less to say
        if not torch.compiler.is_compiling():
            needed = decode_workspace_bytes(
                batch_size,
                num_qo_heads,
                num_kv_heads,
                head_dim,
                max_q_len=max_q_len,
                num_ctas=num_ctas,
                device=device,
            )
            if workspace.shape[0] < needed:
                raise ValueError(
                    f"workspace: wanted at least {needed} bytes, got {workspace.shape[0]}"
                )
    _require("decode", k_format, v_format)
    torch.ops.turbokv.decode(
        q,
        pages,
        format_text(k_format),
        format_text(v_format),
        page_size,
        kv_indices,
        kv_lens,
        kv_indptr,
        kv_last_page_len,
        qo_indptr,
        max_q_len,
        causal,
        1.0 / math.sqrt(head_dim) if sm_scale is None else sm_scale,
        window_left,
        logits_soft_cap,
        sinks,
        out,
        lse,
        rotated_output,
        rotated_query,
        tile_slots,
        window,
        k_offset,
        workspace,
        body,
        num_ctas,
        early_loads,
    )
    return out


def _tables(kv_indices: Tensor, kv_indptr: Tensor | None, device: torch.device) -> int:
    """Check the page table and return the number of requests."""
    int32 = (torch.int32,)
    if kv_indptr is None:
        _tensor(kv_indices, "kv_indices", int32, (None, None), device)
        return kv_indices.shape[0]
    _tensor(kv_indices, "kv_indices", int32, (None,), device)
    _packed(kv_indptr, "kv_indptr", int32, (None,), device)
    if kv_indptr.shape[0] < 1:
        raise ValueError("kv_indptr: wanted at least 1 element, got 0")
    return kv_indptr.shape[0] - 1


def decode_workspace_bytes(
    batch_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    max_q_len: int = 1,
    num_ctas: int = 0,
    device: torch.device | str = "cuda",
) -> int:
    """Return how many bytes of workspace :func:`decode` needs.

    So much is enough for every smaller ``batch_size``, ``head_dim`` and ``max_q_len`` with the same
    heads, too, in any order. Caches with other heads or ``num_ctas`` need workspaces of their own.

    Parameters
    ----------
    batch_size, num_qo_heads, num_kv_heads, head_dim, max_q_len
        The largest values that the workspace will be used with; ``num_qo_heads`` a multiple of
        ``num_kv_heads``.
    num_ctas
        As for :func:`decode`; 0 for as many as run at a time on ``device``.
    device
        Asked only if ``num_ctas`` is 0.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got.
    BackendUnavailableError
        If the library is not built.
    """
    _count(batch_size, "batch_size", 0)
    _count(num_kv_heads, "num_kv_heads", 1)
    _count(num_qo_heads, "num_qo_heads", 1)
    _count(head_dim, "head_dim", _MIN_PADDED_DIM // 2 + 1, 512)
    _count(max_q_len, "max_q_len", 1)
    _count(num_ctas, "num_ctas", 0, 1 << 15)
    if num_qo_heads % num_kv_heads:
        raise ValueError(
            f"num_qo_heads: wanted a multiple of num_kv_heads {num_kv_heads}, got {num_qo_heads}"
        )
    function = library.load().handle.turbokv_decode_workspace_bytes
    function.restype = ctypes.c_int64
    padded_dim = 1 << (head_dim - 1).bit_length()
    multiprocessors = 0
    if not num_ctas:
        index = torch.device(device).index
        multiprocessors = _multiprocessors(torch.cuda.current_device() if index is None else index)
    sizes = (batch_size, num_qo_heads, num_kv_heads, padded_dim, max_q_len, num_ctas)
    return int(function(*sizes, multiprocessors))


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


# --- page metadata --------------------------------------------------------------------------------


def page_metadata(
    seq_lens: Tensor,
    block_table: Tensor,
    page_size: int,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_len: Tensor,
) -> None:
    """Launch once; arguments are those of :func:`turbokv.page_metadata.compute_page_metadata`.

    They are checked there. Allocates nothing and does not synchronise; graph-safe.
    """
    _ensure(None)
    torch.ops.turbokv.page_metadata(
        seq_lens, block_table, page_size, kv_indptr, kv_indices, kv_last_page_len
    )
