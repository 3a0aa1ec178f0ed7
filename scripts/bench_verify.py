# SPDX-License-Identifier: Apache-2.0
"""Time decode by the queries of a request: what verifying drafts costs beside one token.

    python scripts/bench_verify.py --presets 4,4 5,3 --cells 16x32K 1x8K --queries 1 4 8 16

Launches are timed in a CUDA graph of 20, the median of 15 replays. Needs a GPU to itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from turbokv.codec import TurboKVCodec
from turbokv.kernels import cuda
from turbokv.paged import PageLayout

HEAD_DIM, PAGE_SIZE, LAUNCHES, REPLAYS = 128, 64, 20, 15


def random_pages(layout: PageLayout, num_pages: int, device: torch.device) -> torch.Tensor:
    """Return pages of random codes with scales from 0.4 to 1.4."""
    shape = (num_pages, layout.num_kv_heads, layout.page_head_bytes)
    pages = torch.randint(1, 256, shape, dtype=torch.uint8, device=device)
    tiles = pages.view(*shape[:2], -1, layout.tile_bytes)
    for part in torch.split(tiles, 512):
        scales = 0.4 + torch.rand(*part.shape[:3], 32, dtype=torch.float32, device=device)
        part[..., -64:] = scales.half().view(torch.uint8)
    return pages


def microseconds(
    codec: TurboKVCodec, pages: torch.Tensor, cell: tuple[int, int], heads: tuple[int, int], q: int
) -> float:
    """Return the time of one launch for ``cell`` (requests, tokens) with ``q`` queries each."""
    device = pages.device
    (batch, length), (qo_heads, kv_heads) = cell, heads
    per_request = -(-length // PAGE_SIZE)
    table = torch.randperm(batch * per_request, dtype=torch.int32, device=device)
    lens = torch.full((batch,), length, dtype=torch.int32, device=device)
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=device) * q if q > 1 else None
    query = torch.randn(batch * q, qo_heads, HEAD_DIM, dtype=torch.bfloat16, device=device)
    size = cuda.decode_workspace_bytes(
        batch, qo_heads, kv_heads, HEAD_DIM, max_q_len=q, device=device
    )
    workspace = torch.zeros(size, dtype=torch.uint8, device=device)
    out = torch.empty_like(query)

    def launch() -> None:
        cuda.decode(
            query,
            pages,
            codec.vector_format("k"),
            codec.vector_format("v"),
            PAGE_SIZE,
            table.view(batch, per_request),
            kv_lens=lens,
            qo_indptr=indptr,
            max_q_len=q,
            out=out,
            workspace=workspace,
        )

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            launch()
    times: list[float] = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / LAUNCHES * 1000)
    return statistics.median(times)


def main() -> None:
    """Print a table: a row for each preset and cell, a column for each number of queries."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["4,4", "5,3"], help="widths of K and V")
    parser.add_argument("--cells", nargs="+", default=["16x32K", "16x8K", "1x32K", "1x8K"])
    parser.add_argument("--queries", nargs="+", type=int, default=[1, 2, 4, 8, 12, 16, 17])
    parser.add_argument("--heads", default="32/8", help="query heads and KV heads")
    args = parser.parse_args()
    device = torch.device("cuda")
    qo_heads, kv_heads = map(int, args.heads.split("/"))
    print(f"{torch.cuda.get_device_name()}, microseconds, and times one query")
    print("| preset, cell |", " | ".join(map(str, args.queries)), "|")
    print("|---" * (1 + len(args.queries)) + "|")
    for preset in args.presets:
        k_bits, v_bits = map(int, preset.split(","))
        codec = TurboKVCodec(HEAD_DIM, k_bits=k_bits, v_bits=v_bits, device=device)
        layout = PageLayout(HEAD_DIM, k_bits, v_bits, PAGE_SIZE, kv_heads)
        for cell in args.cells:
            batch, length = cell.split("x")
            shape = int(batch), int(length.rstrip("K")) * 1024
            pages = random_pages(layout, shape[0] * -(-shape[1] // PAGE_SIZE), device)
            found = [
                microseconds(codec, pages, shape, (qo_heads, kv_heads), q) for q in args.queries
            ]
            cells = " | ".join(f"{us:.1f} ({us / found[0]:.2f})" for us in found)
            print(f"| K{k_bits}V{v_bits} {cell} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
