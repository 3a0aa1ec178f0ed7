# SPDX-License-Identifier: Apache-2.0
"""Where every bit of a page lies (``FORMAT.md``, section 6): the one definition in Python.

:class:`PageLayout` alone decides it; all else goes through its ``scatter`` and ``gather``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from turbokv import core

FORMAT_VERSION = 3
TILE = 16  # tokens; every part of a tile is then a multiple of 16 bytes, at any width
PAGE_BITS = (2, 3, 4, 5, 8)  # the int8 lattices, which kernels can expand
MIN_PADDED_DIM = 64  # at 32 the high plane of V has too few bytes for its order
SCALE_BYTES = 2
_SWIZZLED_BYTES = 128  # rows of K as long as this swap their halves in odd tokens
Part = Literal["k_base", "k_high", "v_base", "v_high", "k_scale", "v_scale"]
_PARTS: dict[core.Role, tuple[Part, Part, Part]] = {
    "k": ("k_base", "k_high", "k_scale"),
    "v": ("v_base", "v_high", "v_scale"),
}
_LANES = 32  # lanes of a warp, among which the words of a tile of 3-bit codes are dealt


_ROLES: dict[Part, core.Role] = {"k_base": "k", "v_base": "v"}


def check_count(value: int, name: str, multiple: int = 1) -> None:
    """Raise unless ``value`` is a positive multiple; ``name`` is what the error calls it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted an int, got {value!r}")
    if value < 1 or value % multiple:
        raise ValueError(f"{name}: wanted a positive multiple of {multiple}, got {value}")


def base_bits(bits: int) -> int:
    """Return the bits of a code in the base plane; any other bit lies in the high plane."""
    return {2: 2, 3: 3, 4: 4, 5: 4, 8: 8}[bits]


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes ``[..., n]`` to codes ``[8 * n / bits, vectors]``."""
    rows = packed.reshape(-1, packed.shape[-1]).t().contiguous()
    return core.unpack_rows(rows, 8 * packed.shape[-1] // bits, bits)


def _pack(codes: Tensor, bits: int, like: Tensor) -> Tensor:
    """Codes ``[dim, vectors]`` to bytes ``[..., dim * bits / 8]``, leading dimensions of ``like``.

    No -1 among the dimensions: there may be no vectors.
    """
    return core.pack_rows(codes, bits).t().reshape(*like.shape[:-1], codes.shape[0] * bits // 8)


def _high_order(role: core.Role, dim: int, device: torch.device) -> Tensor:
    """Return which coordinate each bit of a token's high plane belongs to, int64 ``[dim]``."""
    j = torch.arange(dim, dtype=torch.int64, device=device)
    if role == "k":  # (U, r, upper and lower bit of c) to (U, lower, r, upper)
        return j.view(-1, 4, 2, 2).permute(0, 3, 1, 2).flatten()
    return j


def _columns(role: core.Role) -> int:
    """Return the nibbles of 3-bit codes that share a place in the three of a group."""
    return 4 if role == "k" else 2


def _codes_to_nibbles(codes: Tensor, role: core.Role) -> Tensor:
    """Codes of 3 bits ``[dim, vectors]`` to nibbles ``[3 * dim / 4, vectors]``.

    Of every four codes three have a nibble each, whose upper bits hold the fourth.
    """
    columns = _columns(role)
    groups = codes.view(codes.shape[0] // (4 * columns), 4, columns, codes.shape[1])
    place = torch.arange(3, dtype=codes.dtype, device=codes.device)[:, None, None]
    return (groups[:, :3] | ((groups[:, 3:] >> place) & 1) << 3).flatten(0, 2)


def _nibbles_to_codes(nibbles: Tensor, role: core.Role) -> Tensor:
    columns = _columns(role)
    groups = nibbles.view(nibbles.shape[0] // (3 * columns), 3, columns, nibbles.shape[1])
    place = torch.arange(3, dtype=nibbles.dtype, device=nibbles.device)[:, None, None]
    fourth = ((groups >> 3) << place).sum(1, keepdim=True, dtype=nibbles.dtype)
    return torch.cat([groups & 7, fourth], 1).flatten(0, 2)


def flat_to_planes(packed: Tensor, role: core.Role, bits: int) -> tuple[Tensor, Tensor]:
    """Turn codes of the flat form into a token's planes, bytes counted by FORMAT.md's ``B``.

    Parameters
    ----------
    packed
        uint8 ``[..., padded_dim * bits / 8]``.
    role, bits
        Which vector it is, and the width of its codes: 2, 3, 4, 5 or 8.

    Returns
    -------
    tuple of Tensor
        Base and high plane, uint8, ``padded_dim * base_bits(bits) / 8`` and ``padded_dim / 8``
        bytes per vector; only with 5 bits has the high plane any.
    """
    if bits in (2, 8):
        return packed, packed[..., :0]
    codes = _unpack(packed, bits)
    if bits == 3:
        return _pack(_codes_to_nibbles(codes, role), 4, packed), packed[..., :0]
    if bits == 4:
        return _pack((codes >> 1) | ((codes & 1) << 3), 4, packed), packed[..., :0]
    high = codes >> base_bits(bits)
    # five bits: the magnitude's index, which counts up from code 16 and down from code 15
    base = torch.where(high != 0, codes, ~codes) & 15
    order = _high_order(role, codes.shape[0], packed.device)
    return _pack(base, base_bits(bits), packed), _pack(high[order], 1, packed)


def planes_to_flat(base: Tensor, high: Tensor, role: core.Role, bits: int) -> Tensor:
    """Undo :func:`flat_to_planes`: uint8 ``[..., padded_dim * bits / 8]``."""
    if bits in (2, 8):
        return base
    if bits == 3:
        return _pack(_nibbles_to_codes(_unpack(base, 4), role), 3, base)
    codes = _unpack(base, base_bits(bits))
    if bits == 4:
        return _pack(((codes & 7) << 1) | (codes >> 3), 4, base)
    top = torch.empty_like(codes)
    top[_high_order(role, codes.shape[0], base.device)] = _unpack(high, 1)
    return _pack(torch.where(top != 0, codes + 16, 15 - codes), bits, base)


@dataclass(frozen=True)
class PageLayout:
    """Shapes of a page and the place of every byte in it.

    Attributes
    ----------
    head_dim, k_bits, v_bits
        Elements per vector, 33 to 512, and widths: 2, 3, 4, 5 or 8.
    page_size, num_kv_heads
        Tokens per page, a multiple of 16, and KV heads.
    """

    head_dim: int
    k_bits: int
    v_bits: int
    page_size: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        """Refuse what has no page."""
        if core.padded_dim(self.head_dim) < MIN_PADDED_DIM:
            wanted = f"{MIN_PADDED_DIM // 2 + 1} to {core.MAX_HEAD_DIM} for pages"
            raise ValueError(f"head_dim: wanted {wanted}, got {self.head_dim}")
        for name, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if core.check_bits(bits, name) not in PAGE_BITS:
                raise ValueError(f"{name}: wanted one of {PAGE_BITS} for pages, got {bits}")
        check_count(self.page_size, "page_size", TILE)
        check_count(self.num_kv_heads, "num_kv_heads")

    def part_bytes(self, part: Part) -> int:
        """Return the bytes that one token and head has in ``part``."""
        if part in ("k_scale", "v_scale"):
            return SCALE_BYTES
        bits = self.k_bits if part in ("k_base", "k_high") else self.v_bits
        base = base_bits(bits)
        plane = base if part in ("k_base", "v_base") else bits - base
        return core.padded_dim(self.head_dim) * plane // 8

    @property
    def tile_bytes(self) -> int:
        """Bytes of 16 tokens of one KV head: planes of K, planes of V, 16 pairs of scales."""
        return TILE * sum(self.part_bytes(part) for part in get_args(Part))

    @property
    def page_head_bytes(self) -> int:
        """Bytes of one KV head in a page: contiguous, a multiple of 16."""
        return self.page_size // TILE * self.tile_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page with all its KV heads."""
        return self.num_kv_heads * self.page_head_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes with all its KV heads: codes and scales of K and V."""
        return self.page_bytes // self.page_size

    def shape(self, num_pages: int) -> tuple[int, int, int]:
        """Return the shape of ``num_pages`` pages, uint8."""
        return num_pages, self.num_kv_heads, self.page_head_bytes

    def byte_offsets(self, part: Part, tokens: Tensor) -> Tensor:
        """Return where each byte of a part lies in a page and head: the one definition.

        Parameters
        ----------
        part
            A plane (:func:`flat_to_planes` gives its bytes) or a scale.
        tokens
            int64 ``[n]``, tokens within a page.

        Returns
        -------
        Tensor
            int64 ``[n, part_bytes]``; nothing for a high plane but at 5 bits. The base plane of V
            at 3 bits is the exception: two entries for each of its bytes, for the lower nibble and
            the upper one. An even token has the lower half of those bytes, the next one the upper.
        """
        planes: tuple[Part, ...] = ("k_base", "k_high", "v_base", "v_high")
        sizes = [self.part_bytes(plane) for plane in planes]
        count = self.part_bytes(part)
        byte = torch.arange(count, dtype=torch.int64, device=tokens.device)
        token = tokens[:, None] % TILE
        tile = tokens[:, None] // TILE * self.tile_bytes
        if part in ("k_scale", "v_scale"):
            pair = TILE * sum(sizes) + token * 2 * SCALE_BYTES
            return tile + pair + (SCALE_BYTES if part == "v_scale" else 0) + byte
        tile = tile + TILE * sum(sizes[: planes.index(part)])
        if part in ("k_base", "v_base") and self._bits(_ROLES[part]) == 3:
            return tile + self._three_bits(part, token)
        if part in ("k_base", "k_high"):
            # against bank conflicts: lanes that read one column of several tokens
            half = token % 2 * (_SWIZZLED_BYTES // 2) if count >= _SWIZZLED_BYTES else 0
            return tile + token * count + (byte ^ half)
        # tokens 2t, 2t + 1, 2t + 8 and 2t + 9 share a word, and `run` words follow each other
        run = min(4, sizes[2] // 8)
        if part == "v_high":
            run //= base_bits(self.v_bits)
        k, t, e = token // 8, token // 2 % 4, token % 2
        lane = k + 2 * e if self.v_bits == 2 else 2 * k + e
        return tile + byte // run * (TILE * run) + t * (4 * run) + byte % run * 4 + lane

    def _three_bits(self, part: Part, token: Tensor) -> Tensor:
        """Return :meth:`byte_offsets` of a plane of 3-bit codes from the start of its part."""
        units = core.padded_dim(self.head_dim) // 64  # of three words, for each lane
        if part == "k_base":
            unit, inside = self._split(self.part_bytes(part), 6, token.device)
            lane, word = token % 8 * 4 + unit // units, unit % units * 3 + inside // 2
            byte = token // 8 * 2 + inside % 2
        else:
            unit, inside = self._split(2 * self.part_bytes(part), 6, token.device)
            lane, word = unit % 8 * 4 + token // 2 % 4, unit // 8 * 3 + inside // 2
            byte = inside % 2 * 2 + token // 8
        # words of all lanes lie together by fours, then by twos, then one by one
        first, size = word // 4 * 4, torch.full_like(word, 4)
        for smaller in (2, 1):
            short = first + size > 3 * units
            first = torch.where(short, word // smaller * smaller, first)
            size = torch.where(short, smaller, size)
        return _LANES * 4 * first + lane * 4 * size + (word - first) * 4 + byte

    @staticmethod
    def _split(count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        index = torch.arange(count, dtype=torch.int64, device=device)
        return index // size, index % size

    def _index(self, slots: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Index ``pages`` by page, head and byte; strides do the rest in 64 bits."""
        heads = torch.arange(self.num_kv_heads, dtype=torch.int64, device=slots.device)
        offsets = self.byte_offsets(part, slots % self.page_size)
        return (slots // self.page_size)[:, None, None], heads[:, None], offsets[:, None, :]

    def scatter(
        self, pages: Tensor, slots: Tensor, role: core.Role, packed: Tensor, norms: Tensor
    ) -> None:
        """Write the keys or values of tokens; no bit of other tokens changes.

        Parameters
        ----------
        pages
            uint8 ``[num_pages, num_kv_heads, page_head_bytes]``.
        slots
            int64 ``[n]``, ``page * page_size + token``, all different.
        role
            ``"k"`` or ``"v"``.
        packed, norms
            The flat form: uint8 ``[n, num_kv_heads, packed_dim]`` and float16
            ``[n, num_kv_heads]``.
        """
        base, high, scale = _PARTS[role]
        planes = flat_to_planes(packed, role, self._bits(role))
        if (role, self._bits(role)) == ("v", 3):
            self._scatter_nibbles(pages, slots, planes[0])
        else:
            pages[self._index(slots, base)] = planes[0]
        pages[self._index(slots, high)] = planes[1]
        pages[self._index(slots, scale)] = norms[..., None].view(torch.uint8)

    def _scatter_nibbles(self, pages: Tensor, slots: Tensor, plane: Tensor) -> None:
        """Write V's plane of 3-bit codes: neighbouring tokens share its bytes."""
        nibbles = torch.stack([plane & 15, plane >> 4], -1).flatten(-2)
        for odd in (0, 1):
            own = slots % 2 == odd
            index = self._index(slots[own], "v_base")
            others = pages[index] & (15 if odd else 15 << 4)
            pages[index] = others | nibbles[own] << 4 * odd

    def gather(self, pages: Tensor, slots: Tensor, role: core.Role) -> tuple[Tensor, Tensor]:
        """Read what :meth:`scatter` wrote: ``packed`` and ``norms``."""
        base, high, scale = (pages[self._index(slots, part)] for part in _PARTS[role])
        if (role, self._bits(role)) == ("v", 3):
            nibbles = base >> (slots % 2 * 4)[:, None, None].to(torch.uint8) & 15
            base = nibbles[..., ::2] | nibbles[..., 1::2] << 4
        packed = planes_to_flat(base, high, role, self._bits(role))
        return packed, scale.view(torch.float16)[..., 0]

    def _bits(self, role: core.Role) -> int:
        return self.k_bits if role == "k" else self.v_bits
