# SPDX-License-Identifier: Apache-2.0
"""A few small calls of every CUDA kernel, for compute-sanitizer: ``python -m`` this module."""

from __future__ import annotations

import torch

from tests.gpu.decode_cases import DEVICE, Case, Problem
from turbokv.codec import TurboKVCodec
from turbokv.kernels import cuda
from turbokv.paged import PageLayout

MANY = tuple(100 + i for i in range(62))
DECODE = (
    Case(lens=(600, 33, 0, 1)),
    Case(lens=(3000,), kept=0.3, centred=True),
    Case(head_dim=64, k_bits=2, v_bits=2, group_size=8, kept=0.2, page_size=64, lens=(900, 40)),
    Case(k_bits=3, v_bits=3, lens=(500, 70), q_lens=(3, 1)),
    Case(k_bits=5, v_bits=3, head_dim=256, lens=(400, 17), logits_soft_cap=20.0, sinks=True),
    Case(lens=MANY, num_kv_heads=8, kept=0.2),  # four CTAs per multiprocessor
    Case(lens=MANY[:31], num_kv_heads=8, centred=True, page_size=64),  # two
    Case(body="cp_async", lens=(300, 40), indptr=True, page_size=48),
)


def decode() -> None:
    for case in DECODE:
        problem = Problem(case)
        arguments = problem.arguments()
        cuda.decode(**arguments)
        error = (arguments["out"] - problem.expected).norm() / problem.expected.norm()
        if not error < 6e-4:
            raise SystemExit(f"error {float(error):.2e}: {case}")


def store_and_decompress() -> None:
    for bits, tokens in ((4, 200), (3, 33), (2, 64), (5, 16)):
        codec = TurboKVCodec(128, k_bits=bits, v_bits=bits, device=DEVICE)
        formats = codec.vector_format("k"), codec.vector_format("v")
        layout, heads = PageLayout(128, bits, bits, 16, 2), 2
        pages = torch.zeros(layout.shape(20), dtype=torch.uint8, device=DEVICE)
        k, v, k_out, v_out = torch.randn(4, tokens, heads, 128, device=DEVICE).half()
        slots = torch.randperm(320, device=DEVICE)[:tokens]
        slots[: tokens // 2] = torch.arange(tokens // 2, device=DEVICE)
        slots[tokens // 2 :] = torch.arange(tokens // 2, tokens, device=DEVICE).flip(0)
        slots[-1] = -1
        cuda.store(k, v, slots, pages, *formats, 16)
        table = torch.arange(20, device=DEVICE).int()
        cuda.decompress(pages, *formats, 16, table, k_out, v_out)


def main() -> None:
    store_and_decompress()
    decode()
    torch.cuda.synchronize()
    print("all cases ran")


if __name__ == "__main__":
    main()
