#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time store and decode where a server runs them: among the matrix products of a layer.

    python scripts/bench_step.py --presets 4,4 5,3 --cells 1x8K,1x32K,16x8K --keeps plain centred
    python scripts/bench_step.py --storing apart overlapped

A benchmark of one kernel keeps its instructions in the caches. Here a CUDA graph holds layers of
Qwen3-8B's shape: 0.4 GB of weights run through L2 between two decode kernels, and every layer has
pages of its own. Figures are medians of what PyTorch's profiler says of each kernel, and the time
of a layer. Lengths are no multiples of a step, as they rarely are. Servers keep the newest 128
tokens and the first tile in 16 bits (``window``), and centre keys unless told not to (``centred``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from turbokv.centring import SEGMENT
from turbokv.codec import TurboKVCodec
from turbokv.kernels import cuda
from turbokv.paged import PageLayout

QO_HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, PAGE = 32, 8, 128, 4096, 12288, 64
WINDOW, TILE = 128, 16
KEEPS = ("plain", "window", "centred")  # the last has the window as well
REPLAYS = 3
STORING = ("apart", "overlapped", "none")


def parse_cell(text: str) -> tuple[int, int]:
    """Return batch size and tokens of ``16x8K``; a few tokens more than asked for."""
    match = re.fullmatch(r"(\d+)x(\d+)(K?)", text)
    if match is None:
        raise ValueError(f"cells: wanted names like 16x8K, got {text!r}")
    return int(match[1]), int(match[2]) * (1024 if match[3] else 1) + 5


class Layers:
    """Weights and pages of all layers."""

    def __init__(self, count: int, bits: tuple[int, int], pages: int, device: torch.device) -> None:
        def weights(rows: int, columns: int) -> Tensor:
            made = torch.randn(rows, columns, dtype=torch.bfloat16, device=device)
            return made.mul_(columns**-0.5)

        self.device = device
        codec = TurboKVCodec(HEAD_DIM, k_bits=bits[0], v_bits=bits[1], device=device)
        self.k_format, self.v_format = codec.vector_format("k"), codec.vector_format("v")
        qkv = (QO_HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.products = [
            (
                weights(qkv, HIDDEN),
                weights(HIDDEN, QO_HEADS * HEAD_DIM),
                weights(2 * INTERMEDIATE, HIDDEN),
                weights(HIDDEN, INTERMEDIATE),
            )
            for _ in range(count)
        ]
        layout = PageLayout(HEAD_DIM, *bits, PAGE, KV_HEADS)
        self.pages = [self._fill(layout, pages) for _ in range(count)]

    def _fill(self, layout: PageLayout, pages: int) -> Tensor:
        shape = layout.shape(pages)
        made = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        scales = torch.rand(*shape[:2], PAGE // 16, 32, dtype=torch.float32, device=self.device)
        tiles = made.view(*shape[:2], PAGE // 16, layout.tile_bytes)
        tiles[..., -64:] = scales.add_(0.4).half().view(torch.uint8)
        return made

    def _kept(self, table: Tensor, length: int, keeps: str) -> tuple[dict[str, Any], ...]:
        """Return what store and decode are given for 16-bit copies and offsets of keys."""
        if keeps == "plain":
            return {}, {}
        batch = table.shape[0]
        tiles = [0, *range((length - WINDOW) // TILE, (length - 1) // TILE + 1)]
        where = torch.tensor(tiles, device=self.device)
        pages, within = table[:, where // (PAGE // TILE)].long(), where % (PAGE // TILE)
        count = batch * len(tiles)
        slots = torch.full((self.pages[0].shape[0], PAGE // TILE), -1, dtype=torch.int32)
        slots = slots.to(self.device)
        order = torch.arange(count, dtype=torch.int32, device=self.device)
        slots[pages, within] = order.view(batch, -1)
        shape = (count, KV_HEADS, 2, TILE, HEAD_DIM)
        window = torch.randn(shape, dtype=torch.float16, device=self.device)
        store: dict[str, Any] = {"tile_slots": slots, "window": window}
        decode = dict(store)
        if keeps == "centred":
            segments = -(-length // SEGMENT)
            store["k_offset"] = torch.randn(segments, KV_HEADS, HEAD_DIM, device=self.device)
            store["positions"] = torch.full((batch,), length - 1, device=self.device)
            decode["k_offset"] = torch.randn(segments, KV_HEADS, HEAD_DIM, device=self.device)
        return store, decode

    def graph(self, batch: int, length: int, storing: str, keeps: str = "plain") -> Any:
        """Capture a step of all layers. ``storing``: one of ``STORING``."""
        linear = torch.nn.functional.linear
        per = -(-length // PAGE)
        index = torch.arange(batch * per, dtype=torch.int32, device=self.device)
        table = index.view(batch, per)
        lens = torch.full((batch,), length, dtype=torch.int32, device=self.device)
        kept = self._kept(table, length, keeps)
        slots = table[:, -1].long() * PAGE + (length - 1) % PAGE
        start = torch.randn(batch, HIDDEN, dtype=torch.bfloat16, device=self.device)
        workspace = torch.zeros(
            cuda.decode_workspace_bytes(
                batch, QO_HEADS, KV_HEADS, HEAD_DIM, max_q_len=1, device=self.device
            ),
            dtype=torch.uint8,
            device=self.device,
        )
        widths = [QO_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]

        def step() -> None:
            x = start
            for (qkv, out, gate_up, down), pages in zip(self.products, self.pages, strict=True):
                q, k, v = (
                    part.view(batch, -1, HEAD_DIM)
                    for part in torch.split(linear(x, qkv), widths, dim=-1)
                )
                # stands for the rotary embedding: a kernel that lets none start before it has ended
                q = q * 1.0
                formats = (self.k_format, self.v_format, PAGE)
                overlapped = storing == "overlapped"
                if storing != "none":
                    given = {**kept[0], "launch_dependents": overlapped}
                    cuda.store(k, v, slots, pages, *formats, **given)
                attended = cuda.decode(
                    q,
                    pages,
                    *formats,
                    table,
                    kv_lens=lens,
                    sm_scale=HEAD_DIM**-0.5,
                    workspace=workspace,
                    early_loads=overlapped,
                    **kept[1],
                )
                gate, up = linear(linear(attended.flatten(1), out), gate_up).chunk(2, dim=-1)
                x = linear(gate * up, down)

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
        return graph


def measure(graph: Any, layers: int) -> dict[str, float]:
    """Return medians of decode and store, and the time of a layer, in microseconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    events = trace.events()
    found = {}
    for name, kernel in (("decode", "DecodeKernel"), ("store", "StoreKernel")):
        times = [event.device_time for event in events if kernel in event.name]
        if times:
            found[f"{name}_us"] = statistics.median(times)
    times = []
    for _ in range(7):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / layers)
    found["layer_us"] = statistics.median(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["4,4"], help="widths of K and V")
    parser.add_argument("--cells", default="1x8K,1x32K,16x8K")
    parser.add_argument("--keeps", nargs="+", choices=KEEPS, default=["plain", "centred"])
    parser.add_argument(
        "--storing",
        nargs="+",
        choices=STORING,
        default=["apart", "none"],
        help="store ends before decode starts, or decode starts while it runs, or there is none",
    )
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    cells = {cell: parse_cell(cell) for cell in args.cells.split(",")}
    device = torch.device("cuda", 0)
    most = max(batch * -(-length // PAGE) for batch, length in cells.values())
    rows = []
    print(f"{torch.cuda.get_device_name(device)}; us")
    for preset in args.presets:
        k_bits, v_bits = map(int, preset.split(","))
        layers = Layers(args.layers, (k_bits, v_bits), most, device)
        for cell, (batch, length) in cells.items():
            for keeps, storing in itertools.product(args.keeps, args.storing):
                found = measure(layers.graph(batch, length, storing, keeps), args.layers)
                row = {"preset": preset, "cell": cell, "keeps": keeps, "storing": storing}
                rows.append({**row, **found})
                figures = ", ".join(f"{name[:-3]} {us:.1f}" for name, us in found.items())
                print(f"{preset} {cell} {keeps} storing {storing}: {figures}", flush=True)
        del layers
    if args.json is not None:
        args.json.write_text(
            json.dumps({"device": torch.cuda.get_device_name(device), "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
