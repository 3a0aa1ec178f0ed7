# SPDX-License-Identifier: Apache-2.0
"""The slot map on the GPU: the compiled kernel against the reference, and inside a CUDA graph."""

from __future__ import annotations

import random

import pytest
import torch

from turbokv.integrations.vllm.window.pool import RecentWindow

pytestmark = pytest.mark.gpu


def random_step(rng: random.Random, pages: list[int], batch_size: int) -> list[torch.Tensor]:
    """Decodes, prefills and padding over disjoint pages, as one step of a server has them."""
    width = len(pages) // batch_size
    rng.shuffle(pages)
    table = torch.tensor(pages[: batch_size * width]).view(batch_size, width)
    seq_lens = torch.randint(0, width * 32 + 1, (batch_size,))
    query_lens = torch.minimum(seq_lens, torch.randint(0, 200, (batch_size,)))
    query_lens[::2] = seq_lens[::2].clamp(max=1)
    return [x.to(torch.int32) for x in (table, seq_lens, query_lens)]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1024])
@pytest.mark.parametrize("num_slots", [5, 300, 20_000])
def test_the_compiled_kernel_gives_every_slot_as_the_reference(
    batch_size: int, num_slots: int
) -> None:
    rng = random.Random(batch_size)
    torch.manual_seed(batch_size)
    num_pages = 1 + 20 * batch_size
    ours = RecentWindow(num_pages, 32, num_slots, 128, 4, "cuda")
    reference = RecentWindow(num_pages, 32, num_slots, 128, 4, "cpu", backend="torch")
    pages = list(range(1, num_pages))
    for _ in range(8):
        step = random_step(rng, pages, batch_size)
        ours.refresh(*(x.cuda() for x in step))
        reference.refresh(*step)
        assert torch.equal(ours.tile_slots.cpu(), reference.tile_slots)
        assert ours.metrics() == reference.metrics()
        gone = torch.tensor(rng.sample(pages, 5))
        ours.invalidate(gone.cuda())
        reference.invalidate(gone)


def test_refresh_may_be_captured_and_replayed() -> None:
    ours = RecentWindow(40, 16, 30, 40, 4, "cuda")
    reference = RecentWindow(40, 16, 30, 40, 4, "cpu", backend="torch")
    table = torch.arange(1, 31, dtype=torch.int32).view(1, 30)
    length = torch.zeros(1, dtype=torch.int32, device="cuda")
    one = torch.ones(1, dtype=torch.int32, device="cuda")
    on_device = table.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.refresh(on_device, length, one)
    for tokens in range(1, 300, 3):
        length.fill_(tokens)
        graph.replay()
        reference.refresh(table, length.cpu(), one.cpu())
        assert torch.equal(ours.tile_slots.cpu(), reference.tile_slots)


def test_poll_answers_without_waiting() -> None:
    window = RecentWindow(40, 16, 30, 40, 4, "cuda")
    assert window.poll() is None
    torch.cuda.synchronize()
    found = window.poll()
    assert found is not None
    assert (found.steps, found.slots) == (0, 30)
