#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time the codec against a bf16 copy plus one fp32 matmul with the Hadamard matrix.

The yardstick is what a rotation costs when nothing is compressed: move the vectors once, multiply
them once. Every backend that can run is timed (``--backend`` picks). Calls are interleaved, so that
a slow phase of the machine hits all of them, and the median of the repeats is shown. If PyTorch is
among the backends, a second table times the steps of its compressor over its own blocks and says
which dominates.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from turbokv import TurboKVCodec, core, kernels

YARDSTICK = ("bf16 copy", "fp32 matmul")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def interleaved_medians(
    calls: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Return the median milliseconds of each call after one warm-up round."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def yardstick_calls(x: Tensor) -> dict[str, Callable[[], object]]:
    """Return the copy and the product, writing to preallocated outputs."""
    half = x.to(torch.bfloat16)
    half_out = torch.empty_like(half)
    full = x.to(torch.float32)
    dim = core.padded_dim(x.shape[1])
    matrix = core.hadamard_rows(torch.eye(dim, device=x.device))[: x.shape[1]]
    product = torch.empty((x.shape[0], dim), device=x.device)
    calls = (lambda: half_out.copy_(half), lambda: torch.mm(full, matrix, out=product))
    return dict(zip(YARDSTICK, calls, strict=True))


def codec_calls(codec: TurboKVCodec, x: Tensor) -> dict[str, Callable[[], object]]:
    """Return the codec's methods, writing to preallocated outputs."""
    k_packed, k_norms = codec.compress_k(x)
    v_packed, v_norms = codec.compress_v(x)
    out = torch.empty_like(x)
    raw = torch.empty((x.shape[0], codec.padded_dim), dtype=x.dtype, device=x.device)
    return {
        "compress_k": lambda: codec.compress_k(x, out_packed=k_packed, out_norms=k_norms),
        "compress_v": lambda: codec.compress_v(x, out_packed=v_packed, out_norms=v_norms),
        "decompress_k": lambda: codec.decompress_k(k_packed, k_norms, out=out),
        "decompress_v": lambda: codec.decompress_v(v_packed, v_norms, out=out),
        "decompress_k_raw": lambda: codec.decompress_k_raw(k_packed, k_norms, out=raw),
    }


def step_calls(fmt: core.VectorFormat, x: Tensor) -> dict[str, Callable[[], object]]:
    """Return the steps of ``core.compress`` (PyTorch), each over all blocks."""
    blocks = [x[block] for block in core._blocks(x.shape[0], fmt.padded_dim, x.device)]
    rotated = [core.rotate_rows(block, fmt) for block in blocks]
    lengths = [y.abs() for y in rotated]
    squares = [core.tree_sum_rows(y * y) for y in lengths]
    lattice = [
        y * (fmt.normaliser / core.exact_sqrt(s)) for y, s in zip(lengths, squares, strict=True)
    ]
    cells = [fmt.cells(u.clone()) for u in lattice]
    scratch = [torch.empty_like(y) for y in rotated]
    packed = torch.empty((x.shape[0], fmt.packed_dim), dtype=torch.uint8, device=x.device)
    size = blocks[0].shape[0]

    def signs() -> None:
        for block, y in zip(blocks, scratch, strict=True):
            y[: fmt.head_dim] = block.t()
            y.clamp_(-core.INPUT_LIMIT, core.INPUT_LIMIT).mul_(fmt.signs[:, None])

    def butterflies() -> None:
        for y in scratch:
            core.hadamard_rows(y)

    def norms() -> None:
        for y in rotated:
            magnitude = y.abs()
            core.exact_sqrt(core.tree_sum_rows(magnitude * magnitude))

    def quantise() -> None:
        # a product makes the tensor that cells() overwrites, as in the compressor
        for u, s in zip(lattice, squares, strict=True):
            fmt.cells(u * torch.ones_like(s))

    def scales() -> None:
        for y, s, (_, magnitude) in zip(lengths, squares, cells, strict=True):
            core.round_scale(core.stored_scale(fmt, y, s, magnitude), fmt.norm_dtype)

    def pack() -> None:
        half, full = 1 << (fmt.bits - 1), (1 << fmt.bits) - 1
        for i, (y, (index, _)) in enumerate(zip(rotated, cells, strict=True)):
            negative = (y.add_(0.0).view(torch.int32) >> 31).to(torch.uint8)
            codes = (index + half) ^ (negative & full)
            packed[i * size : (i + 1) * size] = core.pack_rows(codes, fmt.bits).t()

    return {
        "transpose and signs": signs,
        "butterflies": butterflies,
        "sum of squares, root": norms,
        "quantise": quantise,
        "scale sums": scales,
        "codes and packing": pack,
    }


def device_name(device: torch.device) -> str:
    """Return what the vectors ran on."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def chosen_backends(names: list[str], device: torch.device) -> list[kernels.Backend]:
    """Return the backends to time: those named, or all that can run on ``device``."""
    if names == ["all"]:
        return kernels.available_backends(device)
    resolved = [kernels.resolve_backend(kernels.check_backend(name), device) for name in names]
    return list(dict.fromkeys(resolved))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the tables and return them as one JSON-ready dictionary."""
    device = torch.device(args.device)
    backends = chosen_backends(args.backend, device)
    codecs = {
        name: TurboKVCodec(args.dim, args.bits, device=device, backend=name) for name in backends
    }
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.n, args.dim, generator=generator).to(device, DTYPES[args.dtype])
    calls = yardstick_calls(x)
    for backend, codec in codecs.items():
        calls.update((f"{name}, {backend}", call) for name, call in codec_calls(codec, x).items())
    times = interleaved_medians(calls, args.repeats, device)
    yardstick = sum(times[name] for name in YARDSTICK)
    codec = codecs[backends[0]]
    moved = 2 * args.n * args.dim + args.n * codec.bytes_per_vector("k")
    result = {
        "device": device_name(device),
        "torch": torch.__version__,
        "backends": backends,
        "vectors": args.n,
        "head_dim": args.dim,
        "bits": args.bits,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "yardstick_ms": yardstick,
        "calls": {
            name: {"ms": ms, "ratio": ms / yardstick, "gb_per_s": moved / ms / 1e6}
            for name, ms in times.items()
        },
    }
    if "torch" in backends:
        steps = interleaved_medians(step_calls(codec.vector_format("k"), x), args.repeats, device)
        total = sum(steps.values())
        result["steps"] = {name: {"ms": ms, "share": ms / total} for name, ms in steps.items()}
        result["dominates"] = max(steps, key=lambda name: steps[name])
    return result


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    title = "{vectors} vectors of {head_dim} at {bits} bits, {dtype}, {device}"
    table = Table("call", "ms", "x (copy + matmul)", "GB/s", title=title.format(**result))
    for name, row in result["calls"].items():
        speed = "" if name in YARDSTICK else f"{row['gb_per_s']:.2f}"
        table.add_row(name, f"{row['ms']:.2f}", f"{row['ratio']:.2f}", speed)
    console = Console()
    console.print(table)
    if "steps" not in result:
        return
    steps = Table("step of compress_k, torch", "ms", "share")
    for name, row in result["steps"].items():
        steps.add_row(name, f"{row['ms']:.2f}", f"{row['share']:.0%}")
    console.print(steps)
    console.print(f"dominates: {result['dominates']}")


def main() -> None:
    """Parse the arguments, measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=100_000, help="vectors")
    parser.add_argument("--dim", type=int, default=128, help="head_dim")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the vectors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--backend", nargs="+", default=["all"], help="names, auto, or all that can run (default)"
    )
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's own choice")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    result = measure(args)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
