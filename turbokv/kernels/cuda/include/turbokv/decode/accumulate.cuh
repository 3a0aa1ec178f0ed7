// SPDX-License-Identifier: Apache-2.0
// Outputs of a step: O[coordinate, column] += V[coordinate, token] P[token, column].
#ifndef TURBOKV_DECODE_ACCUMULATE_CUH_
#define TURBOKV_DECODE_ACCUMULATE_CUH_

#include <cstdint>

#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/softmax.cuh"
#include "turbokv/decode/tables.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/decode/vector.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief Products of the constant in V's operands with a step's probabilities. */
template <class C>
__device__ __forceinline__ void AccumulateCorrection(const half_probabilities_t<C, C::kTiles>& p,
                                                     half_softmax_t<C>& state) {
  using V = typename C::v_t;
  constexpr uint32_t kConstant = V::kNegatedOffset;
  // of eight tiles, half of the products in a chain of their own
  constexpr bool kTwoChains = C::kTiles == 8;
  constexpr bool kAddPairs = kTwoChains && V::kAddPairs;
  constexpr int kTiles = kAddPairs ? C::kTiles / 2 : C::kTiles;
  float second[C::kTermBlocks][4] = {};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int n = 0; n < C::kTermBlocks; ++n) {
      float(&to)[4] = kTwoChains && i % 2 == 1 ? second[n] : state.correction[n];
      uint32_t b0, b1;
      if constexpr (kAddPairs) {
        b0 = AddHalf2(p.b[2 * i][n][0], p.b[2 * i + 1][n][0]);
        b1 = AddHalf2(p.b[2 * i][n][1], p.b[2 * i + 1][n][1]);
      } else {
        b0 = p.b[i][n][0], b1 = p.b[i][n][1];
      }
      ptx::MmaF16(to, kConstant, kConstant, kConstant, kConstant, b0, b1);
    }
  }
  if constexpr (kTwoChains) {
#pragma unroll
    for (int n = 0; n < C::kTermBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state.correction[n][e] += second[n][e];
    }
  }
}

/*! \brief Attend to a step: probabilities from its scores, and their products with its values. */
template <class C>
__device__ __forceinline__ void AccumulateTiles(const uint8_t* stage,
                                                const scores_t<C, C::kTiles>& scores,
                                                const float (&unit)[C::kLaneColumns], int zero,
                                                const table_t& table, const table_t& negative,
                                                const lane_t<C>& at, half_softmax_t<C>& state) {
  using V = typename C::v_t;
  half_probabilities_t<C, C::kTiles> p;
  state.template Probabilities<false>(scores, unit, zero, p);
  AccumulateCorrection<C>(p, state);
#pragma unroll
  for (int i = 0; i < C::kTiles; ++i) {
    const uint8_t* v = stage + i * C::kTile + C::k_t::kBytes;
    typename V::codes_t codes;
    V::Load(v, at.lane, codes);
#pragma unroll
    for (int section = 0; section < V::kSections; ++section) {
#pragma unroll
      for (int k = 0; k < V::kBlocks; ++k) {
        uint32_t a[4];
        V::Expand(codes, section, k, table, negative, a);
#pragma unroll
        for (int n = 0; n < C::kTermBlocks; ++n) {
          ptx::MmaF16(state.o[n][section * V::kBlocks + k], a[0], a[1], a[2], a[3], p.b[i][n][0],
                      p.b[i][n][1]);
        }
      }
    }
  }
  if constexpr (V::kCorrectionSteps > 0) {
    if (++state.uncorrected == V::kCorrectionSteps) state.Correct();
  }
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_ACCUMULATE_CUH_
