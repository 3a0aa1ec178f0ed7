# SPDX-License-Identifier: Apache-2.0
"""The calibration of one model: what was measured per layer, its file, and whose it is.

A file is safetensors with one JSON document in its header. It names the format version, the model's
fingerprint and the widths that calibrated codebooks were made for; a file of another version or
another model is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from turbokv.centring import SEGMENT, KeyOffsets, Rotary
from turbokv.core import Codebook
from turbokv.files import written_whole

FORMAT = "turbokv-calibration"
SKETCH_SIZE = 64
VERSION = 1
# Embedding samples of the same weights in another dtype agree to bf16's rounding (2^-9); those of
# an unrelated model do not agree at all.
SKETCH_TOLERANCE = 0.02
# Four times the energy to quantise is four times the squared error: what a bit less would give.
_ENERGY_PER_BIT = 4.0
# SmolLM2 diverges less than fp8 with 1.3 of 4 bits lost in its weakest layer, so that is borne; a
# random Qwen2 with six lost in two layers is not far from having no cache.
_BITS_TO_LOSE = 1.5
_WIDTH_THAT_HOLDS = 2.0


class CalibrationError(ValueError):
    """A calibration file that cannot be used; the message says why."""


@dataclass(frozen=True)
class Fingerprint:
    """Which model a calibration belongs to.

    Attributes
    ----------
    config_sha256
        Hash of the fields of the config that shape keys and values.
    sketch
        SKETCH_SIZE samples of the input embedding, to tell models of one architecture apart.
    name
        For messages only.
    """

    config_sha256: str
    sketch: tuple[float, ...]
    name: str = ""

    def mismatch(self, other: Fingerprint) -> str | None:
        """Return why the two differ, or None.

        Where ``other`` has no samples, as when only a config is at hand, the architecture decides.
        """
        if self.config_sha256 != other.config_sha256:
            return (
                f"its architecture hashes to {self.config_sha256[:12]} ({self.name or 'unnamed'}),"
                f" this model's to {other.config_sha256[:12]} ({other.name or 'unnamed'})"
            )
        if not other.sketch:
            return None
        a, b = (
            torch.tensor(sketch, dtype=torch.float64, device="cpu")
            for sketch in (self.sketch, other.sketch)
        )
        if a.shape != b.shape or float((a - b).norm()) > SKETCH_TOLERANCE * float(b.norm()):
            return (
                f"the architecture is the same but the weights are not"
                f" ({self.name or 'unnamed'} against {other.name or 'unnamed'})"
            )
        return None


def architecture_sha256(config: Any) -> str:
    """Hash what shapes a model's keys and values.

    Parameters
    ----------
    config
        As of Transformers (vLLM's ``hf_config`` is one). Written so that defaults spelt out or
        left out, and integers or floats, give the same hash: engines complete configs differently.
    """
    get_text = getattr(config, "get_text_config", None)
    text = config if get_text is None else get_text(decoder=True)
    heads = int(text.num_attention_heads)
    fields = {
        "model_type": str(text.model_type),
        "hidden_size": int(text.hidden_size),
        "num_hidden_layers": int(text.num_hidden_layers),
        "num_attention_heads": heads,
        "num_key_value_heads": int(getattr(text, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(text, "head_dim", None) or int(text.hidden_size) // heads),
        "rope": _rope_fields(text),
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _rope_fields(text: Any) -> Any:
    """Return kind, base and factor of the rotary embedding, by kind of layer where they differ."""
    found = getattr(text, "rope_parameters", None)
    if not found:
        scaling = getattr(text, "rope_scaling", None) or {}
        found = {"rope_theta": getattr(text, "rope_theta", None), **scaling}

    def one(entry: Any) -> list[Any]:
        theta, factor = entry.get("rope_theta"), entry.get("factor")
        return [
            str(entry.get("rope_type") or entry.get("type") or "default"),
            None if theta is None else float(theta),
            None if factor is None else float(factor),
        ]

    nested = {key: one(entry) for key, entry in found.items() if isinstance(entry, dict)}
    return nested or one(found)


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
    """

    offsets: KeyOffsets | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    v_shift: Tensor | None = None
    k_codebook: Codebook | None = None
    v_codebook: Codebook | None = None
    k_spread: Tensor | None = None

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

    def fold_k(self, k: Tensor) -> Tensor:
        """Divide keys ``[..., heads, tokens, head_dim]`` by the channel scales."""
        return k if self.k_scale is None else k / self.k_scale[:, None].to(k.dtype)

    def unfold_k(self, k: Tensor) -> Tensor:
        """Undo :meth:`fold_k`."""
        return k if self.k_scale is None else k * self.k_scale[:, None].to(k.dtype)

    def scale_offset(self, offset: Tensor) -> Tensor:
        """Bring key offsets ``[..., heads, tokens, head_dim]`` into folded space."""
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
            ``v_codebook``, ``k_spread``.
        """
        known = set(LayerCalibration.__dataclass_fields__)
        unknown = set(names) - known
        if unknown:
            raise ValueError(f"names: wanted some of {sorted(known)}, got {sorted(unknown)}")
        dropped = {name: None for name in known - set(names)}
        return replace(
            self, layers={i: replace(layer, **dropped) for i, layer in self.layers.items()}
        )

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
        # clones, because layers may share a tensor of rotary frequencies and safetensors refuses
        # that
        whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        with written_whole(path, "path") as fresh:
            save_file(whole, fresh, metadata={FORMAT: json.dumps(header)})

    @classmethod
    def load(
        cls, path: str | pathlib.Path, *, fingerprint: Fingerprint | None = None
    ) -> Calibration:
        """Read a file written by :meth:`save`.

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
            If the file is damaged, of another kind or version, or of another model.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"calibration: wanted a file, got {path}")
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(FORMAT)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, OSError) as error:
            raise CalibrationError(
                f"calibration: wanted a safetensors file, got {path} ({error})"
            ) from error
        if text is None:
            raise CalibrationError(f"calibration: wanted a {FORMAT} file, got {path}")
        try:
            header = json.loads(text)
            version = header["version"]
            if version != VERSION:
                raise CalibrationError(f"calibration: wanted version {VERSION}, got {version}")
            found = header["fingerprint"]
            calibration = cls(
                Fingerprint(found["config_sha256"], tuple(found["sketch"]), found["name"]),
                {int(i): _layer(int(i), e, tensors) for i, e in header["layers"].items()},
                header["source"],
            )
        except CalibrationError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(
                f"calibration: wanted a complete header, got {path} ({error!r})"
            ) from error
        if fingerprint is not None:
            calibration.check_model(fingerprint)
        return calibration


def _layer(index: int, entry: dict[str, Any], tensors: dict[str, Tensor]) -> LayerCalibration:
    """Build one layer from its header entry and the file's tensors."""
    offsets = None
    if "interleaved" in entry:
        rotary = Rotary(tensors[f"{index}.inv_freq"], bool(entry["interleaved"]))
        offsets = KeyOffsets(tensors[f"{index}.mu"], rotary)
    found: dict[str, Any] = {name: tensors.get(f"{index}.{name}") for name in _TENSORS}
    for name in ("k_codebook", "v_codebook"):
        if name in entry:
            book = dict(entry[name])
            found[name] = Codebook(
                book["bits"], tuple(book["magnitudes"]), book["step"], book["frac_bits"]
            )
    return LayerCalibration(offsets=offsets, **found)
