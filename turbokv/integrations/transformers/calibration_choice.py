# SPDX-License-Identifier: Apache-2.0
"""Which calibration a cache takes: a given one if it is the model's, or the default, made here."""

from __future__ import annotations

import os
import pathlib
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch

from turbokv.calibrate_static import AUTO_CONTEXT, AUTO_TOKENS, config_bos
from turbokv.calibration import Calibration
from turbokv.integrations.transformers.calibrate import calibrate
from turbokv.integrations.transformers.models import fingerprint

# What configs call a bias of the key projection.
_BIAS_FIELDS = ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias", "use_bias")
_BIASED_MODELS = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl")
_AUTO: WeakKeyDictionary[Any, Calibration] = WeakKeyDictionary()


def auto_calibration(model: Any) -> Calibration:
    """Return the offsets that a cache takes by default: from 1024 random token ids.

    The means hold the bias of keys, where a model has one, and what else its keys share. Runs
    the model once (some seconds on a CPU, if it is small); later calls return the same object as
    long as the model lives and keeps its input embedding.
    """
    made = _AUTO.get(model)
    if made is None or made.fingerprint.mismatch(fingerprint(model)) is not None:
        bos = config_bos(model.config.get_text_config(decoder=True))
        made = calibrate(model, tokens=AUTO_TOKENS, context=AUTO_CONTEXT, bos=bos)
        _AUTO[model] = made
    return made


def choose_calibration(
    model: Any,
    given: Calibration | str | os.PathLike[str] | None,
    k_bits: int,
    v_bits: int,
) -> Calibration | None:
    """Return the calibration that was asked for, checked to be of ``model``.

    Parameters
    ----------
    model
        A Transformers model, or its config.
    given
        As for :class:`turbokv.integrations.transformers.TurboKVCache`.
    k_bits, v_bits
        Widths of the cache.

    Raises
    ------
    FileNotFoundError, CalibrationError
        If there is no such file, it is damaged, or it is of another model.
    TypeError, ValueError
        If it is nothing of the kind, or has codebooks of other widths.

    Warns
    -----
    UserWarning
        If the offsets leave most of the keys' energy in a layer; if ``"auto"`` meets a config whose
        keys have biases.
    """
    if given is None or given == "none":
        return None
    found: Calibration
    if given == "auto":
        if not isinstance(model, torch.nn.Module):
            _warn_of_biases(model)
            return None
        found = auto_calibration(model)
    elif isinstance(given, (str, os.PathLike)):
        found = Calibration.load(pathlib.Path(given), fingerprint=fingerprint(model))
    elif isinstance(given, Calibration):
        found = given
        found.check_model(fingerprint(model))
    else:
        raise TypeError(
            f"calibration: wanted 'auto', 'none', a Calibration or a file, got {given!r}"
        )
    found.check_widths(k_bits, v_bits)
    weakness = found.weakness(k_bits)
    if weakness is not None:
        warnings.warn(f"calibration: {weakness}", UserWarning, stacklevel=3)
    return found


def _warn_of_biases(config: Any) -> None:
    """Warn if a config speaks of biases of keys, which offsets would take and it cannot give."""
    text = config.get_text_config(decoder=True)
    fields = [name for name in _BIAS_FIELDS if getattr(text, name, False) is True]
    if fields or text.model_type in _BIASED_MODELS:
        reason = fields[0] if fields else f"model_type {text.model_type}"
        warnings.warn(
            f"config: this model's keys have biases ({reason}), which quantise badly unless they"
            " are subtracted: give TurboKVCache the model instead of its config, or a calibration",
            UserWarning,
            stacklevel=4,
        )
