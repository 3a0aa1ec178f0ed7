// SPDX-License-Identifier: Apache-2.0
// Probabilities as B operands: from lanes that have tokens g and g + 8 to lanes whose tokens run
// along k.
#ifndef TURBOKV_DECODE_PROBABILITY_CUH_
#define TURBOKV_DECODE_PROBABILITY_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

constexpr float kCopyGain = 1024.f;  // of the probabilities of 16-bit copies, far from subnormals

/*! \brief Probabilities of TILES tiles for fp16 products: of each tile and block of columns tokens
 * 2t and 2t + 1, then 2t + 8 and 2t + 9. */
template <class C, int TILES>
struct half_probabilities_t {
  uint32_t b[TILES][C::kTermBlocks][2];

  /*! \brief Pack a tile's, of tokens g and g + 8 and the columns of block n; raises `largest`. */
  __device__ __forceinline__ void Pack(int tile, int n, const float (&p)[2][C::kBlockColumns],
                                       __half2& largest) {
    uint32_t(&to)[2] = b[tile][n];
    if constexpr (C::kColumns == 4) {
      // Both tokens of a row side by side. Transposed, even columns have tokens 2t and 2t + 1 of
      // row g / 2, odd ones 2t + 8 and 2t + 9: outputs use the even ones.
      const __half2 pair = __floats2half2_rn(p[0][0], p[1][0]);
      largest = __hmax2_nan(largest, pair);
      to[0] = ptx::Transpose8x8(*reinterpret_cast<const uint32_t*>(&pair));
      to[1] = __shfl_xor_sync(~0u, to[0], 4);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const __half2 pair = __floats2half2_rn(p[half][0], p[half][C::kBlockColumns - 1]);
        largest = __hmax2_nan(largest, pair);
        to[half] = ptx::Transpose8x8(*reinterpret_cast<const uint32_t*>(&pair));
      }
    }
  }
};

/*! \brief Integers of 16 bits for int8 products, their high and their low bytes.
 *
 *  kPairs (four rows): columns 2h and 2h + 1 have row h where k is the first or the second
 *  coordinate, and zeros elsewhere; high and low bytes are operands of their own.
 *  kQuads, four rows: column 2h has the high bytes of row h, 2h + 1 the low ones. Eight rows: high
 *  and low bytes are operands of their own.
 */
template <class C>
struct integer_probabilities_t {
  static constexpr int kOperands = C::kColumns == 4 && C::kOrder == order_t::kQuads ? 1 : 2;
  static constexpr int kWords = C::kOrder == order_t::kPairs ? 2 : 1;  // of a tile and operand
  // V's uniform 2-bit codes have the four tokens in another order, see FORMAT.md
  static constexpr bool kSwapped = C::v_t::kKind == expand_t::kUniform2;
  static_assert(C::kColumns == 4 || C::kOrder == order_t::kQuads, "pairs are for four rows");
  uint32_t b[C::kTiles][kOperands][kWords];

  /*! \brief Pack a tile's: `n` has tokens g and g + 8 in its low 16 bits, for this lane's columns.
   */
  __device__ __forceinline__ void Pack(int tile, const uint32_t (&n)[2][C::kLaneColumns], int g) {
    using ptx::Permute;
    const bool odd = g % 2 != 0;
    if constexpr (C::kColumns == 4) {
      // even columns g: tokens 2t and 2t + 1 of row g / 2; odd ones: 2t + 8 and 2t + 9
      const uint32_t x = ptx::Transpose8x8(Permute(n[0][0], n[1][0], 0x5410));
      const uint32_t y = __shfl_xor_sync(~0u, x, 4);
      if constexpr (C::kOrder == order_t::kPairs) {
        const uint32_t first = odd ? y : x, second = odd ? x : y;
        const uint32_t high = odd ? 0x3414u : 0x4341u, low = odd ? 0x2404u : 0x4240u;
        b[tile][0][0] = Permute(first, 0, high), b[tile][0][kWords - 1] = Permute(second, 0, high);
        b[tile][kOperands - 1][0] = Permute(first, 0, low);
        b[tile][kOperands - 1][kWords - 1] = Permute(second, 0, low);
      } else {
        const uint32_t high = kSwapped ? 0x7351u : 0x7531u, low = kSwapped ? 0x2604u : 0x2064u;
        b[tile][0][0] = Permute(x, y, odd ? low : high);
      }
    } else {
      const uint32_t x = ptx::Transpose8x8(Permute(n[0][0], n[0][C::kLaneColumns - 1], 0x5410));
      const uint32_t y = ptx::Transpose8x8(Permute(n[1][0], n[1][C::kLaneColumns - 1], 0x5410));
      b[tile][0][0] = Permute(x, y, kSwapped ? 0x7351 : 0x7531);
      b[tile][kOperands - 1][0] = Permute(x, y, kSwapped ? 0x6240 : 0x6420);
    }
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_PROBABILITY_CUH_
