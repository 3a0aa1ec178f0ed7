# SPDX-License-Identifier: Apache-2.0
"""A layer's formats, offsets and copies, and the steps of attention in PyTorch; without vLLM."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from turbokv.calibration import (
    Calibration,
    CalibrationError,
    Fingerprint,
    LayerCalibration,
)
from turbokv.centring import KeyOffsets, Rotary, rotary_frequencies
from turbokv.core import Codebook
from turbokv.integrations.vllm.attention import steps_torch as kernels
from turbokv.integrations.vllm.attention.layer import CacheLayer, head_slice
from turbokv.integrations.vllm.offsets.file import check_parts
from turbokv.key_map import KeyMap
from turbokv.paged import PageLayout

HEADS, DIM, PAGE = 2, 64, 32
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
SETTINGS = {"sm_scale": DIM**-0.5, "sliding_window": None, "logits_soft_cap": 0.0, "sinks": None}


def offsets(scale: float = 3.0) -> KeyOffsets:
    generator = torch.Generator().manual_seed(5)
    mu = scale * torch.randn(HEADS, DIM, generator=generator)
    return KeyOffsets(mu, Rotary(rotary_frequencies(DIM)))


def key_map() -> KeyMap:
    """Of matrices that are not orthogonal: they stretch by 1/e to e."""
    generator = torch.Generator().manual_seed(6)
    turn = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator)).Q
    return KeyMap(turn * torch.linspace(-1, 1, DIM).exp())


def cache_layer(
    dtype: str = "tq_k8v4", centred: bool = False, copies: int = 0, mapped: bool = False
) -> CacheLayer:
    calibration = LayerCalibration(offsets=offsets() if centred else None)
    layer = CacheLayer.create(dtype, DIM, HEADS, calibration)
    if mapped:
        layer.set_map(key_map(), torch.device("cpu"))
    if calibration.offsets is not None:
        layer.set_offsets(calibration.offsets, 1024, torch.device("cpu"))
    if copies:
        layer.make_copies(copies, torch.device("cpu"))
    return layer


class Stored:
    """A request of ``length`` tokens in shuffled pages."""

    def __init__(self, layer: CacheLayer, length: int, tile_slots: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(length)
        self.k, self.v = (torch.randn(length, HEADS, DIM, generator=generator) for _ in "kv")
        if layer.offsets is not None:
            self.k += layer.offsets.at(0, length).transpose(0, 1)
        count = -(-length // PAGE)
        self.table = torch.randperm(count, generator=generator).int()
        bits = layer.k_format.bits, layer.v_format.bits
        layout = PageLayout(DIM, *bits, PAGE, HEADS)
        self.pages = torch.zeros(layout.shape(count), dtype=torch.uint8)
        token = torch.arange(length)
        slots = self.table[token // PAGE].long() * PAGE + token % PAGE
        kernels.store(layer, self.k, self.v, slots, self.pages, PAGE, token, tile_slots)
        self.tile_slots = tile_slots

    def expand(self, layer: CacheLayer, first: int, count: int) -> tuple[Tensor, Tensor]:
        k, v = (torch.empty(count, HEADS, DIM) for _ in "kv")
        args = (layer, self.pages, PAGE, self.table, k, v, self.tile_slots)
        kernels.expand(*args, first_token=first)
        return k, v


@pytest.mark.parametrize("centred", [False, True])
def test_what_is_stored_is_read_back(centred: bool) -> None:
    layer = cache_layer(centred=centred)
    stored = Stored(layer, 700)
    k, v = stored.expand(layer, 250, 300)
    assert float((k - stored.k[250:550]).norm() / stored.k[250:550].norm()) < 0.02
    assert float((v - stored.v[250:550]).norm() / stored.v[250:550].norm()) < 0.12


def test_centring_helps_keys_that_share_a_mean() -> None:
    errors = {}
    for centred in (False, True):
        layer = cache_layer("tq4", centred)
        stored = Stored(cache_layer("tq4", True), 256)
        if not centred:
            stored.pages.zero_()
            token = torch.arange(256)
            slots = stored.table[token // PAGE].long() * PAGE + token % PAGE
            kernels.store(layer, stored.k, stored.v, slots, stored.pages, PAGE, token, None)
        k, _ = stored.expand(layer, 0, 256)
        errors[centred] = float((k - stored.k).norm())
    assert errors[True] < 0.5 * errors[False]


def test_copies_are_read_in_the_place_of_codes() -> None:
    layer = cache_layer("tq2", copies=3)
    tile_slots = torch.full((4, 2), -1, dtype=torch.int32)
    tile_slots[1, 0], tile_slots[3, 1] = 2, 0
    stored = Stored(layer, 4 * PAGE, tile_slots)
    k, v = stored.expand(layer, 0, 4 * PAGE)
    token = torch.arange(4 * PAGE)
    page = stored.table[token // PAGE].long()
    held = tile_slots[page, token % PAGE // 16] >= 0
    assert int(held.sum()) == 32
    for got, wanted in ((k, stored.k), (v, stored.v)):
        error = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(error[held].max()) < 1e-3
        assert float(error[~held].min()) > 0.05


@pytest.mark.parametrize(
    "changed",
    [{}, {"sliding_window": 40}, {"logits_soft_cap": 2.0}, {"sinks": torch.tensor([0.5] * 4)}],
    ids=["plain", "sliding window", "soft cap", "sinks"],
)
def test_decode_is_attention_over_what_is_expanded(changed: dict[str, object]) -> None:
    layer = cache_layer("tq4", centred=True)
    stored = Stored(layer, 300)
    q = torch.randn(3, 4, DIM, generator=torch.Generator().manual_seed(1))
    settings = {**SETTINGS, **changed}
    got, wanted = torch.empty(3, 4, DIM), torch.empty(3, 4, DIM)
    lens, indptr = torch.tensor([300], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    table = stored.table[None]
    kernels.decode(
        layer, q, stored.pages, PAGE, table, lens, indptr, 3, None, got, None, **settings
    )
    k, v = stored.expand(layer, 0, 300)
    cu_k = torch.tensor([0, 300], dtype=torch.int32)
    kernels.attend(q, k, v, indptr, cu_k, 3, 300, wanted, causal=True, version=0, **settings)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_pages_before_a_sliding_window_are_not_read() -> None:
    """They may be another request's by now, of a layer whose bytes mean something else."""
    layer = cache_layer("tq4")
    stored = Stored(layer, 300)
    q = torch.randn(3, 4, DIM, generator=torch.Generator().manual_seed(1))
    lens, indptr = torch.tensor([300], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    outs = []
    for byte in (None, 0xFF):  # all ones are no number as a scale
        if byte is not None:
            stored.pages[stored.table[: 250 // PAGE].long()] = byte
        outs.append(torch.empty(3, 4, DIM))
        kernels.decode(
            layer,
            q,
            stored.pages,
            PAGE,
            stored.table[None],
            lens,
            indptr,
            3,
            None,
            outs[-1],
            None,
            **{**SETTINGS, "sliding_window": 40},  # type: ignore[arg-type]
        )
    assert outs[0].isfinite().all()
    torch.testing.assert_close(outs[0], outs[1], atol=0, rtol=0)


def test_an_empty_row_of_a_padded_batch_answers_zero() -> None:
    layer = cache_layer("tq4")
    stored = Stored(layer, 40)
    out = torch.full((2, 4, DIM), 7.0)
    lens = torch.tensor([40, 0], dtype=torch.int32)
    tables = torch.stack([stored.table, torch.zeros_like(stored.table)])
    q = torch.randn(2, 4, DIM)
    kernels.decode(layer, q, stored.pages, PAGE, tables, lens, None, 1, None, out, None, **SETTINGS)
    assert not out[1].any()
    assert out[0].any()


def test_pieces_merge_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(n, h, DIM, generator=generator) for n, h in ((20, 4), (100, 2), (100, 2))
    )
    cu = [torch.tensor([0, n], dtype=torch.int32) for n in (20, 100, 80)]
    whole, fresh, older = (torch.empty(20, 4, DIM) for _ in range(3))
    kernels.attend(q, k, v, cu[0], cu[1], 20, 100, whole, causal=True, version=0, **SETTINGS)
    a = kernels.attend(
        q, k[80:], v[80:], cu[0], cu[0], 20, 20, fresh, causal=True, version=0, **SETTINGS
    )
    b = kernels.attend(
        q, k[:80], v[:80], cu[0], cu[2], 20, 80, older, causal=False, version=0, **SETTINGS
    )
    merged = torch.empty_like(a)
    kernels.merge(fresh, merged, older, b, fresh, a)
    torch.testing.assert_close(fresh, whole, atol=1e-5, rtol=1e-5)


def test_offsets_are_those_of_the_rank() -> None:
    own = KeyOffsets(offsets().mu[head_slice(2, 1, 1, 2)], offsets().rotary)
    layer = CacheLayer.create("tq4", DIM, 1)
    layer.reserve_offsets(600, torch.device("cpu"))
    assert layer.k_offset is not None
    assert not layer.k_offset.any()
    address = layer.k_offset.data_ptr()
    layer.reserve_offsets(600, torch.device("cpu"))  # weights are loaded again
    assert layer.k_offset.data_ptr() == address
    layer.set_offsets(own, 600, torch.device("cpu"))
    assert layer.k_offset is not None
    assert layer.k_offset.shape == (3, 1, DIM)
    rotary = Rotary(rotary_frequencies(DIM))
    wanted = rotary.segment_means(offsets().mu[1:], 0, 3)
    torch.testing.assert_close(layer.k_offset, wanted)
    layer.k_offset.zero_()  # as sleep leaves it
    assert layer.offsets is not None
    layer.set_offsets(layer.offsets, 600, torch.device("cpu"))
    assert layer.k_offset.data_ptr() == address
    torch.testing.assert_close(layer.k_offset, wanted)


def test_the_map_is_that_of_the_rank_and_stays_where_it_is() -> None:
    own = key_map().of_heads(head_slice(2, 1, 1, 2))
    layer = CacheLayer.create("tq4", DIM, 1)
    layer.set_map(own, torch.device("cpu"))
    assert layer.k_matrix is not None and layer.q_matrix is not None
    assert torch.equal(layer.k_matrix[0], key_map().matrix[1].mT)
    addresses = layer.k_matrix.data_ptr(), layer.q_matrix.data_ptr()
    layer.k_matrix.zero_()  # as sleep leaves it
    assert layer.key_map is not None
    layer.set_map(layer.key_map, torch.device("cpu"))
    assert (layer.k_matrix.data_ptr(), layer.q_matrix.data_ptr()) == addresses
    assert torch.equal(layer.k_matrix[0], key_map().matrix[1].mT)
    with pytest.raises(CalibrationError, match=r"k_map: wanted shape \[1, 64, 64\] for this rank"):
        layer.set_map(key_map(), torch.device("cpu"))


@pytest.mark.parametrize("copies", [False, True], ids=["codes", "copies"])
def test_decode_over_mapped_keys_is_attention_over_the_original(copies: bool) -> None:
    """Whatever a tile is read from, one query meets it: copies are of mapped keys, too."""
    layer = cache_layer(mapped=True, centred=True, copies=4)
    slots = torch.full((10, PAGE // 16), -1, dtype=torch.int32)
    if copies:
        slots[3, 0], slots[7, 1], slots[9, 1] = 0, 1, 3
    stored = Stored(layer, 300, slots)
    q = torch.randn(3, 4, DIM, generator=torch.Generator().manual_seed(1))
    lens, indptr = torch.tensor([300], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    got, wanted = torch.empty(3, 4, DIM), torch.empty(3, 4, DIM)
    table = stored.table[None]
    kernels.decode(
        layer, q, stored.pages, PAGE, table, lens, indptr, 3, slots, got, None, **SETTINGS
    )
    cu_k = torch.tensor([0, 300], dtype=torch.int32)
    kernels.attend(
        q, stored.k, stored.v, indptr, cu_k, 3, 300, wanted, causal=True, version=0, **SETTINGS
    )
    # of 8-bit keys and 4-bit values; a query in the other space is off by more than the output
    assert float((got - wanted).norm() / wanted.norm()) < 0.12


def test_pages_of_mapped_keys_are_those_of_the_reference() -> None:
    from turbokv import TurboKVCodec
    from turbokv.paged import PagedKVCache

    layer = cache_layer("tq4", mapped=True, centred=True)
    stored = Stored(layer, 300)
    cache = PagedKVCache(TurboKVCodec(DIM, 4), 10, HEADS, PAGE, key_map=key_map())
    plain = cache_layer("tq4", centred=True)
    assert plain.k_offset is not None
    token = torch.arange(300)
    slots = stored.table[token // PAGE].long() * PAGE + token % PAGE
    cache.append(stored.k, stored.v, slots, k_offset=plain.k_offset[token // 256])
    differing = (cache.pages != stored.pages).float().mean()
    assert float(differing) < 1e-3  # products may be summed up in another order


@needs_vllm
def test_prefill_over_older_tokens_maps_what_meets_them() -> None:
    """A chunk with older tokens in pages answers as attention over all keys does."""
    from types import SimpleNamespace

    from turbokv.integrations.vllm.attention.layer import AttentionShape, AttentionSinks
    from turbokv.integrations.vllm.prefill.flash_attention import (
        Prefill,
        PrefillGroup,
        Workspace,
    )
    from turbokv.integrations.vllm.prefill.plan import Group

    layer = cache_layer(mapped=True, centred=True)
    stored = Stored(layer, 200)
    shape = AttentionShape(4, HEADS, DIM, DIM**-0.5, None, 0.0)
    workspace: Workspace = SimpleNamespace(  # type: ignore[assignment]
        views=lambda _: [torch.empty(256, HEADS, DIM) for _ in range(4)]
    )
    q = torch.randn(50, 4, DIM, generator=torch.Generator().manual_seed(2))
    wanted = torch.empty(50, 4, DIM)
    cu_q = torch.tensor([0, 50], dtype=torch.int32)
    cu_k = torch.tensor([0, 200], dtype=torch.int32)
    kernels.attend(
        q, stored.k, stored.v, cu_q, cu_k, 50, 200, wanted, causal=True, version=0, **SETTINGS
    )
    plan = Group(0, 1, (50,), (0,), (200,))
    group = PrefillGroup(
        plan, slice(0, 1), slice(0, 50), cu_q, cu_k, torch.zeros(1, dtype=torch.int32)
    )
    for reads_cache_only in (False, True):
        prefill = Prefill(
            kernels,
            shape,
            workspace,
            AttentionSinks(),
            lambda: layer,
            reads_cache_only=reads_cache_only,
            fa_version=0,
        )
        out = torch.empty(50, 4, DIM)
        fresh = stored.k[150:], stored.v[150:]
        prefill.run(group, q, *fresh, stored.pages, PAGE, stored.table[None], None, out)
        assert float((out - wanted).norm() / wanted.norm()) < 0.12, reads_cache_only


def test_heads_are_split_or_shared_among_ranks() -> None:
    assert head_slice(8, 2, 3, 4) == slice(6, 8)
    assert [head_slice(2, 1, rank, 4).start for rank in range(4)] == [0, 0, 1, 1]


def calibration_of(layer: LayerCalibration) -> Calibration:
    return Calibration(Fingerprint("", ()), {0: layer})


def test_calibrations_that_need_folding_are_refused() -> None:
    check_parts(calibration_of(LayerCalibration(offsets=offsets())), "tq4")
    scaled = LayerCalibration(k_scale=torch.ones(HEADS, DIM))
    with pytest.raises(CalibrationError, match=r"wanted offsets and codebooks only, got .*k_scale"):
        check_parts(calibration_of(scaled), "tq4")


def test_codebooks_of_other_widths_are_refused() -> None:
    book = LayerCalibration(k_codebook=Codebook.gaussian(3))
    with pytest.raises(ValueError, match="k_bits: wanted 3"):
        check_parts(calibration_of(book), "tq4")
