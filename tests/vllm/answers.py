# SPDX-License-Identifier: Apache-2.0
"""Run a model in a process of its own; print what vLLM chose and answered as a line of JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.vllm import engine as e
from tests.vllm import models


def answer(model: str, kv_cache_dtype: str, settings: dict[str, Any]) -> dict[str, Any]:
    with e.engine(model, kv_cache_dtype, **settings) as llm:
        config = llm.llm_engine.vllm_config
        layers = config.compilation_config.static_forward_context.values()
        answers = e.ask(llm, e.prompts((200, 40, 5), models.VOCAB), 6)
        return {
            "hash": config.compute_hash(),
            "scheduler": str(config.scheduler_config.scheduler_cls),
            "blocks": config.cache_config.num_gpu_blocks,
            "block_size": config.cache_config.block_size,
            "backends": [f"{x.attn_backend.__module__}.{x.attn_backend.__name__}" for x in layers],
            "caches": [[str(x.kv_cache.dtype), *x.kv_cache.shape] for x in layers],
            "tokens": [a.tokens for a in answers],
            "logprobs": [[sorted(top.items()) for top in a.top] for a in answers],
        }


if __name__ == "__main__":
    print(json.dumps(answer(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))), flush=True)
