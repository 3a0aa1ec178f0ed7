# SPDX-License-Identifier: Apache-2.0
"""Pages that travel: their identity in the keys of KV connectors, and what a load must undo here.

Equal tokens give equal pages only under the same byte format, widths and calibration. vLLM's keys
hold the tokens, the model's name and the cache dtype; :func:`page_identity` is the rest. At
start-up :func:`choose_module` lets vLLM load the connectors that we know from this module (its
``kv_connector_module_path``), as subclasses that add two things:

- the identity, where the connector names its storage or greets its peers, so that pages from
  elsewhere that differ are not found, or refused;
- after a load, the pages that came lose their 16-bit copies, which are not theirs
  (:meth:`RecentWindow.invalidate`).

A connector that we do not know is refused at start-up, because pages under another identity would
be read as if they were ours. One of the user's own (by ``kv_connector_module_path``) is taken if
its class says ``turbokv_page_identity = True``, which promises both of the above.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import torch

from turbokv import core
from turbokv.codec import DEFAULT_K_RULE, DEFAULT_V_RULE
from turbokv.integrations.vllm.dtypes import uses_turbokv
from turbokv.integrations.vllm.options import NONE, WEIGHTS, Options
from turbokv.integrations.vllm.window.pool import live_windows
from turbokv.paged import FORMAT_VERSION

CONNECTORS = (
    "DecodeBenchConnector",
    "ExampleConnector",
    "MultiConnector",
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
)
# Of the offloading connector's further tiers, those that name storage, or greet peers, by the cache
# dtype. A router of the KVCR tier is told a digest by the user, other tiers are the user's own.
TIERS = ("example", "fs", "obj", "p2p")
# Worker methods after which pages in the prefix cache are of other weights.
_RELOADS = ("reload_weights", "finish_weight_update")
_OWN = "turbokv_page_identity"


# --- the identity ---------------------------------------------------------------------------------


@functools.cache
def _file_sha256(path: str) -> str:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def _centring_identity(vllm_config: Any, options: Options) -> str:
    """Return what fixes offsets and codebooks, in the process of the scheduler as in workers.

    Offsets from weights need no hash: the weights are those that vLLM's keys name, and the biases
    of keys, in the model's dtype, give the same offsets to the bit wherever they are loaded. Means
    over random tokens would not, which is why they are not taken beside a connector.
    """
    if options.calibration_file is not None:
        return _file_sha256(options.calibration_file)
    if options.calibration == NONE:
        return NONE
    return f"{WEIGHTS} {vllm_config.model_config.dtype}"


def page_identity(vllm_config: Any) -> str:
    """Return 16 hex digits that differ if equal tokens could give other bytes.

    They cover the version of FORMAT.md, the cache dtype (widths of K and V), the calibration
    file's sha256 (offsets, codebooks) or how else keys are centred, rotation seed and scale rules,
    and which layers stay in 16 bits. The 16-bit window is not among them: copies never travel.
    """
    options = Options.from_config(vllm_config.additional_config)
    cache = vllm_config.cache_config
    fields = {
        "format": FORMAT_VERSION,
        "cache_dtype": cache.cache_dtype,
        "draft_cache_dtype": getattr(vllm_config.speculative_config, "kv_cache_dtype", None),
        "calibration": _centring_identity(vllm_config, options),
        "seed": core.DEFAULT_SEED,
        "rules": [DEFAULT_K_RULE, DEFAULT_V_RULE],
        "skip_layers": sorted(map(str, cache.kv_cache_dtype_skip_layers or ())),
    }
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def named_config(vllm_config: Any) -> Any:
    """Return a copy whose cache dtype carries the identity, for what a connector names by it."""
    named = copy.copy(vllm_config)
    named.cache_config = copy.copy(vllm_config.cache_config)
    # past the validation of a dataclass field: this is a name for storage, not a dtype
    name = f"{vllm_config.cache_config.cache_dtype}-{page_identity(vllm_config)}"
    object.__setattr__(named.cache_config, "cache_dtype", name)
    return named


# --- start-up -------------------------------------------------------------------------------------


def choose_module(vllm_config: Any) -> None:
    """Refuse connectors whose keys do not hold the identity, and have known ones loaded from here.

    Raises
    ------
    ValueError
        Naming the connector, and those that can be used.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    transfer.kv_connector_module_path = _module_of(
        transfer.kv_connector, transfer.kv_connector_module_path
    )
    _check_tiers(transfer.kv_connector_extra_config)
    for child in transfer.kv_connector_extra_config.get("connectors", ()):
        _check_tiers(child.get("kv_connector_extra_config") or {})
        child["kv_connector_module_path"] = _module_of(
            child.get("kv_connector"), child.get("kv_connector_module_path")
        )


def _check_tiers(extra_config: Any) -> None:
    for tier in extra_config.get("secondary_tiers", ()):
        kind = tier.get("type")
        if kind not in TIERS:
            raise ValueError(
                f"secondary_tiers: wanted some of {', '.join(TIERS)}, whose keys hold the identity"
                f" of compressed pages, got {kind}"
            )


def _module_of(name: str | None, module: str | None) -> str:
    """Return the module to load a connector from."""
    if module not in (None, __name__):
        if getattr(getattr(importlib.import_module(module), str(name), None), _OWN, False):
            return module
    elif name in CONNECTORS:
        return __name__
    raise ValueError(
        f"kv_connector: wanted one of {', '.join(CONNECTORS)}, or a class with {_OWN} = True, whose"
        f" keys hold the identity of compressed pages, got {name}"
    )


def keeps_window(vllm_config: Any) -> bool:
    """Whether there may be 16-bit copies: no connector, or one that drops those of loaded pages."""
    transfer = vllm_config.kv_transfer_config
    return transfer is None or transfer.kv_connector_module_path is not None


def after_worker_call(engine_core: Any, method: Any) -> None:
    """Forget all cached pages after workers took other weights.

    Called at the end of the engine core's ``collective_rpc``. Requests under way are preempted and
    computed again.
    """
    if method not in _RELOADS or not uses_turbokv(engine_core.vllm_config):
        return
    if not engine_core.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
        raise RuntimeError(f"{method}: the prefix cache of the old weights could not be cleared")


# --- loads ----------------------------------------------------------------------------------------


def forget_copies(blocks: Iterable[int], block_size: int) -> None:
    """Take the 16-bit copies of blocks (vLLM's) whose bytes came from elsewhere."""
    ids = torch.tensor(sorted({int(block) for block in blocks}), dtype=torch.int64, device="cpu")
    if not ids.numel():
        return
    for window in live_windows():
        ratio = block_size // window.page_size
        pages = (
            ids[:, None] * ratio + torch.arange(ratio, dtype=torch.int64, device="cpu")
        ).flatten()
        window.invalidate(pages.to(window.device))


def _loaded_blocks(metadata: Any, block_size: int) -> Iterable[int]:
    """Return the blocks that a step's connector metadata asks the worker to load."""
    for job in getattr(metadata, "load_jobs", {}).values():  # OffloadingConnector
        yield from job.dst_spec.block_ids
    for request in getattr(metadata, "requests", ()):  # ExampleConnector
        if not request.is_store:
            yield from (request.slot_mapping // block_size).tolist()
    for groups, _ in getattr(metadata, "reqs_to_fill", {}).values():  # DecodeBenchConnector
        for blocks in groups:
            yield from blocks
    yield from getattr(metadata, "load_gpu_blocks", ())  # SimpleCPUOffloadConnector


class _Identity:
    """Mixed into a connector of vLLM's."""

    turbokv_page_identity = True

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(named_config(vllm_config), role, kv_cache_config)  # type: ignore[call-arg]
        self.turbokv_block_size = int(vllm_config.cache_config.block_size)
        path = getattr(self, "_storage_path", None)
        if path is not None:  # ExampleConnector, whose files are named by tokens alone
            self._storage_path = str(pathlib.Path(path) / page_identity(vllm_config))

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Take the copies of pages that are about to be loaded, before the step reads the map."""
        forget_copies(
            _loaded_blocks(connector_metadata, self.turbokv_block_size), self.turbokv_block_size
        )
        super().bind_connector_metadata(connector_metadata)  # type: ignore[misc]


class _Several:
    """Mixed into MultiConnector: its children are ours already, and bind metadata themselves."""

    turbokv_page_identity = True


@functools.cache
def _connector(name: str) -> type:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    base = KVConnectorFactory.get_connector_class_by_name(name)
    mixin = _Several if name == "MultiConnector" else _Identity
    # vLLM keys statistics by the class's name, so it stays
    return type(name, (mixin, base), {"__module__": __name__, "__doc__": base.__doc__})


def __getattr__(name: str) -> Any:
    if name in CONNECTORS:
        return _connector(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
