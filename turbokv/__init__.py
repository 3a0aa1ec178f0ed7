# SPDX-License-Identifier: Apache-2.0
"""TurboKV: KV caches of LLM servers at 2 to 5 bits a number, attended without decompressing."""

from turbokv.codec import TurboKVCodec
from turbokv.core import Codebook, packed_dim, padded_dim

__version__ = "0.1.0"
__all__ = ["Codebook", "TurboKVCodec", "__version__", "packed_dim", "padded_dim"]
