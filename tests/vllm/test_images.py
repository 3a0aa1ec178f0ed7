# SPDX-License-Identifier: Apache-2.0
"""Tokens of an image that see each other: which they are, and what prefill makes of them."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from turbokv.integrations.vllm.attention import steps_torch
from turbokv.integrations.vllm.attention.layer import AttentionShape, AttentionSinks, CacheLayer
from turbokv.integrations.vllm.prefill.images import reversed_tokens, spans
from turbokv.integrations.vllm.prefill.plan import plan
from turbokv.paged import PageLayout

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
HEADS, KV_HEADS, DIM, PAGE = 4, 2, 64, 32


def test_images_count_as_far_as_the_step_has_tokens_of_them() -> None:
    ranges = {0: [(2, 5), (8, 9)], 2: [(0, 3)], 3: [(7, 20)]}
    # rows 1 to 4 of a step: no image; all of one; the end of one; a single token of one
    assert spans(ranges, 1, [4, 6, 5], [10, 6, 12]) == [(1, 0, 3), (2, 0, 4)]
    assert spans(ranges, 0, [10], [10]) == [(0, 2, 5), (0, 8, 9)]
    assert spans(ranges, 0, [4], [9]) == [(0, 0, 0)][:0]
    assert spans({}, 0, [4], [9]) == []


def test_later_tokens_are_earlier_ones_from_the_end() -> None:
    queries, keys, starts = reversed_tokens([(0, 2, 5), (1, 0, 1)], [0, 8])
    assert queries == [4, 3, 2, 8]
    assert keys == [5, 4, 3, 9]
    assert starts == [0, 3, 4]


# --- prefill --------------------------------------------------------------------------------------


def mask(q_len: int, kv_len: int, images: list[tuple[int, int]], window: int | None) -> Tensor:
    """Whether each query sees each key, from vLLM's definition: (causal and window) or image."""
    query = torch.arange(kv_len - q_len, kv_len)[:, None]
    key = torch.arange(kv_len)
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    for start, end in images:
        seen |= (query >= start) & (query <= end) & (key >= start) & (key <= end)
    return seen


def reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor | None) -> Tensor:
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q.double(), k) * DIM**-0.5
    logits.masked_fill_(~seen, -torch.inf)
    total = logits.logsumexp(-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.double()[:, None])
    return torch.einsum("hqk,khd->qhd", (logits - total[..., None]).exp(), v)


@needs_vllm
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("capacity", [512, 64], ids=["whole", "in pieces"])
@pytest.mark.parametrize("reads_cache_only", [False, True], ids=["fresh values", "from pages"])
@pytest.mark.parametrize(
    ("window", "sinks"), [(None, None), (48, None), (None, torch.tensor([2.0, 0.0, 1.0, -1.0]))]
)
def test_prefill_sees_the_later_tokens_of_an_image(
    window: int | None, sinks: Tensor | None, reads_cache_only: bool, capacity: int, device: str
) -> None:
    from turbokv.integrations.vllm import compat
    from turbokv.integrations.vllm.prefill.flash_attention import Prefill, PrefillGroup, Workspace
    from turbokv.integrations.vllm.prefill.images import LaterTokens

    if window is not None and capacity < 512:
        pytest.skip("windows are never cut")
    steps: Any = steps_torch
    dtype, version = torch.float32, 0
    if device == "cuda":
        from turbokv.integrations.vllm.attention import steps_cuda

        steps, dtype = steps_cuda, torch.bfloat16
        version = compat.flash_attention_version(DIM) or 0
    q_lens, seq_lens = [40, 24], [40, 150]
    images = {0: [(3, 22)], 1: [(130, 149)]}
    layer = CacheLayer.create("tq_k8v4", DIM, KV_HEADS)
    generator = torch.Generator().manual_seed(0)
    layout = PageLayout(DIM, 8, 4, PAGE, KV_HEADS)
    pages = torch.zeros(layout.shape(12), dtype=torch.uint8)
    table = torch.tensor([[3, 1, 0, 0, 0], [4, 2, 7, 5, 9]], dtype=torch.int32)
    stored, queries = [], []
    for row, length in enumerate(seq_lens):
        k, v = (torch.randn(length, KV_HEADS, DIM, generator=generator) for _ in "kv")
        token = torch.arange(length)
        slots = table[row][token // PAGE].long() * PAGE + token % PAGE
        steps_torch.store(layer, k, v, slots, pages, PAGE, None, None)
        stored.append((k, v))
        queries.append(torch.randn(q_lens[row], HEADS, DIM, generator=generator))
    query = torch.cat(queries).to(device, dtype)
    key, value = (
        torch.cat([kv[i][-n:] for kv, n in zip(stored, q_lens, strict=True)]).to(device, dtype)
        for i in (0, 1)
    )
    pages, table = pages.to(device), table.to(device)
    held = AttentionSinks()
    if sinks is not None:
        held.load(sinks.to(device))
    prefill = Prefill(
        steps,
        AttentionShape(HEADS, KV_HEADS, DIM, DIM**-0.5, window, 0.0),
        Workspace(capacity, 64, dtype, torch.device(device)),
        held,
        lambda: layer,
        reads_cache_only=reads_cache_only,
        fa_version=version,
    )
    out = torch.empty_like(query)
    for group in plan(q_lens, seq_lens, capacity, window):
        begins = [sum(q_lens[: group.first])]
        cu_q, cu_k, pieces = [0], [0], []
        for q_len, kv_len in zip(group.q_lens, group.kv_lens, strict=True):
            cu_q.append(cu_q[-1] + q_len)
            cu_k.append(cu_k[-1] + kv_len)
        if group.is_chunked:
            for first in range(0, group.context_lens[0], capacity):
                count = min(capacity, group.context_lens[0] - first)
                pieces.append(
                    (first, count, torch.tensor([0, count], dtype=torch.int32, device=device))
                )
        totals = [b + kv for b, kv in zip(group.begins, group.kv_lens, strict=True)]
        q_at, k_at, starts = reversed_tokens(spans(images, group.first, group.q_lens, totals), cu_q)
        part = PrefillGroup(
            group,
            slice(group.first, group.last),
            slice(begins[0], begins[0] + cu_q[-1]),
            torch.tensor(cu_q, dtype=torch.int32, device=device),
            torch.tensor(cu_k, dtype=torch.int32, device=device),
            torch.tensor(group.begins, dtype=torch.int32, device=device),
            pieces=tuple(pieces),
            images=LaterTokens(
                torch.tensor(q_at, device=device),
                torch.tensor(k_at, device=device),
                torch.tensor(starts, dtype=torch.int32, device=device),
                20,
            ),
        )
        prefill.run(part, query, key, value, pages, PAGE, table, None, out, sees_images=True)
    at = 0
    for row, (k, v) in enumerate(stored):
        n = q_lens[row]
        seen = mask(n, seq_lens[row], images[row], window)
        wanted = reference(queries[row], k, v, seen, sinks)
        error = (out[at : at + n].double().cpu() - wanted).norm() / wanted.norm()
        # 4-bit values where they come from pages; an image that is causal is off by 0.3 and more
        assert error < 0.12, (row, error)
        causal = reference(queries[row], k, v, mask(n, seq_lens[row], [], window), sinks)
        assert (causal - wanted).norm() / wanted.norm() > 0.25
        at += n


def problems(**changes: Any) -> list[str]:
    """Return what start-up refuses of a model with images."""
    from types import SimpleNamespace

    from turbokv.integrations.vllm import startup

    model = SimpleNamespace(
        use_mla=False,
        is_mm_prefix_lm=True,
        dtype=torch.bfloat16,
        get_head_size=lambda: 256,
        multimodal_config=SimpleNamespace(**changes),
    )
    config: Any = SimpleNamespace(model_config=model)
    return list(startup._model(config, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("names_images", [False, True], ids=["vLLM 0.26", "0.28 and newer"])
def test_only_images_need_a_vllm_that_says_where_they_are(
    names_images: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turbokv.integrations.vllm import startup

    monkeypatch.setattr(startup, "_names_images", lambda: names_images)
    none = {"get_limit_per_prompt": lambda kind: 0}
    some = {"get_limit_per_prompt": lambda kind: int(kind == "image")}
    assert problems(language_model_only=True, **some) == []
    assert problems(**none) == []
    found = problems(**some)
    assert found == [] if names_images else "serve text only" in found[0]
