# SPDX-License-Identifier: Apache-2.0
"""Fuzz decode on a GPU with seeds that nobody has seen: every run draws new ones and prints them.

    python -m tests.gpu.fuzz_decode --count 10000 --workers 4

A failure prints its trial and the command that repeats it alone. Where it does not fail alone, a
problem before it has left something behind (a workspace): ``--first`` and ``--count`` repeat the
run. With ``--emulated`` the kernels run on the CPU, as ``tests/emulated`` compiles them: a seed is
the same problem there, byte for byte.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import secrets
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.emulated import harness
from tests.gpu.fuzz_answer import Answer, solve
from tests.gpu.fuzz_cases import COMMON, MAX_BATCH, RARE, Arena, Problem, Trial, codec_of, draw
from turbokv.kernels import cuda
from turbokv.kernels.cuda import jit, library
from turbokv.kernels.cuda.build import Variant

# What test_decode_gpu.py allows a whole problem. A row may be worse: rounding is relative to the
# largest product of 64 tokens, and an output may be smaller than what it is the sum of. A token
# left out of 3000 equal ones is an error of 0.018 of `spread`. What scores that are off may do
# comes on top, see fuzz_answer.py.
TOLERANCE, ROW_TOLERANCE = 6e-4, 5e-3
# Sums of probabilities are fp32: off by 1.5e-4 at most in 100 emulated problems, so that a token
# of 3000 equal ones that is left out, 4.8e-4, is nearly seen. An LSE, and a sink in powers of two,
# are fp32 as well.
LSE_TOLERANCE, LSE_ROUNDING = 5e-4, 2.0**-22
OUT_ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
GUARD = 1024.0  # the same in every dtype
MAX_FAILURES = 5


@dataclass
class Checker:
    """Runs problems one after the other on one device; workspaces pass from one to the next."""

    device: str = "cuda"  # on "cpu" kernels are emulated
    far: bool = False
    max_q_len: int = 8
    worst: float = 0.0
    workspaces: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.arena = Arena(self.device, self.far)

    def workspace(self, trial: Trial) -> Tensor:
        """Return the workspace of these heads, whatever has used it before."""
        heads = trial.num_kv_heads * trial.group_size, trial.num_kv_heads
        needed = cuda.decode_workspace_bytes(
            MAX_BATCH,
            *heads,
            trial.head_dim,
            max_q_len=self.max_q_len,
            num_ctas=trial.num_ctas,
            device=self.device,
        )
        key = (*heads, trial.num_ctas)
        found = self.workspaces.get(key)
        if found is None or found.numel() < needed:
            found = torch.zeros(needed, dtype=torch.uint8, device=self.device)
            self.workspaces[key] = found
        return found

    def check(self, trial: Trial) -> str:
        """Return what is wrong, or nothing."""
        problem = Problem(trial, self.arena)
        expected = solve(problem)
        try:
            return self._compare(problem, expected)
        finally:
            problem.clear()

    def _decode(self, problem: Problem, out: Tensor, lse: Tensor) -> None:
        arguments = problem.arguments() | {"out": out, "lse": lse}
        if self.device == "cpu":
            harness.decode(arguments)
        else:
            cuda.decode(**arguments, workspace=self.workspace(problem.trial))

    def _compare(self, problem: Problem, expected: Answer) -> str:
        trial = problem.trial
        exact, exact_lse = expected.out, expected.lse
        guarded, out = _guarded(exact.shape, trial.out_dtype, trial.strided, self.device)
        guarded_lse, lse = _guarded(exact_lse.shape, torch.float32, False, self.device)
        self._decode(problem, out, lse)
        found, found_lse = out.double(), lse.double()
        out.fill_(GUARD)
        lse.fill_(GUARD)
        bounds = guarded.ne(GUARD).any() | guarded_lse.ne(GUARD).any()
        fine = ~expected.spoilt
        size = exact.square().sum(-1).sqrt()
        error = (found - exact).square().sum(-1).sqrt() - expected.out_slack
        error = torch.where(error < 0, 0, error)
        rounding = OUT_ROUNDING[trial.out_dtype]
        allowed = ROW_TOLERANCE * (expected.spread + size) + rounding * size + 1e-6
        row = torch.where(fine, error / allowed, 0).amax() if error.numel() else error.sum()
        squares = torch.where(fine, error.square(), 0).sum()
        whole = squares.sqrt() / (torch.where(fine, size.square(), 0).sum().sqrt() + 1e-3)
        lost = (fine & ~(found.isfinite().all(-1) & (error <= allowed))).any()
        shown = found.isfinite().all(-1) & expected.doomed
        finite = exact_lse.isfinite()
        wrong_lse = (fine & (finite != found_lse.isfinite())).any()
        lse_allowed = LSE_TOLERANCE + LSE_ROUNDING * exact_lse.abs() + expected.lse_slack
        gap = torch.where(fine & finite, (found_lse - exact_lse).abs() / lse_allowed, 0)
        gap = gap.amax() if gap.numel() else gap.sum()
        facts = (bounds, lost, shown.any(), wrong_lse, row, whole, gap)
        values = torch.stack([x.double() for x in facts]).tolist()
        broke, is_lost, is_shown, is_wrong, row_error, whole_error, lse_error = values
        self.worst = max(self.worst, whole_error if math.isfinite(whole_error) else 0.0)
        texts = (
            (broke, "wrote outside of its output"),
            (is_lost, f"a row is wrong: {row_error:.2f} of what is allowed"),
            (is_shown, "a NaN that a query sees does not reach its output"),
            (is_wrong, "LSE is finite where it must not be, or the other way round"),
            (not whole_error <= TOLERANCE + rounding, f"error {whole_error:.1e} in all"),
            (not lse_error <= 1, f"LSE: {lse_error:.2f} of what is allowed"),
        )
        return "; ".join(text for wrong, text in texts if wrong)


def _guarded(
    shape: torch.Size, dtype: torch.dtype, strided: bool, device: str
) -> tuple[Tensor, Tensor]:
    """Return a tensor full of guards and a view of ``shape`` within it."""
    extra = 8 * strided
    wide = (shape[0] + 2, *shape[1:-1], shape[-1] + extra)
    tensor = torch.full(wide, GUARD, dtype=dtype, device=device)
    return tensor, tensor[1:-1, ..., : shape[-1]]


def compile_all(shapes: tuple[tuple[int, int, int], ...], device: str) -> None:
    """Have every kernel ready; those that were not compiled ahead of time are compiled now."""
    loaded = library.load()
    wanted = {Variant("decode", 1 << (dim - 1).bit_length(), *bits) for dim, *bits in shapes}
    missing = wanted - loaded.variants
    if missing:
        print(f"compiling {len(missing)} kernels, which takes minutes", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compile_one = functools.partial(
            jit.compile_variant, archs=library.device_archs(loaded.archs)
        )
        list(pool.map(compile_one, missing))
    for shape in shapes:
        codec = codec_of(*shape, device)
        cuda.prepare("decode", codec.vector_format("k"), codec.vector_format("v"))


def fuzz(first: int, count: int, args: argparse.Namespace, far: bool) -> tuple[int, list[str]]:
    """Check so many seeds; return how many were done, and what failed."""
    device = "cpu" if args.emulated else "cuda"
    checker = Checker(device, far, args.max_q_len)
    shapes = COMMON if args.common else COMMON * 4 + RARE
    failures: list[str] = []
    begin, done = time.monotonic(), 0
    for seed in range(first, first + count):
        if time.monotonic() - begin > args.seconds:
            break
        trial = draw(seed, shapes, args.max_q_len, far=args.far)
        if trial.far and not far:
            continue  # the process that has the memory takes it
        wrong = checker.check(trial)
        done += 1
        if not wrong:
            continue
        alone = Checker(device, far, args.max_q_len).check(trial)
        options = "--common " * args.common + "--far " * args.far + "--emulated " * args.emulated
        text = (
            f"python -m tests.gpu.fuzz_decode {options}--max-q-len {args.max_q_len} --seed {seed}"
        )
        if not alone:
            text = f"not alone, but after --first {first} --count {seed - first + 1} {options}"
        failures.append(f"{wrong}\n  {trial}\n  again: {text}")
        print(failures[-1], flush=True)
        if len(failures) >= MAX_FAILURES:
            break
    print(f"seeds from {first}: {done} done, largest error in all {checker.worst:.1e}", flush=True)
    return done, failures


def _worker(index: int, first: int, share: int, args: argparse.Namespace, queue: Any) -> None:
    try:
        if args.emulated:
            torch.set_num_threads(1)
        queue.put(fuzz(first + index * share, share, args, far=args.far and index == 0))
    except Exception as error:  # a lost context, say: the others go on
        queue.put((0, [f"worker {index}: {type(error).__name__}: {error}"]))
        raise


def main() -> None:
    """Parse the arguments, fuzz, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=1000, help="how many problems")
    parser.add_argument("--seed", type=int, help="this problem alone")
    parser.add_argument("--first", type=int, help="the first seed (default: drawn)")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--max-q-len", type=int, default=8, help="queries of a request")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--common", action="store_true", help="kernels compiled ahead of time only")
    parser.add_argument("--far", action="store_true", help="also pages 5 GiB apart, in a few")
    parser.add_argument("--emulated", action="store_true", help="on the CPU, without a GPU")
    args = parser.parse_args()
    if args.emulated and args.far:
        parser.error("--far: wanted a GPU, got --emulated")
    if not args.emulated and not torch.cuda.is_available():
        sys.exit("fuzz_decode: PyTorch sees no CUDA device; --emulated needs none")
    if args.seed is not None:
        args.first, args.count, args.workers = args.seed, 1, 1
    first = secrets.randbits(40) if args.first is None else args.first
    print(f"seeds {first} to {first + args.count - 1}", flush=True)
    shapes = COMMON if args.common else COMMON + RARE
    if args.seed is not None:
        trial = draw(first, COMMON if args.common else COMMON * 4 + RARE, args.max_q_len, args.far)
        shapes = ((trial.head_dim, trial.k_bits, trial.v_bits),)
    begin = time.monotonic()
    if not args.emulated:  # the emulation compiles what it meets
        compile_all(shapes, "cuda")
        print(f"kernels ready after {time.monotonic() - begin:.0f} s", flush=True)
    if args.workers == 1:
        done, failures = fuzz(first, args.count, args, far=args.far)
    else:
        context = torch.multiprocessing.get_context("spawn")
        queue, share = context.Queue(), -(-args.count // args.workers)
        workers = [
            context.Process(target=_worker, args=(i, first, share, args, queue))
            for i in range(args.workers)
        ]
        for worker in workers:
            worker.start()
        results = [queue.get() for _ in workers]
        for worker in workers:
            worker.join()
        done, failures = sum(r[0] for r in results), [text for r in results for text in r[1]]
    print(f"{done} problems, {len(failures)} failures, {time.monotonic() - begin:.0f} s")
    if failures or not done:
        sys.exit(1)


if __name__ == "__main__":
    main()
