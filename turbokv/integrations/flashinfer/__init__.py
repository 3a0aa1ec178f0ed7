# SPDX-License-Identifier: Apache-2.0
"""The FlashInfer layer: attention over compressed pages under FlashInfer's conventions.

Needs the patched FlashInfer (``patches/flashinfer``), which exports these names too.
"""

from turbokv.integrations import build_identity
from turbokv.integrations.flashinfer.decode import BatchDecodeWithPagedTurboKVCacheWrapper
from turbokv.integrations.flashinfer.jit import gen_turbokv_modules
from turbokv.integrations.flashinfer.page import append_paged_turbokv_cache
from turbokv.integrations.flashinfer.prefill import BatchPrefillWithPagedTurboKVCacheWrapper

__all__ = [
    "BatchDecodeWithPagedTurboKVCacheWrapper",
    "BatchPrefillWithPagedTurboKVCacheWrapper",
    "append_paged_turbokv_cache",
    "gen_turbokv_modules",
]

# FlashInfer compiles its own copies of our headers: one built with others ends here.
build_identity.check("flashinfer", "flashinfer-python")
