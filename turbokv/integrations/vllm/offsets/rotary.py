# SPDX-License-Identifier: Apache-2.0
"""How a layer of vLLM's embeds positions, read from the tables of its rotary modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from turbokv.centring import Rotary

# Tables are kept in the model's dtype: bf16 rounds cosines by 2^-9.
_TABLE_TOLERANCE = 0.02
_CHECKED_ROWS = 64


def from_table(table: Tensor, interleaved: bool) -> tuple[Rotary, float] | None:
    """Recover frequencies from a table of cosines and sines.

    Parameters
    ----------
    table
        ``[positions, rotary_dim]``: cosines, then sines, of each pair, times one factor (YaRN's).
    interleaved
        How channels pair up (:class:`Rotary`).

    Returns
    -------
    tuple or None
        The embedding and the factor; None if some pair does not turn by the same angle at every
        position.

    Notes
    -----
    Row 1 gives every angle to the rounding of the table; row ``2^n``, of which the former rows tell
    how often it has gone round, gives it ``2^n`` times as exactly.
    """
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] % 2:
        return None
    wide = table.detach().to("cpu", torch.float64)
    cos, sin = wide.chunk(2, dim=1)
    factor = float(torch.hypot(cos[0], sin[0]).mean())
    if not factor > 0:
        return None
    frequency = torch.atan2(sin[1], cos[1])
    row = 2
    while row < table.shape[0]:
        error = torch.atan2(sin[row], cos[row]) - row * frequency
        error = torch.remainder(error + math.pi, 2 * math.pi) - math.pi
        frequency = frequency + error / row
        row *= 2
    count = min(_CHECKED_ROWS, table.shape[0])
    rows = torch.linspace(0, table.shape[0] - 1, count, dtype=torch.float64, device="cpu").round()
    angle = rows[:, None] * frequency
    at = rows.to(torch.int64)
    worst = torch.maximum(
        (cos[at] / factor - angle.cos()).abs(), (sin[at] / factor - angle.sin()).abs()
    )
    if float(worst.max()) > _TABLE_TOLERANCE:
        return None
    return Rotary(frequency, interleaved), factor


def of_module(module: Any) -> tuple[Rotary, float] | None:
    """Return the embedding of one of vLLM's rotary modules, or None if it is not a plain one."""
    table = getattr(module, "cos_sin_cache", None)
    if not isinstance(table, Tensor):
        return None
    return from_table(table, not bool(getattr(module, "is_neox_style", True)))


def of_model(model: Any) -> list[Rotary]:
    """Return the plain embeddings that a model may have, each once; pairs may be in either order.

    From the tables of vLLM's modules, and from the frequencies of Transformers' where vLLM runs
    its models.
    """
    found: list[Rotary] = []
    seen: set[int] = set()
    for module in model.modules():
        table = getattr(module, "cos_sin_cache", None)
        if isinstance(table, Tensor) and id(table) not in seen:
            seen.add(id(table))
            entry = of_module(module)
            if entry is not None:
                found.append(entry[0])
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            found.append(Rotary(buffer.detach().to("cpu", torch.float64)))
    return found
