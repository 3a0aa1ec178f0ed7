# SPDX-License-Identifier: Apache-2.0
"""Transformers: a drop-in cache, calibration, the demo and quality measurements."""

from turbokv.integrations.transformers.cache import TurboKVCache, cache_nbytes
from turbokv.integrations.transformers.layers import TurboKVLayer

__all__ = ["TurboKVCache", "TurboKVLayer", "cache_nbytes"]
