# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker, which centres keys once it has loaded the model.

vLLM takes a worker by name (``worker_cls``), in this version and in later ones. The class that the
platform or the user chose is the base of ours: its name, dots as colons, is an attribute of this
module, so that every process finds the same class.
"""

from __future__ import annotations

import functools
import importlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch

from turbokv.calibration import Calibration, LayerCalibration
from turbokv.centring import KeyOffsets
from turbokv.fingerprint import Fingerprint
from turbokv.integrations.vllm import compat
from turbokv.integrations.vllm.attention.impl import TurboKVImpl
from turbokv.integrations.vllm.dtypes import cache_widths
from turbokv.integrations.vllm.offsets import biases, file, measure
from turbokv.integrations.vllm.options import AUTO, NONE, Options

logger = logging.getLogger("vllm.turbokv")


def __getattr__(name: str) -> Any:
    if ":" in name:
        return _worker(name.replace(":", "."))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _worker(base_name: str) -> type:
    module, _, attribute = base_name.rpartition(".")
    base = getattr(importlib.import_module(module), attribute)
    overrides: dict[str, Any] = {"__module__": __name__, "__doc__": base.__doc__}
    # where weights may come anew, depending on vLLM's version
    for method in ("reload_weights", "finish_weight_update"):
        if hasattr(base, method):
            overrides[method] = _centred_again(method)
    return type(attribute, (_CentringWorker, base), overrides)


def _centred_again(method: str) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = getattr(super(_CentringWorker, self), method)(*args, **kwargs)
        after_reload(self.vllm_config, self.get_model())
        return result

    call.__name__ = method
    return call


class _CentringWorker:
    """Mixed into a worker of vLLM's."""

    vllm_config: Any

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Load the model, then check a calibration file against it or measure offsets on it."""
        result = super().load_model(*args, **kwargs)  # type: ignore[misc]
        if kwargs.get("load_dummy_weights"):
            return result  # a rank that joins later and gets its weights from others
        after_load(self.vllm_config, self.get_model())  # type: ignore[attr-defined]
        return result


def own_impls(model: Any, vllm_config: Any) -> dict[str, TurboKVImpl]:
    """Return our implementations of a model's layers, by the names of the layers."""
    layers = compat.cached_layers(model, vllm_config).items()
    impls = {name: getattr(layer, "impl", None) for name, layer in layers}
    return {name: impl for name, impl in impls.items() if isinstance(impl, TurboKVImpl)}


def after_load(vllm_config: Any, model: Any) -> None:
    """Centre the keys of a model as the options say, before anything is stored.

    Raises
    ------
    CalibrationError
        If the calibration file is another model's.
    """
    options = Options.from_config(vllm_config.additional_config)
    if options.calibration == NONE:
        return
    if options.calibration_file is not None:
        calibration = file.load(options.calibration_file)
        if vllm_config.load_config.load_format != "dummy":
            hidden_size = int(vllm_config.model_config.hf_text_config.hidden_size)
            file.check_weights(calibration, model, hidden_size)
        _warn(calibration, vllm_config)
        return
    impls = own_impls(model, vllm_config)
    found = _measured(vllm_config, model, impls)
    # pages that travel are read by other processes, whose means would differ in the last bits
    by_means = options.calibration == AUTO and bool(found) and _stays_here(vllm_config)
    offsets = (
        {name: KeyOffsets(m.mean, m.rotary) for name, m in found.items()}
        if by_means
        else _from_biases(vllm_config, model, impls)
    )
    for name, impl in impls.items():
        impl.take_offsets(offsets.get(name))
    source = "means over random token ids" if by_means else "biases"
    logger.info(
        "TurboKV: keys of %d of %d layers are centred by %s.", len(offsets), len(impls), source
    )
    _report(vllm_config, offsets, found)


def after_reload(vllm_config: Any, model: Any) -> None:
    """Take the biases of new weights where they are what others will read pages by.

    Means stay: attention is exact for any offsets, and those of former weights serve.
    """
    options = Options.from_config(vllm_config.additional_config)
    if options.calibration == NONE or options.calibration_file is not None:
        return
    if _stays_here(vllm_config):
        return
    impls = own_impls(model, vllm_config)
    offsets = _from_biases(vllm_config, model, impls)
    for name, impl in impls.items():
        impl.take_offsets(offsets.get(name))


def _stays_here(vllm_config: Any) -> bool:
    transfer = vllm_config.kv_transfer_config
    return transfer is None or transfer.kv_connector is None


def _measured(
    vllm_config: Any, model: Any, impls: Mapping[str, TurboKVImpl]
) -> dict[str, measure.Measured]:
    """Run the model on random token ids, or say why not."""
    reason = measure.why_not(model, vllm_config, impls)
    if reason is not None:
        logger.info("TurboKV: mean keys are not measured, because %s.", reason)
        return {}
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            found = measure.run(model, vllm_config, impls)
    except Exception as error:
        # a model that does not run by itself may still be served; its keys lose the means
        logger.warning(
            "TurboKV: mean keys could not be measured (%s: %s). Keys are centred by their biases"
            " alone; turbokv.calibration='none' or a file leaves the measurement out.",
            type(error).__name__,
            error,
        )
        return {}
    compat.empty_cache()
    logger.info("TurboKV: mean keys were measured in %.1f s.", time.perf_counter() - start)
    broken = sorted(name for name, m in found.items() if not bool(m.mean.isfinite().all()))
    if broken:
        logger.warning(
            "TurboKV: keys of random tokens are not finite in %d layers, %s first; keys are centred"
            " by their biases alone.",
            len(broken),
            broken[0],
        )
        return {}
    return found


def _from_biases(
    vllm_config: Any, model: Any, impls: Mapping[str, TurboKVImpl]
) -> dict[str, KeyOffsets]:
    context = vllm_config.compilation_config.static_forward_context
    found = {}
    for name, impl in impls.items():
        if impl.kv_sharing_target_layer_name is None:
            offsets = biases.offsets_of(model, context[name], impl)
            if offsets is not None:
                found[name] = offsets
    return found


def _report(
    vllm_config: Any, offsets: Mapping[str, KeyOffsets], found: Mapping[str, measure.Measured]
) -> None:
    """Warn where offsets leave more of the keys' energy than their width bears."""
    layers: dict[int, LayerCalibration] = {}
    for name, kept in offsets.items():
        spread = None
        if name in found:
            away = (found[name].mean - kept.mu).square().sum(-1)
            spread = found[name].spread + away
        layers[compat.layer_index(name)] = LayerCalibration(offsets=kept, k_spread=spread)
    _warn(Calibration(Fingerprint("", ()), layers), vllm_config)


def _warn(calibration: Calibration, vllm_config: Any) -> None:
    k_bits, _ = cache_widths(vllm_config.cache_config.cache_dtype)
    weakness = calibration.weakness(k_bits)
    if weakness is not None:
        logger.warning("TurboKV: %s.", weakness)
