// SPDX-License-Identifier: Apache-2.0
// Where every bit of a tile lies (FORMAT.md, section 6): page codes, planes and byte offsets.
// A tile is 16 tokens of one KV head: [K base][K high][V base][V high][16 x (K scale, V scale)].
#ifndef TURBOKV_PACK_CUH_
#define TURBOKV_PACK_CUH_

#include "turbokv/hadamard.cuh"
#include "turbokv/types.cuh"

namespace turbokv {

constexpr int kTokensPerTile = 16;

/*! \brief Whether pages can hold codes of this width. */
TURBOKV_HOST_DEVICE constexpr bool IsPageWidth(int bits) {
  return (bits >= 2 && bits <= 5) || bits == 8;
}

// --- page codes ---

/*! \brief Bits of a code in the base plane. */
TURBOKV_HOST_DEVICE constexpr int PlaneBits(int bits) { return bits == 5 ? 4 : bits; }

/*! \brief Whether a code has one more bit, in the high plane. */
TURBOKV_HOST_DEVICE constexpr bool HasHighBit(int bits) { return bits == 5; }

/*! \brief Base plane's part of code `c` (numbered as in FORMAT.md, section 3). */
TURBOKV_HOST_DEVICE constexpr uint32_t CodeBase(int bits, uint32_t c) {
  return bits == 4 ? c >> 1 | (c & 1) << 3 : bits == 5 ? (c >= 16 ? c - 16 : 15 - c) : c;
}

/*! \brief High plane's bit of code `c`. */
TURBOKV_HOST_DEVICE constexpr uint32_t CodeHigh(int bits, uint32_t c) {
  return bits == 5 ? c >> 4 : 0;
}

/*! \brief Undo CodeBase and CodeHigh. */
TURBOKV_HOST_DEVICE constexpr uint32_t CodeFromPage(int bits, uint32_t base, uint32_t high) {
  return bits == 4   ? (base & 7) << 1 | base >> 3
         : bits == 5 ? (high ? 16 + base : 15 - base)
                     : base;
}

// --- parts of a tile ---

/*! \brief First byte of every part of a tile, and the tile's size. */
struct tile_layout_t {
  int k_base, k_high, v_base, v_high, scales, bytes;
};

TURBOKV_HOST_DEVICE constexpr tile_layout_t TileLayout(int padded_dim, int k_bits, int v_bits) {
  const int plane = kTokensPerTile * padded_dim / 8;  // bytes of one bit a coordinate
  const int v_base = plane * k_bits, scales = v_base + plane * v_bits;
  return {0,      plane * PlaneBits(k_bits),  v_base, v_base + plane * PlaneBits(v_bits),
          scales, scales + 4 * kTokensPerTile};
}

/*! \brief Bytes of one KV head in a page. */
TURBOKV_HOST_DEVICE constexpr int PageHeadBytes(int padded_dim, int k_bits, int v_bits,
                                                int page_size) {
  return page_size / kTokensPerTile * TileLayout(padded_dim, k_bits, v_bits).bytes;
}

/*! \brief Offset of a token's scale from the start of the tile. */
TURBOKV_HOST_DEVICE constexpr int ScaleOffset(const tile_layout_t& layout, role_t role, int token) {
  return layout.scales + 4 * token + (role == role_t::kKey ? 0 : 2);
}

// --- bytes of a plane ---

/*! \brief Offset of byte `beta` of a token in a plane of K with `n` bytes a token.
 *
 *  Rows of 128 bytes and more swap their 64-byte halves in odd tokens, against bank conflicts.
 */
TURBOKV_HOST_DEVICE constexpr int KeyOffset(int token, int beta, int n) {
  return token * n + (n >= 128 && (token & 1) ? beta ^ 64 : beta);
}

/*! \brief Neighbouring bytes of a token that share a run in V's base plane. */
TURBOKV_HOST_DEVICE constexpr int ValueRun(int padded_dim, int bits) {
  const int run = padded_dim * PlaneBits(bits) / 64;
  return run < 4 ? run : 4;
}

/*! \brief The same for V's high plane. */
TURBOKV_HOST_DEVICE constexpr int ValueHighRun(int padded_dim, int bits) {
  return ValueRun(padded_dim, bits) / PlaneBits(bits);
}

/*! \brief Byte of a token of V in its word: tokens 2t, 2t + 1, 2t + 8 and 2t + 9 share words. */
TURBOKV_HOST_DEVICE constexpr int ValueLane(int token, int bits) {
  const int k = token >> 3, e = token & 1;
  return bits == 2 ? k + 2 * e : 2 * k + e;
}

/*! \brief Offset of byte `beta` of a token in a plane of V with the run `s`. */
TURBOKV_HOST_DEVICE constexpr int ValueOffset(int token, int beta, int s, int bits) {
  return beta / s * (16 * s) + (token >> 1 & 3) * (4 * s) + beta % s * 4 + ValueLane(token, bits);
}

/*! \brief Where coordinate `j` has its bit in a token's high plane: 8 * byte + bit. */
TURBOKV_HOST_DEVICE constexpr int HighPosition(role_t role, int j) {
  if (role == role_t::kKey) return (j & ~15) + (j & 1) * 8 + (j >> 2 & 3) * 2 + (j >> 1 & 1);
  return j;
}

/*! \brief Undo HighPosition. */
TURBOKV_HOST_DEVICE constexpr int HighCoordinate(role_t role, int position) {
  if (role == role_t::kKey) {
    return (position & ~15) + (position >> 1 & 3) * 4 + (position & 1) * 2 + (position >> 3 & 1);
  }
  return position;
}

/*! \brief Bring 32 high bits from the order of the coordinates to that of the plane. */
TURBOKV_HOST_DEVICE constexpr uint32_t OrderHighBits(role_t role, uint32_t x) {
  if (role == role_t::kValue) return x;
  // even coordinates of every 16 to the first byte, odd ones to the second
  uint32_t t = (x ^ x >> 1) & 0x22222222;
  x ^= t ^ t << 1;
  t = (x ^ x >> 2) & 0x0c0c0c0c;
  x ^= t ^ t << 2;
  t = (x ^ x >> 4) & 0x00f000f0;
  return x ^ t ^ t << 4;
}

/*! \brief Undo OrderHighBits. */
TURBOKV_HOST_DEVICE constexpr uint32_t NaturalHighBits(role_t role, uint32_t x) {
  if (role == role_t::kValue) return x;
  uint32_t t = (x ^ x >> 4) & 0x00f000f0;
  x ^= t ^ t << 4;
  t = (x ^ x >> 2) & 0x0c0c0c0c;
  x ^= t ^ t << 2;
  t = (x ^ x >> 1) & 0x22222222;
  return x ^ t ^ t << 1;
}

// --- three bits ---
// Of every 16 coordinates of K, or 8 of V, three in four have a code in the lower bits of a nibble;
// the upper bits of those nibbles are the codes of the rest. A unit is three words of a lane: 32
// codes, of two tokens of K or four of V.

/*! \brief Neighbouring coordinates of a token in a unit. */
TURBOKV_HOST_DEVICE constexpr int UnitCoordinates(role_t role) {
  return role == role_t::kKey ? 16 : 8;
}

/*! \brief Offset of word `word` of lane `lane` in a part of 3-bit codes: words of all lanes lie
 *  together by fours, then by twos, then one by one.
 */
TURBOKV_HOST_DEVICE constexpr int LaneWordOffset(int padded_dim, int lane, int word) {
  const int words = 3 * padded_dim / 64;
  int first = word & ~3, size = 4;
  if (first + size > words) first = word & ~1, size = 2;
  if (first + size > words) first = word, size = 1;
  return 4 * (32 * first + size * lane + word - first);
}

/*! \brief Offset of the half-word of a token of K that has codes 4 k to 4 k + 3 of a unit. */
TURBOKV_HOST_DEVICE constexpr int KeyHalfOffset(int padded_dim, int token, int unit, int k) {
  const int units = padded_dim / 64, lane = (token & 7) * 4 + unit / units;
  return LaneWordOffset(padded_dim, lane, unit % units * 3 + k) + (token >> 3) * 2;
}

/*! \brief Offset of the word of tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of V that has codes 2 k
 *  and 2 k + 1 of a unit: those of even coordinates in its lower half, a nibble a token.
 */
TURBOKV_HOST_DEVICE constexpr int ValueWordOffset(int padded_dim, int t, int unit, int k) {
  return LaneWordOffset(padded_dim, (unit & 7) * 4 + t, (unit >> 3) * 3 + k);
}

/*! \brief A nibble of a tile's part of 3-bit codes. */
struct nibble_t {
  int byte, shift;
};

/*! \brief Where nibble `i` of a token's plane lies. */
TURBOKV_HOST_DEVICE constexpr nibble_t NibblePlace(role_t role, int padded_dim, int token, int i) {
  if (role == role_t::kKey) {
    const int r = i & 3;
    return {KeyHalfOffset(padded_dim, token, i / 12, i % 12 / 4) + (r >> 1), (r & 1) * 4};
  }
  const int place = (i & 1) * 4 + (token >> 3) * 2 + (token & 1);
  return {ValueWordOffset(padded_dim, token >> 1 & 3, i / 6, i % 6 / 2) + (place >> 1),
          (place & 1) * 4};
}

// --- one token, plainly ---

/*! \brief Write a token's 3-bit codes: other tokens' nibbles stay. */
TURBOKV_HOST_DEVICE void PackThreeBits(uint8_t* part, role_t role, int token, int padded_dim,
                                       const uint8_t* codes) {
  const int group = UnitCoordinates(role), columns = group / 4;
  for (int i = 0; i < padded_dim * 3 / 4; ++i) {
    const uint8_t* const own = codes + i / (3 * columns) * group;
    const int k = i % (3 * columns) / columns, r = i % columns;
    const uint32_t nibble = own[k * columns + r] | (own[3 * columns + r] >> k & 1u) << 3;
    const nibble_t place = NibblePlace(role, padded_dim, token, i);
    const uint32_t others = part[place.byte] & ~(15u << place.shift);
    part[place.byte] = static_cast<uint8_t>(others | nibble << place.shift);
  }
}

/*! \brief Undo PackThreeBits. */
TURBOKV_HOST_DEVICE void UnpackThreeBits(const uint8_t* part, role_t role, int token,
                                         int padded_dim, uint8_t* codes) {
  const int group = UnitCoordinates(role), columns = group / 4;
  for (int j = 0; j < padded_dim; ++j) codes[j] = 0;
  for (int i = 0; i < padded_dim * 3 / 4; ++i) {
    uint8_t* const own = codes + i / (3 * columns) * group;
    const int k = i % (3 * columns) / columns, r = i % columns;
    const nibble_t place = NibblePlace(role, padded_dim, token, i);
    const uint32_t nibble = part[place.byte] >> place.shift & 15u;
    own[k * columns + r] = static_cast<uint8_t>(nibble & 7);
    own[3 * columns + r] = static_cast<uint8_t>(own[3 * columns + r] | nibble >> 3 << k);
  }
}

/*! \brief Write a token's codes to a tile, bit by bit: the plain form, which kernels are tested by.
 *
 *  \param tile    The tile's bytes; bits of other tokens stay.
 *  \param codes   [padded_dim], numbered as in FORMAT.md, section 3.
 */
TURBOKV_HOST_DEVICE void PackToken(uint8_t* tile, role_t role, int token, int padded_dim,
                                   int k_bits, int v_bits, const uint8_t* codes) {
  const tile_layout_t layout = TileLayout(padded_dim, k_bits, v_bits);
  const bool key = role == role_t::kKey;
  const int bits = key ? k_bits : v_bits, width = PlaneBits(bits);
  if (bits == 3) {
    PackThreeBits(tile + (key ? layout.k_base : layout.v_base), role, token, padded_dim, codes);
    return;
  }
  for (int plane = 0; plane < (HasHighBit(bits) ? 2 : 1); ++plane) {
    const bool high = plane == 1;
    const int w = high ? 1 : width, n = padded_dim * w / 8;
    const int s = high ? ValueHighRun(padded_dim, bits) : ValueRun(padded_dim, bits);
    uint8_t* part = tile + (key ? (high ? layout.k_high : layout.k_base)
                                : (high ? layout.v_high : layout.v_base));
    for (int beta = 0; beta < n; ++beta) {
      uint32_t byte = 0;
      for (int i = 0; i < 8 / w; ++i) {
        const int place = beta * (8 / w) + i;
        byte |= high ? CodeHigh(bits, codes[HighCoordinate(role, place)]) << i
                     : CodeBase(bits, codes[place]) << (i * w);
      }
      part[key ? KeyOffset(token, beta, n) : ValueOffset(token, beta, s, bits)] =
          static_cast<uint8_t>(byte);
    }
  }
}

/*! \brief Undo PackToken. */
TURBOKV_HOST_DEVICE void UnpackToken(const uint8_t* tile, role_t role, int token, int padded_dim,
                                     int k_bits, int v_bits, uint8_t* codes) {
  const tile_layout_t layout = TileLayout(padded_dim, k_bits, v_bits);
  const bool key = role == role_t::kKey;
  const int bits = key ? k_bits : v_bits, width = PlaneBits(bits), n = padded_dim * width / 8;
  const uint8_t* base = tile + (key ? layout.k_base : layout.v_base);
  if (bits == 3) return UnpackThreeBits(base, role, token, padded_dim, codes);
  const uint8_t* high = tile + (key ? layout.k_high : layout.v_high);
  for (int j = 0; j < padded_dim; ++j) {
    const int beta = j * width / 8, place = HighPosition(role, j);
    const int at = key ? KeyOffset(token, beta, n)
                       : ValueOffset(token, beta, ValueRun(padded_dim, bits), bits);
    const uint32_t low = base[at] >> (j * width % 8) & ((1u << width) - 1);
    uint32_t bit = 0;
    if (HasHighBit(bits)) {
      const int high_at = key ? KeyOffset(token, place / 8, padded_dim / 8)
                              : ValueOffset(token, place / 8, ValueHighRun(padded_dim, bits), bits);
      bit = high[high_at] >> (place % 8) & 1;
    }
    codes[j] = static_cast<uint8_t>(CodeFromPage(bits, low, bit));
  }
}

}  // namespace turbokv

#endif  // TURBOKV_PACK_CUH_
