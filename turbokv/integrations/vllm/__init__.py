# SPDX-License-Identifier: Apache-2.0
"""TurboKV in vLLM: cache dtypes, the attention backend TURBOKV, and its options.

==================  ============================================================================
``hooks``           what vLLM calls; like ``dtypes`` it imports nothing of vLLM, which imports both
                    while it starts
``dtypes``          values of ``--kv-cache-dtype``, and the bytes of a token under each
``options``         ``additional_config={"turbokv": {...}}``
``startup``         checks of vLLM's configuration and changes to it, one list, in order
``limits``          queries of a request that decode takes, and drafts
``plugin/``         what makes an unpatched vLLM know of us: dtypes, backend, platform, engine
``compat``          calls to vLLM that moved between versions, or will
``backend``         what vLLM imports when a model is built with one of our dtypes
``attention/``      one layer: implementation, metadata of a step, formats, scratch, and the steps
                    of attention on a GPU and on a CPU
``offsets/``        offsets of centred keys: from a file, or measured by the worker at load
``prefill/``        how prefill is cut, and who attends: FlashAttention or FlashInfer
``window/``         16-bit copies of recent tokens: pool, counters, prefix hits, scheduler
``connectors``      pages that travel: their identity, and what a load undoes
``serve``           ``turbokv serve``
==================  ============================================================================
"""

from __future__ import annotations

from turbokv.integrations.vllm.dtypes import CACHE_DTYPES, cache_widths, slot_bytes

__all__ = ["CACHE_DTYPES", "cache_widths", "slot_bytes"]
