# SPDX-License-Identifier: Apache-2.0
"""Mapped keys: scores are unchanged, the expected error is least, and what is stored agrees."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from turbokv import TurboKVCodec
from turbokv.centring import SEGMENT, Rotary, no_rotary, rotary_frequencies
from turbokv.key_map import KeyMap, KeyMapCalibrator, best_map, shifted_mean
from turbokv.paged import PagedKVCache

HEADS, DIM = 2, 64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def covariance(seed: int, spread: float = 1.0) -> Tensor:
    """Of channels whose variances differ by ``e^(4 spread)``, turned at random."""
    turn = torch.linalg.qr(normal(HEADS, DIM, DIM, seed=seed).double()).Q
    variance = torch.linspace(0, 4 * spread, DIM, dtype=torch.float64).exp()
    return turn @ (variance[:, None] * turn.mT)


def drawn(c: Tensor, count: int, seed: int) -> Tensor:
    root = torch.linalg.cholesky(c).float()
    return torch.matmul(normal(HEADS, count, DIM, seed=seed), root.mT)


def example() -> KeyMap:
    return KeyMap(best_map(covariance(1), covariance(2, 2.0)))


# --- the map itself -------------------------------------------------------------------------------


def test_mapped_queries_and_keys_have_the_scores_of_the_original() -> None:
    key_map = example()
    q, k = normal(3, 2 * HEADS, 5, DIM, seed=3), normal(3, HEADS, 7, DIM, seed=4)
    want = q.double() @ k.double().repeat_interleave(2, 1).mT
    mapped = (
        key_map.map_queries(q).double() @ key_map.map_keys(k).double().repeat_interleave(2, 1).mT
    )
    # rounding of two fp32 products, times the condition number of the matrices
    torch.testing.assert_close(mapped, want, rtol=0, atol=2e-4)
    torch.testing.assert_close(key_map.unmap_keys(key_map.map_keys(k)), k, rtol=0, atol=1e-4)


def test_both_covariances_become_one_diagonal_and_the_energy_stays() -> None:
    k, q = covariance(1), covariance(2, 2.0)
    a = best_map(k, q).double()
    b = torch.linalg.inv(a)
    one = torch.eye(DIM, dtype=torch.float64)
    # with the ridge of 1% that the map is made with
    k, q = (c + 0.01 * c.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * one for c in (k, q))
    of_keys, of_queries = ((m @ c @ m.mT) for m, c in ((a, k), (b.mT, q)))
    for c in (of_keys, of_queries):
        diagonal = c.diagonal(dim1=1, dim2=2)
        assert float((c - torch.diag_embed(diagonal)).abs().max()) < 1e-3 * float(diagonal.max())
    of_keys, of_queries = (c.diagonal(dim1=1, dim2=2) for c in (of_keys, of_queries))
    ratio = of_keys / of_queries
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=0)
    torch.testing.assert_close(of_keys.sum(-1), k.diagonal(dim1=1, dim2=2).sum(-1))


def test_mapped_keys_have_a_fraction_of_the_error_of_scores() -> None:
    c_k, c_q = covariance(1), covariance(2, 1.5)
    key_map = KeyMap(best_map(c_k, c_q))
    k, q = drawn(c_k, 400, 5), drawn(c_q, 400, 6)
    codec = TurboKVCodec(DIM, 4)

    def error(x: Tensor, y: Tensor) -> float:
        got = codec.decompress_k(*codec.compress_k(x))
        return float((y @ (got - x).mT).square().mean())

    assert error(key_map.map_keys(k), key_map.map_queries(q)) < 0.5 * error(k, q)


def test_a_head_without_energy_keeps_its_keys() -> None:
    k, q = covariance(1), covariance(2)
    k[1] = 0
    a = best_map(k, q)
    torch.testing.assert_close(a[1], torch.eye(DIM) * a[1, 0, 0], rtol=0, atol=1e-5)
    assert float(a[1, 0, 0]) > 0


def test_a_rank_takes_the_matrices_of_its_heads() -> None:
    key_map, k = example(), normal(HEADS, 5, DIM)
    own = key_map.of_heads(slice(1, 2))
    assert torch.equal(own.map_keys(k[1:]), key_map.map_keys(k)[1:])
    assert torch.equal(own.inverse, key_map.inverse[1:])


def test_infinite_keys_stay_finite_and_nan_stays_nan() -> None:
    key_map = example()
    k = normal(HEADS, 4, DIM)
    k[0, 0, 3], k[0, 0, 4], k[1, 2, 5] = math.inf, -math.inf, math.nan
    mapped = key_map.map_keys(k)
    assert bool(mapped[0].isfinite().all())
    assert bool(mapped[1, 2].isnan().all()) and bool(mapped[1, :2].isfinite().all())


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(DIM), "wanted shape .heads, head_dim, head_dim., got .64, 64."),
        (torch.zeros(1, DIM, DIM), "with an inverse, got"),
        (torch.full((1, 4, 4), math.nan), "with an inverse, got nan"),
        (torch.eye(4).repeat(2, 1, 1).mul(torch.tensor([1.0, math.inf]).view(2, 1, 1)), "head 1"),
        (torch.ones(1, 4, 4), "with an inverse, got"),
    ],
)
def test_matrices_that_cannot_be_undone_are_refused(matrix: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyMap(matrix)


def test_tensors_of_other_shapes_are_named() -> None:
    key_map = example()
    with pytest.raises(TypeError, match=r"k_map: wanted a tensor of torch.float32, got torch.f"):
        KeyMap(key_map.matrix.double())
    with pytest.raises(ValueError, match=r"k: wanted shape \[..., 2, tokens, 64\], got \[3, 5, 64"):
        key_map.map_keys(normal(3, 5, DIM))
    with pytest.raises(ValueError, match=r"q: wanted shape \[..., a multiple of 2, tokens, 64\]"):
        key_map.map_queries(normal(3, 5, DIM))


# --- collection -----------------------------------------------------------------------------------


def direct(
    q: Tensor, k: Tensor, v: Tensor, offset: Tensor, scale: float, window: int, sinks: int
) -> tuple[Tensor, Tensor]:
    """The covariances pair by pair, as the definition says."""
    heads, tokens, dim = k.shape
    group = q.shape[0] // heads
    c_k = torch.zeros(heads, dim, dim, dtype=torch.float64)
    c_q = torch.zeros_like(c_k)
    for head in range(q.shape[0]):
        kv = head // group
        for i in range(tokens):
            p = torch.softmax(q[head, i].double() @ k[kv, : i + 1].double().T * scale, -1)
            o = p @ v[kv, : i + 1].double()
            for t in range(sinks, i - window + 1):
                w = p[t] ** 2 * (v[kv, t].double() - o).square().sum()
                centred = k[kv, t].double() - offset[kv, t]
                c_k[kv] += w * torch.outer(centred, centred)
                c_q[kv] += w * torch.outer(q[head, i].double(), q[head, i].double())
    return c_k, c_q


def test_covariances_are_weighted_as_defined() -> None:
    q, k, v = normal(4, 12, 8, seed=1), normal(2, 12, 8, seed=2), normal(2, 12, 8, seed=3)
    offset = normal(2, 12, 8, seed=4)
    found = KeyMapCalibrator(window=3, sinks=2)
    found.update(0, q, k, v, offset, sm_scale=0.7)
    c_k, c_q = direct(q, k, v, offset, 0.7, 3, 2)
    torch.testing.assert_close(found._sums[0].k, c_k, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found._sums[0].q, c_q, rtol=1e-4, atol=1e-5)
    found.update(0, q, k, v, offset, sm_scale=0.7)
    torch.testing.assert_close(found._sums[0].k, 2 * c_k, rtol=1e-4, atol=1e-5)


def test_a_sink_logit_takes_its_share_of_the_weights() -> None:
    q, k, v = normal(2, 12, 8, seed=1), normal(2, 12, 8, seed=2), normal(2, 12, 8, seed=3)
    zeros = torch.zeros(2, 12, 8)
    plain, sunk = KeyMapCalibrator(3, 2), KeyMapCalibrator(3, 2)
    plain.update(0, q, k, v, zeros, sm_scale=0.7)
    sunk.update(0, q, k, v, zeros, sm_scale=0.7, sinks=torch.tensor([-1e4, 20.0]))
    torch.testing.assert_close(sunk._sums[0].k[0], plain._sums[0].k[0])
    assert float(sunk._sums[0].k[1].abs().max()) < 1e-6 * float(plain._sums[0].k[1].abs().max())


def test_a_map_is_judged_pair_by_pair() -> None:
    """By the sum of weight, energy of the stored key and energy of the query, over all pairs."""
    q, k, v = normal(4, 12, 8, seed=1), normal(2, 12, 8, seed=2), normal(2, 12, 8, seed=3)
    offset = normal(2, 12, 8, seed=4)
    key_map = KeyMap(normal(2, 8, 8, seed=5) + 3 * torch.eye(8, dtype=torch.float32))
    found = KeyMapCalibrator(window=3, sinks=2)
    found.judge(0, key_map, no_rotary(), 1, q, k, v, offset, sm_scale=0.7)
    want = torch.zeros(2, 2, dtype=torch.float64)
    pairs = [
        (q, k, offset),
        (key_map.map_queries(q), key_map.map_keys(k), key_map.map_keys(offset)),
    ]
    for kind, (asked, keys, offsets) in enumerate(pairs):
        for head in range(4):
            for i in range(12):
                logits = q[head, i].double() @ k[head // 2, : i + 1].double().T * 0.7
                p = torch.softmax(logits, -1)
                o = p @ v[head // 2, : i + 1].double()
                for t in range(2, i - 2):
                    w = p[t] ** 2 * (v[head // 2, t].double() - o).square().sum()
                    key, off = keys[head // 2, t].double(), offsets[head // 2, t].double()
                    energy = min(key.square().sum(), (key - off).square().sum())
                    want[kind, head // 2] += w * energy * asked[head, i].double().square().sum()
    torch.testing.assert_close(found._costs[0], want, rtol=1e-4, atol=1e-6)


def test_heads_that_a_map_does_not_help_keep_their_keys() -> None:
    """Large keys that meet small queries: less error on average by traces, more by pairs."""
    tokens, dim = 40, 8
    q, k, v = (torch.zeros(2, tokens, dim, dtype=torch.float32) for _ in "qkv")
    v += normal(2, tokens, dim, seed=3)
    q += normal(2, tokens, dim, seed=1)
    k += normal(2, tokens, dim, seed=2)
    found = KeyMapCalibrator(window=3, sinks=2)
    matrix = torch.eye(dim, dtype=torch.float32).repeat(2, 1, 1)
    matrix[1] = torch.diag(torch.tensor([100.0] + [1.0] * (dim - 1), dtype=torch.float32))
    # head 0 gets a map that does what it should, head 1 one that blows up a direction of both
    k[0, :, 0], q[0, :, 0] = 30 * k[0, :, 0], q[0, :, 0] / 30
    matrix[0, 0, 0] = 1 / 30
    key_map = KeyMap(matrix)
    found.judge(0, key_map, no_rotary(), 1, q, k, v, torch.zeros_like(k), sm_scale=0.3)
    kept = found.accepted(0, key_map)
    assert torch.equal(kept.matrix[0], matrix[0])
    assert torch.equal(kept.matrix[1], torch.eye(dim, dtype=torch.float32))


def test_texts_within_the_window_give_no_map() -> None:
    found = KeyMapCalibrator(window=16, sinks=2)
    x = normal(1, 16, 8)
    found.update(0, x, x, x, torch.zeros_like(x), sm_scale=1.0)
    assert found.layers() == []
    with pytest.raises(ValueError, match="wanted one with texts of more than 18 tokens"):
        found.key_map(0, no_rotary(), 1024)


def test_shifts_move_keys_and_queries_together() -> None:
    rotary = Rotary(rotary_frequencies(DIM))
    c = covariance(1)
    want = torch.zeros_like(c)
    for shift in (0, 256, 512, 768):
        r = rotary.rotate(torch.eye(DIM, dtype=torch.float64), torch.full((DIM,), shift)).mT
        want += r @ c @ r.mT / 4
    torch.testing.assert_close(shifted_mean(c, rotary, 1000), want)
    torch.testing.assert_close(shifted_mean(c, rotary, 1), c)
    assert shifted_mean(c, no_rotary(), 1000) is c


def test_the_mean_over_shifts_serves_positions_that_were_not_seen() -> None:
    """What was measured from 0 on is as good from 4096 on; a map of the seen positions is not."""
    rotary = Rotary(rotary_frequencies(DIM, theta=1e4))
    # pairs of channels with a preferred direction, which turns away with the position
    values = torch.linspace(4, -4, DIM, dtype=torch.float64).exp()
    seen = [torch.diag_embed(x).repeat(HEADS, 1, 1) for x in (values, 1 / values)]
    shift = torch.full((DIM,), 4096)
    later = [rotary.rotate(rotary.rotate(c, shift).mT.contiguous(), shift) for c in seen]

    def cost(a: Tensor, k: Tensor, q: Tensor) -> float:
        b = torch.linalg.inv(a)
        traces = [x.diagonal(dim1=1, dim2=2).sum(-1) for x in (a @ k @ a.mT, b.mT @ q @ b)]
        return float((traces[0] * traces[1]).mean())

    none = torch.eye(DIM, dtype=torch.float64).repeat(HEADS, 1, 1)
    narrow = best_map(*seen).double()
    wide = best_map(*(shifted_mean(c, rotary, 8192) for c in seen)).double()
    assert cost(wide, *later) < 0.7 * cost(narrow, *later)
    assert cost(narrow, *seen) < cost(wide, *seen) < cost(none, *seen)


# --- what is stored -------------------------------------------------------------------------------


def test_pages_of_mapped_keys_attend_like_the_original_space() -> None:
    """Attention over pages is that over the keys and values that the same pages give back."""
    key_map, length = example(), 600
    k, v = normal(length, HEADS, DIM, seed=7), normal(length, HEADS, DIM, seed=8)
    q = normal(1, 2 * HEADS, DIM, seed=9)
    offsets = 3 * normal(3, HEADS, DIM, seed=10)
    own = offsets[torch.arange(length) // SEGMENT]
    codec = TurboKVCodec(DIM, 5, 4)
    cache = PagedKVCache(codec, 40, HEADS, 16, key_map=key_map)
    pages = torch.randperm(40)[:38].to(torch.int32)
    cache.append(k + own, v, cache.slots(pages, length), k_offset=own)
    got_k, got_v = cache.gather(pages, length, k_offset=offsets)
    assert float((got_k - k - own).norm() / k.norm()) < 0.1
    table = (torch.tensor([0, 38], dtype=torch.int32), pages, torch.tensor([8], dtype=torch.int32))
    out = cache.attention(q, *table, k_offset=offsets)
    assert isinstance(out, Tensor)
    keys, values = got_k.repeat_interleave(2, 1), got_v.repeat_interleave(2, 1)
    p = torch.softmax(torch.einsum("hd,khd->hk", q[0], keys) / DIM**0.5, -1)
    torch.testing.assert_close(out[0], torch.einsum("hk,khd->hd", p, values), rtol=0, atol=1e-4)
    # and what is in the pages are the codes of mapped keys and offsets
    mapped = key_map.map_keys((k + own).transpose(0, 1)), key_map.map_keys(own.transpose(0, 1))
    packed, norms = codec.compress_k(mapped[0], offset=mapped[1])
    stored = cache.gather_packed(pages, length)
    assert torch.equal(stored[0].transpose(0, 1), packed)
    assert torch.equal(stored[1].transpose(0, 1), norms)


def test_uncentred_is_decided_in_mapped_space() -> None:
    """A map that blows up one direction makes an offset worth subtracting that is not otherwise."""
    matrix = torch.eye(DIM).repeat(1, 1, 1)
    matrix[0, 0, 0] = 100.0
    key_map = KeyMap(matrix)
    k, offset = torch.zeros(1, 1, DIM), torch.zeros(1, 1, DIM)
    k[0, 0, 0], offset[0, 0, 0], offset[0, 0, 1] = 1.0, 1.0, 5.0
    codec = TurboKVCodec(DIM, 4)
    assert bool(torch.signbit(codec.compress_k(k, offset=offset)[1]).all())
    _, norms = codec.compress_k(key_map.map_keys(k), offset=key_map.map_keys(offset))
    assert not bool(torch.signbit(norms).any())


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_products_in_another_order_move_few_codes_and_by_one(bits: int) -> None:
    """Backends may add up a mapped key in any order: FORMAT.md, section 5, states what may differ.

    A sum of 64 products in fp32 is off by less than 2^-18 of the key's length, so that a code can
    only differ where a coordinate is as near to a boundary: 1 in 20,000.
    """
    key_map = example()
    k = drawn(covariance(1), 4000, 11)
    codec = TurboKVCodec(DIM, bits)
    a = key_map.map_keys(k)
    exact = torch.matmul(k.double(), key_map.matrix.double().mT)
    assert float((a - exact).norm(dim=-1).div(exact.norm(dim=-1)).max()) < 2**-18
    b = exact.float()
    assert not torch.equal(a, b)  # or nothing is tested
    packed = [codec.compress_k(x)[0] for x in (a, b)]
    norms = [codec.compress_k(x)[1].float() for x in (a, b)]
    codes = [core_codes(x.reshape(-1, x.shape[-1]), bits) for x in packed]
    apart = (codes[0].int() - codes[1].int()).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) < 5e-5
    torch.testing.assert_close(norms[0], norms[1], rtol=2**-9, atol=0)


def core_codes(packed: Tensor, bits: int) -> Tensor:
    from turbokv import core

    return core.unpack_rows(packed.t().contiguous(), DIM, bits)
