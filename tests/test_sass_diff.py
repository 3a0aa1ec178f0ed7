# SPDX-License-Identifier: Apache-2.0
"""The comparison of machine code, on made-up kernels: no compiler is needed."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/sass_diff.py"


@pytest.fixture(scope="module")
def sass_diff() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sass_diff", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sass_diff"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def cubin(kernels: dict[str, bytes]) -> bytes:
    """Return a 64-bit ELF file with a text section for each kernel."""
    names = [".shstrtab", *(f".text.{name}" for name in kernels)]
    table = b"\0".join(name.encode() for name in names) + b"\0"
    bodies = [table, *kernels.values()]
    offset, sections, place = 64, b"", 0
    for name, body in zip(names, bodies, strict=True):
        sections += struct.pack("<2I4Q2I2Q", place, 1, 0, 0, offset, len(body), 0, 0, 1, 0)
        place += len(name) + 1
        offset += len(body)
    header = bytearray(64)
    struct.pack_into("<Q", header, 40, offset)
    struct.pack_into("<3H", header, 58, 64, len(bodies), 0)
    return bytes(header) + b"".join(bodies) + sections


def test_code_of_every_kernel_is_found(sass_diff: ModuleType) -> None:
    kernels = {"first": b"a" * 32, "second": b"b" * 16}
    assert dict(sass_diff.text_sections(cubin(kernels))) == kernels


def test_registers_spills_and_stack_are_read(sass_diff: ModuleType) -> None:
    log = """ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
    88 bytes stack frame, 172 bytes spill stores, 252 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 88 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers"""
    assert sass_diff.resources(log) == {"_Z1av": (255, 424, 88), "_Z1bv": (32, 0, 0)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(), "equal"),
        (dict(digest=2), "moved"),
        (dict(digest=2, instructions=1005, registers=200), "moved"),
        (dict(digest=2, instructions=1006), "changed"),
        (dict(digest=2, registers=201), "changed"),
        (dict(digest=2, spills=4), "changed"),
        (dict(digest=2, stack=8), "changed"),
    ],
    ids=str,
)
def test_verdicts(sass_diff: ModuleType, change: dict[str, int], expected: str) -> None:
    base = dict(instructions=1000, registers=199, spills=0, stack=0, digest=1)
    kernel = sass_diff.Kernel
    assert sass_diff.verdict(kernel(**base), kernel(**{**base, **change})) == expected
    assert sass_diff.verdict(None, kernel(**base)) == "new"
    assert sass_diff.verdict(kernel(**base), None) == "gone"
