# SPDX-License-Identifier: Apache-2.0
"""Bad input to TurboKVCodec: every error names the argument, what was wanted and what was got."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from turbokv import Codebook, TurboKVCodec

PACKED, NORMS = torch.zeros(3, 64, dtype=torch.uint8), torch.zeros(3, dtype=torch.float16)
X = torch.zeros(3, 128, dtype=torch.float32)

BAD: list[tuple[Callable[[TurboKVCodec], Any], type[Exception], str]] = [
    (lambda c: c.compress_k([1.0]), TypeError, "k: wanted a torch.Tensor, got list"),
    (lambda c: c.compress_k(X[:, :64]), ValueError, "k: wanted shape [..., 128], got [3, 64]"),
    (lambda c: c.compress_v(X[0, 0]), ValueError, "v: wanted shape [..., 128], got []"),
    (
        lambda c: c.compress_v(X.double()),
        TypeError,
        "v: wanted float32, float16 or bfloat16, got torch.float64",
    ),
    (
        lambda c: c.compress_k(X.int()),
        TypeError,
        "k: wanted float32, float16 or bfloat16, got torch.int32",
    ),
    (lambda c: c.compress_k(X.to("meta")), ValueError, "k: wanted device cpu, got meta"),
    (
        lambda c: c.compress_k(X, out_packed=PACKED.short()),
        TypeError,
        "out_packed: wanted torch.uint8, got torch.int16",
    ),
    (
        lambda c: c.compress_k(X, out_packed=PACKED[:2]),
        ValueError,
        "out_packed: wanted shape [3, 64], got [2, 64]",
    ),
    (
        lambda c: c.compress_k(X, out_packed=PACKED.repeat(1, 2)[:, ::2]),
        ValueError,
        "out_packed: wanted a contiguous tensor, got strides (128, 2)",
    ),
    (
        lambda c: c.compress_v(X, out_packed=PACKED.to("meta")),
        ValueError,
        "out_packed: wanted device cpu, got meta",
    ),
    (lambda c: c.compress_k(X, out_packed=1), TypeError, "out_packed: wanted a torch.Tensor, got"),
    (
        lambda c: c.compress_v(X, out_norms=NORMS.float()),
        TypeError,
        "out_norms: wanted torch.float16, got torch.float32",
    ),
    (
        lambda c: c.compress_v(X, out_norms=NORMS[:, None]),
        ValueError,
        "out_norms: wanted shape [3], got [3, 1]",
    ),
    (
        lambda c: c.compress_v(X, out_norms=NORMS.repeat(2)[::2]),
        ValueError,
        "out_norms: wanted a contiguous tensor, got strides (2,)",
    ),
    (
        lambda c: c.compress_k(X, offset=X[:, :64]),
        ValueError,
        "offset: wanted shape [..., 128], got [3, 64]",
    ),
    (
        lambda c: c.compress_k(X, offset=torch.zeros(2, 128, dtype=torch.float32)),
        ValueError,
        "offset: wanted a shape that broadcasts to [3, 128], got [2, 128]",
    ),
    (
        lambda c: c.compress_k(X, offset=X.double()),
        TypeError,
        "offset: wanted float32, float16 or bfloat16, got torch.float64",
    ),
    (
        lambda c: c.compress_k(X, offset=X.to("meta")),
        ValueError,
        "offset: wanted device cpu, got meta",
    ),
    (
        lambda c: c.decompress_k(PACKED.char(), NORMS),
        TypeError,
        "packed: wanted torch.uint8, got torch.int8",
    ),
    (
        lambda c: c.decompress_v(PACKED[:, :48], NORMS),
        ValueError,
        "packed: wanted shape [..., 64], got [3, 48]",
    ),
    (lambda c: c.decompress_v(None, NORMS), TypeError, "packed: wanted a torch.Tensor, got None"),
    (
        lambda c: c.decompress_k(PACKED.to("meta"), NORMS),
        ValueError,
        "packed: wanted device cpu, got meta",
    ),
    (
        lambda c: c.decompress_k_raw(PACKED, NORMS[:2]),
        ValueError,
        "norms: wanted shape [3] to match packed, got [2]",
    ),
    (
        lambda c: c.decompress_v_raw(PACKED, NORMS.float()),
        TypeError,
        "norms: wanted torch.float16, got torch.float32",
    ),
    (
        lambda c: c.decompress_v(PACKED, NORMS.to("meta")),
        ValueError,
        "norms: wanted device cpu, got meta",
    ),
    (
        lambda c: c.decompress_v(PACKED, NORMS, dtype=torch.float64),
        TypeError,
        "dtype: wanted float32, float16 or bfloat16, got torch.float64",
    ),
    (
        lambda c: c.decompress_v(PACKED, NORMS, out=torch.empty(3, 64, dtype=torch.float32)),
        ValueError,
        "out: wanted shape [3, 128], got [3, 64]",
    ),
    (
        lambda c: c.decompress_k(PACKED, NORMS, out=torch.empty(128, 3, dtype=torch.float32).t()),
        ValueError,
        "out: wanted a contiguous tensor, got strides (1, 3)",
    ),
    (
        lambda c: c.decompress_k(PACKED, NORMS, offset=torch.zeros(2, 128, dtype=torch.float32)),
        ValueError,
        "offset: wanted a shape that broadcasts to [3, 128], got [2, 128]",
    ),
    (lambda c: c.rotate_query(X[:, :5]), ValueError, "q: wanted shape [..., 128], got [3, 5]"),
    (lambda c: c.rotate_query(X.to("meta")), ValueError, "q: wanted device cpu, got meta"),
    (lambda c: c.unrotate_output(X[:, :5]), ValueError, "o: wanted shape [..., 128], got [3, 5]"),
    (lambda c: c.bytes_per_vector("q"), ValueError, "role: wanted 'k' or 'v', got 'q'"),
    (lambda c: TurboKVCodec(5), ValueError, "head_dim: wanted 8 to 512, got 5"),
    (lambda c: TurboKVCodec("128"), TypeError, "head_dim: wanted an int, got '128'"),
    (lambda c: TurboKVCodec(128, 1), ValueError, "k_bits: wanted 2 to 8, got 1"),
    (lambda c: TurboKVCodec(128, 4, 9), ValueError, "v_bits: wanted 2 to 8, got 9"),
    (lambda c: TurboKVCodec(128, bit_width=1), ValueError, "bit_width: wanted 2 to 8, got 1"),
    (
        lambda c: TurboKVCodec(128, 4, 4, bit_width=4.0),
        TypeError,
        "bit_width: wanted an int from 2 to 8, got 4.0",
    ),
    (
        lambda c: TurboKVCodec(128, 4.0),
        TypeError,
        "k_bits: wanted an int from 2 to 8, got 4.0",
    ),
    (
        lambda c: TurboKVCodec(128, norm_dtype=torch.float64),
        ValueError,
        "norm_dtype: wanted one of (torch.float16, torch.bfloat16, torch.float32), got",
    ),
    (
        lambda c: TurboKVCodec(128, k_scale_rule="best"),
        ValueError,
        "scale_rule: wanted one of",
    ),
    (
        lambda c: TurboKVCodec(128, v_codebook=Codebook.gaussian(3)),
        ValueError,
        "v_codebook: wanted 4 bits, got 3",
    ),
    (
        lambda c: TurboKVCodec(128, k_codebook={}),
        TypeError,
        "k_codebook: wanted a Codebook, got dict",
    ),
    (lambda c: TurboKVCodec(128, backend="mps"), ValueError, "backend: wanted one of"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[case[2] for case in BAD])
def test_bad_input_names_argument_wanted_and_got(
    call: Callable[[TurboKVCodec], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call(TurboKVCodec(128, 4))


def test_a_refused_call_writes_nothing() -> None:
    codec = TurboKVCodec(128, 4)
    packed = torch.full((3, 64), 0xA5, dtype=torch.uint8)
    with pytest.raises(ValueError, match="out_norms"):
        codec.compress_k(X, out_packed=packed, out_norms=NORMS[:2])
    assert (packed == 0xA5).all()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_unusable_device_is_named(device: str) -> None:
    with pytest.raises(ValueError, match="device: wanted"):
        TurboKVCodec(128, device=device)
