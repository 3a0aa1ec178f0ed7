# SPDX-License-Identifier: Apache-2.0
"""Device memory that all layers share: scratch for expanded context, and what graphs read.

Scratch comes from vLLM's own workspace manager, which other layers use too, so its contents last
only as long as one layer's call. What must outlive a call, because captured graphs hold its address
or because the kernel expects zeros, is allocated here once, outside the pools that sleep mode
discards.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from turbokv.integrations.vllm import compat

_per_manager: weakref.WeakKeyDictionary[Any, Scratch] = weakref.WeakKeyDictionary()
_without_manager: list[Scratch] = []


class Scratch:
    """The shared memory of one engine on one device."""

    def __init__(self, manager: Any | None) -> None:
        # weak, since the manager is the key that this object hangs from
        self._manager = None if manager is None else weakref.ref(manager)
        self._decode: Tensor | None = None
        self._positions: Tensor | None = None
        self._own: Tensor | None = None

    def views(
        self, device: torch.device, *shapes: tuple[tuple[int, ...], torch.dtype]
    ) -> list[Tensor]:
        """Return tensors of these shapes that are valid until the next call."""
        manager = None if self._manager is None else self._manager()
        if manager is not None:
            found: list[Tensor] = manager.get_simultaneous(*shapes)
            return found
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // 256) * 256)
        if self._own is None or self._own.numel() < starts[-1]:
            self._own = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        return [
            self._own[start : start + size].view(dtype).view(shape)
            for start, size, (shape, dtype) in zip(starts, sizes, shapes, strict=False)
        ]

    def reserve_decode(self, num_bytes: int, device: torch.device) -> None:
        """Make the decode kernel's workspace at least this large; before graphs are captured."""
        if self._decode is None or self._decode.numel() < num_bytes:
            self._decode = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    @property
    def decode(self) -> Tensor | None:
        """The decode kernel's workspace, which it leaves zeroed; None before it is reserved."""
        return self._decode

    def positions(self, count: int, device: torch.device) -> Tensor:
        """Return the buffer of logical positions, int64, at least ``count``, at a fixed address."""
        if self._positions is None or self._positions.numel() < count:
            self._positions = torch.zeros(count, dtype=torch.int64, device=device)
        return self._positions


def current() -> Scratch:
    """Return the scratch memory of the engine in this process."""
    manager = compat.scratch_manager()
    if manager is None:
        if not _without_manager:
            _without_manager.append(Scratch(None))
        return _without_manager[0]
    if manager not in _per_manager:
        _per_manager[manager] = Scratch(manager)
    return _per_manager[manager]
