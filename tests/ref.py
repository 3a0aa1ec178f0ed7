# SPDX-License-Identifier: Apache-2.0
"""A second implementation of FORMAT.md in NumPy and plain Python, and plain attention in float64.

It imports nothing under test, and its codebooks are typed from FORMAT.md. The codec runs in
float64, as the mathematical truth, or in float32, where it must give the very bytes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
MASK64 = (1 << 64) - 1


class Book(NamedTuple):
    """Magnitudes, step and binary point of one width."""

    magnitudes: tuple[float, ...]
    step: float
    frac_bits: int


BOOKS = {
    2: Book((1, 3), 0.497843337, 1),
    3: Book((10, 31, 55, 88), 0.0244461385, 5),
    4: Book((5, 15, 25, 36, 48, 62, 79, 104), 0.0262171381, 5),
    5: Book((2, 6, 10, 14, 18, 22, 26, 31, 36, 41, 47, 53, 60, 69, 80, 97), 0.0336402694, 5),
    8: Book(tuple(range(128)), 0.0308700902, 5),
}
BASE_BITS = {2: 2, 4: 4, 5: 4, 8: 8}


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def signs(role: str, dim: int, seed: int = 42) -> Array:
    base = (seed + {"k": 0, "v": 500}[role]) << 32
    return np.array([-1.0 if splitmix64((base + j) & MASK64) >> 63 else 1.0 for j in range(dim)])


def hadamard_matrix(dim: int) -> Array:
    """Unnormalised, entry by entry."""
    return np.array([[(-1.0) ** bin(i & j).count("1") for j in range(dim)] for i in range(dim)])


def transform(x: Array) -> Array:
    """Butterflies over the last axis, strides 1, 2, 4, ..., in the dtype of ``x``."""
    x, stride = x.copy(), 1
    while stride < x.shape[-1]:
        for first in range(x.shape[-1]):
            if not first & stride:
                a, b = x[..., first].copy(), x[..., first + stride].copy()
                x[..., first], x[..., first + stride] = a + b, a - b
        stride *= 2
    return x


def tree_sum(x: Array) -> Array:
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def pad(x: Array) -> Array:
    dim = 1 << (x.shape[-1] - 1).bit_length()
    return np.concatenate([x, np.zeros((*x.shape[:-1], dim - x.shape[-1]), x.dtype)], axis=-1)


def compress(
    x: Array, role: str, book: Book, rule: str, dtype: Any = np.float64, seed: int = 42
) -> tuple[Array, Array]:
    """Codes ``[n, P]`` and scales ``[n]`` before rounding, of finite vectors ``[n, head_dim]``."""
    x = pad(np.clip(x.astype(dtype), -(2.0**48), 2.0**48))
    dim, half = x.shape[-1], len(book.magnitudes)
    y = transform(x * signs(role, dim, seed).astype(dtype))
    squares = tree_sum(y * y)
    live = squares > dtype(2.0**-120)
    root = np.sqrt(squares)
    safe = np.where(live, root, dtype(1))
    inverse = np.where(live, dtype(math.sqrt(dim) / book.step) / safe, dtype(0))
    magnitudes = np.array(book.magnitudes, np.float64)
    midpoints = (0.5 * (magnitudes[1:] + magnitudes[:-1])).astype(np.float32).astype(dtype)
    index = np.searchsorted(midpoints, np.abs(y) * inverse[:, None], side="left")
    if book.magnitudes[0] == 0:
        codes = np.where(y < 0, half - index, half + index)
    else:
        codes = np.where(y < 0, half - 1 - index, half + index)
    m = magnitudes.astype(dtype)[index]
    factor = dtype(2.0**book.frac_bits / math.sqrt(dim))
    product, energy = tree_sum(np.abs(y) * m), tree_sum(m * m)
    product, energy = np.where(live, product, dtype(1)), np.where(live, energy, dtype(1))
    scale = {
        "plain": root * dtype(book.step * 2.0**book.frac_bits / dim),
        "norm_corrected": root / np.sqrt(energy) * factor,
        "least_squares": product / energy * factor,
        "unbiased": squares / product * factor,
    }[rule]
    return codes, np.where(live, scale, dtype(0))


def round_scale(scale: Array, name: str = "float16") -> Array:
    """Saturate and round to ``float16`` or ``float32``."""
    limit = np.finfo(name).max
    return np.clip(scale, -limit, limit).astype(name)


def pack(codes: Array, bits: int) -> bytes:
    string = sum(int(code) << (bits * j) for j, code in enumerate(codes))
    return string.to_bytes(len(codes) * bits // 8, "little")


def page_codes(bits: int) -> Array:
    """Return the page code of every code, section 6: its base, and its high bit above that."""
    codes = np.arange(1 << bits)
    if bits == 4:
        return codes // 2 + codes % 2 * 8
    if bits == 5:
        return np.where(codes >= 16, codes, 15 - codes)
    return codes


def bit_places(dim: int, role: str, bits: int) -> Array:
    """Return where each bit of the page codes of a tile lies: int64 ``[16, dim, bits]``.

    Bits are counted from the start of the role's parts: bit ``n`` is bit ``n % 8`` of byte
    ``n // 8``.
    """
    if bits == 3:
        return three_bit_places(dim, role)
    width = BASE_BITS[bits]
    token, j = np.arange(16)[:, None], np.arange(dim)[None, :]
    places = np.empty((16, dim, bits), np.int64)

    def byte_place(byte: Array, size: int, run: int) -> Array:
        if role == "k":
            swapped = (size >= 128) & (token % 2 == 1)
            return token * size + np.where(swapped, byte ^ 64, byte)
        order = token // 8 + token % 2 * 2 if bits == 2 else token // 8 * 2 + token % 2
        group = byte // run * (16 * run) + token // 2 % 4 * (4 * run)
        return group + byte % run * 4 + order

    size = dim * width // 8
    run = min(4, size // 8)
    base = byte_place(j * width // 8, size, run) * 8 + j * width % 8
    for bit in range(width):
        places[..., bit] = base + bit
    if bits > width:
        byte, place = j // 8, j % 8
        if role == "k":
            byte, place = j // 16 * 2 + j % 2, j // 4 % 4 * 2 + j // 2 % 2
        places[..., width] = (16 * size + byte_place(byte, dim // 8, run // width)) * 8 + place
    return places


def three_bit_places(dim: int, role: str) -> Array:
    """Return the same for 3 bits, one code after the other as section 6 words it."""
    places = np.empty((16, dim, 3), np.int64)
    words = 3 * dim // 64
    for token in range(16):
        for j in range(dim):
            if role == "k":
                lane = token % 8 * 4 + j // (dim // 4)
                unit, place = j % (dim // 4) // 16, j % 16
                k, n = place // 4, token // 8 * 4 + place % 4
            else:
                lane = j // 8 % 8 * 4 + token // 2 % 4
                unit, place = j // 64, j % 8
                k, n = place // 2, place % 2 * 4 + token // 8 * 2 + token % 2
            for bit in range(3):
                word, at = (unit * 3 + k, 4 * n + bit) if k < 3 else (unit * 3 + bit, 4 * n + 3)
                places[token, j, bit] = 32 * word_place(word, lane, words) + at
    return places


def word_place(word: int, lane: int, words: int) -> int:
    """Return where a word of a lane is among those of all lanes: by fours, twos, ones."""
    first, left = 0, words
    while True:
        size = 4 if left >= 4 else 2 if left >= 2 else 1
        if word < first + size:
            return 32 * first + lane * size + word - first
        first, left = first + size, left - size


_PLACES: dict[tuple[int, str, int], Array] = {}


def write_token(
    tile: bytearray, token: int, codes: tuple[Array, Array], bits: tuple[int, int], scales: bytes
) -> None:
    """Write a token, 0 to 15, where section 6 puts it in a tile: K's and V's codes and scales."""
    start, dim = 0, len(codes[0])
    for role, own, width in zip("kv", codes, bits, strict=True):
        if (dim, role, width) not in _PLACES:
            _PLACES[dim, role, width] = bit_places(dim, role, width)
        for code, places in zip(
            page_codes(width)[own], _PLACES[dim, role, width][token], strict=True
        ):
            for bit, place in enumerate(map(int, places)):
                value = 1 << place % 8
                at = start + place // 8
                tile[at] = tile[at] | value if code >> bit & 1 else tile[at] & ~value
        start += 2 * dim * width
    tile[start + 4 * token : start + 4 * token + 4] = scales


def read(codes: Array, scale: Array, book: Book) -> Array:
    """Rotated vectors ``[n, P]`` in float64 (the mark of a scale ignored)."""
    m = np.array(book.magnitudes, np.float64)
    levels = np.concatenate([-m[::-1], m] if m[0] else [-m[-1:], -m[:0:-1], m])
    return np.abs(scale.astype(np.float64))[:, None] * levels[codes] * 2.0**-book.frac_bits


def unrotate(rotated: Array, role: str, head_dim: int, seed: int = 42) -> Array:
    dim = rotated.shape[-1]
    return (rotated @ hadamard_matrix(dim) / math.sqrt(dim) * signs(role, dim, seed))[:, :head_dim]


def attention(
    q: Array, k: Array, v: Array, sm_scale: float, causal: bool, cap: float, window_left: int
) -> tuple[Array, Array]:
    """Queries ``[Lq, Hq, D]`` are the newest of tokens ``[Lk, Hk, D]``; output and base-2 LSE."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    group = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        own = k.shape[0] - q.shape[0] + i
        last = own if causal else k.shape[0] - 1
        first = max(0, own - window_left) if window_left >= 0 else 0
        for head in range(q.shape[1]):
            keys, values = k[first : last + 1, head // group], v[first : last + 1, head // group]
            if last < 0 or len(keys) == 0:
                continue
            scores = keys @ q[i, head] * sm_scale
            scores = cap * np.tanh(scores / cap) if cap > 0 else scores
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ values / weights.sum()
            lse[i, head] = (scores.max() + math.log(weights.sum())) / math.log(2.0)
    return out, lse
