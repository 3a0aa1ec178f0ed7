#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Rate and distortion of the codec on N(0, 1): error, cosine, bytes and ratio by bits x head_dim.

Errors are mean squared errors relative to unit variance, of keys (unbiased scale) and values
(least-squares scale), beside the error of the codebook alone; cosine is the mean over keys. Bytes
are those of one vector, its 16-bit scale included; the ratio is against 16 bits per number. 96 is
padded to 128: a third more bytes, and a quarter less error.
"""

from __future__ import annotations

import argparse
import json

import torch
from rich.console import Console
from rich.table import Table

from turbokv import TurboKVCodec
from turbokv._codebooks import CODEBOOKS

HEAD_DIMS = (64, 96, 128, 256)
Row = dict[str, float]


def measure(bits: int, head_dim: int, numbers: int) -> Row:
    """Compress ``numbers`` normal numbers in vectors of ``head_dim`` and compare what is read."""
    codec = TurboKVCodec(head_dim, bits)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(numbers // head_dim, head_dim, generator=generator)
    keys = codec.decompress_k(*codec.compress_k(x))
    values = codec.decompress_v(*codec.compress_v(x))
    variance = x.square().mean()
    return {
        "bits": bits,
        "head_dim": head_dim,
        "k_mse": float((keys - x).square().mean() / variance),
        "v_mse": float((values - x).square().mean() / variance),
        "codebook_mse": CODEBOOKS[bits].mse,
        "cosine": float(torch.cosine_similarity(keys, x, dim=-1).mean()),
        "bytes": codec.bytes_per_vector("k"),
        "ratio": codec.compression_ratio,
    }


def cells(row: Row) -> list[str]:
    """Format one row, errors to three digits."""
    return [
        str(row["bits"]),
        str(row["head_dim"]),
        f"{row['k_mse']:#.3g}",
        f"{row['v_mse']:#.3g}",
        f"{row['codebook_mse']:#.3g}",
        f"{row['cosine']:.5f}",
        str(row["bytes"]),
        f"{row['ratio']:.2f}x",
    ]


HEADINGS = ("bits", "head_dim", "K MSE", "V MSE", "codebook", "cosine", "bytes", "ratio")


def main() -> None:
    """Parse the arguments, measure, print a table, Markdown or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bits", type=int, nargs="+", default=list(CODEBOOKS))
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--numbers", type=int, default=1 << 21, help="normal numbers per row")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = parser.parse_args()
    rows = [measure(bits, dim, args.numbers) for bits in args.bits for dim in args.head_dim]
    if args.json:
        print(json.dumps(rows, indent=2))
    elif args.markdown:
        print(f"| {' | '.join(HEADINGS)} |")
        print("|" + "---:|" * len(HEADINGS))
        for row in rows:
            print(f"| {' | '.join(cells(row))} |")
    else:
        table = Table(*HEADINGS, title="Rate and distortion on N(0, 1)")
        for row in rows:
            table.add_row(*cells(row))
        Console().print(table)


if __name__ == "__main__":
    main()
