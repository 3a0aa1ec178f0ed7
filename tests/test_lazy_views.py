# SPDX-License-Identifier: Apache-2.0
"""Views whose sign is not in memory (``x.conj().imag``) and tensors without an address."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from turbokv import TurboKVCodec, core, kernels
from turbokv.core import Codebook, VectorFormat
from turbokv.kernels import arguments
from turbokv.page_metadata import compute_page_metadata
from turbokv.paged import PagedKVCache

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(kernels.why_unavailable(name, "cpu") is not None, reason=name),
    )
    for name in ("torch", "cpp", "triton")
]


def negated(*shape: int) -> Tensor:
    """Return a float view whose memory holds the numbers with the other sign."""
    pair = torch.randn(*shape, 2, generator=torch.Generator("cpu").manual_seed(0))
    view = torch.view_as_complex(pair).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazily_negated_vectors_keep_their_sign(backend: str) -> None:
    codec, lazy = TurboKVCodec(64, 5, backend=backend), negated(3, 7, 64)  # type: ignore[arg-type]
    solid = lazy.clone().resolve_neg()
    assert not solid.is_neg()
    for compress in (codec.compress_k, codec.compress_v):
        for got, want in zip(compress(lazy), compress(solid), strict=True):
            assert torch.equal(got, want)
    offset = negated(64)
    for got, want in zip(
        codec.compress_k(solid, offset=offset),
        codec.compress_k(solid, offset=offset.resolve_neg()),
        strict=True,
    ):
        assert torch.equal(got, want)
    assert torch.equal(codec.rotate_query(lazy), codec.rotate_query(solid))
    assert torch.equal(codec.unrotate_output(lazy), codec.unrotate_output(solid))
    packed, norms = codec.compress_k(solid)
    lazy_norms = torch._neg_view(-norms)
    assert torch.equal(codec.decompress_k(packed, lazy_norms), codec.decompress_k(packed, norms))


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_never_lazily_negated(backend: str) -> None:
    codec = TurboKVCodec(64, 4, backend=backend)  # type: ignore[arg-type]
    x = torch.randn(3, 64)
    packed, norms = codec.compress_k(x)
    with pytest.raises(ValueError, match="out_norms: wanted numbers as they lie in memory"):
        codec.compress_k(x, out_norms=torch._neg_view(torch.empty(3).half()))
    with pytest.raises(ValueError, match="out: wanted numbers as they lie in memory"):
        codec.decompress_k(packed, norms, out=torch._neg_view(torch.empty(3, 64)))


def test_paged_cache_takes_lazily_negated_vectors() -> None:
    lazy = negated(16, 1, 64)
    slots = torch.arange(16)
    pages = []
    for x in (lazy, lazy.clone().resolve_neg()):
        cache = PagedKVCache(TurboKVCodec(64), 1, 1, 16)
        cache.append(x, x, slots)
        pages.append(cache.pages)
    assert torch.equal(*pages)


# --- native functions, called without the codec in between ----------------------------------------


def native(backend: str, job: str, x: Tensor, fmt: VectorFormat, packed: Tensor, norms: Tensor):  # type: ignore[no-untyped-def]
    if kernels.why_unavailable(backend, "cpu") is not None:  # type: ignore[arg-type]
        pytest.skip(backend)
    from turbokv.kernels import cpu, triton_kernels

    module = {"cpp": cpu, "triton": triton_kernels}[backend]
    if job == "compress":
        return module.compress(x, fmt, packed, norms)
    return module.decompress(packed, norms, fmt, x, rotated=False)


BAD: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "vectors: dtype": ("x", lambda x: x.double()),
    "vectors: complex": ("x", lambda x: torch.complex(x, x).conj()),
    "vectors: negated": ("x", torch._neg_view),
    "vectors: sparse": ("x", lambda x: x.to_sparse()),
    "vectors: dimensions": ("x", lambda x: x[0]),
    "vectors: length": ("x", lambda x: x[:, :-1]),
    "packed: dtype": ("packed", lambda x: x.to(torch.int8)),
    "packed: length": ("packed", lambda x: x[:, :-1]),
    "packed: device": ("packed", lambda x: x.to("meta")),
    "norms: dtype": ("norms", lambda x: x.float()),
    "norms: negated": ("norms", torch._neg_view),
    "norms: device": ("norms", lambda x: x.to("meta")),
    "norms: length": ("norms", lambda x: x[:-1]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("job", ["compress", "decompress"])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_native_code_refuses_what_it_would_misread(backend: str, job: str, case: str) -> None:
    fmt = TurboKVCodec(64, 4).vector_format("k")
    given = {
        "x": torch.ones(3, 64, dtype=torch.float32),
        "packed": torch.zeros(3, fmt.packed_dim, dtype=torch.uint8),
        "norms": torch.zeros(3, dtype=torch.float16),
    }
    native(backend, job, given["x"], fmt, given["packed"], given["norms"])
    name, spoil = BAD[case]
    given[name] = spoil(given[name])
    shown = {"x": "x" if job == "compress" else "out"}.get(name, name)
    with pytest.raises((TypeError, ValueError), match=f"^{shown}: wanted "):
        native(backend, job, given["x"], fmt, given["packed"], given["norms"])


def test_formats_refuse_signs_of_another_dtype() -> None:
    signs = core.rotation_signs("k", 64)
    book = Codebook.gaussian(4)
    with pytest.raises(TypeError, match=r"signs: wanted contiguous torch\.float32, got"):
        VectorFormat(64, 64, book, signs.double(), "plain", torch.float16)
    with pytest.raises(ValueError, match=r"signs: wanted shape \[64\], got \[32\]"):
        VectorFormat(64, 64, book, signs[:32], "plain", torch.float16)


def test_page_tables_refuse_lazy_views() -> None:
    lens, table = torch.ones(1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32)
    out = [torch.zeros(n, dtype=torch.int32) for n in (2, 1, 1)]
    with pytest.raises(ValueError, match="seq_lens: wanted numbers as they lie in memory"):
        compute_page_metadata(torch._neg_view(lens), table, 16, *out)


def test_plain_copies_only_what_is_lazy() -> None:
    x = torch.ones(3)
    assert arguments.plain(x) is x
    assert not arguments.plain(torch._neg_view(x)).is_neg()
