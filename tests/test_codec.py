# SPDX-License-Identifier: Apache-2.0
"""TurboKVCodec: shapes, dtypes, outputs, offsets, extreme vectors and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbokv import Codebook, TurboKVCodec, core

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = ((2, 2), (5, 3), (4, 4), (6, 7), (8, 4))
bounded = settings(max_examples=25, deadline=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def error(x: Tensor, read: Tensor) -> float:
    """Squared error relative to the energy of ``x``."""
    return float((read.double() - x.double()).square().sum() / x.double().square().sum())


# --- the quick start ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quick_start(device: str, dtype: torch.dtype) -> None:
    codec = TurboKVCodec(head_dim=128, bit_width=4, device=device)
    keys = normal(2, 8, 100, 128).to(device, dtype)
    values = normal(2, 8, 100, 128, seed=1).to(device, dtype)
    k_packed, k_norms = codec.compress_k(keys)
    v_packed, v_norms = codec.compress_v(values)
    assert k_packed.shape == v_packed.shape == (2, 8, 100, 64)
    k, v = codec.decompress_k(k_packed, k_norms), codec.decompress_v(v_packed, v_norms)
    for read, x in ((k, keys), (v, values)):
        assert (read.shape, read.dtype, read.device) == (x.shape, dtype, x.device)
        assert error(x, read) < 0.0095
    query = normal(2, 8, 1, 128, seed=2).to(device, dtype)
    scores = codec.rotate_query(query) @ codec.decompress_k_raw(k_packed, k_norms).mT
    want = query.float() @ k.float().mT
    assert float((scores.float() - want).norm() / want.norm()) < 0.02  # bf16 rounds twice


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({}, (4, 4)),
        ({"bit_width": 3}, (3, 3)),
        ({"bit_width": 3, "k_bits": 5}, (5, 3)),
        ({"bit_width": 3, "v_bits": 2}, (3, 2)),
        ({"bit_width": 3, "k_bits": 5, "v_bits": 2}, (5, 2)),
        ({"k_bits": 5}, (5, 5)),
        ({"v_bits": 3}, (4, 3)),
    ],
)
def test_bit_width_sets_both_and_each_own_width_overrides_it(
    options: dict[str, int], widths: tuple[int, int]
) -> None:
    codec = TurboKVCodec(64, **options)
    assert (codec.k_bits, codec.v_bits) == widths
    assert [codec.vector_format(role).bits for role in ("k", "v")] == list(widths)


def test_decompressed_dtype_is_the_role_s_own_input_unless_it_is_given() -> None:
    codec = TurboKVCodec(64)
    wide, narrow = codec.compress_k(normal(3, 64)), codec.compress_v(normal(3, 64).half())
    fresh = TurboKVCodec(64)
    assert fresh.decompress_v(*narrow).dtype == torch.float32
    assert codec.decompress_k(*wide).dtype == torch.float32
    assert codec.decompress_v(*narrow).dtype == torch.float16
    assert codec.decompress_v_raw(*narrow, dtype=torch.bfloat16).dtype == torch.bfloat16


# --- shapes, strides, dtypes, outputs -------------------------------------------------------------


@bounded
@given(
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from(WIDTHS),
    st.sampled_from((8, 64, 96)),
    st.sampled_from(DTYPES),
)
def test_any_leading_shape(
    lead: list[int], widths: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    codec = TurboKVCodec(head_dim, *widths)
    x = normal(*lead, head_dim).to(dtype)
    for role in ("k", "v"):
        fmt = codec.vector_format(role)
        packed, norms = getattr(codec, f"compress_{role}")(x)
        assert (packed.dtype, norms.dtype) == (torch.uint8, torch.float16)
        assert packed.shape == (*lead, fmt.packed_dim)
        assert norms.shape == tuple(lead)
        flat_packed, flat_norms = getattr(codec, f"compress_{role}")(x.reshape(-1, head_dim))
        assert torch.equal(packed.view(-1, fmt.packed_dim), flat_packed)
        assert torch.equal(norms.view(-1), flat_norms)
        for out_dtype in DTYPES:
            read = getattr(codec, f"decompress_{role}")(packed, norms, dtype=out_dtype)
            assert (read.shape, read.dtype) == (x.shape, out_dtype)
            raw = getattr(codec, f"decompress_{role}_raw")(packed, norms, dtype=out_dtype)
            assert (raw.shape, raw.dtype) == ((*lead, codec.padded_dim), out_dtype)
    rotated = codec.rotate_query(x)
    assert (rotated.shape, rotated.dtype) == ((*lead, codec.padded_dim), dtype)
    assert codec.unrotate_output(rotated).shape == x.shape


@pytest.mark.parametrize("bits", range(2, 9))
def test_strided_input_gives_the_same_bytes(bits: int) -> None:
    codec = TurboKVCodec(64, bits)
    base = normal(6, 4, 128)
    views = {
        "transposed": base[..., :64].transpose(0, 1),
        "every second": base[..., ::2],
        "sliced": base[1:5, :, 32:96],
        "permuted coordinates": normal(64, 6).t(),
        "expanded": base[:1, :1, :64].expand(3, 2, 64),
    }
    for name, view in views.items():
        got = codec.compress_k(view)
        want = codec.compress_k(view.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
    packed, norms = codec.compress_v(base[..., :64])
    read = codec.decompress_v(packed.transpose(0, 1), norms.t())
    assert torch.equal(read, codec.decompress_v(packed, norms).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_input_is_its_fp32_value(dtype: torch.dtype) -> None:
    codec = TurboKVCodec(128)
    x = normal(50, 128).to(dtype)
    for got, want in zip(codec.compress_k(x), codec.compress_k(x.float()), strict=True):
        assert torch.equal(got, want)
    packed, norms = codec.compress_v(x)
    narrow = codec.decompress_v(packed, norms, dtype=dtype)
    assert torch.equal(narrow, codec.decompress_v(packed, norms, dtype=torch.float32).to(dtype))


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_filled_wherever_they_were_poisoned(
    widths: tuple[int, int], dtype: torch.dtype
) -> None:
    codec = TurboKVCodec(96, *widths)
    x = normal(3, 5, 96)
    offset = normal(96)
    for role in ("k", "v"):
        extra = {"offset": offset} if role == "k" else {}
        compress = getattr(codec, f"compress_{role}")
        packed, norms = compress(x, **extra)
        for poison in (0x00, 0xFF):
            out_packed = torch.full_like(packed, poison)
            out_norms = torch.full_like(norms, math.nan)
            got = compress(x, **extra, out_packed=out_packed, out_norms=out_norms)
            assert got[0] is out_packed and got[1] is out_norms
            assert torch.equal(out_packed, packed) and torch.equal(out_norms, norms)
        for suffix in ("", "_raw"):
            decompress = getattr(codec, f"decompress_{role}{suffix}")
            want = decompress(packed, norms, **extra, dtype=dtype)
            out = torch.full_like(want, math.nan)
            assert decompress(packed, norms, **extra, out=out) is out
            assert torch.equal(out, want)


@pytest.mark.parametrize("norm_dtype", core.NORM_DTYPES)
def test_norm_dtype_and_sizes(norm_dtype: torch.dtype) -> None:
    codec = TurboKVCodec(128, 5, 3, norm_dtype=norm_dtype)
    packed, norms = codec.compress_k(normal(9, 128))
    assert norms.dtype == norm_dtype
    size = norm_dtype.itemsize
    assert packed[0].numel() + norms[0].numel() * size == codec.bytes_per_vector("k") == 80 + size
    assert codec.bytes_per_vector("v") == 48 + size
    assert codec.compression_ratio == pytest.approx(512 / (128 + 2 * size))
    # bfloat16 has eight bits of precision
    assert error(normal(9, 128), codec.decompress_k(packed, norms)) < 0.00265


def test_padding_costs_what_is_documented() -> None:
    assert TurboKVCodec(96).bytes_per_vector("k") == TurboKVCodec(128).bytes_per_vector("k") == 66
    assert TurboKVCodec(96).compression_ratio == pytest.approx(192 / 66)


@pytest.mark.parametrize("norm_dtype", core.NORM_DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (4,)])
def test_inputs_are_left_alone(lead: tuple[int, ...], norm_dtype: torch.dtype) -> None:
    """One vector is contiguous both ways round, so no step may work in place on its argument."""
    codec = TurboKVCodec(64, 3, norm_dtype=norm_dtype)
    x, offset = normal(*lead, 64), normal(64, seed=1)
    packed, norms = codec.compress_k(-offset.expand(*lead, 64), offset=offset)
    inputs = [x, offset, packed, norms]
    before = [tensor.clone() for tensor in inputs]
    codec.compress_k(x, offset=offset)
    codec.compress_v(x)
    codec.decompress_k(packed, norms, offset=offset)
    codec.decompress_k_raw(packed, norms, offset=offset)
    codec.decompress_v(packed, norms)
    codec.decompress_v_raw(packed, norms)
    codec.rotate_query(x)
    codec.unrotate_output(x)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    strided = normal(64, 3).t()
    copy = strided.clone()
    codec.unrotate_output(strided)
    codec.rotate_query(strided)
    codec.compress_k(strided)
    assert torch.equal(strided, copy)


def test_gradients_do_not_flow() -> None:
    codec = TurboKVCodec(64)
    x = normal(4, 64).requires_grad_()
    packed, norms = codec.compress_k(x, offset=normal(64).requires_grad_())
    read = codec.decompress_k(packed, norms, offset=normal(64).requires_grad_())
    for result in (norms, read, codec.rotate_query(x), codec.unrotate_output(x)):
        assert not result.requires_grad


def test_default_rules_and_calibrated_codebooks() -> None:
    codec = TurboKVCodec(128, 4)
    assert codec.vector_format("k").scale_rule == "unbiased"
    assert codec.vector_format("v").scale_rule == "least_squares"
    assert "head_dim=128, k_bits=4, v_bits=4" in repr(codec)
    uniform = Codebook(4, tuple(float(m) for m in range(1, 16, 2)), 0.17, 2)
    other = TurboKVCodec(128, 4, k_codebook=uniform)
    x = normal(500, 128)
    assert not torch.equal(other.compress_k(x)[0], codec.compress_k(x)[0])
    assert torch.equal(other.compress_v(x)[0], codec.compress_v(x)[0])
    # a uniform codebook of 16 levels: 0.0115 on N(0, 1)
    assert error(x, other.decompress_k(*other.compress_k(x))) < 0.0125


# --- quality and identities -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "limit"), [(2, 0.119), (3, 0.0347), (4, 0.00952), (5, 0.00253), (8, 9e-5)]
)
def test_error_through_the_public_methods(bits: int, limit: float) -> None:
    """On N(0, 1), with fp16 scales (which add 4e-8). The unbiased scale of K costs e / (1 - e)."""
    codec = TurboKVCodec(128, bits)
    x = normal(8000, 128)
    assert error(x, codec.decompress_v(*codec.compress_v(x))) <= limit
    assert error(x, codec.decompress_k(*codec.compress_k(x))) <= limit / (1 - limit)


@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("widths", WIDTHS)
def test_scores_and_outputs_in_rotated_space(head_dim: int, widths: tuple[int, int]) -> None:
    """``q . k = rotate_query(q) . raw(k)``, and un-rotating a sum of raw values is the sum."""
    codec = TurboKVCodec(head_dim, *widths)
    q, x, offset = normal(7, head_dim, seed=1), normal(40, head_dim), 3 * normal(head_dim, seed=2)
    packed, norms = codec.compress_k(x + offset, offset=offset)
    keys = codec.decompress_k(packed, norms, offset=offset)
    raw = codec.decompress_k_raw(packed, norms, offset=offset)
    want = q.double() @ keys.double().t()
    got = codec.rotate_query(q).double() @ raw.double().t()
    # fp32 transforms of vectors as long as 4 sqrt(head_dim)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * 4 * head_dim)
    scaled = codec.rotate_query(q, 0.125).double() @ raw.double().t()
    torch.testing.assert_close(scaled, 0.125 * got, rtol=0, atol=1e-6 * head_dim)
    probability = torch.softmax(got, -1).float()
    packed, norms = codec.compress_v(x)
    raw_sum = probability @ codec.decompress_v_raw(packed, norms)
    values = probability @ codec.decompress_v(packed, norms)
    torch.testing.assert_close(codec.unrotate_output(raw_sum), values, rtol=0, atol=1e-5)


def test_k_v_and_seeds_rotate_differently() -> None:
    x = normal(20, 128)
    codec, other = TurboKVCodec(128), TurboKVCodec(128, seed=43)
    k, v = codec.compress_k(x)[0], codec.compress_v(x)[0]
    assert not torch.equal(k, v)
    assert not torch.equal(k, other.compress_k(x)[0])
    assert not torch.equal(v, other.compress_v(x)[0])
    mixed = other.decompress_k(*codec.compress_k(x))
    assert error(x, mixed) > 1


# --- extreme vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_dtype", core.NORM_DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_vectors_are_exact(bits: int, norm_dtype: torch.dtype) -> None:
    codec = TurboKVCodec(96, bits, norm_dtype=norm_dtype)
    x = normal(5, 96)
    x[1::2] = torch.tensor([[0.0], [-0.0]], dtype=torch.float32)
    for role in ("k", "v"):
        packed, norms = getattr(codec, f"compress_{role}")(x)
        assert (norms[1::2] == 0).all() and (norms[::2] > 0).all()
        read = getattr(codec, f"decompress_{role}")(packed, norms)
        assert (read[1::2] == 0).all()
        assert error(x, read) < 0.14
    offset = normal(96)
    packed, norms = codec.compress_k(x, offset=offset)
    assert torch.signbit(norms[1::2]).all()
    assert (codec.decompress_k(packed, norms, offset=offset)[1::2] == 0).all()


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_huge_norms_saturate(bits: int, role: str) -> None:
    """Direction and sign survive; the scale stops at the largest finite number."""
    codec = TurboKVCodec(64, bits)
    x = (
        normal(6, 64)
        * torch.tensor([1e4, 1e5, 1e7, 1e12, 1e14, 1e25], dtype=torch.float32)[:, None]
    )
    packed, norms = getattr(codec, f"compress_{role}")(x)
    assert norms.isfinite().all()
    assert (norms[2:] == torch.finfo(torch.float16).max).all()
    read = getattr(codec, f"decompress_{role}")(packed, norms)
    assert read.isfinite().all()
    cosine = torch.cosine_similarity(read.double(), x.double(), dim=1)
    # beyond 2^48 a coordinate is clamped, which here leaves signs only (the last row)
    assert (cosine[:-1] > 0.9).all()
    assert cosine[-1] > 0.7
    wide = TurboKVCodec(64, bits, norm_dtype=torch.float32)
    assert error(x[:5], wide.decompress_k(*wide.compress_k(x[:5]))) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_infinity_counts_as_the_input_limit(dtype: torch.dtype) -> None:
    codec = TurboKVCodec(64, 4, norm_dtype=torch.float32)
    x = normal(3, 64).to(dtype)
    x[0, 5], x[1, 7] = math.inf, -math.inf
    clamped = x.float().clamp(-core.INPUT_LIMIT, core.INPUT_LIMIT)
    for got, want in zip(codec.compress_k(x), codec.compress_k(clamped), strict=True):
        assert torch.equal(got, want)
    read = codec.decompress_k(*codec.compress_k(x), dtype=torch.float32)
    assert read.isfinite().all()
    assert int(read[0].argmax()) == 5 and int(read[1].argmin()) == 7


@pytest.mark.parametrize("bits", range(2, 9))
def test_nan_stays_in_its_vector(bits: int) -> None:
    codec = TurboKVCodec(64, bits)
    x = normal(4, 64)
    clean = codec.decompress_k(*codec.compress_k(x))
    x[2, 17] = math.nan
    for offset in (None, normal(64)):
        packed, norms = codec.compress_k(x, offset=offset)
        assert norms.isnan().tolist() == [False, False, True, False]
        read = codec.decompress_k(packed, norms, offset=offset)
        assert read[2].isnan().all()
        assert read[[0, 1, 3]].isfinite().all()
    without = codec.decompress_k(*codec.compress_k(x))
    assert torch.equal(without[[0, 1, 3]], clean[[0, 1, 3]])


def test_tiny_norms() -> None:
    """fp16 scales lose precision below 2^-14 and end at 2^-24; fp32 scales reach 2^-60."""
    x = normal(200, 64)
    codec, wide = TurboKVCodec(64), TurboKVCodec(64, norm_dtype=torch.float32)
    for power in (-10, -14):
        small = x * 2.0**power
        assert error(small, codec.decompress_v(*codec.compress_v(small))) < 0.0095
    # a subnormal scale near 2^-20 has four bits: up to 3% off
    small = x * 2.0**-20
    assert error(small, codec.decompress_v(*codec.compress_v(small))) < 0.0105
    small = x * 2.0**-30
    assert (codec.decompress_v(*codec.compress_v(small)) == 0).all()
    for power in (-30, -60):
        small = x * 2.0**power
        assert error(small, wide.decompress_v(*wide.compress_v(small))) < 0.0095
    assert (wide.decompress_v(*wide.compress_v(x * 2.0**-70)) == 0).all()


@bounded
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=8, max_size=8),
    st.sampled_from(WIDTHS),
)
def test_any_finite_or_infinite_vector_reads_as_finite(
    values: list[float], widths: tuple[int, int]
) -> None:
    codec = TurboKVCodec(8, *widths)
    x = torch.tensor(values, dtype=torch.float32)
    for role in ("k", "v"):
        packed, norms = getattr(codec, f"compress_{role}")(x)
        assert norms.isfinite()
        assert getattr(codec, f"decompress_{role}")(packed, norms).isfinite().all()


# --- centred keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_dtype", core.NORM_DTYPES)
def test_vectors_shorter_without_the_offset_are_marked(norm_dtype: torch.dtype) -> None:
    codec = TurboKVCodec(64, 4, norm_dtype=norm_dtype)
    offset = 2 * normal(64, seed=5)
    near, far = normal(30, 64) + offset, normal(30, 64, seed=1) * 0.5 - offset
    x = torch.stack([near, far], 1)
    packed, norms = codec.compress_k(x, offset=offset)
    assert not torch.signbit(norms[:, 0]).any()
    assert torch.signbit(norms[:, 1]).all()
    plain = codec.compress_k(far)
    assert torch.equal(packed[:, 1], plain[0]) and torch.equal(norms[:, 1].abs(), plain[1])
    centred = codec.compress_k(near - offset)
    assert torch.equal(packed[:, 0], centred[0]) and torch.equal(norms[:, 0], centred[1])
    read = codec.decompress_k(packed, norms, offset=offset)
    plain_read = codec.decompress_k(*codec.compress_k(near))
    assert error(near, read[:, 0]) < 0.5 * error(near, plain_read)
    assert torch.equal(read[:, 1], codec.decompress_k(*plain))
    rotated = codec.decompress_k_raw(packed, norms, offset=offset)
    torch.testing.assert_close(rotated, codec.rotate_query(read), rtol=0, atol=2e-5)


def test_equal_lengths_are_centred() -> None:
    codec = TurboKVCodec(8, 4)
    x = torch.zeros(8, dtype=torch.float32)
    x[2] = 1.0
    _, norms = codec.compress_k(x, offset=2 * x)
    assert not torch.signbit(norms)
    _, norms = codec.compress_k(x, offset=torch.zeros(8, dtype=torch.float32))
    assert not torch.signbit(norms)


def test_offsets_broadcast() -> None:
    codec = TurboKVCodec(64, 5)
    x = normal(3, 4, 6, 64)
    for shape in ((64,), (6, 64), (4, 1, 64), (3, 4, 6, 64)):
        offset = normal(*shape, seed=9)
        got = codec.compress_k(x, offset=offset)
        want = codec.compress_k(x, offset=offset.expand(x.shape).contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        read = codec.decompress_k(*got, offset=offset)
        assert error(x, read) < 0.004
        narrow = codec.decompress_k(*got, offset=offset, dtype=torch.bfloat16)
        assert torch.equal(narrow, read.bfloat16())  # rounded once
