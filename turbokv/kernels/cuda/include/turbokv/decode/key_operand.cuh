// SPDX-License-Identifier: Apache-2.0
// K of a tile as the A operand of an int8 product: tokens as rows and coordinates as k.
// FORMAT.md section 6 orders the bytes of a tile for exactly this.
#ifndef TURBOKV_DECODE_KEY_OPERAND_CUH_
#define TURBOKV_DECODE_KEY_OPERAND_CUH_

#include <cstdint>

#include "turbokv/codebook.cuh"
#include "turbokv/decode/tables.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {

/*! \brief K of a tile, but by 3 bits, in the registers of a warp: lane (g, t) reads rows g and g +
 * 8, and of each row, in step i, the kCodes coordinates from (4 * i + t) * kCodes on.
 *
 *  \tparam HEAD_DIM Coordinates stored per vector.
 *  \tparam BITS     Width of a code.
 *  \tparam UNIFORM2 Whether 2-bit codebooks are {m, 3 m}, which need no lookup.
 */
template <int HEAD_DIM, int BITS, bool UNIFORM2>
struct key_operand_t {
  static constexpr expand_t kKind = ExpandKind(BITS, UNIFORM2);
  static constexpr int kBase = PlaneBits(BITS);
  static constexpr bool kHigh = HasHighBit(BITS);
  static constexpr int kRowBytes = HEAD_DIM * kBase / 8;
  static constexpr int kCodes = HEAD_DIM / 4 < 128 / kBase ? HEAD_DIM / 4 : 128 / kBase;
  static constexpr int kSteps = HEAD_DIM / 4 / kCodes;
  static constexpr int kWords = kCodes * kBase / 32;
  static constexpr int kRegs = kCodes / 4;  // int8 registers a row and step
  static constexpr int kBytes = 16 * (kRowBytes + (kHigh ? HEAD_DIM / 8 : 0));
  // What the operand leaves out of a level, as a multiple of the sum of the query's integers:
  // whether there is anything, and whether that sum has to be even.
  static constexpr bool kLacksSum =
      kKind == expand_t::kUniform2 || kKind == expand_t::kSignMagnitude5;
  static constexpr bool kEvenSum = kKind == expand_t::kUniform2;

  /*! \brief What an operand of 1 stands for, without the vector's scale. */
  static TURBOKV_HOST_DEVICE float Unit(const codebook_t& book) {
    return InverseExp2(book.frac_bits) *
           (kKind == expand_t::kUniform2 ? 2 * book.magnitudes[0] : 1);
  }

  /*! \brief Where the accumulator of a product starts, so that it lacks nothing; `sum` is that of
   * the query's integers. */
  static __device__ __forceinline__ int ScoreStart(int sum) {
    return kKind == expand_t::kUniform2 ? -(sum / 2 * 3) : kLacksSum ? sum : 0;
  }

  /*! \brief Where coordinate j belongs in the query's fragments: byte of a row of HEAD_DIM bytes
   * that lane t reads from t * HEAD_DIM / 4 on, kRegs words a step. */
  static __device__ __forceinline__ int QueryByte(int j) {
    const int chunk = j / kCodes, x = j % kCodes;
    int reg = x / 4, byte = x % 4;
    if constexpr (kKind == expand_t::kUniform2) {
      reg = x / 16 * 4 + x % 4;
      byte = x / 4 % 4;
    } else if constexpr (kKind == expand_t::kLookup2) {
      // x = 8 * m + 4 * i + 2 * v + f
      const int m = x % 32 / 8, i = x / 4 % 2, v = x / 2 % 2, f = x % 2;
      reg = kCodes >= 32 ? x / 32 * 8 + (i * 2 + f) * 2 + m / 2 : i * 2 + f;
      byte = m % 2 * 2 + v;
    }
    return chunk % 4 * (HEAD_DIM / 4) + chunk / 4 * kCodes + reg * 4 + byte;
  }

  /*! \brief Bits by which coordinate j's operand exceeds its code: the query's integer has as many
   * less, and the product is the same. It saves shifts at 2 bits, where the query's last bits are
   * far below the error of the codes. */
  static __host__ __device__ constexpr int CodeShift(int j) {
    return kKind == expand_t::kUniform2 && j % 4 > 0 ? 2 : 0;
  }

  /*! \brief Codes of a step: words of rows g and g + 8, and their high bits. */
  struct codes_t {
    uint32_t w[2][kWords], h[2][2];
  };

  /*! \brief Read the codes of step i. */
  static __device__ __forceinline__ void Load(const uint8_t* tile, int i, int g, int t,
                                              codes_t& codes) {
    auto& w = codes.w;
    auto& h = codes.h;
    constexpr int kChunkBytes = kWords * 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int byte = (4 * i + t) * kChunkBytes;
      if constexpr (kRowBytes >= 128) byte ^= (g & 1) * 64;
      const uint8_t* p = tile + (r * 8 + g) * kRowBytes + byte;
      if constexpr (kWords == 4) {
        const uint4 x = *reinterpret_cast<const uint4*>(p);
        w[r][0] = x.x, w[r][1] = x.y, w[r][2] = x.z, w[r][3] = x.w;
      } else if constexpr (kWords == 2) {
        const uint2 x = *reinterpret_cast<const uint2*>(p);
        w[r][0] = x.x, w[r][1] = x.y;
      } else {
        w[r][0] = *reinterpret_cast<const uint32_t*>(p);
      }
      h[r][0] = h[r][1] = 0;
      if constexpr (kHigh) {
        const uint8_t* q =
            tile + 16 * kRowBytes + (r * 8 + g) * (HEAD_DIM / 8) + (4 * i + t) * (kCodes / 8);
        if constexpr (kCodes == 64) {
          const uint2 x = *reinterpret_cast<const uint2*>(q);
          h[r][0] = x.x, h[r][1] = x.y;
        } else if constexpr (kCodes == 32) {
          h[r][0] = *reinterpret_cast<const uint32_t*>(q);
        } else {
          h[r][0] = *reinterpret_cast<const uint16_t*>(q);
        }
      }
    }
  }

  /*! \brief Whether a second int8 product completes the first. */
  static __host__ __device__ constexpr bool TwoTerms(bool sum) {
    return BITS == 5 || (BITS == 4 && sum);
  }

  /*! \brief Levels of rows g (a[0]) and g + 8 (a[1]); `extra` is the second term.
   *
   *  5 bits: a is the magnitude, complemented where negative (-m - 1), and `extra` is -1 where the
   * level is positive: the product lacks the sum of the query, which the caller adds once a score.
   *  kUniform2: a is the code 0..3, shifted by CodeShift; the level is m * (2 code - 3).
   */
  template <bool SUM>
  static __device__ __forceinline__ void Expand(const codes_t& codes, const table_t& table,
                                                uint32_t (&a)[2][kRegs],
                                                uint32_t (&extra)[2][kRegs]) {
    using ptx::Permute;
    const auto& w = codes.w;
    const auto& h = codes.h;
    if constexpr (kKind == expand_t::kPaired4) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          const uint32_t x = w[r][i], y = x ^ 0x88888888u;
          const uint32_t a0 = Permute(table.a0, table.a1, x), b0 = Permute(table.b0, table.b1, y);
          const uint32_t a1 = Permute(table.a0, table.a1, x >> 16);
          const uint32_t b1 = Permute(table.b0, table.b1, y >> 16);
          a[r][2 * i] = SUM ? a0 : a0 ^ b0;
          a[r][2 * i + 1] = SUM ? a1 : a1 ^ b1;
          extra[r][2 * i] = b0;
          extra[r][2 * i + 1] = b1;
        }
      }
    } else if constexpr (kKind == expand_t::kSignMagnitude5) {
      // A unit is 16 coordinates: two words of nibbles and two bytes of signs. Groups of four
      // coordinates find their signs in the top bits of two shifted copies.
      constexpr bool kMixed = kCodes == 16;  // the units of both rows in one register
      uint32_t high[2] = {h[0][0], h[1][0]};
      if constexpr (kMixed) high[0] = Permute(h[0][0], h[1][0], 0x5410);
#pragma unroll
      for (int r = 0; r < (kMixed ? 1 : 2); ++r) {
#pragma unroll
        for (int group = 0; group < 4; ++group) {
          const uint32_t p = high[r] << (7 - 2 * group), q = high[r] << (6 - 2 * group);
#pragma unroll
          for (int unit = 0; unit < 2; ++unit) {
            const int row = kMixed ? unit : r, word = (kMixed ? 0 : 2 * unit) + group / 2;
            const uint32_t positive = Permute(p, q, unit ? 0xFEBAu : 0xDC98u);
            const uint32_t x = w[row][word], y = x ^ 0x88888888u;
            const int shift = group % 2 * 16;
            const uint32_t magnitude =
                Permute(table.a0, table.a1, x >> shift) | Permute(table.b0, table.b1, y >> shift);
            a[row][2 * word + group % 2] = magnitude ^ ~positive;
            extra[row][2 * word + group % 2] = positive;
          }
        }
      }
    } else if constexpr (kKind == expand_t::kLookup2) {
      // Selector words take one byte (four codes) from each of four pairs of bytes.
      if constexpr (kCodes == 16) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t x = Permute(w[0][0], w[1][0], i ? 0x7531 : 0x6420);
#pragma unroll
          for (int f = 0; f < 2; ++f) {
            const uint32_t s = (x >> (2 * f)) & 0x33333333u;
            a[0][i * 2 + f] = Permute(table.a0, table.a1, s);
            a[1][i * 2 + f] = Permute(table.a0, table.a1, s >> 16);
          }
        }
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int k = 0; k < kWords / 2; ++k) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const uint32_t x = Permute(w[r][2 * k], w[r][2 * k + 1], i ? 0x7531 : 0x6420);
#pragma unroll
              for (int f = 0; f < 2; ++f) {
                const uint32_t s = (x >> (2 * f)) & 0x33333333u;
                a[r][k * 8 + (i * 2 + f) * 2] = Permute(table.a0, table.a1, s);
                a[r][k * 8 + (i * 2 + f) * 2 + 1] = Permute(table.a0, table.a1, s >> 16);
              }
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          if constexpr (kKind == expand_t::kUniform2) {
#pragma unroll
            for (int f = 0; f < 4; ++f) {
              const uint32_t field = w[r][i] >> (2 * f - CodeShift(f));
              a[r][4 * i + f] = field & (0x03030303u << CodeShift(f));
            }
          } else {
            a[r][i] = w[r][i] ^ 0x80808080u;
          }
        }
      }
    }
  }
};

}  // namespace turbokv

#endif  // TURBOKV_DECODE_KEY_OPERAND_CUH_
