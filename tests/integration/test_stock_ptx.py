# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's own kernels compile to the same PTX with and without the patches (nvcc, no GPU)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from forks import base, wheels  # noqa: E402

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="wanted nvcc on PATH"),
]

# FlashInfer's paged prefill with a stock variant, as its own generator writes it.
SOURCE = """
#include <flashinfer/attention/default_prefill_params.cuh>
#include <flashinfer/attention/mask.cuh>
#include <flashinfer/attention/prefill.cuh>
#include <flashinfer/attention/variants.cuh>

namespace flashinfer {{
using Params = BatchPrefillPagedParams<{dtype_q}, {dtype_kv}, {dtype_q}, int32_t>;
using Variant = DefaultAttention<false, {window}, {soft_cap}, false>;
template cudaError_t BatchPrefillWithPagedKVCacheDispatched<
    64, {dim}, {dim}, PosEncodingMode::kNone, false, MaskMode::{mask}, Variant, Params>(
    Params, {dtype_q}*, float*, bool, cudaStream_t);
}}
"""
CASES = {
    "bf16_causal_128": ("__nv_bfloat16", "__nv_bfloat16", 128, "kCausal", "false", "false"),
    "fp16_window_cap_64": ("half", "half", 64, "kNone", "true", "true"),
    "fp8_causal_128": ("__nv_bfloat16", "__nv_fp8_e4m3", 128, "kCausal", "false", "false"),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Upstream's sources, and the patched ones with all that the build adds."""
    fork = base.Fork.load("flashinfer", ROOT)
    folder = tmp_path_factory.mktemp("trees")
    stock, patched = folder / "stock", folder / "patched"
    base.unpack(fork, stock)
    shutil.copytree(stock, patched, symlinks=True)
    base.apply_patches(fork, patched)
    for name, path in wheels.overlay(fork).items():
        (patched / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, patched / name)
    return stock, patched


def ptx(tree: Path, source: Path) -> str:
    """Compile to PTX, without what differs between two compilations of the same text."""
    out = source.with_suffix(f".{tree.name}.ptx")
    command = ["nvcc", "-ptx", "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=compute_90a"]
    cccl = tree / "3rdparty/cccl"
    folders = [cccl / "cub", cccl / "libcudacxx/include", cccl / "thrust", tree / "include"]
    command += [
        *(f"-I{folder}" for folder in folders),
        "-DFLASHINFER_ENABLE_BF16",
        "-DFLASHINFER_ENABLE_F16",
    ]
    command += ["-DFLASHINFER_ENABLE_FP8_E4M3", "-use_fast_math", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # names of anonymous namespaces hold the compiler's process number, and their length
    return re.sub(r"_ZN\d+(_INTERNAL_\w+?_cu_[0-9a-f]{8}_)\d+", r"_ZN\1", out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_stock_kernels_are_the_same(case: str, trees: tuple[Path, Path], tmp_path: Path) -> None:
    dtype_q, dtype_kv, dim, mask, window, soft_cap = CASES[case]
    source = tmp_path / f"{case}.cu"
    source.write_text(
        SOURCE.format(
            dtype_q=dtype_q, dtype_kv=dtype_kv, dim=dim, mask=mask, window=window, soft_cap=soft_cap
        )
    )
    stock, patched = (ptx(tree, source) for tree in trees)
    assert stock.count(".entry") >= 2, "wanted kernels to compare"
    assert stock == patched
