# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for a GPU that need not be there; run by test_kernels.py.

A process of its own, because Triton either interprets or compiles, and the tests interpret. The
interpreter takes much that the compiler refuses.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from turbokv.core import Codebook, VectorFormat
from turbokv.kernels import triton_kernels, triton_page_metadata, triton_recent_window

POINTERS = {
    "x_ptr": "*bf16",
    "out_ptr": "*bf16",
    "packed_ptr": "*u8",
    "norms_ptr": "*fp16",
    "signs_ptr": "*fp32",
    "boundaries_ptr": "*fp32",
    "levels_ptr": "*fp32",
    "counters_ptr": "*i64",
}
FLOATS = ("normaliser", "lattice_unit", "scale_factor", "norm_limit", "inverse_root")


def ptx(kernel: Any, constants: dict[str, Any], **options: Any) -> str:
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*i32")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    source = ASTSource(kernel, signature, constants)
    return str(triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["ptx"])


def main() -> None:
    options = {"num_warps": 1, "enable_fp_fusion": False}
    for bits, rule in ((8, 0), (5, 2), (4, 3)):
        fmt = VectorFormat.create("k", 96, Codebook.gaussian(bits), scale_rule="plain")
        layout = triton_kernels._layout(fmt)
        wanted = {**layout, "MID_TREAD": fmt.codebook.is_mid_tread, "RULE": rule}
        texts = [ptx(triton_kernels._compress_kernel, wanted, **options)]
        wanted = {**layout, "ROTATED": bits == 8}
        texts.append(ptx(triton_kernels._decompress_kernel, wanted, **options))
        # a fused multiply-add would round once where the reference rounds twice
        assert not any("fma." in text for text in texts)
        assert "div.rn.f32" in texts[0] and "sqrt.rn.f32" in texts[0]
    ptx(
        triton_page_metadata._page_metadata_kernel,
        {"ROWS": 8, "PAGES": 128, "PREFIX_CHUNK": 1024},
    )
    for window, sinks in ((128, 1), (0, 1), (128, 0)):
        constants = {
            "WINDOW": window,
            "SINK_TILES": sinks,
            "WINDOW_TILES": 9 if window else 0,
            "TILES_PER_PAGE": 2,
            "BLOCK": triton_recent_window._BLOCK,
        }
        ptx(triton_recent_window._recent_window_kernel, constants, num_warps=8)


if __name__ == "__main__":
    main()
