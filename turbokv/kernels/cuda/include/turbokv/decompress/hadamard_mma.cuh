// SPDX-License-Identifier: Apache-2.0
// The Hadamard transform as integer products: coefficients as operands, sums across blocks.
#ifndef TURBOKV_DECOMPRESS_HADAMARD_MMA_CUH_
#define TURBOKV_DECOMPRESS_HADAMARD_MMA_CUH_

#include "turbokv/types.cuh"

namespace turbokv {
namespace decompress_detail {

constexpr int kMagicBits = 0x4b400000;  // of 1.5 * 2^23: plus an integer they are a float's bits
constexpr float kMagic = 0x1.8p23f;     // and that number
constexpr uint32_t kNegateBytes = 0xfefefefe;  // turns bytes of 1 into -1 and back

/*! \brief Signs of Hadamard coefficients for the eight coordinates of a piece, one byte each.
 *
 *  \param low    Lowest three bits of the output's coordinate.
 *  \param which  Register of the operand: see tile_rows_t::kEvenOdd.
 */
TURBOKV_HOST_DEVICE constexpr uint32_t SignBytes(bool even_odd, int which, int low) {
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const int j = (even_odd ? 2 * i + which : 4 * which + i) & low;
    bytes |= ((j ^ j >> 1 ^ j >> 2) & 1 ? 0xffu : 0x01u) << (8 * i);
  }
  return bytes;
}

/*! \brief The same for two coordinates, as the sign bits of a pair of 16-bit numbers. */
TURBOKV_HOST_DEVICE constexpr uint32_t SignHalves(int first, int low) {
  uint32_t halves = 0;
  for (int i = 0; i < 2; ++i) {
    const int j = (first + i) & low;
    halves |= ((j ^ j >> 1 ^ j >> 2) & 1 ? 0x8000u : 0u) << (16 * i);
  }
  return halves;
}

/*! \brief The transform across 2 or 4 blocks. With `magic`, inputs have kMagic added: it leaves
 *  without rounding.
 */
template <int N>
TURBOKV_DEVICE void AcrossBlocks(float (&x)[N], bool magic) {
  static_assert(N == 2 || N == 4, "of 32 coordinates");
  TURBOKV_UNROLL
  for (int i = 0; i < N; i += 2) {
    const float a = x[i], b = x[i + 1];
    x[i] = Add(magic ? Sub(a, 2 * kMagic) : a, b);
    x[i + 1] = Sub(a, b);
  }
  if constexpr (N == 4) {
    TURBOKV_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float a = x[i], b = x[i + 2];
      x[i] = Add(a, b);
      x[i + 2] = Sub(a, b);
    }
  }
}

}  // namespace decompress_detail
}  // namespace turbokv

#endif  // TURBOKV_DECOMPRESS_HADAMARD_MMA_CUH_
