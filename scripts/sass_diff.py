#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare the machine code of CUDA kernels with that of another revision, without a GPU.

Compiles variants of both trees and prints, for each kernel, its instructions, registers and bytes
spilled, and a verdict: *equal* bytes; *moved*, which is as many instructions (within half a
percent), as many warps that fit, and no more spills or stack; *changed*; *new* or *gone*. Exits
with 1 if any kernel changed, unless ``--report-only``.

    python scripts/sass_diff.py --base main --dims 128 --pairs tq4 tq_k5v3
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from turbokv.kernels.cuda import build  # noqa: E402

INSTRUCTION_BYTES = 16
# Registers are given to warps in groups of eight, so that such a step decides how many warps fit.
REGISTER_STEP = 8


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of a kernel.

    Attributes
    ----------
    instructions
        Including padding at the end.
    registers
        Per thread.
    spills, stack
        Bytes spilled (stores and loads), and bytes of the stack frame.
    digest
        A hash of the code, to tell equal from moved.
    """

    instructions: int
    registers: int
    spills: int
    stack: int
    digest: int


def text_sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the mangled name and code of each kernel of a 64-bit ELF file."""
    offset, size, count, names = (
        struct.unpack_from("<Q", cubin, 40)[0],
        *struct.unpack_from("<3H", cubin, 58),
    )
    sections = [struct.unpack_from("<2I4Q2I2Q", cubin, offset + i * size) for i in range(count)]
    table = sections[names][4]
    for section in sections:
        start = table + section[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            yield name.removeprefix(".text."), cubin[section[4] : section[4] + section[5]]


def resources(log: str) -> dict[str, tuple[int, int, int]]:
    """Return registers, spilled bytes and stack of each kernel of ``ptxas -v``."""
    found: dict[str, tuple[int, int, int]] = {}
    name, stack, spills = "", 0, 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) .*stores, (\d+)", line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            found[name] = int(match[1]), spills, stack
    return found


def compile_kernels(root: Path, variant: build.Variant, arch: str) -> dict[str, Kernel]:
    """Compile a variant of the tree at ``root`` and return its kernels by readable name."""
    folder = root / "turbokv/kernels/cuda"
    source = folder / "standalone_kernels" / f"{variant.kind}.cu"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.cubin"
        command = [build.require_nvcc(), "-std=c++17", "-O3", "-cubin", "-Xptxas=-v"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{folder / 'include'}"]
        command += [f"-I{folder}", *variant.defines(), str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise build.BuildError(f"{variant.name} of {root}:\n{done.stderr}")
        cubin, used = out.read_bytes(), resources(done.stderr)
    kernels = {}
    for name, code in text_sections(cubin):
        registers, spills, stack = used[name]
        count = len(code) // INSTRUCTION_BYTES
        kernels[readable(name)] = Kernel(count, registers, spills, stack, hash(code))
    return kernels


def readable(name: str) -> str:
    """Return the kernel's name and template arguments, demangled if c++filt is there."""
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
    text = re.sub(r"turbokv::|\w+_detail::|\((?:bool|int)\)", "", text).removeprefix("void ")
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return text[:i]
    return text


def verdict(base: Kernel | None, now: Kernel | None) -> str:
    """Compare a kernel with its base."""
    if base is None or now is None:
        return "new" if base is None else "gone"
    if base.digest == now.digest:
        return "equal"
    steps = [-(-kernel.registers // REGISTER_STEP) for kernel in (base, now)]
    same_size = abs(now.instructions - base.instructions) <= 0.005 * base.instructions
    if same_size and steps[1] <= steps[0] and now.spills <= base.spills and now.stack <= base.stack:
        return "moved"
    return "changed"


def checkout(revision: str, folder: Path) -> Path:
    """Lay out the kernels of a revision in ``folder``."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision, "turbokv/kernels/cuda"],
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a kernel changed and that was not asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", help="a revision; without, only this tree is compiled")
    parser.add_argument("--arch", default="90a")
    parser.add_argument("--kinds", nargs="+", choices=build.KINDS, default=("decode",))
    parser.add_argument("--dims", nargs="+", type=int, default=(128,))
    parser.add_argument("--pairs", nargs="+", type=build._pair, default=((4, 4),))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write this tree's numbers there")
    parser.add_argument("--report-only", action="store_true", help="exit with 0 in any case")
    options = parser.parse_args(arguments)
    chosen = build.variants(options.kinds, options.dims, options.pairs)
    rows: list[tuple[str, Kernel | None, Kernel | None]] = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        base = checkout(options.base, Path(scratch)) if options.base else None
        now = [pool.submit(compile_kernels, ROOT, each, options.arch) for each in chosen]
        old = [pool.submit(compile_kernels, base, each, options.arch) for each in chosen if base]
        for i, future in enumerate(now):
            mine, theirs = future.result(), old[i].result() if old else {}
            for name in sorted({*mine, *theirs}):
                rows.append((name, theirs.get(name), mine.get(name)))
    verdicts = []
    print(f"{'instructions':>16} {'registers':>10} {'spills':>10}  verdict  kernel")
    for name, before, after in rows:
        verdicts.append(verdict(before, after) if options.base else "")
        pairs = [
            " ".join("-" if k is None else str(getattr(k, field)) for k in (before, after))
            for field in ("instructions", "registers", "spills")
        ]
        print(f"{pairs[0]:>16} {pairs[1]:>10} {pairs[2]:>10}  {verdicts[-1]:8} {name}")
    if options.json:
        numbers = {name: asdict(kernel) for name, _, kernel in rows if kernel is not None}
        for each in numbers.values():
            del each["digest"]
        options.json.write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n")
    return int("changed" in verdicts and not options.report_only)


if __name__ == "__main__":
    sys.exit(main())
