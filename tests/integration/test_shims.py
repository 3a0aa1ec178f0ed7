# SPDX-License-Identifier: Apache-2.0
"""Shims forward: includes and imports at the paths where the forks look, and nothing else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIMS = ROOT / "shims"
FILES = sorted(p for p in SHIMS.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
MAX_LINES = 30
HEADERS = (
    ROOT / "turbokv/kernels/cuda/include",
    ROOT / "turbokv/integrations/flashinfer/include",
)


def name(path: Path) -> str:
    return path.relative_to(SHIMS).as_posix()


def logic_of_python(text: str) -> list[str]:
    """Return what a module does besides a docstring, imports from turbokv and ``__all__``."""
    found = []
    imported: set[str] = set()
    for i, node in enumerate(ast.parse(text).body):
        if i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("turbokv."):
            imported |= {alias.asname or alias.name for alias in node.names}
            continue
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            if set(ast.literal_eval(node.value)) != imported:
                found.append("__all__ other than what is imported")
            continue
        found.append(ast.unparse(node).splitlines()[0])
    return found


def logic_of_header(text: str) -> list[str]:
    """Return the lines of a header besides comments, its guard and an include of turbokv's."""
    allowed = re.compile(
        r"//.*|#ifndef (FLASHINFER_TURBOKV_\w+_CUH_)|#define FLASHINFER_TURBOKV_\w+_CUH_"
        r"|#endif  // FLASHINFER_TURBOKV_\w+_CUH_|#include <turbokv/[\w/]+\.cuh>"
    )
    return [line for line in text.splitlines() if line and not allowed.fullmatch(line)]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_shim_holds_no_logic(path: Path) -> None:
    text = path.read_text()
    checks = {".py": logic_of_python, ".cuh": logic_of_header}
    assert path.suffix in checks, "wanted a module or a header"
    assert checks[path.suffix](text) == []
    assert len(text.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".cuh"], ids=name)
def test_a_header_forwards_to_one_that_exists(path: Path) -> None:
    (target,) = re.findall(r"#include <(.+)>", path.read_text())
    assert any((folder / target).is_file() for folder in HEADERS)


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".py"], ids=name)
def test_a_module_forwards_to_names_that_exist(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            module = ROOT / Path(*str(node.module).split("."))
            source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            known = {
                name
                for stmt in ast.walk(ast.parse(source.read_text()))
                for name in (
                    [stmt.name]
                    if isinstance(stmt, ast.ClassDef | ast.FunctionDef)
                    else [alias.asname or alias.name for alias in stmt.names]
                    if isinstance(stmt, ast.ImportFrom)
                    else [ast.unparse(target) for target in stmt.targets]
                    if isinstance(stmt, ast.Assign)
                    else []
                )
            }
            assert {alias.name for alias in node.names} <= known


@pytest.mark.parametrize(
    "text",
    [
        "def f(): ...",
        "from os import path",
        "if True:\n    from turbokv.core import pack",
        "from turbokv.core import pack\n__all__ = ['other']",
        "from turbokv.core import pack\npack(1)",
    ],
)
def test_logic_in_a_module_is_found(text: str) -> None:
    assert logic_of_python(text)


@pytest.mark.parametrize("line", ["__global__ void Kernel();", "#define N 2", "#if 1", "int n;"])
def test_logic_in_a_header_is_found(line: str) -> None:
    assert logic_of_header(line)
