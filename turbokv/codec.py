# SPDX-License-Identifier: Apache-2.0
"""TurboKVCodec: compress and decompress keys and values, rotate queries, un-rotate outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from turbokv import core, kernels
from turbokv.core import DEFAULT_SEED, Codebook, Role, ScaleRule, VectorFormat
from turbokv.kernels import arguments

DEFAULT_BITS = 4
# Chosen by KL on a real model, not by MSE: README, "Which scale".
DEFAULT_K_RULE: ScaleRule = "unbiased"
DEFAULT_V_RULE: ScaleRule = "least_squares"


class TurboKVCodec:
    """Codec of one head size: K and V each have a width, a rotation and a scale rule.

    Parameters
    ----------
    head_dim
        Elements per vector, 8 to 512. Sizes that are no power of two are zero-padded to the next
        one (96 is stored as 128, a third more bytes).
    k_bits, v_bits
        Widths, 2 to 8; 4 unless ``bit_width`` says otherwise. ``v_bits`` defaults to ``bit_width``
        if that is given, else to ``k_bits``.
    bit_width
        Width of both; ``k_bits`` and ``v_bits`` override it, each for its own.
    seed
        Seeds the rotation signs; K and V differ for every seed.
    device
        Where tensors are. Calls on another device raise.
    norm_dtype
        dtype of the stored scale: float16 (default), bfloat16 or float32.
    k_scale_rule, v_scale_rule
        ``plain``, ``norm_corrected``, ``least_squares`` or ``unbiased``
        (:func:`core.stored_scale`).
    k_codebook, v_codebook
        Calibrated codebooks in place of the Gaussian ones; their widths must match.
    backend
        ``auto``, ``cuda``, ``triton`` or ``torch`` (:func:`turbokv.kernels.resolve_backend`).

    Notes
    -----
    A stored vector decodes as ``scale * level * 2**-frac_bits``. Zero vectors decode to exact
    zeros.
    Scales saturate at the largest finite ``norm_dtype``. A vector with NaN stores a NaN scale and
    decodes to NaN; infinities count as +-2**48. No call synchronises with the device.

    Source: TurboQuant, arXiv:2504.19874, section 3.

    Examples
    --------
    >>> codec = TurboKVCodec(128, k_bits=5, v_bits=3)
    >>> packed, norms = codec.compress_k(torch.randn(2, 10, 8, 128))
    >>> codec.decompress_k(packed, norms).shape
    torch.Size([2, 10, 8, 128])
    """

    def __init__(
        self,
        head_dim: int,
        k_bits: int | None = None,
        v_bits: int | None = None,
        *,
        bit_width: int | None = None,
        seed: int = DEFAULT_SEED,
        device: torch.device | str = "cpu",
        norm_dtype: torch.dtype = torch.float16,
        k_scale_rule: ScaleRule = DEFAULT_K_RULE,
        v_scale_rule: ScaleRule = DEFAULT_V_RULE,
        k_codebook: Codebook | None = None,
        v_codebook: Codebook | None = None,
        backend: kernels.Backend = "auto",
    ) -> None:
        self.head_dim = head_dim
        self.padded_dim = core.padded_dim(head_dim)
        self.k_bits, self.v_bits = _widths(k_bits, v_bits, bit_width)
        self.seed = seed
        self.device = usable_device(device)
        self.backend = kernels.check_backend(backend)
        kernels.resolve_backend(self.backend, self.device)
        # what decompression gives unless told otherwise
        self._dtypes: dict[Role, torch.dtype] = {"k": torch.float32, "v": torch.float32}
        self._formats: dict[Role, VectorFormat] = {}
        choices: tuple[tuple[Role, int, ScaleRule, Codebook | None], ...] = (
            ("k", self.k_bits, k_scale_rule, k_codebook),
            ("v", self.v_bits, v_scale_rule, v_codebook),
        )
        for role, bits, rule, book in choices:
            if book is None:
                book = Codebook.gaussian(bits)
            elif not isinstance(book, Codebook):
                raise TypeError(f"{role}_codebook: wanted a Codebook, got {type(book).__name__}")
            elif book.bits != bits:
                raise ValueError(f"{role}_codebook: wanted {bits} bits, got {book.bits}")
            self._formats[role] = VectorFormat.create(
                role,
                head_dim,
                book,
                scale_rule=rule,
                norm_dtype=norm_dtype,
                seed=seed,
                device=self.device,
            )

    def __repr__(self) -> str:
        """Name what fixes the bytes."""
        return (
            f"TurboKVCodec(head_dim={self.head_dim}, k_bits={self.k_bits}, v_bits={self.v_bits}, "
            f"seed={self.seed}, device={str(self.device)!r})"
        )

    def vector_format(self, role: Role) -> VectorFormat:
        """Return the byte-level description of ``"k"`` or ``"v"``, as kernels read it."""
        if role not in self._formats:
            raise ValueError(f"role: wanted 'k' or 'v', got {role!r}")
        return self._formats[role]

    def bytes_per_vector(self, role: Role) -> int:
        """Return the stored bytes of one key (``"k"``) or value (``"v"``): codes and scale."""
        fmt = self.vector_format(role)
        return fmt.packed_dim + fmt.norm_dtype.itemsize

    @property
    def compression_ratio(self) -> float:
        """Bytes of a 16-bit key and value over the stored bytes of both."""
        stored = self.bytes_per_vector("k") + self.bytes_per_vector("v")
        return 4 * self.head_dim / stored

    # --- compress -----------------------------------------------------------------------------

    def compress_k(
        self,
        k: Tensor,
        *,
        offset: Tensor | None = None,
        out_packed: Tensor | None = None,
        out_norms: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compress keys.

        Parameters
        ----------
        k
            ``[..., head_dim]``, float32, float16 or bfloat16, any strides, on the codec's device.
        offset
            Broadcastable to ``k``: subtracted before rotation wherever that makes the vector
            shorter. A vector that is shorter without it is stored uncentred and marked by the sign
            bit of its scale, so readers need no second tensor.
        out_packed, out_norms
            Contiguous outputs, uint8 ``[..., packed_dim]`` and ``norm_dtype`` ``[...]``. Allocated
            if absent.

        Returns
        -------
        tuple
            ``(packed, norms)``.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was wanted and what was got.
        """
        return self._compress("k", k, offset, out_packed, out_norms)

    def compress_v(
        self,
        v: Tensor,
        *,
        out_packed: Tensor | None = None,
        out_norms: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compress values; as :meth:`compress_k` without an offset."""
        return self._compress("v", v, None, out_packed, out_norms)

    def _compress(
        self,
        role: Role,
        x: Tensor,
        offset: Tensor | None,
        out_packed: Tensor | None,
        out_norms: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        fmt = self._formats[role]
        core.check_vectors(x, self.head_dim, role)
        self._check_device(x, role)
        self._dtypes[role] = x.dtype
        lead = x.shape[:-1]
        packed = self._output(out_packed, "out_packed", (*lead, fmt.packed_dim), torch.uint8)
        norms = self._output(out_norms, "out_norms", lead, fmt.norm_dtype)
        uncentred: Tensor | None = None
        if offset is not None:
            offset = self._check_offset(offset, x.shape)
            x = x.to(torch.float32)
            centred = x - offset
            # both sums reduce in the format's order, so that every backend decides alike
            uncentred = _squares(x) < _squares(centred)
            x = torch.where(uncentred[..., None], x, centred)
        flat_norms = norms.view(-1)
        kernels.compress(
            x.reshape(-1, self.head_dim),
            fmt,
            packed.view(-1, fmt.packed_dim),
            flat_norms,
            self.backend,
        )
        if uncentred is not None:
            torch.where(uncentred.reshape(-1), -flat_norms, flat_norms, out=flat_norms)
        return packed, norms

    # --- decompress ---------------------------------------------------------------------------

    def decompress_k(
        self,
        packed: Tensor,
        norms: Tensor,
        *,
        offset: Tensor | None = None,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Decompress keys to the original space.

        Parameters
        ----------
        packed, norms
            What :meth:`compress_k` returned: ``[..., packed_dim]`` and ``[...]``.
        offset
            The offset given to :meth:`compress_k`, broadcastable to the result; added back except
            to marked vectors.
        dtype
            float32, float16 or bfloat16, of a new result. None is that of the keys that this codec
            last compressed (values have their own), and float32 before there were any. ``out``
            carries its own.
        out
            Contiguous output ``[..., head_dim]``.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was wanted and what was got.
        """
        return self._decompress("k", packed, norms, offset, dtype, out, rotated=False)

    def decompress_v(
        self,
        packed: Tensor,
        norms: Tensor,
        *,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Decompress values to the original space; as :meth:`decompress_k`."""
        return self._decompress("v", packed, norms, None, dtype, out, rotated=False)

    def decompress_k_raw(
        self,
        packed: Tensor,
        norms: Tensor,
        *,
        offset: Tensor | None = None,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Decompress keys to rotated space, ``[..., padded_dim]``: what a rotated query meets.

        ``offset`` is in original space, as for :meth:`compress_k`, and is rotated here.
        """
        return self._decompress("k", packed, norms, offset, dtype, out, rotated=True)

    def decompress_v_raw(
        self,
        packed: Tensor,
        norms: Tensor,
        *,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Decompress values to rotated space, ``[..., padded_dim]``; un-rotate what they sum to."""
        return self._decompress("v", packed, norms, None, dtype, out, rotated=True)

    def _decompress(
        self,
        role: Role,
        packed: Tensor,
        norms: Tensor,
        offset: Tensor | None,
        dtype: torch.dtype | None,
        out: Tensor | None,
        *,
        rotated: bool,
    ) -> Tensor:
        fmt = self._formats[role]
        self._check_stored(packed, norms, fmt)
        dim = fmt.padded_dim if rotated else fmt.head_dim
        shape = (*packed.shape[:-1], dim)
        if isinstance(out, Tensor):
            dtype = out.dtype
        dtype = self._dtypes[role] if dtype is None else _check_result_dtype(dtype)
        result = self._output(out, "out", shape, dtype)
        # the offset is added in fp32, so a 16-bit result is rounded once
        target = result
        if offset is not None and dtype != torch.float32:
            target = torch.empty(shape, dtype=torch.float32, device=self.device)
        kernels.decompress(
            packed.reshape(-1, fmt.packed_dim),
            norms.reshape(-1),
            fmt,
            target.view(-1, dim),
            rotated=rotated,
            backend=self.backend,
        )
        if offset is not None:
            offset = self._check_offset(offset, (*packed.shape[:-1], fmt.head_dim))
            if rotated:
                flat = offset.reshape(-1, fmt.head_dim)
                offset = core.rotate(flat, fmt).view(*offset.shape[:-1], dim)
            added = torch.where(torch.signbit(norms)[..., None], torch.zeros_like(target), offset)
            target += added
            if target is not result:
                result.copy_(target)
        return result

    # --- queries and outputs ------------------------------------------------------------------

    def rotate_query(self, q: Tensor, scale: float = 1.0) -> Tensor:
        """Rotate queries as keys are, so that scores can be taken in rotated space.

        Parameters
        ----------
        q
            ``[..., head_dim]``, float32, float16 or bfloat16.
        scale
            Multiplied in, usually ``sm_scale``.

        Returns
        -------
        Tensor
            ``[..., padded_dim]`` in ``q``'s dtype.
        """
        fmt = self._formats["k"]
        core.check_vectors(q, self.head_dim, "q")
        self._check_device(q, "q")
        rotated = core.rotate(q.reshape(-1, self.head_dim), fmt, scale)
        return rotated.view(*q.shape[:-1], fmt.padded_dim).to(q.dtype)

    def unrotate_output(self, o: Tensor) -> Tensor:
        """Undo V's rotation of an output: ``[..., padded_dim]`` to ``[..., head_dim]``."""
        fmt = self._formats["v"]
        core.check_vectors(o, fmt.padded_dim, "o")
        self._check_device(o, "o")
        flat = core.unrotate(o.reshape(-1, fmt.padded_dim), fmt)
        return flat.view(*o.shape[:-1], self.head_dim).to(o.dtype)

    # --- checks -------------------------------------------------------------------------------

    def _check_device(self, x: Tensor, name: str) -> None:
        if x.device != self.device:
            raise ValueError(f"{name}: wanted device {self.device}, got {x.device}")

    def _output(
        self, out: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        if out is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        arguments.check_plain(out, name)
        if out.dtype != dtype:
            raise TypeError(f"{name}: wanted {dtype}, got {out.dtype}")
        if tuple(out.shape) != tuple(shape):
            raise ValueError(f"{name}: wanted shape {list(shape)}, got {list(out.shape)}")
        self._check_device(out, name)
        if not out.is_contiguous():
            raise ValueError(f"{name}: wanted a contiguous tensor, got strides {out.stride()}")
        return out

    def _check_offset(self, offset: Tensor, shape: tuple[int, ...]) -> Tensor:
        core.check_vectors(offset, self.head_dim, "offset")
        self._check_device(offset, "offset")
        try:
            return offset.detach().to(torch.float32).expand(shape)
        except RuntimeError:
            raise ValueError(
                f"offset: wanted a shape that broadcasts to {list(shape)}, got {list(offset.shape)}"
            ) from None

    def _check_stored(self, packed: Tensor, norms: Tensor, fmt: VectorFormat) -> None:
        for name, tensor in (("packed", packed), ("norms", norms)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: wanted a torch.Tensor, got {type(tensor).__name__}")
            self._check_device(tensor, name)
        if packed.dtype != torch.uint8:
            raise TypeError(f"packed: wanted torch.uint8, got {packed.dtype}")
        if packed.ndim == 0 or packed.shape[-1] != fmt.packed_dim:
            raise ValueError(
                f"packed: wanted shape [..., {fmt.packed_dim}], got {list(packed.shape)}"
            )
        if norms.dtype != fmt.norm_dtype:
            raise TypeError(f"norms: wanted {fmt.norm_dtype}, got {norms.dtype}")
        if norms.shape != packed.shape[:-1]:
            raise ValueError(
                f"norms: wanted shape {list(packed.shape[:-1])} to match packed,"
                f" got {list(norms.shape)}"
            )


def _widths(k_bits: int | None, v_bits: int | None, both: int | None) -> tuple[int, int]:
    """Return the widths of K and V, from their own arguments or from the one for both."""
    if both is not None:
        core.check_bits(both, "bit_width")
    k = core.check_bits(k_bits, "k_bits") if k_bits is not None else both or DEFAULT_BITS
    v = core.check_bits(v_bits, "v_bits") if v_bits is not None else both or k
    return k, v


def _check_result_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dtype: wanted float32, float16 or bfloat16, got {dtype}")
    return dtype


def usable_device(device: torch.device | str) -> torch.device:
    """Return ``device`` with its index, or raise ValueError if PyTorch cannot use it."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: wanted a PyTorch device, got {device!r}") from error
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: wanted one that PyTorch can use, got {device!r} (no CUDA)")
        if found.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        if found.index >= torch.cuda.device_count():
            raise ValueError(
                f"device: wanted one of {torch.cuda.device_count()} CUDA devices, got {device!r}"
            )
        return found
    # a name that PyTorch knows may still need another build or another machine
    try:
        torch.empty(0, dtype=torch.uint8, device=found)
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device: wanted one that PyTorch can use, got {device!r}") from error
    return found


def _squares(x: Tensor) -> Tensor:
    """Sum of squares over the last dim, neighbours first, as :func:`core.tree_sum_rows`."""
    flat = x.reshape(-1, x.shape[-1])
    rows = (flat * flat).t().contiguous()
    pad = (1 << (rows.shape[0] - 1).bit_length()) - rows.shape[0]
    if pad:
        rows = torch.cat([rows, rows.new_zeros(pad, rows.shape[1])])
    return core.tree_sum_rows(rows).view(x.shape[:-1])
