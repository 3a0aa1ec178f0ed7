// SPDX-License-Identifier: Apache-2.0
// From codes in a tile to operands of tensor-core instructions: which lane holds what, and the
// byte-permute lookups. FORMAT.md section 6 orders the bytes of a tile for exactly this.
//
// Throughout, lane = 4 * g + t as in the PTX fragments: g (0..7) is a row of A, t (0..3) a step of
// k. K is the A operand of an int8 product with tokens as rows and coordinates as k. V is the A
// operand of an fp16 product with coordinates as rows and tokens as k.
#ifndef TURBOKV_EXPAND_CUH_
#define TURBOKV_EXPAND_CUH_

#include "turbokv/codebook.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {

/*! \brief How codes of a width become levels. 2 bits need no lookup if the magnitudes are m and 3m.
 */
enum class expand_t { kUniform2, kLookup2, kLookup3, kPaired4, kSignMagnitude5, kBytes8 };

__host__ __device__ constexpr expand_t ExpandKind(int bits, bool uniform2) {
  return bits == 2   ? (uniform2 ? expand_t::kUniform2 : expand_t::kLookup2)
         : bits == 3 ? expand_t::kLookup3
         : bits == 4 ? expand_t::kPaired4
         : bits == 5 ? expand_t::kSignMagnitude5
                     : expand_t::kBytes8;
}

// --- lookup tables
// --------------------------------------------------------------------------------

/*! \brief Two tables of eight bytes each. What they hold depends on the width; see MakeTable. */
struct table_t {
  uint32_t a0, a1, b0, b1;
};

/*! \brief What a byte of the expansion holds. */
enum class bytes_t {
  kSigned,     // the level
  kSignedSum,  // 4 bits only: two bytes whose sum is the level
  kOffset128,  // the level + 128, unsigned
};

/*! \brief Build the lookup tables of a codebook (not for kUniform2 and kBytes8, which need none).
 *
 *  4 bits: nibble n is code c = 2 * (n & 7) + (n >> 3), so that the two codes of entry n & 7 share
 * a sign. A lookup with n selects table a if bit 3 is clear, else it replicates the top bit of the
 *  entry: zeros or ones. A lookup in table b with bit 3 flipped does the opposite, and the
 * exclusive or of the two is any byte: one table holds the complement where the other fills with
 * ones. kSignedSum adds instead: a fill of ones is -1, which the entries of that sign make up for.
 *  5 bits: a and b hold magnitudes 0..7 and 8..15, with clear top bits, so that fills are zero.
 *  2 and 3 bits: a holds the levels of the 4 or 8 codes.
 */
template <int BITS, bytes_t BYTES>
TURBOKV_HOST_DEVICE table_t MakeTable(const codebook_t& codebook) {
  uint32_t words[4] = {0, 0, 0, 0};
  constexpr int kHalf = 1 << (BITS - 1);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int a = 0, b = 0;
    if constexpr (BITS == 5) {
      a = codebook.magnitudes[i];
      b = codebook.magnitudes[i + 8];
    } else if constexpr (BITS == 4) {
      const bool positive = i >= 4;
      const int even =
          positive ? codebook.magnitudes[2 * i - kHalf] : -codebook.magnitudes[kHalf - 1 - 2 * i];
      const int odd = positive ? codebook.magnitudes[2 * i + 1 - kHalf]
                               : -codebook.magnitudes[kHalf - 2 - 2 * i];
      if constexpr (BYTES == bytes_t::kSignedSum) {
        a = positive ? even : even + 1;
        b = positive ? odd : odd + 1;
      } else if constexpr (BYTES == bytes_t::kSigned) {
        a = positive ? even : ~even;
        b = odd;
      } else {
        a = positive ? ~(even + 128) : even + 128;
        b = odd + 128;
      }
    } else if (i < 2 * kHalf) {
      a = i >= kHalf ? codebook.magnitudes[i - kHalf] : -codebook.magnitudes[kHalf - 1 - i];
      if constexpr (BYTES == bytes_t::kOffset128) a += 128;
    }
    words[i / 4] |= static_cast<uint32_t>(a & 255) << (8 * (i % 4));
    words[2 + i / 4] |= static_cast<uint32_t>(b & 255) << (8 * (i % 4));
  }
  return {words[0], words[1], words[2], words[3]};
}

/*! \brief Negative levels of 5 bits, as 128 - magnitude. */
__device__ __forceinline__ table_t MakeNegativeTable5(const codebook_t& codebook) {
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    words[i / 4] |= static_cast<uint32_t>(128 - codebook.magnitudes[i]) << (8 * (i % 4));
  }
  return {words[0], words[1], words[2], words[3]};
}

// --- K
// --------------------------------------------------------------------------------------------

/*! \brief K of a tile in the registers of a warp: lane (g, t) reads rows g and g + 8, and of each
 * row, in step i, the kCodes coordinates from (4 * i + t) * kCodes on.
 */
template <int HEAD_DIM, int BITS, bool UNIFORM2>
struct k_fragment_t {
  static constexpr expand_t kKind = ExpandKind(BITS, UNIFORM2);
  static constexpr int kBase = PlaneBits(BITS);
  static constexpr bool kHigh = HasHighBit(BITS);
  static constexpr int kRowBytes = HEAD_DIM * kBase / 8;
  static constexpr int kCodes = HEAD_DIM / 4 < 128 / kBase ? HEAD_DIM / 4 : 128 / kBase;
  static constexpr int kSteps = HEAD_DIM / 4 / kCodes;
  static constexpr int kWords = kCodes * kBase / 32;
  static constexpr int kRegs = kCodes / 4;  // int8 registers a row and step
  static constexpr int kBytes = 16 * (kRowBytes + (kHigh ? HEAD_DIM / 8 : 0));

  /*! \brief Where coordinate j belongs in the query's fragments: byte of a row of HEAD_DIM bytes
   * that lane t reads from t * HEAD_DIM / 4 on, kRegs words a step. */
  static __device__ __forceinline__ int QueryByte(int j) {
    const int chunk = j / kCodes, x = j % kCodes;
    int reg = x / 4, byte = x % 4;
    if constexpr (kKind == expand_t::kUniform2) {
      reg = x / 16 * 4 + x % 4;
      byte = x / 4 % 4;
    } else if constexpr (kKind == expand_t::kLookup2 || kKind == expand_t::kLookup3) {
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

  /*! \brief Read the codes of step i: words of rows g and g + 8, and their high bits. */
  static __device__ __forceinline__ void Load(const uint8_t* tile, int i, int g, int t,
                                              uint32_t (&w)[2][kWords], uint32_t (&h)[2][2]) {
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
  static __device__ __forceinline__ void Expand(const uint32_t (&w)[2][kWords],
                                                const uint32_t (&h)[2][2], const table_t& table,
                                                uint32_t (&a)[2][kRegs],
                                                uint32_t (&extra)[2][kRegs]) {
    using ptx::Permute;
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
    } else if constexpr (kKind == expand_t::kLookup2 || kKind == expand_t::kLookup3) {
      // Selector words take one byte (four codes) from each of four pairs of bytes, so that the
      // bits of the high plane are one shift away.
      if constexpr (kCodes == 16) {
        const uint32_t high = Permute(h[0][0], h[1][0], 0x5410);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t x = Permute(w[0][0], w[1][0], i ? 0x7531 : 0x6420);
#pragma unroll
          for (int f = 0; f < 2; ++f) {
            const uint32_t s = Selector(x, high, i, f);
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
                const uint32_t s = Selector(x, h[r][k], i, f);
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

  /*! \brief Nibbles of 2 or 3-bit codes from field f of x, and bit 2 i + f of each nibble of high.
   */
  static __device__ __forceinline__ uint32_t Selector(uint32_t x, uint32_t high, int i, int f) {
    const uint32_t low = (x >> (2 * f)) & 0x33333333u;
    if constexpr (!kHigh) return low;
    const int bit = 2 * i + f;
    const uint32_t shifted = bit <= 2 ? high << (2 - bit) : high >> (bit - 2);
    return low | (shifted & 0x44444444u);
  }
};

// --- V
// --------------------------------------------------------------------------------------------

/*! \brief V of a tile: lane (g, t) reads tokens {2t, 2t + 1, 2t + 8, 2t + 9} of coordinates
 *  (8 * section + g) * kCodes + 0..kCodes - 1. Each section makes kBlocks A operands (16
 * coordinates x 16 tokens); row g of block b is coordinate Offset(b, 0), row g + 8 is Offset(b, 1).
 */
template <int HEAD_DIM, int BITS, bool UNIFORM2>
struct v_fragment_t {
  static constexpr expand_t kKind = ExpandKind(BITS, UNIFORM2);
  static constexpr int kBase = PlaneBits(BITS);
  static constexpr bool kHigh = HasHighBit(BITS);
  static constexpr int kRowBytes = HEAD_DIM * kBase / 8;
  static constexpr int kWords = kRowBytes / 8 < 4 ? kRowBytes / 8 : 4;  // words a lane and section
  static constexpr int kHighWords =
      kHigh ? kWords / kBase : 0;                    // of high bits: a byte of four tokens each
  static constexpr int kCodes = kWords * 8 / kBase;  // coordinates a lane and section
  static constexpr int kSections = HEAD_DIM / 8 / kCodes;
  static constexpr int kBlocks = kCodes / 2;
  static constexpr int kBytes = 16 * (kRowBytes + (kHigh ? HEAD_DIM / 8 : 0));
  // What the fp16 operand adds to every level: 1024 comes with the byte, 128 with its sign.
  static constexpr float kOffset = kKind == expand_t::kUniform2 ? 0.f : 1152.f;

  static __host__ __device__ constexpr int Offset(int block, int half) {
    return kBase == 2 && kKind == expand_t::kUniform2 ? block / 2 * 4 + block % 2 * 2 + half
           : kBase == 2                               ? block / 2 * 4 + block % 2 + 2 * half
                                                      : 2 * block + half;
  }
  static __device__ __forceinline__ int Coordinate(int section, int block, int half, int g) {
    return (8 * section + g) * kCodes + Offset(block, half);
  }

  static __device__ __forceinline__ void Load(const uint8_t* v, int section, int lane,
                                              uint32_t (&w)[kWords], uint32_t (&h)[2]) {
    const uint8_t* p = v + section * (kWords * 128) + lane * (kWords * 4);
    if constexpr (kWords == 4) {
      const uint4 x = *reinterpret_cast<const uint4*>(p);
      w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
    } else {
      static_assert(kWords == 2, "head_dim is at least 64");
      const uint2 x = *reinterpret_cast<const uint2*>(p);
      w[0] = x.x, w[1] = x.y;
    }
    h[0] = h[1] = 0;
    if constexpr (kHigh) {
      const uint8_t* q =
          v + 16 * kRowBytes + section * (kHighWords * 128) + lane * (kHighWords * 4);
      if constexpr (kHighWords == 2) {
        const uint2 x = *reinterpret_cast<const uint2*>(q);
        h[0] = x.x, h[1] = x.y;
      } else {
        static_assert(kHighWords == 1, "one or two bytes a token");
        h[0] = *reinterpret_cast<const uint32_t*>(q);
      }
    }
  }

  /*! \brief fp16 operands of bytes [token 0 row g, token 0 row g + 8, token 1 row g, token 1 row g
   * + 8]. */
  static __device__ __forceinline__ void Widen(uint32_t low, uint32_t high, uint32_t (&a)[4]) {
    constexpr uint32_t k1024 = 0x64646464u;
    a[0] = ptx::Permute(low, k1024, 0x4240);
    a[1] = ptx::Permute(low, k1024, 0x4341);
    a[2] = ptx::Permute(high, k1024, 0x4240);
    a[3] = ptx::Permute(high, k1024, 0x4341);
  }

  /*! \brief The A operand of `block`: tokens {2t, 2t + 1} in a[0] and a[1], {2t + 8, 2t + 9} in
   * a[2], a[3].
   *
   *  kUniform2: fp16 subnormals, the code times 4^field * 2^-24; field = 2 * (block % 2) + half.
   */
  static __device__ __forceinline__ void Expand(const uint32_t (&w)[kWords], const uint32_t (&h)[2],
                                                int block, const table_t& table,
                                                const table_t& negative, uint32_t (&a)[4]) {
    using ptx::Permute;
    if constexpr (kKind == expand_t::kUniform2) {
      const uint32_t x = w[block / 2], y = x >> 8;
      const uint32_t mask = 0x00030003u << (block % 2 * 4);
      a[0] = x & mask, a[1] = x & (mask << 2), a[2] = y & mask, a[3] = y & (mask << 2);
    } else if constexpr (kKind == expand_t::kPaired4) {
      const uint32_t x = w[block], y = x ^ 0x88888888u;
      const uint32_t low = Permute(table.a0, table.a1, x) ^ Permute(table.b0, table.b1, y);
      const uint32_t high =
          Permute(table.a0, table.a1, x >> 16) ^ Permute(table.b0, table.b1, y >> 16);
      Widen(low, high, a);
    } else if constexpr (kKind == expand_t::kSignMagnitude5) {
      const uint32_t p = h[0] << (7 - 2 * block), q = h[0] << (6 - 2 * block);
      uint32_t bytes[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t positive = Permute(p, q, i ? 0xFBEAu : 0xD9C8u);
        const uint32_t x = w[block] >> (16 * i), y = (w[block] ^ 0x88888888u) >> (16 * i);
        const uint32_t plus =
            Permute(table.a0, table.a1, x) | Permute(table.b0, table.b1, y) | 0x80808080u;
        const uint32_t minus =
            Permute(negative.a0, negative.a1, x) | Permute(negative.b0, negative.b1, y);
        bytes[i] = (plus & positive) | (minus & ~positive);
      }
      Widen(bytes[0], bytes[1], a);
    } else if constexpr (kKind == expand_t::kBytes8) {
      constexpr uint32_t k1024 = 0x64646464u;
      const uint32_t x = w[2 * block], y = w[2 * block + 1];
      a[0] = Permute(x, k1024, 0x4140), a[1] = Permute(y, k1024, 0x4140);
      a[2] = Permute(x, k1024, 0x4342), a[3] = Permute(y, k1024, 0x4342);
    } else {
      uint32_t x = w[block / 2];
      if constexpr (kKind == expand_t::kLookup2) x = Permute(x, 0, 0x3120);
      const int f = block % 2, i = block / 2 % 2;
      uint32_t s = (x >> (2 * f)) & 0x33333333u;
      if constexpr (kHigh) {
        const int bit = 2 * i + f;
        const uint32_t shifted = bit <= 2 ? h[block / 4] << (2 - bit) : h[block / 4] >> (bit - 2);
        s |= shifted & 0x44444444u;
      }
      Widen(Permute(table.a0, table.a1, s), Permute(table.a0, table.a1, s >> 16), a);
    }
  }
};

}  // namespace turbokv

#endif  // TURBOKV_EXPAND_CUH_
