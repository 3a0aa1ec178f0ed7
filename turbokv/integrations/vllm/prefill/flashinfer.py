# SPDX-License-Identifier: Apache-2.0
"""Prefill through FlashInfer's kernel, which expands compressed tiles inside: no workspace.

Imported only where ``turbokv.path`` is ``flashinfer``; needs the patched FlashInfer.
"""

from __future__ import annotations

import importlib.util
import math
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbokv.integrations.vllm.attention.layer import AttentionShape, CacheLayer
from turbokv.integrations.vllm.prefill.plan import Group

if TYPE_CHECKING:
    from turbokv.integrations.vllm.attention.scratch import Scratch

# FlashInfer recommends this for partial results of split KV.
_FLOAT_WORKSPACE_BYTES = 128 << 20
MAX_HEAD_DIM = 256


def why_unavailable() -> str | None:
    """Return why this path cannot be taken, or None."""
    if importlib.util.find_spec("flashinfer") is None:
        return "turbokv.path='flashinfer' needs the patched FlashInfer, and none is installed"
    if importlib.util.find_spec("flashinfer.turbokv") is None:
        return (
            "turbokv.path='flashinfer' needs the patched FlashInfer (make build-flashinfer), and"
            " the installed one is not"
        )
    return None


class FlashInferPrefill:
    """The wrapper of FlashInfer for layers of one shape and format, planned once a step.

    Parameters
    ----------
    layers
        The layers' caches; all of one format, since a plan fixes it.
    shape
        Of every layer's attention.
    page_size
        Tokens of a page.
    float_workspace
        What :func:`reserve` returned.
    """

    def __init__(
        self,
        layers: list[CacheLayer],
        shape: AttentionShape,
        page_size: int,
        float_workspace: Tensor,
    ) -> None:
        from turbokv.kernels.cuda.library import format_text

        texts = {(format_text(layer.k_format), format_text(layer.v_format)) for layer in layers}
        if len(texts) != 1:
            raise ValueError(
                "turbokv.path='flashinfer' wants one codebook for all layers; leave calibrated"
                " codebooks out, or take another path"
            )
        self.cache = layers[0]
        self.shape = shape
        self.page_size = page_size
        self.window_left = -1 if shape.sliding_window is None else shape.sliding_window - 1
        self._float_workspace = float_workspace
        self._wrappers: list[Any] = []
        self._copied: list[torch.cuda.Event] = []
        self._used = 0

    def start_step(self) -> None:
        """Make all wrappers free again."""
        self._used = 0

    def plan(self, group: Group, block_table: Tensor) -> Any:
        """Plan the rows of ``group``, whose pages ``block_table`` names; returns what runs them."""
        from turbokv.integrations.flashinfer import BatchPrefillWithPagedTurboKVCacheWrapper

        if self._used == len(self._wrappers):
            self._wrappers.append(BatchPrefillWithPagedTurboKVCacheWrapper(self._float_workspace))
            self._copied.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
        wrapper, copied = self._wrappers[self._used], self._copied[self._used]
        self._used += 1
        # a plan goes to the device from a pinned buffer of the wrapper's: with asynchronous
        # scheduling the last step's may not have left it yet
        copied.synchronize()
        lens = [begin + kv for begin, kv in zip(group.begins, group.kv_lens, strict=True)]
        pages = [-(-n // self.page_size) for n in lens]
        indices = torch.cat([block_table[row, :count] for row, count in enumerate(pages)])
        wrapper.plan(
            _int32(accumulate(group.q_lens, initial=0)),
            _int32(accumulate(pages, initial=0)),
            indices,
            _int32(n - (p - 1) * self.page_size for n, p in zip(lens, pages, strict=True)),
            self.shape.num_qo_heads,
            self.shape.num_kv_heads,
            self.shape.head_dim,
            self.page_size,
            self.cache.k_format,
            self.cache.v_format,
            causal=True,
            sm_scale=self.shape.sm_scale,
            window_left=self.window_left,
            logits_soft_cap=self.shape.logits_soft_cap,
        )
        copied.record()
        return wrapper


def run(
    wrapper: Any,
    layer: CacheLayer,
    q: Tensor,
    pages: Tensor,
    tile_slots: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Attend with a planned wrapper; returns the natural log-sum-exp, ``[num_heads, tokens]``."""
    _, lse = wrapper.run(
        q,
        pages,
        k_offset=layer.k_offset_rotated,
        tile_slots=tile_slots,
        window=layer.copies if tile_slots is not None else None,
        out=out,
        return_lse=True,
    )
    natural: Tensor = lse.t() * math.log(2.0)
    return natural


def reserve(memory: Scratch, device: torch.device) -> Tensor:
    """Return FlashInfer's workspace for partial results, which all layers share."""
    return memory.keep("flashinfer", _FLOAT_WORKSPACE_BYTES, torch.uint8, device)


def _int32(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device="cpu")
