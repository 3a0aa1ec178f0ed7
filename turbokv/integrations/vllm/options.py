# SPDX-License-Identifier: Apache-2.0
"""Options of the backend, given as ``additional_config={"turbokv": {...}}``."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from turbokv.paged import TILE
from turbokv.window_pool import FRACTION, SINKS, WINDOW

Path = Literal["native_tq", "flash_attn", "flashinfer"]
Decode = Literal["fused", "decompress"]
KEY = "turbokv"
AUTO, WEIGHTS, NONE = "auto", "weights", "none"


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"turbokv.{name}: wanted an integer, got {value!r}")
    if value < least:
        raise ValueError(f"turbokv.{name}: wanted {least} or more, got {value}")
    return value


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"turbokv.{name}: wanted one of {list(choices)}, got {value!r}")


@dataclass(frozen=True)
class Options:
    """What can be chosen in addition to the cache dtype.

    Attributes
    ----------
    path
        Who attends in prefill. ``native_tq``: fresh tokens meet their own 16-bit keys and values
        and older ones are expanded for FlashAttention; ``flash_attn``: everything is expanded from
        the compressed cache; ``flashinfer``: FlashInfer expands inside its kernel.
    decode
        ``fused`` attends to compressed pages in CUDA graphs. ``decompress`` expands them for
        FlashAttention at every step, for comparisons only.
    window, sinks
        Newest and first tokens of a request that are also kept in 16 bits; 0 and 0 keep none.
    window_pool_fraction
        Largest share of the cache's memory for those copies; less is taken if ``max_num_seqs``
        requests need less.
    recompute_window
        Whether the newest ``window`` tokens of a prompt are computed even if they are in the prefix
        cache, so that they are in 16 bits; otherwise they are read compressed after such a hit.
    workspace_tokens
        Tokens of one layer that are expanded at a time; bounds the memory of prefill.
    skip_layers
        Layers to leave in 16 bits: indices, or ``"sliding_window"`` for all of that kind.
    calibration
        How keys are centred. ``auto``: by the means of the keys of random token ids, for which the
        model is run when it is loaded (seconds); by the biases of keys alone where it cannot be, or
        where a KV connector carries pages to others. ``weights``: by those biases alone. ``none``:
        not at all. Otherwise a file of ``turbokv calibrate``, which must be of this model.
    """

    path: Path = "native_tq"
    decode: Decode = "fused"
    window: int = WINDOW
    sinks: int = SINKS
    window_pool_fraction: float = FRACTION
    recompute_window: bool = True
    workspace_tokens: int = 32_768
    skip_layers: tuple[str, ...] = ()
    calibration: str = AUTO

    def __post_init__(self) -> None:
        """Refuse what makes no sense, naming the option."""
        _choice("path", self.path, get_args(Path))
        _choice("decode", self.decode, get_args(Decode))
        _integer("window", self.window, 0)
        _integer("sinks", self.sinks, 0)
        if self.sinks > TILE:
            raise ValueError(f"turbokv.sinks: wanted at most {TILE}, got {self.sinks}")
        _integer("workspace_tokens", self.workspace_tokens, TILE)
        if self.workspace_tokens % TILE:
            raise ValueError(
                f"turbokv.workspace_tokens: wanted a multiple of {TILE},"
                f" got {self.workspace_tokens}"
            )
        share = self.window_pool_fraction
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise TypeError(f"turbokv.window_pool_fraction: wanted a number, got {share!r}")
        if not 0 <= share <= 0.5:
            raise ValueError(f"turbokv.window_pool_fraction: wanted 0 to 0.5, got {share}")
        if not isinstance(self.recompute_window, bool):
            raise TypeError(
                f"turbokv.recompute_window: wanted true or false, got {self.recompute_window!r}"
            )
        if not isinstance(self.calibration, str):
            raise TypeError(
                f"turbokv.calibration: wanted '{AUTO}', '{WEIGHTS}', '{NONE}' or a file of"
                f" `turbokv calibrate`, got {self.calibration!r}"
            )
        path = self.calibration_file
        if path is not None and not pathlib.Path(path).is_file():
            raise ValueError(
                f"turbokv.calibration: wanted a file of `turbokv calibrate`, '{AUTO}', '{WEIGHTS}'"
                f" or '{NONE}', got {path!r}"
            )

    @property
    def calibration_file(self) -> str | None:
        """The calibration file, or None if keys are centred in another way or not at all."""
        return None if self.calibration in (AUTO, WEIGHTS, NONE) else self.calibration

    @property
    def keeps_window(self) -> bool:
        """Whether any token also has a 16-bit copy."""
        return self.window + self.sinks > 0 and self.window_pool_fraction > 0

    @classmethod
    def from_config(cls, additional_config: Any) -> Options:
        """Read the options out of vLLM's ``additional_config``.

        Raises
        ------
        TypeError, ValueError
            Naming the option, what was wanted and what was got; an unknown key is refused.
        """
        found = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if found is None:
            return cls()
        if not isinstance(found, Mapping):
            raise TypeError(f"additional_config[{KEY!r}]: wanted a mapping, got {found!r}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(map(str, set(found) - known))
        if unknown:
            raise ValueError(f"additional_config[{KEY!r}]: wanted {sorted(known)}, got {unknown}")
        values = dict(found)
        if "skip_layers" in values:
            values["skip_layers"] = _skip_layers(values["skip_layers"])
        return cls(**values)


def _skip_layers(value: Any) -> tuple[str, ...]:
    wanted = "a list of layer indices and 'sliding_window'"
    if isinstance(value, (str, bytes)) or not isinstance(value, (list, tuple)):
        raise TypeError(f"turbokv.skip_layers: wanted {wanted}, got {value!r}")
    for item in value:
        is_index = isinstance(item, int) and not isinstance(item, bool) and item >= 0
        if not (is_index or item == "sliding_window" or (isinstance(item, str) and item.isdigit())):
            raise ValueError(f"turbokv.skip_layers: wanted {wanted}, got {item!r}")
    return tuple(str(item) for item in value)
