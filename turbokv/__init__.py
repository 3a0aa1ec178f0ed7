# SPDX-License-Identifier: Apache-2.0
"""TurboKV: KV caches of LLM servers at 2 to 5 bits per number, attended without decompressing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbokv.codec import TurboKVCodec
from turbokv.core import Codebook, packed_dim, padded_dim

if TYPE_CHECKING:
    from turbokv.integrations.transformers import TurboKVCache

__version__ = "0.2.0"
__all__ = [
    "Codebook",
    "TurboKVCache",
    "TurboKVCodec",
    "__version__",
    "packed_dim",
    "padded_dim",
]


def __getattr__(name: str) -> Any:
    """Import what needs an extra when it is asked for, so that PyTorch alone is enough for us."""
    if name != "TurboKVCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from turbokv.integrations.transformers import TurboKVCache

    return TurboKVCache
