# SPDX-License-Identifier: Apache-2.0
"""Every tensor made in ``turbokv`` names its dtype and device, so that no default can change it."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

import turbokv

ROOT = pathlib.Path(turbokv.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
# What makes a tensor from numbers or from nothing. *_like and Tensor.new_* take both from a tensor.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty"),
    *("empty_strided", "eye", "full", "hamming_window", "hann_window", "kaiser_window"),
    *("linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range"),
    *("scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
# Names of one dtype only; what they lack is the device.
DEVICE_ONLY = {"Generator"}
# Their result has the default dtype, or changes it for everybody.
FORBIDDEN = {
    *("BFloat16Tensor", "DoubleTensor", "FloatTensor", "HalfTensor", "IntTensor", "LongTensor"),
    *("Tensor", "get_default_device", "get_default_dtype", "set_default_device"),
    *("set_default_dtype", "set_default_tensor_type"),
}


def torch_calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Yield calls of a function of the module ``torch`` by their last name."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "torch"
        ):
            yield node, node.func.attr


def faults(source: str) -> list[str]:
    """Return what ``source`` leaves to PyTorch's defaults, with line numbers."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            for name in node.names:
                if name.name in FACTORIES | DEVICE_ONLY or name.name in FORBIDDEN - {"Tensor"}:
                    found.append(f"{node.lineno}: torch.{name.name} is imported without 'torch.'")
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id == "Tensor":
            found.append(f"{called.lineno}: Tensor() has the default dtype")
    for node, name in torch_calls(tree):
        given = {keyword.arg for keyword in node.keywords}
        if name in FORBIDDEN:
            found.append(f"{node.lineno}: torch.{name}() depends on the default dtype or device")
        wanted = {"dtype", "device"} if name in FACTORIES else set()
        wanted = {"device"} if name in DEVICE_ONLY else wanted
        missing = wanted - given
        # torch.Generator takes its device by position, too
        if missing and not (name in DEVICE_ONLY and node.args):
            found.append(f"{node.lineno}: torch.{name}() without {' and '.join(sorted(missing))}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_names_its_dtype_and_device(path: pathlib.Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.tensor([1.0], device='cpu')",
        "torch.arange(3, dtype=torch.int64)",
        "torch.full((2,), 0.5)",
        "torch.Generator()",
        "torch.Tensor([1.0])",
        "Tensor([1.0])",
        "torch.get_default_dtype()",
        "from torch import zeros",
    ],
)
def test_the_check_finds(line: str) -> None:
    assert len(faults(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "torch.tensor([1.0], dtype=torch.float32, device='cpu')",
        "torch.zeros_like(x)",
        "x.new_zeros(3)",
        "torch.Generator('cpu')",
        "isinstance(x, torch.Tensor)",
        "from torch import Tensor",
    ],
)
def test_the_check_allows(line: str) -> None:
    assert faults(line) == []
