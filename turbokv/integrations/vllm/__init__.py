# SPDX-License-Identifier: Apache-2.0
"""TurboKV in vLLM: cache dtypes, the attention backend TURBOKV, and its options.

``hooks`` and ``dtypes`` are what the patched vLLM imports while it starts, so they import nothing
of vLLM. ``backend`` is what it imports when a model is built with one of our dtypes.
"""

from __future__ import annotations

from turbokv.integrations.vllm.dtypes import CACHE_DTYPES, cache_widths, slot_bytes

__all__ = ["CACHE_DTYPES", "cache_widths", "slot_bytes"]
