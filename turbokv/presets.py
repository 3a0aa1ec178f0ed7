# SPDX-License-Identifier: Apache-2.0
"""Presets: the widths of keys and values by name, one name for each everywhere.

``tq4`` is 4 bits for both, ``tq_k5v3`` is 5 bits for keys and 3 for values. Where a preset is asked
for, ``k5v3`` and ``k4v4`` are taken as well; what is shown is always the preset's own name.
"""

from __future__ import annotations

import re

# Those that servers know, most bits first.
PRESETS: dict[str, tuple[int, int]] = {
    "tq_k8v4": (8, 4),
    "tq_k5v5": (5, 5),
    "tq_k5v4": (5, 4),
    "tq4": (4, 4),
    "tq_k5v3": (5, 3),
    "tq_k4v3": (4, 3),
    "tq3": (3, 3),
    "tq_k4v2": (4, 2),
    "tq_k3v2": (3, 2),
    "tq2": (2, 2),
}
_NAMES = {widths: name for name, widths in PRESETS.items()}
_EQUAL = re.compile(r"tq([2-8])")
_PAIR = re.compile(r"(?:tq_)?k([2-8])v([2-8])")


def preset_widths(name: object) -> tuple[int, int] | None:
    """Return ``(k_bits, v_bits)`` of a preset in any spelling, or None if it is none.

    The widths need not be those of :data:`PRESETS`: ``k6v6`` exists in the codec only.
    """
    if not isinstance(name, str):
        return None
    equal, pair = _EQUAL.fullmatch(name.lower()), _PAIR.fullmatch(name.lower())
    if equal is not None:
        return int(equal[1]), int(equal[1])
    return None if pair is None else (int(pair[1]), int(pair[2]))


def preset_name(k_bits: int, v_bits: int) -> str:
    """Return the one name of a pair of widths."""
    return _NAMES.get((k_bits, v_bits), f"tq_k{k_bits}v{v_bits}")
