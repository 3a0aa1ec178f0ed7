# SPDX-License-Identifier: Apache-2.0
"""A calibration file as vLLM takes it: read once in a process, and only of the model served."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from turbokv.calibration import Calibration, CalibrationError
from turbokv.fingerprint import SKETCH_SIZE, Fingerprint, architecture_sha256
from turbokv.integrations.vllm.dtypes import cache_widths

_UNSUPPORTED = ("k_scale", "v_scale", "v_shift")


def load(path: str) -> Calibration:
    """Read a calibration file; every layer of a process gets the same object.

    Raises
    ------
    FileNotFoundError, CalibrationError
        As :meth:`Calibration.load`.
    """
    found = pathlib.Path(path)
    if not found.is_file():
        raise FileNotFoundError(f"turbokv.calibration: wanted a file, got {path!r}")
    stat = found.stat()
    return _load(str(found.resolve()), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _load(path: str, mtime_ns: int, size: int) -> Calibration:
    return Calibration.load(path)


def problems(path: str, hf_config: Any, cache_dtype: str) -> Iterator[str]:
    """Say why a file cannot be used with a model and cache dtype, as far as configs tell."""
    try:
        calibration = load(path)
        calibration.check_model(Fingerprint(architecture_sha256(hf_config), (), "the model served"))
        check_parts(calibration, cache_dtype)
    except ValueError as error:  # CalibrationError is one
        yield f"turbokv.calibration={path!r}: {error}"


def check_parts(calibration: Calibration, cache_dtype: str) -> None:
    """Refuse a calibration that this backend cannot use.

    Raises
    ------
    CalibrationError, ValueError
        If it has channel scales or shifts, or codebooks of other widths.
    """
    calibration.check_widths(*cache_widths(cache_dtype))
    for index, layer in calibration.layers.items():
        present = [name for name in _UNSUPPORTED if getattr(layer, name) is not None]
        if present:
            raise CalibrationError(
                f"calibration: wanted offsets and codebooks only, got {present} in layer {index};"
                " calibrate again without them"
            )


def check_weights(calibration: Calibration, model: Any, hidden_size: int) -> bool:
    """Compare the file's samples of the input embedding with those rows that this rank holds.

    Parameters
    ----------
    calibration
        From the file.
    model
        vLLM's, loaded.
    hidden_size
        Of the text model, to tell its embedding from others.

    Returns
    -------
    bool
        Whether there was anything to compare: later pipeline stages have no embedding.

    Raises
    ------
    CalibrationError
        If they are another model's.
    """
    sketch = calibration.fingerprint.sketch
    embedding = _embedding(model, hidden_size)
    if embedding is None or len(sketch) != SKETCH_SIZE:
        return False
    shard = embedding.shard_indices
    first, last = shard.org_vocab_start_index, shard.org_vocab_end_index
    step = int(embedding.org_vocab_size) * hidden_size // SKETCH_SIZE
    at = torch.arange(SKETCH_SIZE, dtype=torch.int64, device="cpu") * step
    row, column = at // hidden_size, at % hidden_size
    held = (row >= first) & (row < last)
    if not bool(held.any()):
        return False
    weight = embedding.weight.detach()
    rows, columns = (x[held].to(weight.device) for x in (row - first, column))
    mine = tuple(weight[rows, columns].float().cpu().tolist())
    theirs = tuple(value for value, is_held in zip(sketch, held.tolist(), strict=True) if is_held)
    print_of_file = calibration.fingerprint
    name = print_of_file.name
    reason = Fingerprint("", theirs, name).mismatch(Fingerprint("", mine, "the model served"))
    if reason is not None:
        raise CalibrationError(f"turbokv.calibration: wanted one of this model, but {reason}")
    return True


def _embedding(model: Any, hidden_size: int) -> Any | None:
    """Return the text model's input embedding if its weights are plain numbers, else None."""
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    for module in model.modules():
        if (
            isinstance(module, VocabParallelEmbedding)
            and not isinstance(module, ParallelLMHead)
            and module.embedding_dim == hidden_size
        ):
            weight = getattr(module, "weight", None)  # quantised embeddings have others
            if not isinstance(weight, Tensor) or not weight.is_floating_point():
                return None
            return module if weight.shape[1:] == (hidden_size,) else None
    return None
