# SPDX-License-Identifier: Apache-2.0
"""What happens at start-up, in order: checks with their reasons, then changes of vLLM's config.

Everything that would otherwise fail in the middle of serving, or answer wrongly, belongs here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from turbokv.integrations.vllm import connectors
from turbokv.integrations.vllm.dtypes import (
    CACHE_DTYPES,
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
    cache_dtypes,
)
from turbokv.integrations.vllm.limits import (
    MAX_DECODE_QUERIES,
    MAX_DRAFT_TOKENS,
    max_decode_queries,
)
from turbokv.integrations.vllm.offsets import file
from turbokv.integrations.vllm.options import NONE, Options
from turbokv.integrations.vllm.prefill import flashinfer
from turbokv.integrations.vllm.window import prefix_hits

# These draft a block of tokens in one pass, and write their keys and values outside of it.
NON_CAUSAL_DRAFTERS = ("dflash", "dspark")
# Names of workers, after which comes what they are made from.
_WORKERS = "turbokv.integrations.vllm.offsets.worker."

# --- checks ---------------------------------------------------------------------------------------


def _parallel(config: Any, options: Options) -> Iterator[str]:
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1:
        yield "decode context parallelism is not supported; use tensor parallelism"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        yield "prefill context parallelism is not supported; use tensor parallelism"
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1:
        yield "dual-batch overlap is not supported: two batches would share one workspace"


def _determinism(config: Any, options: Options) -> Iterator[str]:
    envs = sys.modules.get("vllm.envs")  # asked for by every process of vLLM's
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        yield (
            "VLLM_BATCH_INVARIANT is not supported: how decode splits a request's tokens, and which"
            " of them have 16-bit copies, depends on the requests beside it"
        )


def _model(config: Any, options: Options) -> Iterator[str]:
    model = config.model_config
    if model.use_mla:
        yield "multi-head latent attention is not supported: it keeps no keys and values"
        return
    if getattr(model, "is_encoder_decoder", False):
        yield "encoder-decoder models are not supported"
    if getattr(model, "is_mm_prefix_lm", False) and _takes_images(model) and not _names_images():
        yield (
            "bidirectional attention over image tokens is not supported with this vLLM; serve text"
            " only (--language-model-only), or use vLLM 0.28 or newer"
        )
    text = getattr(model, "hf_text_config", None)
    if getattr(text, "attention_chunk_size", None) and not _asks_for_pages():
        yield (
            "attention within chunks (Llama 4) is not supported with the patched vLLM 0.26; use"
            " vLLM 0.28 or newer"
        )
    if model.dtype not in (torch.float16, torch.bfloat16):
        yield f"activations of {model.dtype} are not supported; use float16 or bfloat16"
    head_dim = model.get_head_size()
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        yield f"head_dim: wanted {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}"


def _takes_images(model: Any) -> bool:
    """Whether requests may hold images or videos (vLLM 0.26 does not ask itself)."""
    multimodal = getattr(model, "multimodal_config", None)
    if multimodal is None or getattr(multimodal, "language_model_only", False):
        return False
    return any(multimodal.get_limit_per_prompt(kind) for kind in ("image", "video"))


def _asks_for_pages() -> bool:
    """Whether this vLLM asks us for the pages of layers of any kind: all but the patched."""
    return importlib.util.find_spec("vllm.turbokv_hooks") is None


def _names_images() -> bool:
    """Whether this vLLM tells a step's builder which tokens are an image's."""
    from turbokv.integrations.vllm import compat

    return compat.names_image_ranges()


def _speculation(config: Any, options: Options) -> Iterator[str]:
    speculative = config.speculative_config
    queries = max_decode_queries(config)
    if queries == 1:
        return
    drafts = int(speculative.num_speculative_tokens)
    if drafts > MAX_DRAFT_TOKENS or queries > MAX_DECODE_QUERIES:
        yield (
            f"num_speculative_tokens: wanted at most {MAX_DRAFT_TOKENS}"
            f" ({MAX_DECODE_QUERIES // 2} with parallel_drafting), got {drafts}"
        )
    draft_dtype = getattr(speculative, "kv_cache_dtype", None) or config.cache_config.cache_dtype
    if speculative.method in NON_CAUSAL_DRAFTERS and draft_dtype in CACHE_DTYPES:
        yield (
            f"speculative_config: method {speculative.method} is not supported: its drafts attend"
            " to each other in both directions; take a draft model, EAGLE, MTP or n-grams"
        )
    if options.decode == "decompress":
        yield "turbokv.decode='decompress' is not supported with speculative decoding"


def _is_vllms_choice(config: Any) -> bool:
    """Whether vLLM itself asks for the backend: Triton's for two head sizes (Gemma 4).

    It does so where FlashAttention 4 is missing, before anyone knows what serves the cache's dtype,
    and only if the user has asked for none.
    """
    arch: Any = getattr(config.model_config, "model_arch_config", None)
    if not hasattr(arch, "__getitem__"):
        return False
    sizes = {arch[i].head_size for i in range(arch.total_num_hidden_layers)}
    return len(sizes) > 1 and config.attention_config.backend.name == "TRITON_ATTN"


def _cache(config: Any, options: Options) -> Iterator[str]:
    cache, attention = config.cache_config, config.attention_config
    is_ours = cache.cache_dtype in CACHE_DTYPES  # else only the drafter's is
    backend = None if attention.backend is None else attention.backend.name
    if is_ours and backend not in (None, "TURBOKV") and not _is_vllms_choice(config):
        yield f"attention_backend: wanted TURBOKV or none, got {backend}"
    if options.path == "flashinfer":
        reason = flashinfer.why_unavailable()
        if reason is not None:
            yield reason
        if config.model_config.get_head_size() > flashinfer.MAX_HEAD_DIM:
            yield f"turbokv.path='flashinfer' takes heads up to {flashinfer.MAX_HEAD_DIM}"
    # A server checks its configuration twice; without compilation nothing is split by then.
    if (
        options.keeps_window
        and config.compilation_config.mode.name == "VLLM_COMPILE"
        and not config.compilation_config.splitting_ops_contain_kv_cache_update()
    ):
        yield (
            "compilation_config: wanted vllm::unified_kv_cache_update in splitting_ops"
            " (use_inductor_graph_partition leaves it out): pages would be written within piecewise"
            " graphs, which know no step's 16-bit copies; or turn the copies off (window and sinks"
            " 0)"
        )
    if getattr(attention, "use_non_causal", False):
        yield "non-causal attention is not supported"
    skipped = {*options.skip_layers, *map(str, cache.kv_cache_dtype_skip_layers or ())}
    if skipped and config.model_config.is_hybrid:
        yield (
            "skip_layers is not supported for models that mix attention with linear layers: every"
            " page would be padded to the size of a 16-bit one"
        )
    kinds = getattr(config.model_config.hf_text_config, "layer_types", None) or ()
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention" and str(i) in skipped]
    if full and len(full) < len(kinds) and "sliding_attention" in kinds:
        yield (
            "skip_layers: wanted sliding-window layers only, as this model has both and pages would"
            f" be padded to the size of a full layer's in 16 bits, got layers {full}"
        )
    if config.cache_config.block_size is not None and config.cache_config.block_size % 16:
        yield f"block_size: wanted a multiple of 16, got {config.cache_config.block_size}"


def _calibration(config: Any, options: Options) -> Iterator[str]:
    if options.calibration_file is not None:
        hf_config = config.model_config.hf_config
        yield from file.problems(
            options.calibration_file, hf_config, config.cache_config.cache_dtype
        )


# --- changes of the configuration -----------------------------------------------------------------


def _skip_layers(config: Any, options: Options) -> None:
    """Leave the option's layers in 16 bits, and those that vLLM was told of."""
    skipped = dict.fromkeys([*(config.cache_config.kv_cache_dtype_skip_layers or ())])
    skipped.update(dict.fromkeys(options.skip_layers))
    if skipped:
        config.cache_config.kv_cache_dtype_skip_layers = list(skipped)


def _backend(config: Any, options: Options) -> None:
    """Forget a backend asked for by name: the dtype implies ours, 16-bit layers need another."""
    if config.cache_config.cache_dtype in CACHE_DTYPES:
        config.attention_config.backend = None


def _images(config: Any, options: Options) -> None:
    """Schedule images whole where their tokens see each other, as vLLM does on a GPU."""
    if getattr(config.model_config, "is_mm_prefix_lm", False):
        config.scheduler_config.disable_chunked_mm_input = True


def _connector(config: Any, options: Options) -> None:
    """Have KV connectors keyed by the identity of pages; other connectors are refused."""
    connectors.choose_module(config)


def _worker(config: Any, options: Options) -> None:
    """Let workers centre keys once they have loaded the model."""
    chosen = config.parallel_config.worker_cls
    if options.calibration == NONE or chosen == "auto" or chosen.startswith(_WORKERS):
        return
    config.parallel_config.worker_cls = _WORKERS + chosen.replace(".", ":")


def _scheduler(config: Any, options: Options) -> None:
    """Let prefix hits end before the 16-bit window."""
    prefix_hits.choose_scheduler(config)


# Connectors come after the skipped layers, which are part of a page's identity, and the scheduler
# after connectors, which decide whether there is a window.
CHECKS: tuple[Callable[[Any, Options], Iterator[str]], ...] = (
    _parallel,
    _determinism,
    _model,
    _speculation,
    _cache,
    _calibration,
)
COMPLETIONS: tuple[Callable[[Any, Options], None], ...] = (
    _skip_layers,
    _backend,
    _images,
    _connector,
    _scheduler,
    _worker,
)


def complete(config: Any) -> None:
    """Run all checks and then all completions, in the order of the two lists above.

    Parameters
    ----------
    config
        vLLM's ``VllmConfig``, changed in place. One without a model is left alone.

    Raises
    ------
    TypeError, ValueError
        Naming everything that is not supported at once, or the option or connector that is wrong.

    Notes
    -----
    vLLM completes a configuration more than once; the second time changes nothing.
    """
    options = Options.from_config(config.additional_config)
    if config.model_config is None:
        return
    problems = [text for check in CHECKS for text in check(config, options)]
    if problems:
        names = ", ".join(cache_dtypes(config))
        raise ValueError(f"kv_cache_dtype={names}: " + "; ".join(problems))
    for completion in COMPLETIONS:
        completion(config, options)
