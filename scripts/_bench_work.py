# SPDX-License-Identifier: Apache-2.0
"""What the contenders of ``bench_kernels.py`` work on, and how they are timed.

A contender's launches are captured in one CUDA graph. No byte of a cache is met twice in it while
L2 may still hold it: launches go round separate sets of pages, and before a replay other memory is
read through L2. Replays of all contenders alternate, forwards and backwards, so that a slow phase
of the device hits all of them.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU: only --help works there
    triton = None

Kind = Literal["decode", "store", "decompress"]
Launch = Callable[[], object]

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
_CHUNK = 1 << 27  # elements that are drawn at a time
_ROTATION = 5  # what sets of pages sum to before they come again, in sizes of L2
_GRAPH_BYTES = 1 << 30  # a graph moves this much, in MIN_LAUNCHES to MAX_LAUNCHES launches
MIN_LAUNCHES, MAX_LAUNCHES = 8, 64
_MIN_REPEATS, _REPLAY_SECONDS = 3, 0.5  # slow contenders are replayed less often
_CEILING_BYTES = 2 << 30


@dataclass(frozen=True)
class Shape:
    """Heads of a layer, e.g. ``32/8x128``."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_qo_heads}/{self.num_kv_heads}x{self.head_dim}"

    @property
    def vector_elements(self) -> int:
        """Elements of all keys, or all values, of a token."""
        return self.num_kv_heads * self.head_dim


@dataclass
class Pool:
    """The caches of one number of KV heads and head size, each allocated once."""

    num_pages: int
    page_size: int
    device: torch.device
    caches: dict[str, Any] = field(default_factory=dict)

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the cache ``key``, made by ``make`` when it is first asked for."""
        if key not in self.caches:
            self.caches[key] = make()
        return self.caches[key]


@dataclass
class Work:
    """One cell: what every contender does in a launch, on ``sets`` separate sets of pages."""

    kind: Kind
    shape: Shape
    pool: Pool
    batch: int = 0  # decode: requests of
    context: int = 0  # tokens each
    tokens: int = 0  # store and decompress
    max_sets: int = 1
    _vectors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the cell is called in tables."""
        return size_name(self.tokens) if self.kind != "decode" else cell_name(self)

    @property
    def vector_bytes(self) -> int:
        """Bytes of the cell's new keys and values in 16 bits."""
        return 4 * self.tokens * self.shape.vector_elements

    def tables(self, sets: int) -> list[Tensor]:
        """Return int32 ``[batch, pages]`` (one request unless decoding), disjoint, shuffled."""
        rows = max(1, self.batch)
        pages = (self.context or self.tokens) // self.pool.page_size
        generator = torch.Generator(self.pool.device).manual_seed(0)
        order = torch.randperm(
            self.pool.num_pages, generator=generator, device=self.pool.device, dtype=torch.int32
        )
        if sets * rows * pages > order.numel():
            raise ValueError(f"{sets} x {rows} x {pages} pages wanted, got {order.numel()}")
        return list(order[: sets * rows * pages].view(sets, rows, pages).unbind())

    def slots(self, sets: int) -> list[Tensor]:
        """Return int64 slots to store to: full pages, or a token each of as many requests."""
        size = self.pool.page_size
        if self.tokens >= 1024:
            inside = torch.arange(size, device=self.pool.device)
            return [(t.long()[0, :, None] * size + inside).flatten() for t in self.tables(sets)]
        order = torch.randperm(self.pool.num_pages, device=self.pool.device)
        pages = order.repeat(-(-sets * self.tokens // order.numel()))[: sets * self.tokens]
        token = torch.randint(size, pages.shape, device=self.pool.device)
        return list((pages * size + token).view(sets, self.tokens).unbind())

    def vectors(self, name: str) -> Tensor:
        """Return bf16 ``[max_sets, K and V, tokens, num_kv_heads, head_dim]``."""
        if name not in self._vectors:
            shape = (self.max_sets, 2, self.tokens, self.shape.num_kv_heads, self.shape.head_dim)
            self._vectors[name] = normal(shape, BF16, self.pool.device)
        return self._vectors[name]

    def query(self) -> Tensor:
        """Return bf16 ``[batch, num_qo_heads, head_dim]``."""
        shape = (self.batch, self.shape.num_qo_heads, self.shape.head_dim)
        return normal(shape, BF16, self.pool.device)

    def lengths(self) -> Tensor:
        """Return int32 ``[batch]``."""
        return torch.full((self.batch,), self.context, dtype=torch.int32, device=self.pool.device)


def size_name(count: int) -> str:
    """Return ``8K`` for 8192."""
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else str(count)


def cell_name(work: Work) -> str:
    """Return ``16x32K`` for 16 requests of 32768 tokens."""
    return f"{work.batch}x{size_name(work.context)}"


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes
    ----------
    name
        As in tables; no two of a kind are equal.
    family
        ``bf16`` and ``fp8`` set the marks; ``turbokv`` and ``other`` are compared with them.
    cache
        Which cache it works on: contenders may share one. Empty for none.
    token_bytes
        Bytes of a token in that cache.
    build
        Returns a launch for each of so many disjoint sets.
    extra_bytes
        Bytes that a launch moves in addition to codes, and vectors stored or decompressed.
    """

    name: str
    family: Literal["turbokv", "bf16", "fp8", "other"]
    cache: str
    token_bytes: Callable[[Shape], int]
    build: Callable[[Work, int], list[Launch]]
    extra_bytes: Callable[[Work], int] = lambda work: 0

    def bytes(self, work: Work) -> int:
        """Bytes that a launch has to move."""
        tokens = work.batch * work.context or work.tokens
        return tokens * self.token_bytes(work.shape) + work.vector_bytes + self.extra_bytes(work)


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return normal numbers of any dtype, drawn in parts that do not fill the device."""
    out = torch.empty(shape, dtype=dtype, device=device)
    flat = out.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        part.copy_(torch.randn(part.shape, dtype=BF16, device=device))
    return out


def random_bytes(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return uniform bytes."""
    return torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 256)


def plain_cache(work: Work, fp8: bool) -> tuple[Tensor, Tensor]:
    """Return keys and values ``[num_pages, page_size, num_kv_heads, head_dim]``."""
    pool, shape = work.pool, work.shape
    extents = (pool.num_pages, pool.page_size, shape.num_kv_heads, shape.head_dim)
    dtype = FP8 if fp8 else BF16

    def make() -> tuple[Tensor, Tensor]:
        return normal(extents, dtype, pool.device), normal(extents, dtype, pool.device)

    cache: tuple[Tensor, Tensor] = pool.get("fp8" if fp8 else "bf16", make)
    return cache


# --- timing ---------------------------------------------------------------------------------------


def l2_bytes(device: torch.device) -> int:
    """Return the size of the device's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def rotation(size: int, device: torch.device) -> tuple[int, int]:
    """Return sets of pages and launches of a graph, for launches that move ``size`` bytes."""
    launches = max(MIN_LAUNCHES, min(MAX_LAUNCHES, -(-_GRAPH_BYTES // size)))
    return min(launches, -(-_ROTATION * l2_bytes(device) // size)), launches


def spare_pages(page_bytes: int, device: torch.device) -> int:
    """Return the pages that rotation needs in addition to those of a launch."""
    return -(-_ROTATION * l2_bytes(device) // page_bytes)


def capture(launches: list[Launch], count: int) -> torch.cuda.CUDAGraph:
    """Return a graph of ``count`` launches, round and round; runs a few before."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for launch in (launches[0], launches[-1], launches[0]):
            launch()
        stream.synchronize()
        # not torch.cuda.graph, which collects garbage first; thread_local, as modules may be
        # compiled in another thread meanwhile
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for index in range(count):
                launches[index % len(launches)]()
        except Exception:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


class Timer:
    """Replays graphs with a cold L2."""

    def __init__(self, device: torch.device) -> None:
        self._other = torch.zeros(max(1 << 28, 2 * l2_bytes(device)), device=device)
        self._sum = torch.empty((), device=device)

    def __call__(self, graph: torch.cuda.CUDAGraph) -> float:
        """Return the seconds of one replay."""
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # reading, as written lines would go back to memory during the replay; it also lasts long
        # enough that the replay is in the queue before the device gets there
        torch.sum(self._other, 0, out=self._sum)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def measure(
    work: Work, contenders: list[Contender], repeats: int, timer: Timer
) -> list[dict[str, Any]]:
    """Time the contenders in one cell; each yields a row, with an error if it cannot run."""
    rows: list[dict[str, Any]] = []
    graphs: list[tuple[dict[str, Any], torch.cuda.CUDAGraph, list[float], int]] = []
    keep: list[list[Launch]] = []  # graphs do not own what they read
    for contender in contenders:
        size = contender.bytes(work)
        row: dict[str, Any] = {"contender": contender.name, "family": contender.family}
        rows.append(row | {"bytes": size})
        row = rows[-1]
        try:
            sets, count = rotation(size, work.pool.device)
            launches = contender.build(work, sets)
            result = launches[0]()
            if isinstance(result, Tensor) and not bool(torch.isfinite(result).all()):
                row["note"] = "output is not finite"
            graph = capture(launches, count)
            seconds = timer(graph)
            often = max(_MIN_REPEATS, min(repeats, int(_REPLAY_SECONDS / max(seconds, 1e-9))))
            row |= {"launches": count, "sets": sets, "repeats": often}
            graphs.append((row, graph, [], often))
            keep.append(launches)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
    for repeat in range(repeats):
        for row, graph, times, often in graphs if repeat % 2 == 0 else reversed(graphs):
            if repeat >= often or "error" in row:
                continue
            try:
                times.append(timer(graph) * 1e6 / row["launches"])
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"
    for row, _, times, _ in graphs:
        if "error" not in row:
            middle = statistics.median(times)
            row |= {"us": middle, "us_min": min(times), "us_max": max(times)}
            row["gb_per_s"] = row["bytes"] / middle / 1e3
    for mark in ("bf16", "fp8"):
        best = min((r["us"] for r in rows if r["family"] == mark and "us" in r), default=None)
        for row in rows:
            if best is not None and "us" in row:
                row[f"vs_{mark}"] = best / row["us"]
    return rows


# --- the device -----------------------------------------------------------------------------------

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _read(x, out, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        lane = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.int32)
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            total ^= tl.load(x + block * BLOCK + lane)  # int32 reaches 8 GiB
        tl.store(out + tl.program_id(0), tl.sum(total, 0))


def nvidia_smi(device: torch.device, load: Launch, seconds: float) -> dict[str, str]:
    """Return clocks, power and temperature while ``load``, of so many seconds, runs."""
    names = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    query += ["-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
    for _ in range(max(1, int(1.5 / seconds))):
        load()
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        found = dict(zip(names, answer.stdout.strip().split(", "), strict=False))
    except (OSError, subprocess.SubprocessError) as error:
        found = {"error": str(error)}
    torch.cuda.synchronize(device)
    return found


def ceilings(device: torch.device, timer: Timer) -> dict[str, Any]:
    """Return what this device reads and copies in GB/s, and its clocks while it copies."""
    # not zeros, which move with less power and so at higher clocks
    x = torch.empty(_CEILING_BYTES // 4, dtype=torch.int32, device=device).random_()
    y = torch.empty_like(x)

    def gb_per_s(launch: Launch, size: int) -> float:
        graph = capture([launch], 4)
        times = [timer(graph) for _ in range(9)]
        return 4 * size / statistics.median(times) / 1e9

    reads: dict[str, float] = {}
    total = torch.empty((), dtype=torch.int64, device=device)
    reads["torch.sum"] = gb_per_s(lambda: torch.sum(x, 0, out=total), _CEILING_BYTES)
    if triton is not None:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        for warps, block in ((8, 4096), (8, 8192), (4, 4096)):
            for grid in (processors * 4, processors * 8, processors * 32):

                def read(grid: int = grid, block: int = block, warps: int = warps) -> None:
                    _read[(grid,)](x, y, x.numel() // block, BLOCK=block, num_warps=warps)

                reads[f"triton {grid}x{block}, {warps} warps"] = gb_per_s(read, _CEILING_BYTES)
    copy = gb_per_s(lambda: y.copy_(x), 2 * _CEILING_BYTES)
    seconds = 2 * _CEILING_BYTES / copy / 1e9
    smi = nvidia_smi(device, lambda: y.copy_(x), seconds)
    return {"read": max(reads.values()), "reads": reads, "copy": copy, "nvidia_smi": smi}
