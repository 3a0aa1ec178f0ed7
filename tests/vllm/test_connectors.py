# SPDX-License-Identifier: Apache-2.0
"""Which pages may come from elsewhere, and what a load takes from the 16-bit window."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from turbokv.integrations.vllm import connectors
from turbokv.integrations.vllm.window.pool import RecentWindow


def config(cache_dtype: str = "tq4", connector: str | None = None, **ours: Any) -> Any:
    transfer = None
    if connector is not None:
        transfer = SimpleNamespace(
            kv_connector=connector, kv_connector_module_path=None, kv_connector_extra_config={}
        )
    return SimpleNamespace(
        speculative_config=None,
        additional_config={"turbokv": ours} if ours else {},
        cache_config=SimpleNamespace(
            cache_dtype=cache_dtype, kv_cache_dtype_skip_layers=[], block_size=32
        ),
        kv_transfer_config=transfer,
        model_config=SimpleNamespace(dtype=torch.bfloat16),
    )


# --- identity -------------------------------------------------------------------------------------


def test_the_identity_is_of_what_fixes_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    one.write_bytes(b"one")
    other.write_bytes(b"other")
    narrower = config()
    narrower.model_config.dtype = torch.float16  # which rounds biases otherwise
    skipping = config()
    skipping.cache_config.kv_cache_dtype_skip_layers = ["0"]
    found = [
        connectors.page_identity(c)
        for c in (
            config(),
            config("tq_k5v3"),
            config(calibration=str(one)),
            config(calibration=str(other)),
            config(calibration="none"),
            narrower,
            skipping,
        )
    ]
    monkeypatch.setattr(connectors, "FORMAT_VERSION", connectors.FORMAT_VERSION + 1)
    found.append(connectors.page_identity(config()))
    assert len(set(found)) == len(found)


def test_the_identity_is_not_of_what_leaves_bytes_alone(tmp_path: Path) -> None:
    same = tmp_path / "same.safetensors"
    same.write_bytes(b"one")
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(b"one")
    assert connectors.page_identity(config(window=64)) == connectors.page_identity(config())
    # beside a connector offsets are taken from the weights in either case
    by_weights = connectors.page_identity(config(calibration="weights"))
    assert connectors.page_identity(config(calibration="auto")) == by_weights
    assert connectors.page_identity(config(calibration=str(same))) == connectors.page_identity(
        config(calibration=str(elsewhere), path="flash_attn")
    )


def test_the_named_config_leaves_the_real_one_alone() -> None:
    real = config()
    named = connectors.named_config(real)
    assert named.cache_config.cache_dtype == f"tq4-{connectors.page_identity(real)}"
    assert real.cache_config.cache_dtype == "tq4"


# --- start-up -------------------------------------------------------------------------------------


def test_known_connectors_are_loaded_from_here() -> None:
    known = config(connector="OffloadingConnector")
    connectors.choose_module(known)
    assert known.kv_transfer_config.kv_connector_module_path == connectors.__name__
    connectors.choose_module(known)  # vLLM completes a configuration more than once
    assert connectors.keeps_window(known)


def test_without_a_connector_nothing_happens() -> None:
    plain = config()
    connectors.choose_module(plain)
    assert plain.kv_transfer_config is None
    assert connectors.keeps_window(plain)


def test_unknown_connectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_connector: wanted .*, got LMCacheConnectorV1"):
        connectors.choose_module(config(connector="LMCacheConnectorV1"))


def test_an_unknown_child_is_refused() -> None:
    several = config(connector="MultiConnector")
    children = [{"kv_connector": "ExampleConnector"}, {"kv_connector": "NixlConnector"}]
    several.kv_transfer_config.kv_connector_extra_config = {"connectors": children}
    with pytest.raises(ValueError, match="got NixlConnector"):
        connectors.choose_module(several)
    assert children[0]["kv_connector_module_path"] == connectors.__name__


@pytest.mark.parametrize("is_child", [False, True])
def test_tiers_that_do_not_hold_the_identity_are_refused(is_child: bool) -> None:
    known = {"secondary_tiers": [{"type": "fs", "root_dir": "/pages"}, {"type": "p2p"}]}
    other = {"secondary_tiers": [{"type": "fs"}, {"type": "kvcr"}]}
    for extra in (known, other):
        found = config(connector="MultiConnector" if is_child else "OffloadingConnector")
        child = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": extra}
        settings = {"connectors": [child]} if is_child else extra
        found.kv_transfer_config.kv_connector_extra_config = settings
        if extra is known:
            connectors.choose_module(found)
        else:
            with pytest.raises(ValueError, match=r"secondary_tiers: wanted .*, got kvcr"):
                connectors.choose_module(found)


@pytest.mark.parametrize("promises", [True, False])
def test_a_users_own_connector_has_to_promise(
    promises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("own_connector")
    module.Own = type("Own", (), {"turbokv_page_identity": promises})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_connector", module)
    own = config(connector="Own")
    own.kv_transfer_config.kv_connector_module_path = "own_connector"
    if promises:
        connectors.choose_module(own)
        assert own.kv_transfer_config.kv_connector_module_path == "own_connector"
    else:
        with pytest.raises(ValueError, match="turbokv_page_identity = True"):
            connectors.choose_module(own)


# --- weights --------------------------------------------------------------------------------------


class FakeCore:
    def __init__(self, cache_dtype: str, succeeds: bool = True) -> None:
        self.vllm_config = config(cache_dtype)
        self.succeeds = succeeds
        self.resets: list[dict[str, bool]] = []

    def reset_prefix_cache(self, **options: bool) -> bool:
        self.resets.append(options)
        return self.succeeds


@pytest.mark.parametrize(
    ("cache_dtype", "method", "times"),
    [
        ("tq4", "reload_weights", 1),
        ("tq4", "finish_weight_update", 1),
        ("tq4", "execute_model", 0),
        ("tq4", print, 0),
        ("auto", "reload_weights", 0),
    ],
)
def test_new_weights_clear_the_prefix_cache(cache_dtype: str, method: Any, times: int) -> None:
    core = FakeCore(cache_dtype)
    connectors.after_worker_call(core, method)
    assert core.resets == [{"reset_running_requests": True, "reset_connector": True}] * times


def test_a_prefix_cache_that_cannot_be_cleared_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="reload_weights: the prefix cache"):
        connectors.after_worker_call(FakeCore("tq4", succeeds=False), "reload_weights")


# --- loads ----------------------------------------------------------------------------------------


@pytest.fixture
def window() -> RecentWindow:
    """Blocks of 32 tokens, of which the window knows the halves; 2 and 3 are block 1."""
    window = RecentWindow(12, 16, 12, 128, 4, "cpu")
    lens = torch.tensor([128], dtype=torch.int32)
    window.refresh(torch.arange(2, 10, dtype=torch.int32).view(1, 8), lens, lens)
    assert (window.tile_slots[2:10] >= 0).all()
    return window


@pytest.mark.parametrize(
    "metadata",
    [
        SimpleNamespace(load_jobs={7: SimpleNamespace(dst_spec=SimpleNamespace(block_ids=[2]))}),
        SimpleNamespace(
            requests=[
                SimpleNamespace(is_store=False, slot_mapping=torch.arange(64, 96)),
                SimpleNamespace(is_store=True, slot_mapping=torch.arange(32, 64)),
            ]
        ),
        SimpleNamespace(reqs_to_fill={"a": (([2],), 32)}),
        SimpleNamespace(load_gpu_blocks=[2]),
    ],
    ids=["offloading", "example", "decode_bench", "simple_offload"],
)
def test_loaded_blocks_lose_their_copies(metadata: Any, window: RecentWindow) -> None:
    connectors.forget_copies(connectors._loaded_blocks(metadata, 32), 32)
    assert (window.tile_slots[4:6] == -1).all()
    assert (window.tile_slots[2:4] >= 0).all()
    assert (window.tile_slots[6:10] >= 0).all()


def test_a_step_without_loads_touches_nothing(window: RecentWindow) -> None:
    before = window.tile_slots.clone()
    connectors.forget_copies(connectors._loaded_blocks(SimpleNamespace(), 32), 32)
    assert torch.equal(window.tile_slots, before)


# --- vLLM's own classes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", connectors.CONNECTORS)
def test_every_connector_is_vllms_with_the_identity(name: str) -> None:
    pytest.importorskip("vllm")
    from vllm.config.kv_transfer import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    transfer = KVTransferConfig(
        kv_connector=name, kv_role="kv_both", kv_connector_module_path=connectors.__name__
    )
    ours = KVConnectorFactory.get_connector_class(transfer)
    theirs = KVConnectorFactory.get_connector_class_by_name(name)
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    assert ours.turbokv_page_identity
    assert not getattr(theirs, "turbokv_page_identity", False)


def test_unequal_identities_do_not_find_each_others_files(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

    found = set()
    for cache_dtype in ("tq4", "tq3"):
        made = config(cache_dtype)
        made.kv_transfer_config = SimpleNamespace(
            get_from_extra_config=lambda key, default: str(tmp_path)
        )
        connector = connectors.ExampleConnector(made, KVConnectorRole.WORKER, None)
        found.add(connector._generate_foldername_debug(torch.arange(32), [], create_folder=True))
    assert len(found) == 2
    assert all(Path(folder).is_relative_to(tmp_path) for folder in found)


def test_peers_of_the_offloading_connector_are_greeted_by_the_identity() -> None:
    """What its tier p2p refuses in a handshake is made of what names files."""
    pytest.importorskip("vllm")
    pytest.importorskip("vllm.v1.kv_offload.tiering.p2p.manager")  # 0.30 and newer, with zmq
    from vllm.v1.kv_offload.tiering.p2p import manager

    source = Path(manager.__file__).read_text()
    assert "config_fields = FileMapper.from_offloading_spec(" in source
    assert "config_fields=config_fields" in source


def test_files_of_the_offloading_connector_are_named_by_the_identity() -> None:
    pytest.importorskip("vllm")
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading import config as offloading
    from vllm.v1.kv_offload.file_mapper import FileMapper

    # what vLLM itself takes for the dtype of what it stores
    assert "vllm_config.cache_config.cache_dtype" in Path(offloading.__file__).read_text()
    paths = set()
    for made in (config(), config("tq_k4v3")):
        dtype = connectors.named_config(made).cache_config.cache_dtype
        mapper = FileMapper("root", "model", 32, 1, 1, 1, 1, 1, 0, dtype)
        paths.add(mapper.base_path)
    assert len(paths) == 2
