// SPDX-License-Identifier: Apache-2.0
// A tile's K or V as rows of int8 levels in the registers of a warp: tokens are the rows of an A
// operand of mma.m16n8k32, coordinates its k. Lane = 4 * g + t has tokens g and g + 8, and of every
// 32 coordinates the eight from 8 * t on.
#ifndef TURBOKV_TILE_ROWS_CUH_
#define TURBOKV_TILE_ROWS_CUH_

#include "turbokv/expand.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/types.cuh"

namespace turbokv {

/*! \brief Reads tiles and turns codes into levels.
 *
 *  \tparam BITS  Of the role's codes.
 */
template <int PADDED_DIM, int BITS, role_t ROLE>
struct tile_rows_t {
  static constexpr bool kKey = ROLE == role_t::kKey;
  static constexpr int kWidth = PlaneBits(BITS);
  static constexpr bool kHigh = HasHighBit(BITS);
  static constexpr int kBlocks = PADDED_DIM / 32;
  static constexpr int kRowBytes = PADDED_DIM * kWidth / 8;
  // Of V a lane reads whole words, each a byte of four tokens; of K its two tokens' own bytes. At 3
  // bits it reads units, which have both of its tokens.
  static constexpr int kRaw = BITS == 3 || !kKey ? kWidth : kWidth == 8 ? 4 : 2;
  /*! \brief Whether the first register of a row has the even coordinates of eight, not the first
   * four: fields of 2 bits are picked apart that way. */
  static constexpr bool kEvenOdd = kWidth == 2;

  /*! \brief What a lane reads of a tile. */
  struct raw_t {
    uint32_t base[kBlocks][kRaw];
    uint32_t high[kHigh ? kBlocks : 1][2];
  };

  /*! \brief Read the codes of a tile. `base` and `high` are the role's planes. */
  static TURBOKV_DEVICE void Load(const uint8_t* base, const uint8_t* high, int lane, raw_t& raw) {
    const int g = lane / 4, t = lane % 4;
    TURBOKV_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      const int piece = b * 4 + t, beta = piece * kWidth;  // of eight coordinates; its first byte
      if constexpr (BITS == 3) {
        TURBOKV_UNROLL
        for (int k = 0; k < 3; ++k) {
          // a unit of K is two pieces
          const int offset = kKey ? KeyHalfOffset(PADDED_DIM, g, piece >> 1, k)
                                  : ValueWordOffset(PADDED_DIM, g >> 1, piece, k);
          raw.base[b][k] = __ldg(reinterpret_cast<const uint32_t*>(base + offset));
        }
      } else if constexpr (kKey) {
        TURBOKV_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int token = g + 8 * r;
          const uint8_t* const from = base + KeyOffset(token, beta, kRowBytes);
          if constexpr (kWidth == 8) {
            const uint2 x = __ldg(reinterpret_cast<const uint2*>(from));
            raw.base[b][2 * r] = x.x, raw.base[b][2 * r + 1] = x.y;
          } else if constexpr (kWidth == 4) {
            raw.base[b][r] = __ldg(reinterpret_cast<const uint32_t*>(from));
          } else {
            raw.base[b][r] = __ldg(reinterpret_cast<const uint16_t*>(from));
          }
          if constexpr (BITS == 5) {  // 16 coordinates, two lanes', share two bytes
            raw.high[b][r] = __ldg(reinterpret_cast<const uint16_t*>(
                high + KeyOffset(token, piece & ~1, PADDED_DIM / 8)));
          }
        }
      } else {
        constexpr int kRun = ValueRun(PADDED_DIM, BITS);
        TURBOKV_UNROLL
        for (int i = 0; i < kWidth; i += kRun) {
          const uint8_t* const from = base + ValueOffset(g & ~1, beta + i, kRun, BITS);
          if constexpr (kRun == 4 && kWidth >= 4) {
            const uint4 x = __ldg(reinterpret_cast<const uint4*>(from));
            raw.base[b][i] = x.x, raw.base[b][i + 1] = x.y;
            raw.base[b][i + 2] = x.z, raw.base[b][i + 3] = x.w;
          } else {
            const uint2 x = __ldg(reinterpret_cast<const uint2*>(from));
            raw.base[b][i] = x.x, raw.base[b][i + 1] = x.y;
          }
        }
        if constexpr (kHigh) {
          constexpr int kHighRun = ValueHighRun(PADDED_DIM, BITS);
          raw.high[b][0] = __ldg(
              reinterpret_cast<const uint32_t*>(high + ValueOffset(g & ~1, piece, kHighRun, BITS)));
        }
      }
    }
  }

  /*! \brief Codes that the upper bits of nibbles hold. */
  static TURBOKV_DEVICE uint32_t UpperBits(uint32_t w0, uint32_t w1, uint32_t w2) {
    return (w0 >> 3 & 0x11111111u) | (w1 >> 2 & 0x22222222u) | (w2 >> 1 & 0x44444444u);
  }

  /*! \brief Codes of four coordinates and the next four, a nibble each, of token g in the lower
   *  halves and of g + 8 in the upper ones: the first or the second eight of a unit of K.
   */
  static TURBOKV_DEVICE uint2 UnpackKey(const uint32_t (&w)[kRaw], bool second) {
    return make_uint2((second ? w[2] : w[0]) & 0x77777777u,
                      second ? UpperBits(w[0], w[1], w[2]) : w[1] & 0x77777777u);
  }

  /*! \brief The same of a unit of V. */
  static TURBOKV_DEVICE uint2 UnpackValue(const uint32_t (&w)[kRaw], bool odd) {
    uint32_t x[3];
    TURBOKV_UNROLL
    for (int k = 0; k < 3; ++k) {
      // bytes: tokens g and g + 8 of an even coordinate, then of the next; then a byte for each
      // token
      const uint32_t own = (odd ? w[k] >> 4 : w[k]) & 0x0f0f0f0fu;
      x[k] = own | own >> 12;
    }
    const uint32_t last = UpperBits(x[0], x[1], x[2]);
    return make_uint2(ptx::Permute(x[0], x[1], 0x5140u) & 0x77777777u,
                      ptx::Permute(x[2], last, 0x5140u) & 0x77777777u);
  }

  /*! \brief Levels of block b as an A operand: registers 0 and 2 are token g's, 1 and 3 token g +
   * 8's. */
  static TURBOKV_DEVICE void Expand(const raw_t& raw, int b, int lane, const table_t& table,
                                    uint32_t (&a)[4]) {
    using ptx::Permute;
    const uint32_t(&base)[kRaw] = raw.base[b];
    const bool odd = (lane >> 2 & 1) != 0;  // token g is odd
    // where in a word of V the bytes of tokens g and g + 8 are: those of a first word's, then of a
    // second's, for token g, then the same for token g + 8
    const uint32_t pick = BITS == 2 ? (odd ? 0x7362u : 0x5140u) : (odd ? 0x7351u : 0x6240u);
    if constexpr (BITS == 3) {
      const uint2 codes = kKey ? UnpackKey(base, (lane & 1) != 0) : UnpackValue(base, odd);
      a[0] = Permute(table.a0, table.a1, codes.x);
      a[1] = Permute(table.a0, table.a1, codes.x >> 16);
      a[2] = Permute(table.a0, table.a1, codes.y);
      a[3] = Permute(table.a0, table.a1, codes.y >> 16);
    } else if constexpr (kWidth == 2) {
      const uint32_t x = Permute(base[0], base[1], kKey ? 0x5410u : pick);  // token g's codes below
      const uint32_t even = x & 0x33333333u, uneven = x >> 2 & 0x33333333u;
      a[0] = Permute(table.a0, table.a1, even);
      a[1] = Permute(table.a0, table.a1, even >> 16);
      a[2] = Permute(table.a0, table.a1, uneven);
      a[3] = Permute(table.a0, table.a1, uneven >> 16);
    } else if constexpr (kWidth == 4) {
      uint32_t rows[2] = {base[0], base[1]};
      if constexpr (!kKey) {
        const uint32_t low = Permute(base[0], base[1], pick), top = Permute(base[2], base[3], pick);
        rows[0] = Permute(low, top, 0x5410u);
        rows[1] = Permute(low, top, 0x7632u);
      }
      uint32_t high = 0;  // bits of eight coordinates in order, token g + 8's from bit 16 on
      if constexpr (kHigh) {
        if constexpr (kKey) {
          const uint32_t both = Permute(raw.high[b][0], raw.high[b][1], 0x5410u);
          high = NaturalHighBits(ROLE, both) >> (lane & 1) * 8;
        } else {
          high = Permute(raw.high[b][0], 0, odd ? 0x4341u : 0x4240u);
        }
      }
      TURBOKV_UNROLL
      for (int r = 0; r < 2; ++r) {
        TURBOKV_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t x = rows[r] >> 16 * half, y = (rows[r] ^ 0x88888888u) >> 16 * half;
          const uint32_t first = Permute(table.a0, table.a1, x);
          const uint32_t second = Permute(table.b0, table.b1, y);
          uint32_t level = first ^ second;
          if constexpr (kHigh) {
            // magnitudes, negated where the high bit is clear: 4 bits to the tops of 4 bytes
            const uint32_t bits = high >> (16 * r + 4 * half) & 15;
            const uint32_t tops = bits * 0x10204080u & 0x80808080u;
            const uint32_t negative = ~Permute(tops, 0, 0xba98u);
            level = ((first | second) ^ negative) + (negative & 0x01010101u);
          }
          a[2 * half + r] = level;
        }
      }
    } else {
      TURBOKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t rows[2];
        if constexpr (kKey) {
          rows[0] = base[half], rows[1] = base[2 + half];
        } else {
          const uint32_t low = Permute(base[4 * half], base[4 * half + 1], pick);
          const uint32_t top = Permute(base[4 * half + 2], base[4 * half + 3], pick);
          rows[0] = Permute(low, top, 0x5410u);
          rows[1] = Permute(low, top, 0x7632u);
        }
        // code 0 reads as 1
        a[2 * half] = __vmaxu4(rows[0], 0x01010101u) ^ 0x80808080u;
        a[2 * half + 1] = __vmaxu4(rows[1], 0x01010101u) ^ 0x80808080u;
      }
    }
  }

  /*! \brief Level of coordinate i (0..7) of Expand's token g (r = 0) or g + 8 (r = 1). */
  static TURBOKV_DEVICE float LevelOf(const uint32_t (&a)[4], int r, int i) {
    const int half = kEvenOdd ? i % 2 : i / 4, byte = kEvenOdd ? i / 2 : i % 4;
    const uint32_t shifted = a[2 * half + r] ^ 0x80808080u;  // level + 128
    // 2^23 + number is a float's bits
    return __uint_as_float(ptx::Permute(shifted, 0x4b000000u, 0x7650u + byte)) - (0x1p23f + 128.0f);
  }
};

}  // namespace turbokv

#endif  // TURBOKV_TILE_ROWS_CUH_
