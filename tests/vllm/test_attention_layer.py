# SPDX-License-Identifier: Apache-2.0
"""What a layer does around the kernels: attention sinks, and the size of the pool."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from turbokv.integrations.vllm.attention.layer import AttentionSinks, CacheLayer

HEADS, DIM = 4, 64
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


# --- attention sinks ------------------------------------------------------------------------------


def reference(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal attention in float64, and its log-sum-exp without sinks."""
    logits = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * DIM**-0.5
    logits.masked_fill_(torch.ones(q.shape[0], k.shape[0]).triu(1).bool(), -torch.inf)
    lse = logits.logsumexp(-1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.double()[:, None])
    out = torch.einsum("hqk,khd->qhd", (logits - total[..., None]).exp(), v.double())
    return out, lse.float()


def flash_attention(s_aux: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Do as FlashAttention does: version 3 alone takes sinks."""
    if s_aux is not None and arguments["fa_version"] != 3:
        raise NotImplementedError("s_aux")
    found, lse = reference(arguments["q"], arguments["k"], arguments["v"], s_aux)
    arguments["out"].copy_(found)
    return arguments["out"], lse


@needs_vllm
@pytest.mark.parametrize("version", [2, 3, 4])
def test_sinks_are_applied_whatever_flash_attention_there_is(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turbokv.integrations.vllm import compat
    from turbokv.integrations.vllm.attention import steps_cuda

    monkeypatch.setattr(compat, "flash_attention", lambda: flash_attention)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, HEADS, DIM, generator=generator).bfloat16() for _ in range(3))
    sinks = torch.tensor([3.0, -1.0, 0.0, 5.0])
    out = torch.empty_like(q)
    starts = torch.tensor([0, 40], dtype=torch.int32)
    steps_cuda.attend(
        q,
        k,
        v,
        starts,
        starts,
        40,
        40,
        out,
        sm_scale=DIM**-0.5,
        causal=True,
        sliding_window=None,
        logits_soft_cap=0.0,
        sinks=sinks,
        version=version,
    )
    wanted, _ = reference(q, k, v, sinks)
    assert (out.double() - wanted).norm() < 0.01 * wanted.norm()


def test_sinks_that_are_loaded_again_stay_where_they_are() -> None:
    sinks = AttentionSinks()
    sinks.load(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert sinks.logits is not None
    address = sinks.logits.data_ptr()
    sinks.load(torch.tensor([3.0, 4.0], dtype=torch.bfloat16))
    assert sinks.logits.tolist() == [3.0, 4.0]
    assert sinks.logits.data_ptr() == address


# --- mapped keys ----------------------------------------------------------------------------------


@needs_vllm
def test_kernels_get_mapped_keys_and_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, offsets and pages are handed on; keys and queries go through the layer's matrices."""
    from turbokv.integrations.vllm.attention import steps_cuda
    from turbokv.key_map import KeyMap

    def map_heads(x: Tensor, matrix: Tensor) -> Tensor:
        wide = matrix.repeat_interleave(x.shape[1] // matrix.shape[0], 0)
        return torch.einsum("thd,hde->the", x, wide)

    stand_in = SimpleNamespace(map_heads=map_heads)
    monkeypatch.setitem(sys.modules, "turbokv.kernels.triton_key_map", stand_in)
    got: dict[str, Any] = {}
    monkeypatch.setattr(steps_cuda.cuda, "store", lambda *args, **_: got.update(store=args))
    monkeypatch.setattr(steps_cuda.cuda, "decode", lambda *args, **_: got.update(decode=args))
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, DIM, DIM, generator=generator) + 8 * torch.eye(DIM)
    k, v = (torch.randn(5, 2, DIM, generator=generator) for _ in "kv")
    q = torch.randn(5, HEADS, DIM, generator=generator)
    none = torch.empty(0)
    settings: Any = dict(sm_scale=1.0, sliding_window=None, logits_soft_cap=0.0, sinks=None)
    for key_map in (None, KeyMap(matrix.float())):
        layer = CacheLayer.create("tq4", DIM, 2)
        if key_map is not None:
            layer.set_map(key_map, torch.device("cpu"))
        steps_cuda.store(layer, k, v, none, none, 16, None, None)
        steps_cuda.decode(layer, q, none, 16, none, none, None, 1, None, none, None, **settings)
        stored, values, asked = got["store"][0], got["store"][1], got["decode"][0]
        assert values is v
        if key_map is None:
            assert stored is k and asked is q
            continue
        want = key_map.map_keys(k.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(stored, want)
        want = key_map.map_queries(q.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(asked, want)


# --- the size of the pool -------------------------------------------------------------------------

GIB = 1 << 30


@needs_vllm
@pytest.mark.parametrize("others", [0, 30 * GIB])
def test_memory_of_other_processes_is_not_counted_as_ours(
    others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turbokv.integrations.vllm import compat

    weights = 16 * GIB
    memory = {"free": 80 * GIB - others, "reserved": 0}
    monkeypatch.setattr(compat, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (memory["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: memory["reserved"])
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_memory_bytes=None, gpu_memory_utilization=0.5)
    )
    # some weights are loaded before the first layer is made, the rest after it
    memory["free"] -= 2 * GIB
    memory["reserved"] = 2 * GIB
    start = compat.free_at_start()
    memory["free"] -= weights - 2 * GIB
    memory["reserved"] = weights
    # what vLLM would give: its share of the GPU less what it has taken itself
    assert compat.free_cache_bytes(config, start) == 40 * GIB - weights


@needs_vllm
def test_a_window_that_does_not_fit_is_a_warning_with_the_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from turbokv.integrations.vllm import compat
    from turbokv.integrations.vllm.attention import impl as module
    from turbokv.integrations.vllm.options import Options

    layer: Any = object.__new__(module.TurboKVImpl)
    layer.cache = CacheLayer.create("tq4", 128, 8)
    layer.start_bytes = 0
    layer.options = Options()
    layer.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=16))
    monkeypatch.setattr(compat, "free_cache_bytes", lambda *_: 4 << 20)
    lines: list[str] = []
    monkeypatch.setattr(
        module.logger, "warning_once", lambda text, *values: lines.append(text % values)
    )
    assert layer._pool_slots([layer]) == 0
    assert "no 16-bit window, though 128 tokens and 4 sinks were requested" in lines[0]
    assert "window_pool_fraction 0.05 of a cache of about 0.004 GiB" in lines[0]


@needs_vllm
@pytest.mark.parametrize("padding", [0, 3])
def test_positions_of_the_runner_are_those_that_lengths_tell(padding: int) -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from turbokv.integrations.vllm.attention.metadata import TurboKVMetadataBuilder

    starts, lens = torch.tensor([0, 1, 5, 6]), torch.tensor([40, 17, 1])
    count = 6 + padding
    step = dict(
        query_start_loc=starts.int(),
        query_start_loc_cpu=starts.int(),
        seq_lens=lens.int(),
        num_reqs=3,
        num_actual_tokens=count,
        max_query_len=4,
        max_seq_len=40,
        block_table_tensor=torch.zeros(3, 8, dtype=torch.int32),
        slot_mapping=torch.arange(count),
    )
    builder = SimpleNamespace(max_num_tokens=64, device=torch.device("cpu"))
    own = torch.tensor([39, 13, 14, 15, 16, 0, *range(7, 7 + padding)])
    for known in (None, own, own.int(), torch.cat([own, own])):
        cam = CommonAttentionMetadata(**step, positions=known)
        got = TurboKVMetadataBuilder._positions(builder, cam)
        assert got.dtype == torch.int64 and got.shape[0] == 64
        assert got[:6].tolist() == [39, 13, 14, 15, 16, 0]
        assert (got[:count] >= 0).all()
