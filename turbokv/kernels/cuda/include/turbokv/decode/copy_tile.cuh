// SPDX-License-Identifier: Apache-2.0
// A tile that is attended to by its 16-bit copy: the whole of score, mask, softmax and accumulate
// for fp16 keys and values in rotated space, read from global memory.
#ifndef TURBOKV_DECODE_COPY_TILE_CUH_
#define TURBOKV_DECODE_COPY_TILE_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/mask.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/probability.cuh"
#include "turbokv/decode/query.cuh"
#include "turbokv/decode/score.cuh"
#include "turbokv/decode/shared.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/decode/vector.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief Keys of a copy: lane (g, t) reads coordinates 32 k + 8 t + 0..7 of tokens g and g + 8. */
template <class C>
struct copy_keys_t {
  static constexpr int kLoads = C::kHeadDim / 32;
  uint4 words[kLoads][2];

  __device__ __forceinline__ void Load(const __half* keys, const lane_t<C>& at) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words[k][half] = __ldg(reinterpret_cast<const uint4*>(
            keys + (at.g + half * 8) * C::kHeadDim + 32 * k + 8 * at.t));
      }
    }
  }

  /*! \brief Dots with block n of the query's rows. The query is in two fp16 terms, or its rounding
   * would be the largest error of all: with four rows side by side, as in query_fragments_t. */
  __device__ __forceinline__ void Multiply(const float* rows, int n, const lane_t<C>& at,
                                           float (&dots)[4]) const {
    float more[4] = {0, 0, 0, 0};  // a second chain
    dots[0] = dots[1] = dots[2] = dots[3] = 0;
    const int row = C::kColumns == 4 ? at.g >> 1 : n * 8 + at.g;
    const float* q = rows + row * C::kHeadDim;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int j = 32 * k + 8 * at.t;
      const uint4 x = words[k][0], y = words[k][1];
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const __half2 h = __floats2half2_rn(q[j + 2 * i], q[j + 2 * i + 1]);
        high[i] = *reinterpret_cast<const uint32_t*>(&h);
        low[i] = PackHalf2(q[j + 2 * i] - __low2float(h), q[j + 2 * i + 1] - __high2float(h));
      }
      if constexpr (C::kColumns == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) high[i] = at.g % 2 == 0 ? high[i] : low[i];
        ptx::MmaF16(dots, x.x, y.x, x.y, y.y, high[0], high[1]);
        ptx::MmaF16(more, x.z, y.z, x.w, y.w, high[2], high[3]);
      } else {
        ptx::MmaF16(dots, x.x, y.x, x.y, y.y, high[0], high[1]);
        ptx::MmaF16(more, x.x, y.x, x.y, y.y, low[0], low[1]);
        ptx::MmaF16(dots, x.z, y.z, x.w, y.w, high[2], high[3]);
        ptx::MmaF16(more, x.z, y.z, x.w, y.w, low[2], low[3]);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) dots[e] += more[e];
  }
};

/*! \brief Values of a section of a copy: lane (g, t) reads, of tokens g and g + 8, the coordinates
 * that rows 2t and 2t + 1 of the operands have, which are neighbours; transposing 8x8 blocks makes
 * tokens run along k. */
template <class C>
struct copy_values_t {
  using V = typename C::v_t;
  uint4 words[2][V::kCodes / 4];

  __device__ __forceinline__ void Load(const __half* values, int section, const bool (&wanted)[2],
                                       const lane_t<C>& at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4* from = reinterpret_cast<const uint4*>(values + (half * 8 + at.g) * C::kHeadDim +
                                                         V::Coordinate(section, 0, 0, 2 * at.t));
#pragma unroll
      for (int k = 0; k < V::kCodes / 4; ++k) {
        words[half][k] = wanted[half] ? __ldg(from + k) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  /*! \brief `to` plus zero, or NaN if a value of token g (half 0) or g + 8 that this lane has is
   * not finite. */
  __device__ __forceinline__ __half2 Lost(int half, __half2 to) const {
    const __half2 zero = __float2half2_rn(0.f);
#pragma unroll
    for (int k = 0; k < V::kCodes / 4; ++k) {
      const uint4 x = words[half][k];
      to = __hfma2(*reinterpret_cast<const __half2*>(&x.x), zero, to);
      to = __hfma2(*reinterpret_cast<const __half2*>(&x.y), zero, to);
      to = __hfma2(*reinterpret_cast<const __half2*>(&x.z), zero, to);
      to = __hfma2(*reinterpret_cast<const __half2*>(&x.w), zero, to);
    }
    return to;
  }

  __device__ __forceinline__ void Clear(int half) {
#pragma unroll
    for (int k = 0; k < V::kCodes / 4; ++k) words[half][k] = make_uint4(0, 0, 0, 0);
  }

  /*! \brief The A operand of a block. */
  __device__ __forceinline__ void Expand(int block, uint32_t (&a)[4]) const {
    uint32_t w[2][V::kCodes];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < V::kCodes / 4; ++k) {
        const uint4 x = words[half][k];
        w[half][4 * k] = x.x, w[half][4 * k + 1] = x.y;
        w[half][4 * k + 2] = x.z, w[half][4 * k + 3] = x.w;
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = V::Offset(block, e & 1);
      a[e] = ptx::Transpose8x8(ptx::Permute(w[e / 2][at / 2], w[e / 2][(V::kCodes + at) / 2],
                                            at % 2 == 0 ? 0x5410 : 0x7632));
    }
  }
};

/*! \brief Scores of a copy, in the unit of the item's other scores. `spoilt` is added to those of
 * tokens g and g + 8: zero, or NaN. */
template <class C>
__device__ __forceinline__ void ScoreCopy(const decode_params_t& p, const copy_keys_t<C>& keys,
                                          int token0, const float* rows,
                                          const query_fragments_t<C>& query, const mask_t<C>& mask,
                                          const lane_t<C>& at, const float (&spoilt)[2],
                                          scores_t<C, 1>& scores) {
#pragma unroll
  for (int n = 0; n < C::kTermBlocks; ++n) {
    float dots[4];
    keys.Multiply(rows, n, at, dots);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int y = 0; y < C::kBlockColumns; ++y) {
        const int x = n * 2 + y;
        float dot = dots[2 * half + y];
        if constexpr (C::kColumns == 4) dot += dots[2 * half + 1];
        dot = fmaf(dot, p.sm_scale * kLog2E, spoilt[half]);
        scores.s[0][half][x] = mask.capped ? mask.Cap(dot) : __fdividef(dot, query.unit[x]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mask.Hide(scores.s[0][half], token0 + half * 8 + at.g);
    scores.v_scale[0][half] = 0;
  }
}

/*! \brief Attend to a tile by its copy. */
template <class C, class Softmax>
__device__ __forceinline__ void AttendCopy(const decode_params_t& p, const pending_copy_t& copy,
                                           int head, const float* rows, float v_unit, int zero,
                                           const query_fragments_t<C>& query, const mask_t<C>& mask,
                                           const lane_t<C>& at, Softmax& state) {
  using V = typename C::v_t;
  constexpr bool kEarly = C::kHeadDim <= 128;  // V's loads fit the registers as well
  const int64_t vectors = (static_cast<int64_t>(copy.slot) * p.num_kv_heads + head) * 2;
  const __half* keys_from = p.kv.window + vectors * kTokensPerTile * C::kHeadDim;
  const __half* values_from = keys_from + kTokensPerTile * C::kHeadDim;
  // what was never written may be NaN, which a probability of zero would not stop
  const int written = mask.limits.length - copy.token;
  bool wanted[2] = {at.g < written, at.g + 8 < written};
  float spoilt[2] = {0, 0};
  copy_keys_t<C> keys;
  copy_values_t<C> values[kEarly ? V::kSections : 1];
  keys.Load(keys_from, at);
  if constexpr (kEarly) {
#pragma unroll
    for (int section = 0; section < V::kSections; ++section) {
      values[section].Load(values_from, section, wanted, at);
    }
  }
  if (mask.HidesWritten(copy.token)) {
    // nor would it keep a value that is not finite from rows that may not see it
    __half2 sum[2] = {__float2half2_rn(0.f), __float2half2_rn(0.f)};
#pragma unroll
    for (int section = 0; section < V::kSections; ++section) {
      if constexpr (!kEarly) values[0].Load(values_from, section, wanted, at);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] = values[kEarly ? section : 0].Lost(half, sum[half]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      spoilt[half] = __low2float(sum[half]) + __high2float(sum[half]);
      spoilt[half] += __shfl_xor_sync(~0u, spoilt[half], 1);
      spoilt[half] += __shfl_xor_sync(~0u, spoilt[half], 2);
      if (spoilt[half] == 0) continue;
      wanted[half] = false;
      if constexpr (kEarly) {
#pragma unroll
        for (int section = 0; section < V::kSections; ++section) values[section].Clear(half);
      }
    }
  }
  scores_t<C, 1> scores;
  ScoreCopy<C>(p, keys, copy.token, rows, query, mask, at, spoilt, scores);
  half_probabilities_t<C, 1> probabilities;
  float gain[C::kLaneColumns];
  state.CopyProbabilities(scores, query.unit, v_unit, zero, probabilities, gain);
#pragma unroll
  for (int section = 0; section < V::kSections; ++section) {
    if constexpr (!kEarly) values[0].Load(values_from, section, wanted, at);
#pragma unroll
    for (int k = 0; k < V::kBlocks; ++k) {
      uint32_t a[4];
      values[kEarly ? section : 0].Expand(k, a);
#pragma unroll
      for (int n = 0; n < C::kTermBlocks; ++n) {
        float sum[4] = {0, 0, 0, 0};
        ptx::MmaF16(sum, a[0], a[1], a[2], a[3], probabilities.b[0][n][0],
                    probabilities.b[0][n][1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int x = n * 2 + e % 2;
          if (x < C::kLaneColumns) {
            state.AddCopy(section * V::kBlocks + k, e / 2, x, sum[e] * gain[x]);
          }
        }
      }
    }
  }
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_COPY_TILE_CUH_
