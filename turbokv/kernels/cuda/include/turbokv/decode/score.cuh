// SPDX-License-Identifier: Apache-2.0
// Scores of a step: S[token, column] = K Q, exact in the codes.
#ifndef TURBOKV_DECODE_SCORE_CUH_
#define TURBOKV_DECODE_SCORE_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/query.cuh"
#include "turbokv/decode/tables.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief Scores of TILES tiles and V's scales: of tokens g (half 0) and g + 8 (half 1) of a tile,
 * for this lane's columns. */
template <class C, int TILES>
struct scores_t {
  float s[TILES][2][C::kLaneColumns];
  float v_scale[TILES][2];
};

/*! \brief int32 products of a tile's keys with both terms of the query. */
template <class C>
__device__ __forceinline__ void MultiplyKeys(const uint8_t* tile, const query_fragments_t<C>& query,
                                             const table_t& k_table, const lane_t<C>& at,
                                             int (&acc)[C::kQueryBlocks][4]) {
  using K = typename C::k_t;
  constexpr bool kSum = C::kKeyBytes == bytes_t::kSignedSum;
#pragma unroll
  for (int k = 0; k < K::kSteps; ++k) {
    typename K::codes_t codes;
    uint32_t a[2][K::kRegs], extra[2][K::kRegs];
    K::Load(tile, k, at.g, at.t, codes);
    K::template Expand<kSum>(codes, k_table, a, extra);
#pragma unroll
    for (int q = 0; q < K::kRegs / 2; ++q) {
      const int reg = k * K::kRegs + 2 * q;
#pragma unroll
      for (int n = 0; n < C::kQueryBlocks; ++n) {
        const uint32_t b0 = query.operand[n][reg], b1 = query.operand[n][reg + 1];
        if (reg == 0) {
          ptx::MmaS8From(acc[n], query.start[n], a[0][2 * q], a[1][2 * q], a[0][2 * q + 1],
                         a[1][2 * q + 1], b0, b1);
        } else {
          ptx::MmaS8(acc[n], a[0][2 * q], a[1][2 * q], a[0][2 * q + 1], a[1][2 * q + 1], b0, b1);
        }
        if constexpr (K::TwoTerms(kSum)) {
          ptx::MmaS8(acc[n], extra[0][2 * q], extra[1][2 * q], extra[0][2 * q + 1],
                     extra[1][2 * q + 1], b0, b1);
        }
      }
    }
  }
}

/*! \brief Score a step.
 *
 *  \param offset  Score of the part of K that the step's segment shares, for this lane's columns.
 *  \param marks   Receives in bit 15 whether any key of this lane was stored uncentred.
 */
template <class C>
__device__ __forceinline__ void ScoreTiles(const uint8_t* stage, const query_fragments_t<C>& query,
                                           const table_t& k_table,
                                           const float (&offset)[C::kLaneColumns],
                                           const lane_t<C>& at, scores_t<C, C::kTiles>& scores,
                                           uint32_t& marks) {
#pragma unroll
  for (int i = 0; i < C::kTiles; ++i) {
    const uint8_t* tile = stage + i * C::kTile;
    int acc[C::kQueryBlocks][4];
    MultiplyKeys<C>(tile, query, k_table, at, acc);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const __half2 scales =
          *reinterpret_cast<const __half2*>(tile + C::kScales + (at.g + half * 8) * 4);
      if constexpr (C::kAllFeatures) marks |= *reinterpret_cast<const uint32_t*>(&scales);
      scores.v_scale[i][half] = __high2float(scales);
      // the sign of K's scale says that a key is not centred
      const float k_scale = fabsf(__low2float(scales));
#pragma unroll
      for (int x = 0; x < C::kLaneColumns; ++x) {
        int high, low;
        if constexpr (C::kColumns == 4) {
          high = acc[0][2 * half], low = acc[0][2 * half + 1];
        } else {
          high = acc[x / 2][2 * half + x % 2], low = acc[C::kTermBlocks + x / 2][2 * half + x % 2];
        }
        const float dot = static_cast<float>(high * 256 + low);
        scores.s[i][half][x] = C::kAllFeatures ? fmaf(dot, k_scale, offset[x]) : dot * k_scale;
      }
    }
  }
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_SCORE_CUH_
