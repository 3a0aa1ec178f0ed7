# SPDX-License-Identifier: Apache-2.0
"""Bad input to the paged cache: errors name the argument, what was wanted and what was got."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from turbokv import TurboKVCodec
from turbokv.paged import PagedKVCache, PageLayout

KV, SLOTS = torch.zeros(3, 2, 64, dtype=torch.float32), torch.tensor([0, 1, 2])
ONE = torch.tensor([0, 1], dtype=torch.int32)
Q = torch.zeros(1, 4, 64, dtype=torch.float32)

BAD: list[tuple[Callable[[PagedKVCache], Any], type[Exception], str]] = [
    (lambda c: c.append(KV[:2], KV, SLOTS), ValueError, "k: wanted shape [3, 2, 64], got [2, 2,"),
    (lambda c: c.append(KV, KV[:, :1], SLOTS), ValueError, "v: wanted shape [3, 2, 64], got [3, 1"),
    (lambda c: c.append(KV[..., :8], KV, SLOTS), ValueError, "k: wanted shape [3, 2, 64], got"),
    (lambda c: c.append(KV.double(), KV, SLOTS), TypeError, "k: wanted float32, float16 or bfloat"),
    (lambda c: c.append(KV, KV.int(), SLOTS), TypeError, "v: wanted float32, float16 or bfloat16"),
    (lambda c: c.append(KV, KV.to("meta"), SLOTS), ValueError, "v: wanted device cpu, got meta"),
    (
        lambda c: c.append(KV, KV, SLOTS.int()),
        TypeError,
        "slot_mapping: wanted torch.int64, got torch.int32",
    ),
    (
        lambda c: c.append(KV, KV, torch.tensor([0, 1, 48])),
        ValueError,
        "slot_mapping: wanted values from -1 to 47, got 0 to 48",
    ),
    (
        lambda c: c.append(KV, KV, SLOTS - 2),
        ValueError,
        "slot_mapping: wanted values from -1 to 47, got -2 to 0",
    ),
    (lambda c: c.append(KV, KV, [0, 1, 2]), TypeError, "slot_mapping: wanted a torch.Tensor, got"),
    (lambda c: c.append(KV, KV, SLOTS, KV[0, 0, :9]), ValueError, "offset: wanted shape [..., 64]"),
    (lambda c: c.gather(ONE, 33), ValueError, "length: wanted 0 to 32, got 33"),
    (lambda c: c.gather(ONE, -1), ValueError, "length: wanted 0 to 32, got -1"),
    (
        lambda c: c.gather(ONE + 2, 3),
        ValueError,
        "kv_indices: wanted values from 0 to 2, got 2 to 3",
    ),
    (lambda c: c.gather(ONE[None], 3), ValueError, "kv_indices: wanted shape ['*'], got [1, 2]"),
    (
        lambda c: c.gather(ONE.float(), 3),
        TypeError,
        "kv_indices: wanted torch.int32 or torch.int64, got torch.float32",
    ),
    (
        lambda c: c.gather(ONE, 3, k_offset=KV[:, :1]),
        ValueError,
        "k_offset: wanted shape ['*', 2, 64], got [3, 1, 64]",
    ),
    (
        lambda c: c.gather(ONE, 3, k_offset=KV[:0]),
        ValueError,
        "k_offset: wanted 1 segments, got 0",
    ),
    (
        lambda c: c.attention(Q[:, :3], ONE, ONE, ONE[1:]),
        ValueError,
        "q: wanted a multiple of 2",
    ),
    (lambda c: c.attention(Q[0], ONE, ONE, ONE[1:]), ValueError, "q: wanted shape ['*', '*', 64]"),
    (lambda c: c.attention(Q.int(), ONE, ONE, ONE[1:]), TypeError, "q: wanted float32, float16 or"),
    (
        lambda c: c.attention(Q.repeat(2, 1, 1), ONE, ONE, ONE[1:]),
        ValueError,
        "q: wanted 1 query tokens, got 2",
    ),
    (
        lambda c: c.attention(Q, ONE.flip(0), ONE, ONE[1:]),
        ValueError,
        "kv_indptr: wanted ascending from 0, got [1, 0]",
    ),
    (
        lambda c: c.attention(Q, ONE * 3, ONE, ONE[1:]),
        ValueError,
        "kv_indptr: wanted values from 0 to 2, got 3 to 3",
    ),
    (
        lambda c: c.attention(Q, ONE, ONE, ONE),
        ValueError,
        "kv_last_page_len: wanted shape [1], got [2]",
    ),
    (
        lambda c: c.attention(Q, ONE, ONE, ONE[:1]),
        ValueError,
        "kv_last_page_len: wanted values from 1 to 16, got 0 to 0",
    ),
    (
        lambda c: c.attention(Q, ONE, ONE, ONE[1:] * 17),
        ValueError,
        "kv_last_page_len: wanted values from 1 to 16, got 17 to 17",
    ),
    (
        lambda c: c.attention(Q, ONE, ONE, ONE[1:], qo_indptr=ONE[:1]),
        ValueError,
        "qo_indptr: wanted shape [2], got [1]",
    ),
    (
        lambda c: PagedKVCache(TurboKVCodec(64, norm_dtype=torch.float32), 1, 2),
        ValueError,
        "codec: wanted norm_dtype torch.float16, got torch.float32",
    ),
    (
        lambda c: PagedKVCache(TurboKVCodec(64, 6), 1, 2),
        ValueError,
        "k_bits: wanted one of (2, 3, 4, 5, 8) for pages, got 6",
    ),
    (
        lambda c: PagedKVCache(TurboKVCodec(32), 1, 2),
        ValueError,
        "head_dim: wanted 33 to 512 for pages, got 32",
    ),
    (
        lambda c: PagedKVCache(c.codec, 0, 2),
        ValueError,
        "num_pages: wanted a positive multiple of 1, got 0",
    ),
    (
        lambda c: PagedKVCache(c.codec, 2, 2, pages=c.pages),
        ValueError,
        "pages: wanted shape [2, 2, 1088], got [3, 2, 1088]",
    ),
    (
        lambda c: PagedKVCache(c.codec, 3, 2, pages=c.pages.char()),
        TypeError,
        "pages: wanted torch.uint8, got torch.int8",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[case[2] for case in BAD])
def test_bad_input_names_argument_wanted_and_got(
    call: Callable[[PagedKVCache], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call(PagedKVCache(TurboKVCodec(64), 3, 2))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"k_bits": 6}, ValueError, "k_bits: wanted one of (2, 3, 4, 5, 8) for pages, got 6"),
        ({"v_bits": 7}, ValueError, "v_bits: wanted one of (2, 3, 4, 5, 8) for pages, got 7"),
        ({"v_bits": 4.0}, TypeError, "v_bits: wanted an int from 2 to 8, got 4.0"),
        ({"page_size": 24}, ValueError, "page_size: wanted a positive multiple of 16, got 24"),
        ({"page_size": 0}, ValueError, "page_size: wanted a positive multiple of 16, got 0"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads: wanted a positive multiple of 1, got 0"),
        ({"num_kv_heads": 1.5}, TypeError, "num_kv_heads: wanted an int, got 1.5"),
        ({"head_dim": 32}, ValueError, "head_dim: wanted 33 to 512 for pages, got 32"),
        ({"head_dim": 1024}, ValueError, "head_dim: wanted 8 to 512, got 1024"),
    ],
)
def test_layout_refuses(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good = {"head_dim": 64, "k_bits": 4, "v_bits": 4, "page_size": 16, "num_kv_heads": 2}
    with pytest.raises(kind, match=re.escape(message)):
        PageLayout(**{**good, **change})
