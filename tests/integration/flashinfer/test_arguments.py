# SPDX-License-Identifier: Apache-2.0
"""The FlashInfer layer without a GPU: bad arguments raise, naming argument, wanted and got."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

flashinfer = pytest.importorskip("flashinfer", reason="wanted the patched FlashInfer")

from turbokv.codec import TurboKVCodec  # noqa: E402
from turbokv.integrations import flashinfer as layer  # noqa: E402
from turbokv.integrations.flashinfer import checks  # noqa: E402
from turbokv.integrations.flashinfer.jit import format_words, gen_prefill_module  # noqa: E402
from turbokv.integrations.flashinfer.tables import Batch, Shape, TableBuffers  # noqa: E402

CODEC = TurboKVCodec(128, k_bits=4, v_bits=4)
K, V = CODEC.vector_format("k"), CODEC.vector_format("v")
SHAPE = dict(
    num_qo_heads=8,
    num_kv_heads=2,
    head_dim=128,
    page_size=16,
    k_format=K,
    v_format=V,
    window_left=-1,
    logits_soft_cap=None,
    sm_scale=None,
)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_the_fork_exports_the_layer() -> None:
    for name in (
        "BatchDecodeWithPagedTurboKVCacheWrapper",
        "BatchPrefillWithPagedTurboKVCacheWrapper",
        "append_paged_turbokv_cache",
    ):
        assert getattr(flashinfer, name) is getattr(layer, name)
    with pytest.raises(AttributeError, match="no attribute 'BatchPrefillWithTurbo'"):
        _ = flashinfer.BatchPrefillWithTurbo


@pytest.mark.parametrize(
    "wrapper",
    [layer.BatchPrefillWithPagedTurboKVCacheWrapper, layer.BatchDecodeWithPagedTurboKVCacheWrapper],
)
def test_workspaces_have_to_be_on_a_gpu(wrapper: Any) -> None:
    with pytest.raises(ValueError, match="float_workspace_buffer: wanted a CUDA tensor, got"):
        wrapper(torch.zeros(16))
    with pytest.raises(TypeError, match=r"float_workspace_buffer: wanted a torch.Tensor, got int"):
        wrapper(1 << 20)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_qo_heads": 7}, ValueError, "num_qo_heads: wanted a multiple of num_kv_heads 2"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads: wanted 1 to"),
        ({"head_dim": 64}, ValueError, "k_format: wanted head_dim 64, got 128"),
        ({"page_size": 24}, ValueError, "page_size: wanted a multiple of 16, got 24"),
        ({"page_size": "16"}, TypeError, "page_size: wanted an int, got '16'"),
        ({"k_format": CODEC}, TypeError, "k_format: wanted a VectorFormat, got TurboKVCodec"),
        ({"window_left": -2}, ValueError, "window_left: wanted -1 to"),
        ({"logits_soft_cap": -1.0}, ValueError, r"logits_soft_cap: wanted 0 or more, got -1.0"),
    ],
)
def test_shapes_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Shape.create(**{**SHAPE, **change})


@pytest.mark.parametrize(
    ("head_dim", "k_bits", "message"),
    [
        (512, 4, "wanted head_dim of 33 to 256, got 512"),
        (32, 4, "wanted head_dim of 33 to 256, got 32"),
        (128, 6, r"wanted one of \(2, 3, 4, 5, 8\) bits, got 6"),
    ],
)
def test_formats_that_no_kernel_reads_are_refused(head_dim: int, k_bits: int, message: str) -> None:
    codec = TurboKVCodec(head_dim, k_bits=k_bits, v_bits=4)
    formats = {"k_format": codec.vector_format("k"), "v_format": codec.vector_format("v")}
    with pytest.raises(ValueError, match=f"k_format: {message}"):
        Shape.create(**{**SHAPE, **formats, "head_dim": head_dim})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ((ints(0, 1), ints(1, 2), ints(0, 1), ints(3)), "paged_kv_indptr: wanted ascending from 0"),
        ((ints(0, 1), ints(0, 3), ints(0, 1), ints(3)), "paged_kv_indptr: wanted 2 at most, got 3"),
        ((ints(0, 1), ints(0, 2), ints(0, 1), ints(17)), "last_page_len: wanted 1 to page_size 16"),
        ((ints(0, 1), ints(0, 2), ints(0, 1), ints(0)), "last_page_len: wanted 1 to page_size 16"),
        ((ints(0, 1, 2), ints(0, 2), ints(0, 1), ints(3)), "qo_indptr: wanted 2 elements, got 3"),
        ((ints(0, 2, 1), ints(0, 1, 2), ints(0, 1), ints(3, 3)), "qo_indptr: wanted ascending"),
        ((ints(0, 1), ints(0, 1), ints(0), ints(3, 3)), "paged_kv_last_page_len: wanted shape"),
    ],
)
def test_tables_are_checked(tables: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch.read(*tables, page_size=16)


def test_tables_of_another_dtype_are_refused() -> None:
    with pytest.raises(TypeError, match=r"paged_kv_indices: wanted torch.int32, got torch.int64"):
        Batch.read(ints(0, 1), ints(0, 1), torch.zeros(1, dtype=torch.int64), ints(1), 16)


def test_a_batch_knows_its_lengths() -> None:
    batch = Batch.read(ints(0, 2, 2, 7), ints(0, 2, 2, 3), ints(5, 1, 9), ints(3, 0, 16), 16)
    assert (batch.qo_lens, batch.kv_lens, batch.num_indices) == ([2, 0, 5], [19, 0, 16], 3)
    batch.check_causal()
    more = Batch.read(ints(0, 20), ints(0, 1), ints(5), ints(3), 16)
    with pytest.raises(ValueError, match="qo_indptr: wanted at most 3 queries of request 0"):
        more.check_causal()


def test_graph_buffers_are_kept_and_have_to_fit() -> None:
    names = ("paged_kv_indptr_buf", "paged_kv_indices_buf")
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="paged_kv_indices_buf: wanted a tensor in CUDA graph"):
        TableBuffers(names, (ints(0, 0), None), device, True)
    buffers = (ints(0, 0, 0), ints(*[-1] * 6))
    kept = TableBuffers(names, buffers, device, True)
    filled = kept.fill((ints(0, 1, 3), ints(7, 8, 9)), False)
    assert all(a is b for a, b in zip(filled, buffers, strict=True))
    assert buffers[1].tolist() == [7, 8, 9, -1, -1, -1]
    with pytest.raises(ValueError, match="paged_kv_indices_buf: wanted room for 7 elements"):
        kept.fill((ints(0, 1, 7), ints(*range(7))), False)
    with pytest.raises(ValueError, match="paged_kv_indptr_buf: wanted room for 2 elements"):
        kept.fill((ints(0, 1), ints(7)), False)


def test_caches_have_the_bytes_of_their_format() -> None:
    head_bytes = checks.page_head_bytes(K, V, 16)
    assert head_bytes == 16 * 132
    cpu = torch.device("cpu")
    pages = torch.zeros(3, 2, head_bytes + 16, dtype=torch.uint8)
    checks.cache(pages[..., :head_bytes], 2, head_bytes, cpu)
    with pytest.raises(ValueError, match=re.escape("paged_kv_cache: wanted shape ['*', 2, 2112]")):
        checks.cache(pages, 2, head_bytes, cpu)
    with pytest.raises(ValueError, match="storage offset that are multiples of 16"):
        checks.cache(pages[..., 8 : head_bytes + 8], 2, head_bytes, cpu)
    with pytest.raises(TypeError, match=r"paged_kv_cache: wanted torch.uint8, got torch.int8"):
        checks.cache(pages.view(torch.int8), 2, head_bytes, cpu)


def test_copies_come_with_their_map() -> None:
    pages = torch.zeros(3, 2, 16 * 132, dtype=torch.uint8)
    slots = torch.full((3, 1), -1, dtype=torch.int32)
    window = torch.zeros(4, 2, 2, 16, 128, dtype=torch.float16)
    checks.copies(slots, window, pages, 16, 128)
    with pytest.raises(ValueError, match="window: wanted a tensor, as tile_slots is given"):
        checks.copies(slots, None, pages, 16, 128)
    with pytest.raises(ValueError, match="tile_slots: wanted a tensor, as window is given"):
        checks.copies(None, window, pages, 16, 128)
    with pytest.raises(ValueError, match=re.escape("window: wanted shape ['*', 2, 2, 16, 64]")):
        checks.copies(slots, window, pages, 16, 64)


def test_appending_checks_its_arguments() -> None:
    k = torch.zeros(2, 2, 128)
    pages = torch.zeros(3, 2, 16 * 132, dtype=torch.uint8)
    tables = (ints(0, 0), ints(0, 1), pages, ints(0), ints(0, 1))
    with pytest.raises(ValueError, match="page_size: wanted a multiple of 16, got 20"):
        layer.append_paged_turbokv_cache(k, k, *tables, 20, K, V)
    with pytest.raises(TypeError, match=r"append_value: wanted torch.float32, got torch.float16"):
        layer.append_paged_turbokv_cache(k, k.half(), *tables, 16, K, V)
    with pytest.raises(ValueError, match=re.escape("positions: wanted shape [2], got [3]")):
        layer.append_paged_turbokv_cache(
            k, k, ints(0, 0), ints(0, 1, 2), pages, ints(0), ints(0, 1), 16, K, V
        )


def test_modules_have_their_own_names() -> None:
    with pytest.raises(ValueError, match=r"head_dim: wanted one of \(64, 128, 256\), got 512"):
        gen_prefill_module(512, 4, 4)
    with pytest.raises(ValueError, match=r"v_bits: wanted one of \(2, 3, 4, 5, 8\), got 6"):
        gen_prefill_module(128, 4, 6)


def test_formats_travel_as_words() -> None:
    words = format_words(K)
    assert words[0] == 5 and words[17:] == [5, 15, 25, 36, 48, 62, 79, 104]
    signs = K.signs.tolist()
    assert [words[1 + j // 32] >> j % 32 & 1 for j in range(128)] == [int(s < 0) for s in signs]
    assert len(format_words(TurboKVCodec(64, k_bits=8, v_bits=4).vector_format("k"))) == 17
