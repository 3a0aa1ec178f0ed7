#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time decode, store and decompress on a Hopper GPU against vLLM's and FlashInfer's kernels.

Decode attends one query per request to a paged cache, rotations of query and output included. It
is compared with FlashAttention-3 (vLLM), XQA and FA2 (FlashInfer) on 16-bit and float8 caches, with
FA2 on NVFP4 and with vLLM's own compressed caches; store with vLLM's, decompress with a copy of
what it writes. The fastest bf16 and the fastest fp8 of a cell are its yardsticks. All run in one
process, as CUDA graphs on a cold L2, in turns (``_bench_work.py``); what cannot run is shown with
its error. GB/s counts what a launch has to move: the cache it reads or writes, and the 16-bit
vectors that it stores or decompresses.

Needs the built CUDA kernels; the rivals need vLLM 0.33.0 and FlashInfer 0.7.2.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from _bench_flashinfer import Builds, start_builds
from _bench_rivals import rivals
from _bench_turbokv import TurboKV
from _bench_work import (
    Contender,
    Kind,
    Pool,
    Shape,
    Timer,
    Work,
    ceilings,
    measure,
    rotation,
    size_name,
    spare_pages,
)
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from turbokv import __version__

CELLS = "1x8K,16x8K,64x8K,1x32K,16x32K,64x32K,1x128K,16x128K,64x128K"
SHAPES = "32/8x128,24/4x256,16/2x64,64/8x128"
_MEMORY_SHARE = 0.85


def contenders_of(kind: Kind, args: argparse.Namespace, builds: Builds) -> list[Contender]:
    """Return what takes part, TurboKV last."""
    found = rivals(kind, builds)
    for preset in args.presets.split(","):
        found.append(TurboKV(preset).contender(kind))
        if args.window or args.centred:
            found.append(TurboKV(preset, args.window, args.centred).contender(kind))
    only = [part.lower() for part in args.only.split(",") if part]
    return [c for c in found if not only or any(part in c.name.lower() for part in only)]


def parse_size(text: str) -> int:
    """Return 8192 for ``8K``."""
    found = re.fullmatch(r"(\d+)(K?)", text.strip().upper())
    if found is None:
        raise ValueError(f"wanted a size such as 8K, got {text!r}")
    return int(found[1]) * (1024 if found[2] else 1)


def parse_shape(text: str) -> Shape:
    """Return ``Shape(32, 8, 128)`` for ``32/8x128``."""
    found = re.fullmatch(r"(\d+)/(\d+)x(\d+)", text.strip())
    if found is None:
        raise ValueError(f"shapes: wanted some such as 32/8x128, got {text!r}")
    return Shape(int(found[1]), int(found[2]), int(found[3]))


def parse_cell(text: str) -> tuple[int, int]:
    """Return 16 and 32768 for ``16x32K``."""
    batch, times, context = text.strip().partition("x")
    if not times:
        raise ValueError(f"cells: wanted some such as 16x32K, got {text!r}")
    return int(batch), parse_size(context)


def check_contexts(cells: list[tuple[int, int]], page_size: int) -> None:
    """Raise unless every context fills its pages, as tables of all contenders assume."""
    if page_size < 16 or page_size % 16:
        raise ValueError(f"page_size: wanted a multiple of 16, got {page_size}")
    for _, context in cells:
        if context % page_size or context < 256:
            raise ValueError(f"cells: wanted whole pages of {page_size}, got context {context}")


class Bench:
    """Runs the cells in turn and reports each when it is done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begin = args, time.monotonic()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.console = Console(width=None if sys.stdout.isatty() else 140)
        self.kinds: list[Kind] = [k for k in get_args(Kind) if k in args.kinds.split(",")]
        self.shapes = [parse_shape(text) for text in args.shapes.split(",")]
        self.cells = [parse_cell(text) for text in args.cells.split(",")]
        check_contexts(self.cells, args.page_size)
        self.tokens = [parse_size(text) for text in args.tokens.split(",")]
        # the names, without building anything
        takes_part = {k: contenders_of(k, args, {}) for k in self.kinds}
        wanted = any("FlashInfer" in c.name for c in takes_part.get("decode", []))
        builds = start_builds(self.shapes, args.page_size) if wanted else {}
        self.contenders = {k: contenders_of(k, args, builds) for k in self.kinds}
        self.timer = Timer(self.device)
        self.result: dict[str, Any] = {
            "device": torch.cuda.get_device_name(self.device),
            "versions": versions(),
            "page_size": args.page_size,
            "ceilings": ceilings(self.device, self.timer),
            "rows": [],
            "skipped": [],
        }
        self._say_device()

    def _say_device(self) -> None:
        limits, names = self.result["ceilings"], self.result["versions"]
        smi = " ".join(f"{key} {value}" for key, value in limits["nvidia_smi"].items())
        self.console.print(f"{self.result['device']}; while copying: {smi}", highlight=False)
        self.console.print(" ".join(f"{k} {v}" for k, v in names.items()), highlight=False)
        text = f"read {limits['read']:.0f} GB/s, copy {limits['copy']:.0f} GB/s (read and written)"
        self.console.print(text, highlight=False)
        sys.stdout.flush()

    def run(self) -> None:
        """Measure everything, shapes of equal caches after each other."""
        groups: dict[tuple[int, int], list[Shape]] = {}
        for shape in self.shapes:
            groups.setdefault((shape.num_kv_heads, shape.head_dim), []).append(shape)
        for shapes in groups.values():
            cells = self._fitting(shapes[0])
            pool = self._pool(shapes[0], cells)
            for index, shape in enumerate(shapes):
                for kind in self.kinds:
                    if kind == "decode":
                        for batch, context in cells:
                            self._cell(Work(kind, shape, pool, batch, context))
                    elif index == 0:  # queries have no part in it
                        for tokens in self.tokens:
                            # decompressing takes whole pages
                            if kind == "store" or tokens % pool.page_size == 0:
                                self._cell(Work(kind, shape, pool, tokens=tokens))
            del pool
            gc.collect()
            torch.cuda.empty_cache()

    def _token_bytes(self, shape: Shape) -> dict[str, int]:
        """Return bytes of a token in each cache that is needed."""
        everyone = [c for kind in self.kinds for c in self.contenders[kind] if c.cache]
        return {c.cache: c.token_bytes(shape) for c in everyone}

    def _num_pages(self, shape: Shape, cell: tuple[int, int]) -> int:
        size = int(self.args.page_size)
        least = min(self._token_bytes(shape).values(), default=1 << 20) * size
        most = max(cell[0] * cell[1], *self.tokens)
        return -(-most // size) + spare_pages(least, self.device)

    def _fitting(self, shape: Shape) -> list[tuple[int, int]]:
        """Return the cells whose caches all fit on the device; say which do not."""
        if "decode" not in self.kinds:
            return []
        torch.cuda.empty_cache()
        room = _MEMORY_SHARE * torch.cuda.mem_get_info(self.device)[0]
        found, token = [], sum(self._token_bytes(shape).values())
        for cell in self.cells:
            size = self._num_pages(shape, cell) * self.args.page_size * token
            if size <= room:
                found.append(cell)
            else:
                name = f"decode {shape} {cell[0]}x{size_name(cell[1])}"
                self._skip(name, f"caches take {size / 2**30:.0f} GiB of {room / 2**30:.0f}")
        return found

    def _pool(self, shape: Shape, cells: list[tuple[int, int]]) -> Pool:
        pages = max(self._num_pages(shape, cell) for cell in [*cells, (0, 0)])
        return Pool(pages, self.args.page_size, self.device)

    def _skip(self, name: str, reason: str) -> None:
        self.result["skipped"].append({"cell": name, "reason": reason})
        self.console.print(f"skipped: {name}: {reason}", highlight=False)
        self._save()

    def _cell(self, work: Work) -> None:
        name, spent = f"{work.kind} {work.shape} {work.name}", time.monotonic() - self.begin
        if spent > self.args.budget:
            self._skip(name, f"{spent:.0f} s of {self.args.budget:.0f} are spent")
            return
        if work.tokens:
            work.max_sets = rotation(work.vector_bytes, self.device)[0]
        rows = measure(work, self.contenders[work.kind], self.args.repeats, self.timer)
        place = {"kind": work.kind, "shape": str(work.shape), "cell": work.name}
        self.result["rows"] += [place | row for row in rows]
        self._save()
        title = f"{name}, page size {work.pool.page_size}, at {time.monotonic() - self.begin:.0f} s"
        table = Table(title=title, title_justify="left")
        for column in ("contender", "us", "min..max", "GB/s", "of read", "vs bf16", "vs fp8", "MB"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        for row in rows:
            if "error" in row:
                last = row["error"].strip().splitlines()[0][:100]
                table.add_row(row["contender"], "failed", escape(last))
                continue
            share = row["gb_per_s"] / self.result["ceilings"]["read"]
            table.add_row(
                row["contender"] + (f" ({row['note']})" if "note" in row else ""),
                f"{row['us']:.1f}",
                f"{row['us_min']:.1f}..{row['us_max']:.1f}",
                f"{row['gb_per_s']:.0f}",
                f"{share:.0%}",
                *(f"{row[f'vs_{k}']:.2f}" if f"vs_{k}" in row else "" for k in ("bf16", "fp8")),
                f"{row['bytes'] / 1e6:.1f}",
            )
        self.console.print(table)
        sys.stdout.flush()

    def _save(self) -> None:
        self.result["seconds"] = time.monotonic() - self.begin
        if self.args.json:
            self.args.json.write_text(json.dumps(self.result, indent=1) + "\n")

    def summary(self) -> None:
        """Print the yardsticks, how many times faster TurboKV is, and which rivals cannot run."""
        ours = [r for r in self.result["rows"] if r["family"] == "turbokv"]
        for kind in self.kinds:
            rows = [r for r in ours if r["kind"] == kind]
            names = list(dict.fromkeys(r["contender"] for r in rows))
            title = f"{kind}: times as fast as the best bf16 / the best fp8"
            table = Table("cell", "best bf16", "best fp8", *names, title=title)
            table.title_justify = "left"
            for shape, cell in dict.fromkeys((r["shape"], r["cell"]) for r in rows):
                here = {r["contender"]: r for r in rows if (r["shape"], r["cell"]) == (shape, cell)}
                marks = [
                    [f"{here[n][f'vs_{k}']:.2f}" if f"vs_{k}" in here[n] else "-" for n in names]
                    for k in ("bf16", "fp8")
                ]
                best = [self._best((kind, shape, cell), family) for family in ("bf16", "fp8")]
                cells = (f"{a} / {b}" for a, b in zip(*marks, strict=True))
                table.add_row(f"{shape} {cell}", *best, *cells)
            if names:
                self.console.print(table)
        failed: dict[str, str] = {}
        for row in self.result["rows"]:
            if "error" in row:
                text = row["error"].strip().splitlines()[0][:160]
                place = f"{row['kind']} {row['shape']} {row['cell']}"
                failed.setdefault(row["contender"], f"{text} (first: {place})")
        for name, text in failed.items():
            self.console.print(f"not measured: {name}: {text}", highlight=False, markup=False)
        sys.stdout.flush()

    def _best(self, place: tuple[str, str, str], family: str) -> str:
        """Return the fastest of a family at (kind, shape, cell), and its time."""
        here = [r for r in self.result["rows"] if (r["kind"], r["shape"], r["cell"]) == place]
        rows = [r for r in here if r["family"] == family and "us" in r]
        if not rows:
            return "-"
        best = min(rows, key=lambda r: float(r["us"]))
        return f"{best['contender'].removesuffix(' ' + family)} {best['us']:.1f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw GB/s over bytes of a launch, for every shape, under the ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in result["rows"] if r["kind"] == "decode" and "us" in r]
    if not rows:
        sys.exit("--plot: wanted measured rows of decode, got none")
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    _, axes = pyplot.subplots(1, len(shapes), figsize=(8 * len(shapes), 6), squeeze=False)
    names = list(dict.fromkeys(r["contender"] for r in rows))
    for axis, shape in zip(axes[0], shapes, strict=True):
        for index, name in enumerate(names):
            here = [r for r in rows if r["shape"] == shape and r["contender"] == name]
            here.sort(key=lambda r: r["bytes"])
            style = {"marker": "osv^D*"[index % 6], "color": f"C{index % 10}", "label": name}
            style["linestyle"] = "-" if name.startswith("TurboKV") else "--"
            x, y = [r["bytes"] / 1e6 for r in here], [r["gb_per_s"] for r in here]
            axis.plot(x, y, **style)
        for limit, line in (("read", "-"), ("copy", ":")):
            axis.axhline(result["ceilings"][limit], color="k", linestyle=line, label=limit)
        axis.set(xscale="log", yscale="log", title=f"decode {shape}, {result['device']}")
        axis.set(xlabel="MB of cache a launch", ylabel="GB/s")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=120)


def versions() -> dict[str, str]:
    """Return the versions of what takes part."""
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "turbokv": __version__}
    for name in ("vllm", "flashinfer-python", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    """Parse the arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kinds", default=",".join(get_args(Kind)), help="comma list")
    parser.add_argument("--cells", default=CELLS, help="requests x context, of decode")
    parser.add_argument("--shapes", default=SHAPES, help="query heads / KV heads x head_dim")
    parser.add_argument("--tokens", default="64,8K", help="of store and decompress")
    parser.add_argument("--presets", default="tq4,tq3,tq2,tq_k5v3", help="presets of TurboKV")
    parser.add_argument("--only", default="", help="parts of names of contenders, comma list")
    parser.add_argument("--repeats", type=int, default=7, help="replays of each graph")
    parser.add_argument("--budget", type=float, default=230, help="seconds; then cells are skipped")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--window", action="store_true", help="also with 16-bit newest 128 tokens")
    parser.add_argument("--centred", action="store_true", help="also with key offsets")
    parser.add_argument("--json", type=Path, help="file; rewritten after every cell")
    parser.add_argument("--plot", type=Path, help="image file (needs matplotlib)")
    parser.add_argument("--plot-of", type=Path, help="draw what this JSON of a run holds; no GPU")
    args = parser.parse_args()
    if args.plot_of:
        if not args.plot:
            parser.error("--plot-of: wanted --plot with it")
        plot(json.loads(args.plot_of.read_text()), args.plot)
        return
    if not torch.cuda.is_available():
        sys.exit("bench_kernels.py: PyTorch sees no CUDA device")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    bench = Bench(args)
    bench.run()
    bench.summary()
    if args.plot:
        plot(bench.result, args.plot)
    if not any("us" in row for row in bench.result["rows"]):
        sys.exit("bench_kernels.py: nothing could be measured")


if __name__ == "__main__":
    main()
