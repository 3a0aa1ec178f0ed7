// SPDX-License-Identifier: Apache-2.0
// Byte-permute lookups: how codes of a width become levels, and the tables they are looked up in.
#ifndef TURBOKV_DECODE_TABLES_CUH_
#define TURBOKV_DECODE_TABLES_CUH_

#include <cstdint>

#include "turbokv/codebook.cuh"
#include "turbokv/types.cuh"

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

/*! \brief Selectors of a unit of 32 codes of 3 bits, which has three words: three in four codes
 * have the lower bits of a nibble to themselves, the rest are the nibbles' top bits (FORMAT.md,
 * section 6). Nibbles of m[k] are for byte-permutes. */
TURBOKV_HOST_DEVICE void Selectors3(const uint32_t (&w)[3], uint32_t (&m)[4]) {
  m[0] = w[0] & 0x77777777u, m[1] = w[1] & 0x77777777u, m[2] = w[2] & 0x77777777u;
  m[3] = (w[0] >> 3 & 0x11111111u) | (w[1] >> 2 & 0x22222222u) | (w[2] >> 1 & 0x44444444u);
}

/*! \brief 2^-bits. */
TURBOKV_HOST_DEVICE float InverseExp2(int bits) { return BitsFloat((127u - bits) << 23); }

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
TURBOKV_HOST_DEVICE table_t MakeNegativeTable5(const codebook_t& codebook) {
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    words[i / 4] |= static_cast<uint32_t>(128 - codebook.magnitudes[i]) << (8 * (i % 4));
  }
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace turbokv

#endif  // TURBOKV_DECODE_TABLES_CUH_
