# SPDX-License-Identifier: Apache-2.0
"""What native code asks of every tensor that it reads or writes by address."""

from __future__ import annotations

import torch
from torch import Tensor

from turbokv.core import VectorFormat

__all__ = ["check_flat", "check_plain", "plain"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_plain(x: Tensor, name: str) -> None:
    """Raise unless the numbers of ``x`` are what lies at its address, its strides apart.

    PyTorch keeps some signs outside memory: ``x.conj().imag`` is a view of ``x`` with a negation
    bit, which a kernel that is given an address does not see. Sparse tensors have no address.

    Parameters
    ----------
    x
        Any tensor.
    name
        The argument's name, for the message.

    Raises
    ------
    TypeError
        If ``x`` is no tensor.
    ValueError
        If ``x`` is not strided, or is negated or conjugated lazily.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: wanted a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: wanted a strided tensor, got layout {x.layout}")
    # traced code calls operators, whose dispatcher resolves both; Dynamo cannot ask for the bits
    if torch.compiler.is_compiling():
        return
    if x.is_neg() or x.is_conj():
        lazy = "negation" if x.is_neg() else "conjugation"
        raise ValueError(
            f"{name}: wanted numbers as they lie in memory, got a view with a lazy {lazy}"
            f" (call resolve_{'neg' if x.is_neg() else 'conj'}() first)"
        )


def plain(x: Tensor) -> Tensor:
    """Return ``x`` with lazy negation and conjugation carried out; ``x`` itself if there is none.

    Allocates only where there is some.
    """
    return x.resolve_conj().resolve_neg()


def check_flat(
    x: Tensor, packed: Tensor, norms: Tensor, fmt: VectorFormat, dim: int, name: str
) -> int:
    """Refuse what a kernel of the flat codec would misread or write past.

    Parameters
    ----------
    x
        ``[n, dim]``, fp32, fp16 or bf16: vectors in, or vectors out.
    packed, norms
        uint8 ``[n, packed_dim]`` and ``norm_dtype`` ``[n]``, on the device of ``x``.
    fmt, dim
        The format, and the elements of a vector of ``x``.
    name
        What messages call ``x``.

    Returns
    -------
    int
        ``n``.
    """
    check_plain(x, name)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: wanted float32, float16 or bfloat16, got {x.dtype}")
    count = x.shape[0] if x.ndim else 0
    for label, tensor, shape, dtype in (
        (name, x, (count, dim), x.dtype),
        ("packed", packed, (count, fmt.packed_dim), torch.uint8),
        ("norms", norms, (count,), fmt.norm_dtype),
        ("signs", fmt.signs, (fmt.padded_dim,), torch.float32),
    ):
        check_plain(tensor, label)
        if tensor.device != x.device:
            raise ValueError(f"{label}: wanted device {x.device}, got {tensor.device}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{label}: wanted shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{label}: wanted {dtype}, got {tensor.dtype}")
    return count
