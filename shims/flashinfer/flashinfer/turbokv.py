# SPDX-License-Identifier: Apache-2.0
"""Forward to turbokv, where the code lives."""

from turbokv.integrations.flashinfer import (
    BatchDecodeWithPagedTurboKVCacheWrapper,
    BatchPrefillWithPagedTurboKVCacheWrapper,
    append_paged_turbokv_cache,
    gen_turbokv_modules,
)

__all__ = [
    "BatchDecodeWithPagedTurboKVCacheWrapper",
    "BatchPrefillWithPagedTurboKVCacheWrapper",
    "append_paged_turbokv_cache",
    "gen_turbokv_modules",
]
