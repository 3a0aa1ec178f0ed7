# SPDX-License-Identifier: Apache-2.0
"""safetensors files under a seal: the sha256 of all their bytes, so that none changes unnoticed.

The seal is the string ``sha256`` in the file's metadata: the hash of the whole file with 64 zeros
in the place of that string. Any program reads such a file as safetensors; one that writes it anew
breaks the seal.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import re
from typing import Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from turbokv.files import written_whole

__all__ = ["DamagedFileError", "read_sealed", "write_sealed"]

SEAL = "sha256"
_OPEN = "0" * 64
_LENGTH_BYTES = 8
# Room for the header of a file with thousands of tensors; a length beyond it is damage.
_MAX_HEADER = 16 << 20
_DTYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64")


class DamagedFileError(ValueError):
    """A file that is not what was written; the message says what is wrong with it."""


def write_sealed(
    path: str | os.PathLike[str], name: str, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a sealed safetensors file, whole or not at all.

    Parameters
    ----------
    path, name
        As for :func:`turbokv.files.check_writable`.
    tensors
        Of any device; copied to the CPU.
    metadata
        Strings for the file's header; the seal is added.

    Raises
    ------
    ValueError
        As :func:`turbokv.files.check_writable`.
    OSError
        If the disk is full, for instance. What stood at ``path`` is still there.
    """
    # clones, because tensors may share memory and safetensors refuses that
    whole = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    data = bytearray(safetensors.torch.save(whole, {**metadata, SEAL: _OPEN}))
    start = _seal_at(data, _OPEN)
    data[start : start + len(_OPEN)] = _digest(data, start).encode()
    with written_whole(path, name) as fresh, open(fresh, "wb") as file:
        file.write(data)


def read_sealed(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file, and check its seal if it has one.

    The file is read once, into memory, so that nobody can change it between check and use.

    Returns
    -------
    tensors, metadata
        On the CPU. ``metadata`` has the seal under ``sha256`` if the file had one, which was right.

    Raises
    ------
    DamagedFileError
        If the file is no whole safetensors file, or its seal is not that of its bytes.
    OSError
        If it cannot be read.
    """
    data = bytearray(pathlib.Path(path).read_bytes())
    header = _header(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DamagedFileError(f"its metadata are no strings, but {str(metadata)[:80]!r}")
    seal = metadata.get(SEAL)
    if seal is not None:
        if not re.fullmatch("[0-9a-f]{64}", seal):
            raise DamagedFileError(f"its seal is not 64 hex digits, but {seal[:80]!r}")
        found = _digest(data, _seal_at(data, seal))
        if found != seal:
            raise DamagedFileError(f"its bytes hash to {found[:12]}, its seal is {seal[:12]}")
    for key, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype not in _DTYPES:
            raise DamagedFileError(f"its tensor {key[:80]!r} has dtype {str(dtype)[:20]}")
    try:
        tensors = safetensors.torch.load(bytes(data))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise DamagedFileError(str(error)) from error
    return tensors, metadata


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """Return ``tensor``, or raise DamagedFileError if it holds NaN or infinities."""
    if not bool(torch.isfinite(tensor).all()):
        raise DamagedFileError(f"its tensor {name!r} holds NaN or infinities")
    return tensor


def _header(data: bytearray) -> dict[str, Any]:
    """Return the JSON object that a safetensors file begins with."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < _LENGTH_BYTES or length > min(_MAX_HEADER, len(data) - _LENGTH_BYTES):
        raise DamagedFileError(f"it has {len(data)} bytes, and a header of {length} is announced")
    try:
        header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise DamagedFileError("its header is no JSON object")
    return header


def _seal_at(data: bytearray, seal: str) -> int:
    """Return where the seal's digits stand: after a key that no string within the header holds."""
    key = f'"{SEAL}":"'.encode()
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    places = [found.start() for found in re.finditer(key + seal.encode() + b'"', data[:end])]
    if len(places) != 1:
        raise DamagedFileError(f"its seal stands in {len(places)} places")
    return places[0] + len(key)


def _digest(data: bytearray, seal_at: int) -> str:
    digest = hashlib.sha256(memoryview(data)[:seal_at])
    digest.update(_OPEN.encode())
    digest.update(memoryview(data)[seal_at + len(_OPEN) :])
    return digest.hexdigest()


# --- headers: nothing in a file is believed -------------------------------------------------------


def check_members(found: Any, *names: str, optional: bool = False) -> None:
    """Refuse an object of a header with other members than ``names``."""
    got = set(as_object(found))
    if got - set(names) or (not optional and got != set(names)):
        raise ValueError(f"header: wanted {', '.join(names)}, got {sorted(got)[:8]}")


def as_object(found: Any) -> dict[str, Any]:
    """Return a member of a header that is an object, or raise TypeError."""
    if not isinstance(found, dict):
        raise TypeError(f"header: wanted an object, got {type(found).__name__}")
    return found


def as_text(found: Any) -> str:
    """Return a member of a header that is a string, or raise TypeError."""
    if not isinstance(found, str):
        raise TypeError(f"header: wanted a string, got {type(found).__name__}")
    return found


def as_number(found: Any) -> float:
    """Return an int or finite float as it is: codebooks tell them apart."""
    if type(found) not in (int, float) or not math.isfinite(found):
        raise TypeError(f"header: wanted a finite number, got {str(found)[:20]!r}")
    return found  # type: ignore[no-any-return]


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and infinities: ``parse_constant`` of a header's JSON."""
    raise ValueError(f"header: wanted finite numbers, got {name}")
