# SPDX-License-Identifier: Apache-2.0
"""Pretend to be an H100, make a model's attention layers, print what vLLM makes of their cache.

Run in a process of its own, which answers lines of JSON, ``[world, folder, dtype, arguments]``.
What runs is vLLM's own configuration, selection, specs, grouping, allocation and metadata builders:
of the patched 0.26.0 and of 0.28 to 0.33, whose Python files are enough. Each line is answered in a
fork of its own, so that our plugin is loaded anew; :data:`WORLDS` are what it may find.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

MODULES = (
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm._qutlass_C",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
)
# Looks up fused operators of the libraries when it is imported.
PASSES = "vllm.compilation.passes.pass_manager"
CHECKS = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_group_gemm_supported",
    "cutlass_scaled_mm_supports_fp4",
)
PRELOADED = (
    "vllm.engine.arg_utils",
    "vllm.model_executor.layers.attention",
    "vllm.model_executor.models.registry",
    "vllm.v1.engine.core",
    "vllm.v1.spec_decode.llm_base_proposer",
    "vllm.v1.worker.gpu.attn_utils",
    "turbokv.integrations.vllm.window.pool",
)
END = "---"


def pretend() -> None:
    """Put a CUDA platform of compute capability 9.0 in the place of the one that was found."""
    import torch

    for name in (*MODULES, PASSES):
        sys.modules[name] = types.ModuleType(name)
    # named at the import of a module that also says whether a drafter is made
    sys.modules[PASSES].PostGradPassManager = object  # type: ignore[attr-defined]
    import vllm.platforms as platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    class FakeCuda(cuda.CudaPlatformBase):  # type: ignore[misc]
        device_name = "FakeH100"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

        @classmethod
        def has_device_capability(cls, capability: Any, device_id: int = 0) -> bool:
            wanted = capability if isinstance(capability, int) else 10 * capability[0]
            return wanted <= 90

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return True

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return False

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    platforms.current_platform = FakeCuda()
    library = torch.library.Library("_C", "FRAGMENT")
    for name in CHECKS:
        library.define(f"{name}(int capability) -> bool")
        library.impl(name, lambda capability: True, "CompositeExplicitAutograd")
    pretend.library = library  # type: ignore[attr-defined]  # operators live as long as it does


def describe(model: str, dtype: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return backends, page sizes, groups, shapes and a step's metadata, as JSON types.

    ``memory`` among the arguments is the cache's, in bytes: it is counted, not allocated.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import MambaSpec
    from vllm.v1.worker.gpu import attn_utils

    settings = {"max_model_len": 2048, "load_format": "dummy", **arguments}
    memory = settings.pop("memory", None)
    config = EngineArgs(
        model=model, skip_tokenizer_init=True, kv_cache_dtype=dtype, **settings
    ).create_engine_config()
    config.__post_init__()  # as the engine of a server does with what it is sent
    hf = config.model_config.hf_text_config
    hf.allow_global_per_layer_attribute_access = True  # Gemma 4's head_dim is that of its windows
    kinds = _kinds(hf)
    torch.set_default_dtype(torch.bfloat16)
    found: dict[str, Any] = {
        "v2": config.use_v2_model_runner,
        "scheduler": str(config.scheduler_config.scheduler_cls),
        "hash": config.compute_hash(),
    }
    with set_current_vllm_config(config):
        _make_layers(config, kinds, "model")
    if config.speculative_config is not None:
        drafter = _draft_config(config)
        with set_current_vllm_config(drafter):
            _make_layers(drafter, kinds, "draft_model.model")
    with set_current_vllm_config(config):
        layers = config.compilation_config.static_forward_context
        found["backends"] = [layer.attn_backend.get_name() for layer in layers.values()]
        found["dtypes"] = [layer.kv_cache_dtype for layer in layers.values()]
        current_platform.update_block_size_for_backend(config)
        specs = attn_utils.get_kv_cache_spec(config)
        is_hybrid = config.model_config.is_hybrid
        if is_hybrid:
            specs |= _linear_specs(config, kinds, MambaSpec)
        found["block_size"] = config.cache_config.block_size
        found["pages"] = sorted({spec.page_size_bytes for spec in specs.values()})
        found["slots"] = sorted({_token_bytes(spec) for spec in specs.values()} - {0})
        cache = _cache_config(config, specs, memory)
        found["capacity"] = _capacity(config, cache)
        found["groups"] = [
            [type(g.kv_cache_spec).__name__, len(g.layer_names)] for g in cache.kv_cache_groups
        ]
        found["group_pages"] = sorted(
            {g.kv_cache_spec.page_size_bytes for g in cache.kv_cache_groups}
        )
        found["blocks"] = cache.num_blocks
        found["layout"] = getattr(config.cache_config, "kv_cache_layout", None)
        if is_hybrid or memory:
            return found
        groups, graphs, sizes = attn_utils.init_attn_backend(cache, config, torch.device("cpu"))
        flat = [group for several in groups for group in several]
        tensors = _tensors(config, cache, flat, sizes)
        found["shapes"] = sorted({(tuple(t.shape[1:]), str(t.dtype)) for t in tensors.values()})
        ours = [tensor for tensor in tensors.values() if tensor.dtype == torch.uint8]
        found["is_dense_in_pages"] = all(tensor[0].is_contiguous() for tensor in ours)
        found["graphs"] = graphs.min_cg_support.name
        for name, tensor in tensors.items():
            layers[name].kv_cache = tensor
        found["steps"] = [_step(group) for group in flat if group.backend.get_name() == "TURBOKV"]
    return found


def _make_layers(config: Any, kinds: list[str], prefix: str) -> None:
    from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

    hf = config.model_config.hf_text_config
    for i, kind in enumerate(kinds):
        if not kind.endswith("attention") or kind == "linear_attention":
            continue
        heads, dim = hf.num_key_value_heads, hf.head_dim
        arch = getattr(config.model_config, "model_arch_config", None)
        if hasattr(arch, "__getitem__"):  # sizes may differ by layer (Gemma 4)
            heads, dim = arch[i].total_num_kv_heads, arch[i].head_size
        common = {
            "num_kv_heads": heads,
            "cache_config": config.cache_config,
            "prefix": f"{prefix}.layers.{i}.self_attn.attn",
        }
        if kind == "chunked_attention":
            ChunkedLocalAttention(
                hf.num_attention_heads,
                dim,
                dim**-0.5,
                attention_chunk_size=hf.attention_chunk_size,
                **common,
            )
            continue
        Attention(
            hf.num_attention_heads,
            dim,
            dim**-0.5,
            per_layer_sliding_window=hf.sliding_window if kind == "sliding_attention" else None,
            **common,
        )


def _draft_config(config: Any) -> Any:
    """Return the configuration that vLLM makes a drafter's layers with."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    proposer = types.SimpleNamespace(
        vllm_config=config, speculative_config=config.speculative_config
    )
    return SpecDecodeBaseProposer._create_draft_vllm_config(proposer)


def _token_bytes(spec: Any) -> int:
    """Return the bytes of a token in a page, without what pads the page; 0 for states."""
    heads = getattr(spec, "num_kv_heads", None)
    return 0 if heads is None else int(spec.real_page_size_bytes // (spec.block_size * heads))


def _kinds(hf: Any) -> list[str]:
    """Return the kind of each layer, as Transformers calls them."""
    blocks = getattr(hf, "layers_block_type", None)  # Nemotron-H
    if blocks:
        return ["full_attention" if block == "attention" else block for block in blocks]
    kinds = getattr(hf, "layer_types", None)
    return list(kinds or ["full_attention"] * hf.num_hidden_layers)


def _capacity(config: Any, cache: Any) -> int:
    """Return the tokens that vLLM says the cache holds."""
    from vllm.v1.core import kv_cache_utils

    get = kv_cache_utils.get_max_concurrency_for_kv_cache_config
    return int(get(config, cache) * config.model_config.max_model_len)


def _cache_config(config: Any, specs: dict[str, Any], memory_bytes: int | None = None) -> Any:
    """Return what vLLM allocates, by default in 256 MiB."""
    from vllm.v1.core import kv_cache_utils

    memory = [memory_bytes or 256 << 20]
    _resolve_layout(config, specs)
    if hasattr(kv_cache_utils, "get_kv_cache_configs"):
        return kv_cache_utils.get_kv_cache_configs(config, [specs], memory)[0]
    from vllm.v1.core import kv_cache_planning  # 0.33

    groups = kv_cache_planning.get_global_kv_cache_groups(config, [specs])
    return kv_cache_planning.get_kv_cache_configs(config, [specs], memory, groups)[0]


def _resolve_layout(config: Any, specs: dict[str, Any]) -> None:
    from vllm.v1.attention.backends import utils

    if not hasattr(utils, "resolve_kv_cache_layout"):  # before 0.29
        return
    layers = config.compilation_config.static_forward_context.values()
    layouts = utils.get_supported_kv_cache_layouts([layer.attn_backend for layer in layers])
    names = [layout.name for layout in layouts]
    utils.resolve_kv_cache_layout(config, [names], list(specs.values()))


def _tensors(config: Any, cache: Any, groups: list[Any], sizes: Any) -> dict[str, Any]:
    """Return the caches of all layers, as layers get them."""
    import torch
    from vllm.v1.worker import utils
    from vllm.v1.worker.gpu import attn_utils

    device = torch.device("cpu")
    if hasattr(utils, "allocate_kv_cache"):  # 0.29
        layout = config.cache_config.get_resolved_kv_cache_layout()
        return utils.allocate_kv_cache(cache, device, layout, sizes)
    raw = attn_utils._allocate_kv_cache(cache, {}, device)
    dtype = config.cache_config.cache_dtype
    return attn_utils._reshape_kv_cache(groups, raw, dtype, sizes, {}, cache)


def _step(group: Any) -> list[Any]:
    """Return what a group's builder makes of two decodes and a prefill."""
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, 1, 2, 34], dtype=torch.int32)
    lens = torch.tensor([40, 17, 64], dtype=torch.int32)
    step = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lens,
        num_reqs=3,
        num_actual_tokens=34,
        max_query_len=32,
        max_seq_len=64,
        block_table_tensor=torch.zeros(3, 8, dtype=torch.int32),
        slot_mapping=torch.arange(34),
        seq_lens_cpu_upper_bound=lens,
    )
    # by keyword, as vLLM does
    md = group.get_metadata_builder(0).build(common_prefix_len=0, common_attn_metadata=step)
    contexts = [list(part.group.context_lens) for part in md.prefill]
    return [md.num_decodes, md.num_decode_tokens, md.max_decode_len, contexts]


def _linear_specs(config: Any, kinds: list[str], spec: Any) -> dict[str, Any]:
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

    model_config, cache = config.model_config, config.cache_config
    cls, _ = ModelRegistry.resolve_model_cls(model_config.architecture, model_config=model_config)
    one = spec(
        shapes=cls.get_mamba_state_shape_from_config(config),
        dtypes=cls.get_mamba_state_dtype_from_config(config),
        block_size=cache.mamba_block_size or model_config.max_model_len,
        page_size_padded=cache.mamba_page_size_padded,
        mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
        mamba_cache_mode=cache.mamba_cache_mode,
    )
    return {
        f"model.layers.{i}.linear": one
        for i, kind in enumerate(kinds)
        if kind in ("linear_attention", "mamba")
    }


# --- worlds ---------------------------------------------------------------------------------------


def _without_plugin() -> None:
    os.environ["VLLM_PLUGINS"] = ""


def _lacks_a_feature() -> None:
    """Be a vLLM that no longer has one of the points that the plugin needs."""
    from vllm.v1.attention.backend import AttentionBackend

    del AttentionBackend.customize_spec


def _fails_midway() -> None:
    """Let the last step of registration fail when some of the dtypes are known."""
    from vllm.config import cache

    from turbokv.integrations.vllm.plugin import cache_dtypes

    def fail(*args: Any) -> None:
        raise RuntimeError("pretended failure")

    if not hasattr(cache, "register_kv_cache_dtype"):
        # after all is taught
        add = cache_dtypes._teach
        cache_dtypes._teach = lambda module: (add(module), fail())  # type: ignore[func-returns-value]
        return
    register = cache.register_kv_cache_dtype

    def some(name: str) -> Any:
        return fail if name == "tq2" else register(name)

    cache.register_kv_cache_dtype = some


WORLDS: dict[str, Callable[[], None]] = {
    "plugin": lambda: None,
    "no plugin": _without_plugin,
    "no customize_spec": _lacks_a_feature,
    "failure": _fails_midway,
}


def answer(world: str, model: str, dtype: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what vLLM makes of it, or what it raises, and why the plugin says it is not there."""
    found: dict[str, Any]
    WORLDS[world]()
    try:
        found = {"found": describe(model, dtype, arguments)}
    except Exception as error:  # whatever vLLM raises is the answer
        if os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
            traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    if "vllm.turbokv_hooks" not in sys.modules:
        from turbokv.integrations.vllm import plugin

        found["why_not"] = plugin.why_not()
    return found


def main() -> None:
    pretend()
    # before the forks, since imports take most of the time
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            print(json.dumps(answer(*json.loads(line))), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print(END, flush=True)


if __name__ == "__main__":
    main()
