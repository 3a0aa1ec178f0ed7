# SPDX-License-Identifier: Apache-2.0
"""How wide a published checkpoint's weights are, and which modules it leaves at 16 bits."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Where the many quantisers write their width.
_WIDTH_KEYS = ("bits", "w_bit", "wbits", "nbits", "num_bits", "weight_bits", "bit")
# Where they list what they leave alone.
_SKIP_KEYS = (
    *("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers", "exclude"),
    *("exclude_modules", "skip_modules", "modules_not_to_quantize"),
)
# Widths that a method has by itself. The longer names come first: they hold the shorter ones.
_METHOD_BITS = (
    *(("mxfp4", 4), ("nvfp4", 4), ("fp4", 4), ("mxfp6", 6), ("mxfp8", 8), ("fp8", 8)),
    *(("float8", 8), ("bitnet", 2), ("eetq", 8), ("int8", 8), ("int4", 4), ("uint4", 4)),
    *(("int2", 2), ("w4a", 4), ("w8a", 8), ("nf4", 4)),
)
# Keys that speak of something else than weights.
_OTHERS = re.compile(r"activation|input|output|cache|bias|version|ignore|exclude|skip|convert")
# What a weight is, in a name that speaks of activations too: Int8DynamicActivationInt4WeightConfig.
_OWN_WIDTH = re.compile(r"(?:int|float|fp)(\d)_?weight")
# A scale for so many weights of 4 bits: bits more a weight.
_NVFP4_OVERHEAD = 8 / 16
_GROUP_OVERHEAD = 32 / 128  # a 16-bit scale and zero for 128, as AWQ and GPTQ store them


@dataclass(frozen=True)
class Quantisation:
    """Weights of a checkpoint.

    Attributes
    ----------
    bits
        Of the weights of linear layers; 16 if they are not quantised, None if that is not known.
    skipped
        Patterns of modules that stay at 16 bits.
    overhead
        Bits more a weight for scales.
    """

    bits: int | None
    skipped: tuple[str, ...] = ()
    overhead: float = 0.0

    def skips(self, module: str) -> bool:
        """Whether the checkpoint keeps this module at 16 bits.

        Patterns are what quantisers write: a whole path, a part of one (``lm_head``,
        ``self_attn``), shell wildcards, or ``re:`` and a regular expression.
        """
        return any(_matches(pattern, module) for pattern in self.skipped)

    def bits_of(self, module: str) -> float:
        """Return the bits of a weight in this module, scales included."""
        if self.bits is None or self.bits >= 16 or self.skips(module):
            return 16.0
        return self.bits + self.overhead


def overhead(bits: int, method: str = "") -> float:
    """Return the bits that scales add to every weight of ``bits``."""
    if bits >= 8:
        return 0.0
    return _NVFP4_OVERHEAD if "nvfp4" in method else _GROUP_OVERHEAD


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error:
            return False
    # multi-modal checkpoints put the decoder in a folder of its own
    pattern = re.sub(r"\blanguage_model\.", "", pattern)
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"{pattern}.*")
    return f".{pattern}." in f".{module}." or f".{pattern}." in f".model.{module}."


def _words(value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield every key and plain value of a nested config, the outermost first."""
    if depth > 4:
        return
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(entry, (Mapping, list)):
                yield str(key), entry
        for key, entry in value.items():
            # widths of activations and caches are not those of weights
            if isinstance(entry, (Mapping, list)) and not _OTHERS.search(str(key)):
                yield from _words(entry, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            yield from _words(entry, depth + 1)


def _bits(quantised: Mapping[str, Any]) -> tuple[int | None, str]:
    """Return the width of the weights, and the word that named the format."""
    if quantised.get("load_in_8bit"):
        return 8, "int8"
    if quantised.get("load_in_4bit"):
        return 4, "nf4"
    words = list(_words(quantised))
    names = [v.lower() for k, v in words if isinstance(v, str) and not _OTHERS.search(k)]
    method = next((name for name in names if "nvfp4" in name), "")
    for key, value in words:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if key in _WIDTH_KEYS and is_number and 1 <= value <= 16:
            return value, method
    if quantised.get("quant_method") == "aqlm":
        group = quantised.get("num_codebooks", 1) * quantised.get("nbits_per_codebook", 16)
        return max(1, round(group / quantised.get("in_group_size", 8))), "aqlm"
    for name in names:
        found = _OWN_WIDTH.search(name)
        if found:
            return int(found[1]), name
    for name in names:
        for word, bits in _METHOD_BITS:
            if word in name:
                return bits, name
    return None, method


def read_quantisation(quantised: Any) -> Quantisation:
    """Read a config's ``quantization_config``.

    Raises
    ------
    TypeError
        If it is no object.
    """
    if not quantised:
        return Quantisation(16)
    if not isinstance(quantised, Mapping):
        raise TypeError(f"config.quantization_config: wanted an object, got {quantised!r}")
    skipped: list[str] = []
    for key in _SKIP_KEYS:
        value = quantised.get(key)
        if isinstance(value, (list, tuple)):
            skipped += [str(entry) for entry in value]
        elif isinstance(value, str):
            skipped.append(value)
    # GPTQModel writes a sign before a regular expression
    dynamic = quantised.get("dynamic")
    if isinstance(dynamic, Mapping):
        skipped += [f"re:{str(key)[2:]}" for key in dynamic if str(key).startswith("-:")]
    bits, method = _bits(quantised)
    return Quantisation(bits, tuple(skipped), 0.0 if bits is None else overhead(bits, method))
