# SPDX-License-Identifier: Apache-2.0
"""Forward to turbokv, where the code lives."""

from turbokv.integrations.vllm.hooks import (
    CACHE_DTYPES,
    after_worker_call,
    check_and_update_config,
    is_turbokv,
    layer_spec,
    token_page_bytes,
)

__all__ = [
    "CACHE_DTYPES",
    "after_worker_call",
    "check_and_update_config",
    "is_turbokv",
    "layer_spec",
    "token_page_bytes",
]
