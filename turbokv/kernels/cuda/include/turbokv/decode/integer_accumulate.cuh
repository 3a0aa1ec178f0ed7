// SPDX-License-Identifier: Apache-2.0
// Outputs of a step by int8 products: O[coordinate, column] += V[coordinate, token] P[token,
// column].
#ifndef TURBOKV_DECODE_INTEGER_ACCUMULATE_CUH_
#define TURBOKV_DECODE_INTEGER_ACCUMULATE_CUH_

#include <cstdint>

#include "turbokv/decode/integer_softmax.cuh"
#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/tables.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief Products of a tile in pairs: k is (token, which coordinate of a pair). */
template <class C>
__device__ __forceinline__ void AccumulatePairs(
    const uint8_t* v, int tile, const typename integer_softmax_t<C>::probabilities_t& p,
    const table_t& table, int lane, integer_softmax_t<C>& state) {
  using V = typename C::v_t;
  typename V::codes_t codes;
  V::Load(v, lane, codes);
#pragma unroll
  for (int section = 0; section < V::kSections; ++section) {
#pragma unroll
    for (int k = 0; k < V::kBlocks; k += 2) {
      uint32_t first[V::kTerms][2], second[V::kTerms][2];  // rows g, rows g + 8
      V::LookUpTerms(codes.sections[section], k, table, first);
      V::LookUpTerms(codes.sections[section], k + 1, table, second);
      const int block = (section * V::kBlocks + k) / 2;
#pragma unroll
      for (int i = 0; i < V::kTerms; ++i) {
#pragma unroll
        for (int term = 0; term < 2; ++term) {
          ptx::MmaS8U8(state.acc[term][block], first[i][0], second[i][0], first[i][1], second[i][1],
                       p.b[tile][term][0], p.b[tile][term][1]);
        }
      }
    }
  }
}

/*! \brief Products of two tiles in quads: k is a token. */
template <class C>
__device__ __forceinline__ void AccumulateQuads(
    const uint8_t* v, int tile, const typename integer_softmax_t<C>::probabilities_t& p,
    const table_t& table, int lane, integer_softmax_t<C>& state) {
  using V = typename C::v_t;
  using state_t = integer_softmax_t<C>;
  if constexpr (state_t::kUniform) {
    constexpr uint32_t kOnes = 0x01010101u;
#pragma unroll
    for (int term = 0; term < state_t::kTerms; ++term) {
      ptx::MmaU8(state.ones[term], kOnes, kOnes, kOnes, kOnes, p.b[tile][term][0],
                 p.b[tile + 1][term][0]);
    }
  }
  typename V::codes_t codes[2];  // of each tile
  V::Load(v, lane, codes[0]);
  V::Load(v + C::kTile, lane, codes[1]);
#pragma unroll
  for (int section = 0; section < V::kSections; ++section) {
#pragma unroll
    for (int k = 0; k < V::kBlocks; ++k) {
      uint32_t a[2][2];
      V::Quads(codes[0], section, k, table, a[0]);
      V::Quads(codes[1], section, k, table, a[1]);
#pragma unroll
      for (int term = 0; term < state_t::kTerms; ++term) {
        int(&acc)[4] = state.acc[term][section * V::kBlocks + k];
        const uint32_t b0 = p.b[tile][term][0], b1 = p.b[tile + 1][term][0];
        if constexpr (state_t::kUniform) {
          ptx::MmaU8(acc, a[0][0], a[0][1], a[1][0], a[1][1], b0, b1);
        } else {
          ptx::MmaS8U8(acc, a[0][0], a[0][1], a[1][0], a[1][1], b0, b1);
        }
      }
    }
  }
}

/*! \brief Attend to a step: probabilities from its scores, and their products with its values. */
template <class C>
__device__ __forceinline__ void AccumulateTiles(const uint8_t* stage,
                                                const scores_t<C, C::kTiles>& scores,
                                                const float (&unit)[C::kLaneColumns], int zero,
                                                const table_t& table, const table_t&,
                                                const lane_t<C>& at, integer_softmax_t<C>& state) {
  using state_t = integer_softmax_t<C>;
  typename state_t::probabilities_t p;
  state.Probabilities(scores, unit, zero, at, p);
  const uint8_t* v = stage + C::k_t::kBytes;
  if constexpr (C::kOrder == order_t::kPairs) {
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) {
      AccumulatePairs<C>(v + i * C::kTile, i, p, table, at.lane, state);
    }
  } else {
    static_assert(C::kTiles % 2 == 0, "quads take two tiles");
#pragma unroll
    for (int i = 0; i < C::kTiles; i += 2) {
      AccumulateQuads<C>(v + i * C::kTile, i, p, table, at.lane, state);
    }
  }
  state.CountStep();
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_INTEGER_ACCUMULATE_CUH_
