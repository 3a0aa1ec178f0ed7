# SPDX-License-Identifier: Apache-2.0
"""The calibration of one model: what was measured per layer, its file, and whose it is.

A file is safetensors with one JSON document in its header. It names the format version, the model's
fingerprint and the widths that calibrated codebooks were made for; a file of another version or
another model is refused, and so is one of which a single bit was changed (:mod:`turbokv.sealed`).
"""

from __future__ import annotations

import json
import math
import pathlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from turbokv.centring import SEGMENT, KeyOffsets, Rotary
from turbokv.core import Codebook
from turbokv.fingerprint import SKETCH_SIZE as SKETCH_SIZE
from turbokv.fingerprint import Fingerprint
from turbokv.fingerprint import architecture_sha256 as architecture_sha256
from turbokv.key_map import KeyMap
from turbokv.sealed import (
    SEAL,
    DamagedFileError,
    as_number,
    as_object,
    as_text,
    check_finite,
    check_members,
    read_sealed,
    refuse_constant,
    write_sealed,
)

FORMAT = "turbokv-calibration"
# 1 had no seal, 2 no maps; their files are still read.
VERSION = 3
_SEALED_SINCE = 2
_MAPPED_SINCE = 3
# Four times the energy to quantise is four times the squared error: what a bit less would give.
_ENERGY_PER_BIT = 4.0
# SmolLM2 diverges less than fp8 with 1.3 of 4 bits lost in its weakest layer, so that is borne; a
# random Qwen2 with six lost in two layers is not far from having no cache.
_BITS_TO_LOSE = 1.5
_WIDTH_THAT_HOLDS = 2.0


class CalibrationError(ValueError):
    """A calibration file that cannot be used; the message says why."""


@dataclass(frozen=True, eq=False)
class LayerCalibration:
    """What one layer's keys and values are transformed with before the codec, and its codebooks.

    Attributes
    ----------
    offsets
        Centred keys: subtracted per segment of positions.
    k_scale, v_scale
        fp32 ``[heads, head_dim]``: channels are divided by it before compression. Engines fold K's
        into the query and V's into the output.
    v_shift
        fp32 ``[heads, head_dim]``: subtracted from values, added to outputs (probabilities sum
        to 1).
    k_codebook, v_codebook
        Calibrated levels.
    k_spread
        fp32 ``[heads]``: mean squared distance of keys from the mean key before rotary embedding.
    k_map
        Keys and their offsets are mapped by it before compression, queries by its inverse
        transpose. Never beside ``k_scale``, which is such a map too.
    """

    offsets: KeyOffsets | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    v_shift: Tensor | None = None
    k_codebook: Codebook | None = None
    v_codebook: Codebook | None = None
    k_spread: Tensor | None = None
    k_map: KeyMap | None = None

    def __post_init__(self) -> None:
        """Refuse two maps of keys, of which either was measured without the other."""
        if self.k_map is not None and self.k_scale is not None:
            raise ValueError("k_scale: wanted none beside k_map, got both")

    def share_left(self) -> float | None:
        """Return which share of the keys' energy is mean key that the offsets could not take.

        0 to below 1, over all heads; None without offsets or ``k_spread``. It is large where
        pairs of rotary channels that turn fast carry a large mean.
        """
        if self.offsets is None or self.k_spread is None:
            return None
        left = float(self.offsets.energy_left().sum())
        whole = left + float(self.k_spread.to("cpu", torch.float64).sum())
        return left / whole if whole > 0 else 0.0

    def to(self, device: torch.device) -> LayerCalibration:
        """Return the same calibration on ``device``."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return replace(
            self,
            offsets=None if self.offsets is None else self.offsets.to(device),
            k_scale=move(self.k_scale),
            v_scale=move(self.v_scale),
            v_shift=move(self.v_shift),
            k_spread=move(self.k_spread),
            k_map=None if self.k_map is None else self.k_map.to(device),
        )

    def check(self, heads: int, k_dim: int, v_dim: int) -> None:
        """Raise ValueError unless the layer's tensors fit ``heads`` KV heads of these sizes."""
        mu = None if self.offsets is None else self.offsets.mu
        for name, tensor, dim in (
            ("offsets", mu, k_dim),
            ("k_scale", self.k_scale, k_dim),
            ("v_scale", self.v_scale, v_dim),
            ("v_shift", self.v_shift, v_dim),
        ):
            if tensor is not None and tuple(tensor.shape) != (heads, dim):
                raise ValueError(
                    f"calibration {name}: wanted shape {[heads, dim]}, got {list(tensor.shape)}"
                )
        if self.k_map is not None and tuple(self.k_map.matrix.shape) != (heads, k_dim, k_dim):
            raise ValueError(
                f"calibration k_map: wanted shape {[heads, k_dim, k_dim]}, got"
                f" {list(self.k_map.matrix.shape)}"
            )

    def fold_k(self, k: Tensor) -> Tensor:
        """Bring keys ``[..., heads, tokens, head_dim]`` into the space where they are compressed.

        Divided by the channel scales, in ``k``'s dtype; or mapped, which gives float32.
        """
        if self.k_map is not None:
            return self.k_map.map_keys(k)
        return k if self.k_scale is None else k / self.k_scale[:, None].to(k.dtype)

    def unfold_k(self, k: Tensor) -> Tensor:
        """Undo :meth:`fold_k`."""
        if self.k_map is not None:
            return self.k_map.unmap_keys(k)
        return k if self.k_scale is None else k * self.k_scale[:, None].to(k.dtype)

    def scale_offset(self, offset: Tensor) -> Tensor:
        """Bring key offsets ``[..., heads, tokens, head_dim]`` into folded space."""
        if self.k_map is not None:
            return self.k_map.map_keys(offset)
        return offset if self.k_scale is None else offset / self.k_scale[:, None]

    def fold_v(self, v: Tensor) -> Tensor:
        """Shift and scale values ``[..., heads, tokens, head_dim]``."""
        v = v if self.v_shift is None else v - self.v_shift[:, None].to(v.dtype)
        return v if self.v_scale is None else v / self.v_scale[:, None].to(v.dtype)

    def unfold_v(self, v: Tensor) -> Tensor:
        """Undo :meth:`fold_v`."""
        v = v if self.v_scale is None else v * self.v_scale[:, None].to(v.dtype)
        return v if self.v_shift is None else v + self.v_shift[:, None].to(v.dtype)


_TENSORS = ("k_scale", "v_scale", "v_shift", "k_spread")


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibrations of all layers of one model.

    Attributes
    ----------
    fingerprint
        The model they were measured on.
    layers
        By layer index; layers that are not compressed are absent.
    source
        What was run to measure them, for humans.
    """

    fingerprint: Fingerprint
    layers: dict[int, LayerCalibration]
    source: dict[str, Any] = field(default_factory=dict)

    def layer(self, index: int) -> LayerCalibration | None:
        """Return the calibration of one layer, or None."""
        return self.layers.get(index)

    def check_widths(self, k_bits: int, v_bits: int) -> None:
        """Raise ValueError if calibrated codebooks are for other widths."""
        for index, layer in self.layers.items():
            for name, book, bits in (
                ("k_bits", layer.k_codebook, k_bits),
                ("v_bits", layer.v_codebook, v_bits),
            ):
                if book is not None and book.bits != bits:
                    raise ValueError(
                        f"{name}: wanted {book.bits}, the width of the calibrated codebook of"
                        f" layer {index}, got {bits}"
                    )

    def check_model(self, fingerprint: Fingerprint) -> None:
        """Raise :class:`CalibrationError` if this calibration is of another model."""
        reason = self.fingerprint.mismatch(fingerprint)
        if reason is not None:
            raise CalibrationError(f"calibration: wanted one of this model, but {reason}")

    def weak_layers(self, k_bits: int) -> dict[int, float]:
        """Return the layers whose offsets leave too much of the mean key for ``k_bits``.

        Returns
        -------
        dict
            :meth:`LayerCalibration.share_left` by layer, of the layers where what is left costs
            more than the bits beyond two, and more than 1.5: shares above 87.5% at 2 and 3 bits,
            93.8% at 4, 98.4% at 5 and 99.98% at 8.
        """
        weak = {}
        for index, layer in sorted(self.layers.items()):
            share = layer.share_left()
            if share is None:
                continue
            lost = -math.log(1.0 - share, _ENERGY_PER_BIT)
            if lost > max(_BITS_TO_LOSE, k_bits - _WIDTH_THAT_HOLDS):
                weak[index] = share
        return weak

    def weakness(self, k_bits: int) -> str | None:
        """Return a sentence for users about :meth:`weak_layers`, or None if there are none."""
        weak = self.weak_layers(k_bits)
        if not weak:
            return None
        worst = max(weak, key=lambda index: weak[index])
        times = math.sqrt(1.0 / (1.0 - weak[worst]))
        return (
            f"the offsets of centred keys leave {weak[worst]:.2%} of the keys' energy in layer"
            f" {worst} (too much in layers {', '.join(map(str, weak))}): a mean that sits in rotary"
            f" channels which turn within {SEGMENT} positions. Errors of {k_bits}-bit keys are"
            f" {times:.1f} times as large there as without it. Wider keys help (tq_k8v4), and so"
            " does leaving these layers in 16 bits (skip_layers)"
        )

    def keep(self, *names: str) -> Calibration:
        """Return a calibration with only the named parts.

        Parameters
        ----------
        names
            Among ``offsets``, ``k_scale``, ``v_scale``, ``v_shift``, ``k_codebook``,
            ``v_codebook``, ``k_spread``, ``k_map``.
        """
        known = set(LayerCalibration.__dataclass_fields__)
        unknown = set(names) - known
        if unknown:
            raise ValueError(f"names: wanted some of {sorted(known)}, got {sorted(unknown)}")
        dropped = {name: None for name in known - set(names)}
        return replace(
            self, layers={i: replace(layer, **dropped) for i, layer in self.layers.items()}
        )

    def without(self, *names: str) -> Calibration:
        """Return a calibration without the named parts, which are those of :meth:`keep`."""
        return self.keep(*(set(LayerCalibration.__dataclass_fields__) - set(names)))

    # --- files --------------------------------------------------------------------------------

    def save(self, path: str | pathlib.Path) -> None:
        """Write one safetensors file; an existing file is replaced only when complete."""
        path = pathlib.Path(path)
        tensors: dict[str, Tensor] = {}
        layers: dict[str, Any] = {}
        for index, layer in self.layers.items():
            entry: dict[str, Any] = {}
            if layer.offsets is not None:
                tensors[f"{index}.mu"] = layer.offsets.mu
                tensors[f"{index}.inv_freq"] = layer.offsets.rotary.inv_freq
                entry["interleaved"] = layer.offsets.rotary.interleaved
            for name in _TENSORS:
                tensor = getattr(layer, name)
                if tensor is not None:
                    tensors[f"{index}.{name}"] = tensor
            if layer.k_map is not None:
                tensors[f"{index}.k_map"] = layer.k_map.matrix
            for name in ("k_codebook", "v_codebook"):
                book: Codebook | None = getattr(layer, name)
                if book is not None:
                    entry[name] = {
                        "bits": book.bits,
                        "magnitudes": list(book.magnitudes),
                        "step": book.step,
                        "frac_bits": book.frac_bits,
                    }
            layers[str(index)] = entry
        header = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": {
                "config_sha256": self.fingerprint.config_sha256,
                "sketch": list(self.fingerprint.sketch),
                "name": self.fingerprint.name,
            },
            "source": self.source,
            "layers": layers,
        }
        try:
            for index, layer in self.layers.items():
                _check_numbers(index, layer)
            text = json.dumps(header, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"calibration: wanted numbers that can be used, but {error}") from None
        write_sealed(path, "path", tensors, {FORMAT: text})

    @classmethod
    def load(
        cls, path: str | pathlib.Path, *, fingerprint: Fingerprint | None = None
    ) -> Calibration:
        """Read a file written by :meth:`save`, of this version or one before.

        Parameters
        ----------
        path
            The file.
        fingerprint
            Of the model it is to be used with; another model's file is refused.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        CalibrationError
            If the file is damaged, of another kind or version, or of another model. Every bit of
            files since version 2 is under a seal; of version 1, damage within numbers that stay
            finite goes unseen.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"calibration: wanted a file, got {path}")
        try:
            tensors, metadata = read_sealed(path)
        except (DamagedFileError, OSError) as error:
            raise CalibrationError(
                f"calibration: wanted a safetensors file, got {path} ({error})"
            ) from error
        if FORMAT not in metadata:
            raise CalibrationError(f"calibration: wanted a {FORMAT} file, got {path}")
        try:
            calibration = _decode(metadata[FORMAT], tensors, SEAL in metadata)
        except _VersionError as error:
            raise CalibrationError(f"calibration: wanted {error}, got {path}") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CalibrationError(
                f"calibration: wanted a complete header and usable tensors, got {path} ({error!r})"
            ) from error
        except RecursionError as error:
            raise CalibrationError(
                f"calibration: wanted a header of few levels, got {path}"
            ) from error
        if fingerprint is not None:
            reason = calibration.fingerprint.mismatch(fingerprint)
            if reason is not None:
                raise CalibrationError(
                    f"calibration: wanted one of this model, but {reason}, got {path}"
                )
        return calibration


# --- reading: nothing in a file is believed -------------------------------------------------------


class _VersionError(ValueError):
    """A header of another version."""


def _decode(text: str, tensors: dict[str, Tensor], is_sealed: bool) -> Calibration:
    """Build what a file's header and tensors describe.

    Raises
    ------
    ValueError, TypeError, KeyError, RecursionError
        If a part is missing, is there without being known, or has a value that nothing can use.
    """
    header = json.loads(text, parse_constant=refuse_constant)
    version = header["version"]
    if type(version) is not int or version not in range(1, VERSION + 1):
        raise _VersionError(f"version 1 to {VERSION}, and it has {str(version)[:20]}")
    if is_sealed != (version >= _SEALED_SINCE):
        with_seal = f"a seal since version {_SEALED_SINCE} and none before"
        raise _VersionError(
            f"{with_seal}, and version {version} has {'one' if is_sealed else 'none'}"
        )
    check_members(header, "format", "version", "fingerprint", "source", "layers")
    if header["format"] != FORMAT:
        raise ValueError(f"format: wanted {FORMAT}, got {str(header['format'])[:40]!r}")
    found = header["fingerprint"]
    check_members(found, "config_sha256", "sketch", "name")
    left = dict(tensors)
    layers = {}
    for key, entry in as_object(header["layers"]).items():
        index = int(key)
        if str(index) != key or index < 0:
            raise ValueError(f"layers: wanted their indices, got {key[:20]!r}")
        if version < _MAPPED_SINCE and f"{index}.k_map" in left:
            raise ValueError(f"k_map: wanted none before version {_MAPPED_SINCE}, got one")
        layers[index] = _layer(index, entry, left)
    if left:
        raise ValueError(f"tensors: wanted those of the header's layers, got {sorted(left)[:3]}")
    mark = Fingerprint(
        as_text(found["config_sha256"]),
        tuple(as_number(x) for x in found["sketch"]),
        as_text(found["name"]),
    )
    return Calibration(mark, layers, as_object(header["source"]))


def _layer(index: int, entry: dict[str, Any], tensors: dict[str, Tensor]) -> LayerCalibration:
    """Build one layer from its header entry, and take its tensors out of the file's."""
    books = ("k_codebook", "v_codebook")
    check_members(entry, "interleaved", *books, optional=True)
    found: dict[str, Any] = {name: tensors.pop(f"{index}.{name}", None) for name in _TENSORS}
    if "interleaved" in entry:
        if not isinstance(entry["interleaved"], bool):
            raise TypeError(f"interleaved: wanted true or false, got {entry['interleaved']!r}")
        rotary = Rotary(tensors.pop(f"{index}.inv_freq"), entry["interleaved"])
        found["offsets"] = KeyOffsets(tensors.pop(f"{index}.mu"), rotary)
    matrix = tensors.pop(f"{index}.k_map", None)
    if matrix is not None:
        found["k_map"] = KeyMap(matrix)
    for name in books:
        if name in entry:
            book = as_object(entry[name])
            check_members(book, "bits", "magnitudes", "step", "frac_bits")
            magnitudes = tuple(as_number(x) for x in book["magnitudes"])
            found[name] = Codebook(
                book["bits"], magnitudes, as_number(book["step"]), book["frac_bits"]
            )
    layer = LayerCalibration(**found)
    _check_numbers(index, layer)
    return layer


def _check_numbers(index: int, layer: LayerCalibration) -> None:
    """Refuse tensors of other dtypes and shapes than a layer's, and numbers that nothing can use.

    Raises
    ------
    ValueError
        Naming the tensor.
    """
    tensors = {f"{index}.{name}": getattr(layer, name) for name in _TENSORS}
    if layer.offsets is not None:
        tensors[f"{index}.mu"] = layer.offsets.mu
        inv_freq = layer.offsets.rotary.inv_freq
        if inv_freq.ndim != 1 or inv_freq.dtype != torch.float64:
            raise ValueError(
                f"{index}.inv_freq: wanted float64 [rotary_dim / 2],"
                f" got {inv_freq.dtype} {list(inv_freq.shape)}"
            )
        check_finite(f"{index}.inv_freq", inv_freq)
    heads = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dims = 1 if name.endswith(".k_spread") else 2
        if tensor.ndim != dims or tensor.dtype != torch.float32 or not tensor.numel():
            raise ValueError(
                f"{name}: wanted float32 of {dims} dimensions, got {tensor.dtype}"
                f" {list(tensor.shape)}"
            )
        check_finite(name, tensor)
        least = float(tensor.min())
        if (name.endswith("_scale") and least <= 0) or (name.endswith("_spread") and least < 0):
            raise ValueError(f"{name}: wanted positive numbers, got {least}")
        heads[name] = tensor.shape[0]
    if layer.k_map is not None:
        heads[f"{index}.k_map"] = layer.k_map.num_kv_heads
    if len(set(heads.values())) > 1:
        raise ValueError(f"layer {index}: wanted one number of heads, got {heads}")
