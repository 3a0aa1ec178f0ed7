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
        self._kept: dict[str, Tensor] = {}
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

    def keep(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer of at least ``count`` elements that outlives calls, at a fixed address.

        Zeros at first. It moves only if it has to grow, which must be before graphs are captured.
        """
        kept = self._kept.get(name)
        if kept is None or kept.numel() < count:
            kept = self._kept[name] = torch.zeros(count, dtype=dtype, device=device)
        return kept

    def kept(self, name: str) -> Tensor | None:
        """Return what :meth:`keep` made under that name, or None."""
        return self._kept.get(name)


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
