# SPDX-License-Identifier: Apache-2.0
"""Forward to turbokv, where the code lives."""

from turbokv.integrations.vllm.backend import TurboKVAttentionBackend

__all__ = ["TurboKVAttentionBackend"]
