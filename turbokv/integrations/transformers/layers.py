# SPDX-License-Identifier: Apache-2.0
"""Layers of the compressed cache: attention alone, and attention beside a recurrent state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from turbokv.centring import KeyOffsets
from turbokv.codec import TurboKVCodec
from turbokv.integrations.transformers import checks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from turbokv.calibration import LayerCalibration


DEFAULT_WINDOW = 128
DEFAULT_SINKS = 4


def sees_everything(layer: object, config: PreTrainedConfig) -> bool:
    """Return whether a layer of ``DynamicCache`` keeps keys and values of the whole context.

    So does a layer whose window is as long as the longest context (Phi-3.5: 262144 for 131072
    tokens).
    """
    if type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
        return True
    sliding = (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer)
    if type(layer) not in sliding:
        return False
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return isinstance(limit, int) and limit <= layer.sliding_window  # type: ignore[attr-defined]


class Options:
    """What all layers of one cache share."""

    def __init__(
        self,
        k_bits: int,
        v_bits: int,
        window: int,
        sinks: int,
        codec_options: dict[str, Any],
    ) -> None:
        self.k_bits = k_bits
        self.v_bits = v_bits
        self.window = window
        self.sinks = sinks
        self.codec_options = codec_options
        self._codecs: dict[tuple[Any, ...], TurboKVCodec] = {}

    def codec(
        self, head_dim: int, device: torch.device, layer: LayerCalibration | None
    ) -> TurboKVCodec:
        """Return the codec of a layer; layers without own codebooks share one."""
        books: dict[str, Any] = (
            {}
            if layer is None
            else {"k_codebook": layer.k_codebook, "v_codebook": layer.v_codebook}
        )
        key = (head_dim, device, books.get("k_codebook"), books.get("v_codebook"))
        if key not in self._codecs:
            self._codecs[key] = TurboKVCodec(
                head_dim, self.k_bits, self.v_bits, device=device, **books, **self.codec_options
            )
        return self._codecs[key]


class TurboKVLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's compressed keys and values, recent window and sinks.

    Shapes are Transformers' ``[batch, num_kv_heads, tokens, head_dim]``. Every tensor that the
    layer holds is exactly as long as its tokens; :meth:`nbytes` adds up their storages.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        options: Options,
        *,
        calibration: LayerCalibration | None = None,
        first_position: int = 0,
        left_padding: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._options = options
        self._calibration = calibration
        self._first_position = first_position
        self._left_padding = left_padding
        self._padding: list[int] = []
        self._compressed = 0

    # --- life ---------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty stores that fit the first keys and values."""
        batch, heads, _, k_dim = key_states.shape
        v_dim = value_states.shape[-1]
        self.dtype, self.device = key_states.dtype, key_states.device
        # 16-bit models keep their own dtype; fp32 rounds to fp16, saturating, four times finer than
        # bf16
        self._held_dtype = self.dtype if self.dtype.itemsize == 2 else torch.float16
        # the codec reads and gives 32 bits at most
        self._codec_dtype = self.dtype if self.dtype.itemsize <= 4 else torch.float32
        calibration = self._calibration
        if calibration is not None:
            calibration = self._calibration = calibration.to(self.device)
            calibration.check(heads, k_dim, v_dim)
        self._offsets: KeyOffsets | None = calibration.offsets if calibration else None
        self._k_codec = self._options.codec(k_dim, self.device, calibration)
        self._v_codec = self._options.codec(v_dim, self.device, calibration)
        k_fmt, v_fmt = self._k_codec.vector_format("k"), self._v_codec.vector_format("v")

        def empty(dim: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((batch, heads, 0, dim), dtype=dtype, device=self.device)

        self._k_packed = empty(k_fmt.packed_dim, torch.uint8)
        self._v_packed = empty(v_fmt.packed_dim, torch.uint8)
        self._k_norms = empty(1, k_fmt.norm_dtype)[..., 0]
        self._v_norms = empty(1, v_fmt.norm_dtype)[..., 0]
        self._k_recent, self._v_recent = (
            empty(k_dim, self._held_dtype),
            empty(v_dim, self._held_dtype),
        )
        sinks = (batch, heads, self._options.sinks)
        self._k_sinks = torch.zeros((*sinks, k_dim), dtype=self._held_dtype, device=self.device)
        self._v_sinks = torch.zeros((*sinks, v_dim), dtype=self._held_dtype, device=self.device)
        self._padding = self._padding_for(batch)
        self._compressed = 0
        self.is_initialized = True

    def _padding_for(self, batch: int) -> list[int]:
        if self._left_padding is None:
            return [0] * batch
        given = [int(p) for p in self._left_padding.tolist()]
        if batch % len(given):
            raise ValueError(
                f"left_padding: wanted one entry per sequence ({batch}), got {len(given)}"
            )
        # beam search and num_return_sequences repeat every prompt
        return [p for p in given for _ in range(batch // len(given))]

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self._compressed = 0
        for name in list(self._tensors()):
            delattr(self, name)

    # --- the main job -------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens and return all keys and values, the new ones untouched.

        Parameters
        ----------
        key_states, value_states
            ``[batch, num_kv_heads, new tokens, head_dim]``, keys with their positions embedded.

        Returns
        -------
        tuple
            Keys and values of all tokens in the dtype of ``key_states``; not held by the cache.

        Raises
        ------
        ValueError
            If keys and values are of different batches, heads or lengths, or carry gradients.
        """
        checks.check_states(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self._past()
        keys = torch.cat([past[0], self._k_recent.to(self.dtype), key_states], dim=2)
        values = torch.cat([past[1], self._v_recent.to(self.dtype), value_states], dim=2)
        leaving = max(0, keys.shape[2] - self._compressed - self._options.window)
        start, end = self._compressed, self._compressed + leaving
        if leaving:
            self._append(keys[:, :, start:end], values[:, :, start:end])
        self._k_recent = self._held(keys[:, :, end:])
        self._v_recent = self._held(values[:, :, end:])
        return keys, values

    def _held(self, x: Tensor) -> Tensor:
        """Copy to the held dtype: a view would keep the whole transient tensor alive."""
        if x.dtype == self._held_dtype:
            return x.clone(memory_format=torch.contiguous_format)
        limit = torch.finfo(self._held_dtype).max
        return x.clamp(-limit, limit).to(self._held_dtype).contiguous()

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Compress the tokens that follow the compressed ones and keep a copy of sinks."""
        start, count = self._compressed, keys.shape[2]
        layer = self._calibration
        for b, padding in enumerate(self._padding):
            low, high = max(padding, start), min(padding + self._options.sinks, start + count)
            if low < high:
                into = slice(low - padding, high - padding)
                self._k_sinks[b, :, into] = self._held(keys[b, :, low - start : high - start])
                self._v_sinks[b, :, into] = self._held(values[b, :, low - start : high - start])
        keys, values = keys.to(self._codec_dtype), values.to(self._codec_dtype)
        if layer is not None:
            keys, values = layer.fold_k(keys), layer.fold_v(values)
        offset = self._offset(start, count)
        k_packed, k_norms = self._k_codec.compress_k(keys, offset=offset)
        v_packed, v_norms = self._v_codec.compress_v(values)
        self._k_packed = torch.cat([self._k_packed, k_packed], dim=2)
        self._v_packed = torch.cat([self._v_packed, v_packed], dim=2)
        self._k_norms = torch.cat([self._k_norms, k_norms], dim=2)
        self._v_norms = torch.cat([self._v_norms, v_norms], dim=2)
        self._compressed += count

    def _past(self) -> tuple[Tensor, Tensor]:
        """Decompress all compressed tokens and put the sinks' 16-bit copies in place."""
        layer = self._calibration
        offset = self._offset(0, self._compressed)
        is_mapped = layer is not None and layer.k_map is not None
        keys = self._k_codec.decompress_k(
            self._k_packed,
            self._k_norms,
            offset=offset,
            # a mapped key is rounded to 16 bits once, in the space that attention reads
            dtype=torch.float32 if is_mapped else self._codec_dtype,
        )
        values = self._v_codec.decompress_v(self._v_packed, self._v_norms, dtype=self._codec_dtype)
        if layer is not None:
            keys, values = layer.unfold_k(keys), layer.unfold_v(values)
        keys, values = keys.to(self.dtype), values.to(self.dtype)
        for b, padding in enumerate(self._padding):
            high = min(padding + self._options.sinks, self._compressed)
            if padding < high:
                keys[b, :, padding:high] = self._k_sinks[b, :, : high - padding].to(self.dtype)
                values[b, :, padding:high] = self._v_sinks[b, :, : high - padding].to(self.dtype)
        return keys, values

    def _offset(self, start: int, count: int) -> Tensor | None:
        """Key offsets of cache slots, by each sequence's own positions (padding comes before 0)."""
        if self._offsets is None or count == 0:
            return None
        layer = self._calibration
        rows = {
            padding: self._offsets.at(self._first_position + start - padding, count)
            for padding in set(self._padding)
        }
        offset = (
            torch.stack([rows[padding] for padding in self._padding]) if len(rows) > 1 else None
        )
        if offset is None:
            offset = next(iter(rows.values()))[None]
        return offset if layer is None else layer.scale_offset(offset)

    # --- what Transformers asks ---------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self._compressed + int(self._k_recent.shape[2]) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys' length and offset for the attention mask."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the layer grows without limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens.

        Parameters
        ----------
        tokens_to_remove
            As in Transformers: a negative number removes that many tokens, a positive one is the
            length to keep.

        Notes
        -----
        Tokens that were compressed stay compressed, so right after a deep crop the recent window is
        shorter than usual and grows again.
        """
        length = self.get_seq_length()
        keep = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        keep = max(0, keep)
        if keep >= length:
            return
        if keep < self._compressed:
            self._compressed = keep
            for name in ("_k_packed", "_v_packed", "_k_norms", "_v_norms"):
                setattr(self, name, getattr(self, name)[:, :, :keep].clone())
        recent = keep - self._compressed
        self._k_recent = self._k_recent[:, :, :recent].clone()
        self._v_recent = self._v_recent[:, :, :recent].clone()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence ``i`` continue sequence ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (int64 or bool), in that order."""
        if not self.is_initialized:
            return
        indices = indices.to(self.device)
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        for name, tensor in self._tensors().items():
            setattr(self, name, tensor.index_select(0, indices))
        self._padding = [self._padding[i] for i in indices.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        if not self.is_initialized:
            return
        for name, tensor in self._tensors().items():
            setattr(self, name, tensor.repeat_interleave(repeats, dim=0))
        self._padding = [p for p in self._padding for _ in range(repeats)]

    def offload(self) -> None:
        """Move the compressed tensors to the CPU."""
        if self.is_initialized:
            for name, tensor in self._tensors().items():
                setattr(self, name, tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the compressed tensors back to the layer's device."""
        if self.is_initialized:
            for name, tensor in self._tensors().items():
                setattr(self, name, tensor.to(self.device, non_blocking=True))

    # --- memory -------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        names = [
            f"_{role}_{part}" for role in "kv" for part in ("packed", "norms", "recent", "sinks")
        ]
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def nbytes(self) -> int:
        """Return the bytes of the storages behind every tensor held, each counted once."""
        storages = {t.untyped_storage().data_ptr(): t for t in self._tensors().values()}
        return sum(t.untyped_storage().nbytes() for t in storages.values())


class TurboKVHybridLayer(LinearAttentionLayer, TurboKVLayer):  # type: ignore[misc]
    """Compressed attention in a layer that has a recurrent state too (Falcon-H1, Zamba2).

    The state is constant in size and stays as Transformers keeps it, and what it cannot do (be
    cropped) the layer cannot.
    """

    is_compileable = False

    def __init__(self, options: Options, *, number_of_states: int = 1, **kwargs: Any) -> None:
        TurboKVLayer.__init__(self, options, **kwargs)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make the stores of keys and values (two positional arguments), or those of a state."""
        if args:
            TurboKVLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget all tokens."""
        LinearAttentionLayer.reset(self)
        TurboKVLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens, where Transformers can take them out of the state."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        TurboKVLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence ``i`` continue sequence ``beam_idx[i]``."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        TurboKVLayer.batch_select_indices(self, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (int64 or bool), in that order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = state.repeat_interleave(repeats, dim=0)
        TurboKVLayer.batch_repeat_interleave(self, repeats)

    def offload(self) -> None:
        """Move the tensors to the CPU."""
        LinearAttentionLayer.offload(self)
        TurboKVLayer.offload(self)

    def prefetch(self) -> None:
        """Move the tensors back to the layer's device."""
        LinearAttentionLayer.prefetch(self)
        TurboKVLayer.prefetch(self)

    def nbytes(self) -> int:
        """Return the bytes of the storages behind every tensor held, states included."""
        states = [*self.conv_states.values(), *self.recurrent_states.values()]
        held = sum(x.untyped_storage().nbytes() for x in states if x is not None)
        return int(TurboKVLayer.nbytes(self) + held)
