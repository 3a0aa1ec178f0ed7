# SPDX-License-Identifier: Apache-2.0
"""TurboKVCache: a drop-in Transformers ``Cache`` that holds keys and values compressed.

Per full-attention layer, tokens ``[0, compressed)`` are codes and scales, tokens ``[compressed,
length)`` are the recent window in 16 bits, and the first real tokens of every sequence (the sinks)
have a 16-bit copy that is read in place of their codes. ``update`` hands attention the decompressed
past and the new tokens as they came, then compresses what has left the window; the decompressed
tensors are transient, one layer at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from turbokv.codec import TurboKVCodec
from turbokv.integrations.transformers import checks
from turbokv.integrations.transformers.calibration_choice import choose_calibration
from turbokv.integrations.transformers.layers import (
    DEFAULT_SINKS as DEFAULT_SINKS,
)
from turbokv.integrations.transformers.layers import (
    DEFAULT_WINDOW as DEFAULT_WINDOW,
)
from turbokv.integrations.transformers.layers import (
    Options,
    TurboKVHybridLayer,
    TurboKVLayer,
    sees_everything,
)
from turbokv.kernels import Backend, check_backend

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from turbokv.calibration import Calibration


class TurboKVCache(Cache):  # type: ignore[misc]
    """Compressed ``past_key_values`` for ``generate()`` and forward passes.

    Parameters
    ----------
    config
        The model, or only its config. Layers other than full attention (sliding, chunked, linear)
        get the layer that Transformers' ``DynamicCache`` gives them and stay uncompressed: they are
        bounded. Windows as long as the longest context are full attention, and so is attention
        beside a recurrent state, which stays as it is.
    k_bits, v_bits
        Widths, 2 to 8; K carries most of the error, so give it the larger one.
    window
        Newest tokens that stay in 16 bits (0 compresses everything once attended to).
    sinks
        First tokens of every sequence of which a 16-bit copy is kept.
    calibration
        ``"auto"`` centres keys by what the model's keys share on random token ids: it is run once,
        the first time that a cache is made for it (``calibration_choice.auto_calibration``). A
        config alone has no weights to run, so with one ``"auto"`` stores keys as they are, and
        warns if the config speaks of biases. A :class:`~turbokv.calibration.Calibration`, or the
        path of a file of ``turbokv calibrate``, must be of this model; of a config alone only the
        architecture can be checked. ``"none"`` or None stores keys as they are.
    attention_mask
        ``[batch, tokens]`` of the prompt, to find the first real token of left-padded sequences.
        Without it the sinks are the first slots, padding or not.
    first_position
        Position of the first real token, if the model is called with shifted ``position_ids``.
    backend, seed, norm_dtype, k_scale_rule, v_scale_rule
        As for :class:`turbokv.TurboKVCodec`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got.
    CalibrationError
        If the calibration is of another model, or its file is damaged.

    Warns
    -----
    UserWarning
        If the offsets of centred keys leave most of the keys' energy in a layer
        (:meth:`~turbokv.calibration.Calibration.weak_layers`).

    Examples
    --------
    >>> cache = TurboKVCache(model, k_bits=5, v_bits=3)  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        k_bits: int = 4,
        v_bits: int | None = None,
        *,
        window: int = DEFAULT_WINDOW,
        sinks: int = DEFAULT_SINKS,
        calibration: Calibration | str | os.PathLike[str] | None = "auto",
        attention_mask: Tensor | None = None,
        first_position: int = 0,
        backend: Backend = "auto",
        **codec_options: Any,
    ) -> None:
        v_bits = k_bits if v_bits is None else v_bits
        options = Options(
            k_bits,
            v_bits,
            checks.check_count(window, "window"),
            checks.check_count(sinks, "sinks"),
            {"backend": check_backend(backend), **codec_options},
        )
        # a bad option must fail here, not in the middle of the first forward pass
        TurboKVCodec(64, k_bits, v_bits, **codec_options)
        first_position = checks.check_count(first_position, "first_position")
        padding = None if attention_mask is None else checks.left_padding(attention_mask)
        measured = choose_calibration(config, calibration, k_bits, v_bits)
        if isinstance(config, torch.nn.Module):
            config = config.config
        layers = []
        for index, layer in enumerate(DynamicCache(config=config).layers):
            if sees_everything(layer, config):
                own: dict[str, Any] = {
                    "calibration": None if measured is None else measured.layer(index),
                    "first_position": first_position,
                    "left_padding": padding,
                }
                if isinstance(layer, LinearAttentionCacheLayerMixin):
                    states = layer.number_of_states
                    layer = TurboKVHybridLayer(options, number_of_states=states, **own)
                else:
                    layer = TurboKVLayer(options, **own)
            layers.append(layer)
        if not any(isinstance(layer, TurboKVLayer) for layer in layers):
            raise ValueError(
                "config: wanted a model with layers that attend to the whole context, got"
                f" {type(config).__name__} with {checks.describe(layers)}"
            )
        super().__init__(layers=layers)
        self.calibration = measured

    @classmethod
    def for_model(
        cls,
        model: Any,
        k_bits: int = 4,
        v_bits: int | None = None,
        **options: Any,
    ) -> TurboKVCache:
        """Make a cache for a loaded model; the same as giving the model to the constructor."""
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model: wanted a Transformers model, got {type(model).__name__}")
        return cls(model, k_bits, v_bits, **options)

    def compressed_layers(self) -> Iterator[TurboKVLayer]:
        """Iterate over the layers that compress."""
        return (layer for layer in self.layers if isinstance(layer, TurboKVLayer))

    def nbytes(self) -> int:
        """Return the bytes of tensor storage held by all layers, compressed or not."""
        return sum(
            layer.nbytes() if isinstance(layer, TurboKVLayer) else _held_bytes(layer)
            for layer in self.layers
        )


def _held_bytes(layer: object) -> int:
    """Bytes of a Transformers layer's own tensors."""
    tensors = [t for t in vars(layer).values() if isinstance(t, Tensor) and t.ndim > 1]
    for value in vars(layer).values():
        if isinstance(value, dict):
            tensors += [t for t in value.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def cache_nbytes(cache: Cache) -> int:
    """Return the bytes of tensor storage that any Transformers cache holds."""
    return (
        cache.nbytes() if isinstance(cache, TurboKVCache) else sum(map(_held_bytes, cache.layers))
    )
