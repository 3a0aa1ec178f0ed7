# SPDX-License-Identifier: Apache-2.0
"""The harness's Transformers model with the cache of a preset behind every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from turbokv.integrations.transformers import TurboKVCache
from turbokv.presets import preset_widths

# Makes an empty cache for a batch, from its attention mask (left padding).
MakeCache = Callable[[Tensor], Cache]


def cache_maker(model: Any, name: str, calibration: Any = "auto") -> MakeCache:
    """Return what makes caches called ``name``: a preset, or ``full`` for Transformers' own."""
    if name == "full":
        return lambda mask: DynamicCache(config=model.config)
    widths = preset_widths(name)
    if widths is None:
        raise ValueError(f"presets: wanted full or such as tq_k5v3, got {name!r}")
    k_bits, v_bits = widths
    return lambda mask: TurboKVCache(
        model, k_bits, v_bits, attention_mask=mask, calibration=calibration
    )


class CacheLM(HFLM):  # type: ignore[misc]
    """A loaded model whose past goes through caches of one kind.

    Answers are generated with the prompt in one forward pass, so that its tokens meet each other
    uncompressed and the answer's meet the compressed past, as on a server. Likelihoods are computed
    in chunks of ``chunk`` tokens: in a single pass nothing would ever be read from the cache.

    Parameters
    ----------
    model, tokenizer
        Of Transformers, on its device.
    make_cache
        Makes the cache of a batch.
    chunk
        Tokens of a forward pass where likelihoods are computed.
    options
        The harness's own (``batch_size``, ``max_length`` ...).
    """

    def __init__(
        self, model: Any, tokenizer: Any, make_cache: MakeCache, chunk: int, **options: Any
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", device=None, **options
        )
        self._make_cache = make_cache
        self._chunk = chunk

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return logits ``[batch, tokens, vocabulary]`` of texts that are padded on the right."""
        if attn_mask is not None or labels is not None:
            raise ValueError("attn_mask: wanted none, as of a decoder, got one")
        cache = self._make_cache(torch.ones_like(inps))
        with torch.inference_mode():
            pieces = [
                self.model(input_ids=piece, past_key_values=cache, use_cache=True).logits
                for piece in torch.split(inps, self._chunk, dim=1)
            ]
        return torch.cat(pieces, dim=1)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """Generate after prompts ``[batch, tokens]`` that are padded on the left."""
        mask = generation_kwargs.get("attention_mask")
        mask = torch.ones_like(context) if mask is None else mask
        found: Tensor = super()._model_generate(
            context, max_length, stop, past_key_values=self._make_cache(mask), **generation_kwargs
        )
        return found
