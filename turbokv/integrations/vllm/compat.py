# SPDX-License-Identifier: Apache-2.0
"""What differs between the versions of vLLM: 0.26.0 with our patch, and 0.28 to 0.33 as they are.

We look for what a vLLM has, never at its version.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1 import kv_cache_interface
from vllm.v1.worker import workspace as vllm_workspace

from turbokv.integrations.vllm.dtypes import slot_bytes

# --- specs ----------------------------------------------------------------------------------------


def is_opaque(spec: Any) -> bool:
    """Whether a spec's layer has one of our dtypes, by the mode that the plugin gives them."""
    return bool(spec.kv_quant_mode == getattr(kv_cache_interface.KVQuantMode, "CUSTOM", None))


def page_layouts(*, packed: bool = False) -> Any:
    """Return the layouts of caches that our kernels read, None where vLLM has no choice.

    With ``packed``, only the one where a block holds the pages of all layers beside each other.
    """
    if importlib.util.find_spec("vllm.v1.kv_cache_layout") is None:  # before 0.29
        return None
    from vllm.v1.kv_cache_layout import KVCacheLayout

    if packed:
        return (KVCacheLayout.BLHNC,)
    return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC


def packs_states() -> bool:
    """Whether this vLLM puts several linear layers' states into one block (0.30 and newer)."""
    for name in ("kv_cache_planning", "kv_cache_utils"):
        if importlib.util.find_spec(f"vllm.v1.core.{name}") is not None:
            module = importlib.import_module(f"vllm.v1.core.{name}")
            pack = getattr(module, "_get_packed_kv_cache_groups", None)
            if pack is not None:
                return "states_per_block" in inspect.getsource(pack)
    return False


def unequal_sizes(name: str, cache_dtype: str, sizes: Any) -> str:
    """Return a sentence on a layer whose keys and values differ in size."""
    return (
        f"{name}: wanted keys and values of one size for kv_cache_dtype={cache_dtype}, got"
        f" {sizes.head_size} and {sizes.head_size_v}; list the layer in skip_layers"
    )


def layer_spec(layer: Any, vllm_config: Any) -> Any:
    """Return the KV cache spec of ``layer`` in the patched 0.26.0: pages of our size.

    Newer versions make the spec themselves and ask the backend's ``customize_spec``.

    Raises
    ------
    ValueError
        If keys and values of the layer differ in size.
    """
    if layer.head_size_v != layer.head_size:
        raise ValueError(unequal_sizes(layer.layer_name, layer.kv_cache_dtype, layer))
    common = {
        "block_size": vllm_config.cache_config.block_size,
        "num_kv_heads": layer.num_kv_heads,
        "head_size": layer.head_size,
        "head_size_v": layer.head_size_v,
        "dtype": torch.uint8,
        "kv_quant_mode": kv_cache_interface.KVQuantMode.TURBOKV,
        "tq_slot_size": slot_bytes(layer.kv_cache_dtype, layer.head_size),
    }
    window = layer.sliding_window
    if window is None:
        return kv_cache_interface.TQFullAttentionSpec(**common)
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        # vLLM would turn a sliding window into a full spec itself, and lose the size of our pages
        return kv_cache_interface.TQFullAttentionSpec(sliding_window=window, **common)
    return kv_cache_interface.SlidingWindowSpec(sliding_window=window, **common)


# --- a forward pass and its layers ----------------------------------------------------------------


def names_image_ranges() -> bool:
    """Whether a step's metadata says which tokens of an image see each other (0.28 and newer)."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    return "mm_req_doc_ranges" in CommonAttentionMetadata.__dataclass_fields__


def layer_metadata(layer_name: str) -> Any:
    """Return the attention metadata of a layer in the forward pass under way, or None."""
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, list):  # two-batch overlap: one per micro-batch
        metadata = metadata[0]
    return metadata.get(layer_name) if isinstance(metadata, dict) else metadata


def own_layer(impl: Any, vllm_config: Any) -> tuple[str, Any]:
    """Return name and layer that ``impl`` was made for."""
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if getattr(layer, "impl", None) is impl:
            return name, layer
    raise RuntimeError("the attention layer of this implementation is not registered with vLLM")


def makes_drafter() -> bool:
    """Whether vLLM says that the model it is making now drafts for another."""
    # whoever set this has imported the module, which needs all of vLLM's native operators
    backends = sys.modules.get("vllm.compilation.backends")
    return getattr(backends, "model_tag", None) in ("draft_model", "eagle_head")


def cached_layers(model: Any, vllm_config: Any) -> dict[str, Any]:
    """Return the layers of ``model`` that keep something from token to token, by name.

    Layers of a drafter are registered with vLLM as well, and are not among them.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    own = {id(module) for module in model.modules()}
    context = vllm_config.compilation_config.static_forward_context
    return {
        name: layer
        for name, layer in context.items()
        if isinstance(layer, AttentionLayerBase) and id(layer) in own
    }


@contextlib.contextmanager
def plain_forward(vllm_config: Any, num_tokens: int) -> Iterator[None]:
    """Let a model run by itself: nothing compiled, no attention metadata, no cache."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    with (
        set_current_vllm_config(vllm_config),
        set_forward_context(None, vllm_config, num_tokens=num_tokens, skip_compiled=True),
    ):
        yield


def empty_cache() -> None:
    """Give back device memory that nothing holds any more."""
    if device().type == "cuda":
        torch.cuda.empty_cache()


def layer_index(name: str) -> int:
    """Return the number of the decoder layer that an attention layer's name holds."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(name))


def tensor_parallel() -> tuple[int, int]:
    """Return this process's tensor-parallel rank, and how many there are."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def device() -> torch.device:
    """Return the device of this process: its GPU, else the CPU, where tests run."""
    if current_platform.is_cuda() and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def free_at_start() -> int:
    """Return the device's memory that is free or PyTorch's, in bytes: what was free before weights.

    As vLLM's own snapshot, it leaves out what other processes hold, and this one's CUDA context. 0
    without a GPU.
    """
    if device().type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info()
    return int(free) + int(torch.cuda.memory_reserved())


def free_cache_bytes(vllm_config: Any, start_bytes: int) -> int:
    """Estimate what the KV cache will get, from the memory that is free now.

    Called when weights are loaded and nothing else is: activations and graphs still come off.

    Parameters
    ----------
    vllm_config
        vLLM's ``VllmConfig``.
    start_bytes
        Of :func:`free_at_start`, before weights were loaded. vLLM takes its share of the whole GPU
        and counts off only what this process took since, so that others' memory is not ours.
    """
    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes:
        return int(cache.kv_cache_memory_bytes)
    if device().type != "cuda":
        return 1 << 30
    free, total = torch.cuda.mem_get_info()
    wanted = math.ceil(total * float(cache.gpu_memory_utilization))
    return max(0, wanted - max(0, start_bytes - free))


@functools.cache
def flash_attention() -> Any:
    """Return vLLM's variable-length FlashAttention."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    return flash_attn_varlen_func


def flash_attention_version(head_dim: int) -> int | None:
    """Return which FlashAttention serves heads of this size here, or None if none does."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version: int | None = get_flash_attn_version(head_size=head_dim)
    if version is None:
        return None
    limit = 512 if version == 4 else 256
    return version if head_dim <= limit and head_dim % 8 == 0 else None


def merge_attention(
    out: Tensor, out_lse: Tensor, a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor
) -> None:
    """Merge attention over two disjoint sets of tokens into ``out`` (which may be ``b``).

    Outputs are ``[tokens, num_heads, head_dim]``, log-sum-exps float32 ``[num_heads, tokens]``,
    natural; ``out_lse`` must be neither of the others.
    """
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    merge_attn_states(out, a, a_lse, b, b_lse, output_lse=out_lse)


def scratch_manager() -> Any | None:
    """Return vLLM's manager of scratch memory, or None where the worker has none."""
    if vllm_workspace.is_workspace_manager_initialized():
        return vllm_workspace.current_workspace_manager()
    return None
