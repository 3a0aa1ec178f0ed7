# SPDX-License-Identifier: Apache-2.0
"""Prefill modules compiled for sm_90a without a GPU: they build, load and do not spill."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flashinfer", reason="wanted the patched FlashInfer")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="wanted nvcc on PATH"),
]

# FlashInfer's own kernel of 128 queries has 255 registers; a few bytes outside its loops cost
# nothing. The largest tiles of short queries are not chosen on a device with this much memory.
MAX_SPILL_BYTES = {(128, 4): 64, (64, 8): 64, (16, 8): 128}


def cuda_home() -> Path:
    """Where nvcc says that it is, which may not be where it was found."""
    verbose = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
    ).stderr
    return Path(re.findall(r"^#\$ TOP=(.*)$", verbose, re.M)[0]).resolve()


@pytest.fixture(scope="module")
def module(tmp_path_factory: Any) -> Any:
    """The sources of one module, in a workspace of the test's own."""
    from flashinfer.jit import core
    from flashinfer.jit import env as jit_env

    from turbokv.integrations.flashinfer import jit

    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("flashinfer")
    # a stub to link with: the driver's library is only there where a driver is
    stub = tmp_path_factory.mktemp("stub")
    source = stub / "stub.c"
    source.write_text("")
    command = [
        "gcc",
        "-shared",
        str(source),
        "-o",
        str(stub / "libcuda.so"),
        "-Wl,-soname,libcuda.so.1",
    ]
    subprocess.run(command, check=True)
    shutil.copy(stub / "libcuda.so", stub / "libcuda.so.1")
    patch.setattr(jit_env, "FLASHINFER_JIT_DIR", folder / "cached_ops")
    patch.setattr(jit_env, "FLASHINFER_GEN_SRC_DIR", folder / "generated")
    patch.setattr(jit_env, "FLASHINFER_AOT_DIR", folder / "aot")
    flags = ["-gencode=arch=compute_90a,code=sm_90a"]
    patch.setattr(core.current_compilation_context, "get_nvcc_flags_list", lambda **kwargs: flags)
    patch.setenv("CUDA_HOME", str(cuda_home()))
    patch.setenv("FLASHINFER_EXTRA_CUDAFLAGS", "-Xptxas -v")
    patch.setenv("FLASHINFER_EXTRA_LDFLAGS", f"-L{stub}")
    yield jit.gen_prefill_module(128, 4, 4), stub
    patch.undo()


def test_a_module_builds_loads_and_hardly_spills(module: Any) -> None:
    spec, stub = module
    spec.write_ninja()
    log = subprocess.run(
        ["ninja", "-v", "-j1", "-C", str(spec.build_dir)], capture_output=True, text=True
    )
    assert log.returncode == 0, log.stdout[-3000:]
    found = re.findall(
        r"Compiling entry function '\S*BatchPrefillWithPagedKVCache\S*?MaskModeE(\d)ELj(\d+)ELj\d+"
        r"ELj(\d+)E\S*'.*?\n(?:.*\n)*?.*?(\d+) bytes spill stores",
        log.stdout + log.stderr,
    )
    assert {(int(mask), int(q)) for mask, q, *_ in found} == {
        (mask, q) for mask in (0, 1) for q in (16, 64, 128)
    }
    for _, q, kv, spill in found:
        limit = MAX_SPILL_BYTES.get((int(q), int(kv)), 0)
        assert int(spill) <= limit, f"CTA_TILE_Q {q}, NUM_MMA_KV {kv} spills {spill} bytes"

    script = (
        "import tvm_ffi, sys; m = tvm_ffi.load_module(sys.argv[1]);"
        "assert callable(m.plan) and callable(m.run)"
    )
    libraries = f"{stub}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    subprocess.run(
        [sys.executable, "-c", script, str(spec.jit_library_path)],
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
    )
