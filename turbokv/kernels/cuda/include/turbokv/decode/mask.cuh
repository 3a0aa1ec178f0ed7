// SPDX-License-Identifier: Apache-2.0
// What few steps need: tokens that a row may not see, a cap on scores, keys that were stored
// uncentred, tiles that are attended to by their 16-bit copies.
#ifndef TURBOKV_DECODE_MASK_CUH_
#define TURBOKV_DECODE_MASK_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/schedule.cuh"
#include "turbokv/decode/score.cuh"
#include "turbokv/decode/shared.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief Tokens that need no mask, of an item. */
template <class C>
__device__ __forceinline__ item_limits_t ItemLimits(const decode_params_t& p, const item_t& item,
                                                    int group) {
  const request_t& r = item.request;
  const int own_position = r.length - r.q_len;
  const int first = own_position + item.block * C::kColumns / group;
  const int last = own_position + (min((item.block + 1) * C::kColumns, r.rows) - 1) / group;
  return {p.window_left >= 0 ? last - p.window_left : 0,
          p.causal ? min(first + 1, r.length) : r.length, r.length};
}

template <class C>
struct mask_t {
  const columns_t<C>& columns;
  const item_limits_t& limits;
  const lane_t<C>& at;
  bool capped;
  float cap, inverse_cap;  // in powers of two

  __device__ __forceinline__ mask_t(const decode_params_t& p, const columns_t<C>& columns,
                                    const item_limits_t& limits, const lane_t<C>& at)
      : columns(columns), limits(limits), at(at) {
    capped = C::kAllFeatures && p.logits_soft_cap > 0;
    cap = p.logits_soft_cap * kLog2E;
    inverse_cap = capped ? __fdividef(2, p.logits_soft_cap) : 0;
  }

  /*! \brief cap * tanh(x / cap) of a score in powers of two. */
  __device__ __forceinline__ float Cap(float x) const {
    return cap * (1 - __fdividef(2, ptx::Exp2(x * inverse_cap) + 1));
  }

  /*! \brief Hide a token from the rows that may not see it. */
  __device__ __forceinline__ void Hide(float (&s)[C::kLaneColumns], int token) const {
#pragma unroll
    for (int x = 0; x < C::kLaneColumns; ++x) {
      const int c = at.column(x);
      const bool hidden = (token < columns.see_begin[c]) | (token >= columns.see_end[c]);
      s[x] = hidden ? -INFINITY : s[x];
    }
  }

  /*! \brief Whether a step has tokens that some row may not see. */
  __device__ __forceinline__ bool IsMasked(int token0) const {
    return token0 + C::kStepTokens > limits.all_end || token0 < limits.all_begin;
  }

  /*! \brief Whether some row may not see a token of a tile that was written. */
  __device__ __forceinline__ bool HidesWritten(int token0) const {
    return min(token0 + kTokensPerTile, limits.length) > limits.all_end ||
           token0 < limits.all_begin;
  }

  /*! \brief Hide what rows may not see, and what was never written, which may be anything. */
  __device__ __forceinline__ void HideTokens(int token0, scores_t<C, C::kTiles>& scores) const {
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = token0 + i * kTokensPerTile + half * 8 + at.g;
        float& v_scale = scores.v_scale[i][half];
        // A V scale that is not finite would spoil the rows that may not see it as well, because a
        // probability of zero does not stop it: the scores of those that do carry it on.
#pragma unroll
        for (int x = 0; x < C::kLaneColumns; ++x) {
          scores.s[i][half][x] = fmaf(v_scale, 0.f, scores.s[i][half][x]);
        }
        Hide(scores.s[i][half], token);
        if (token >= limits.length || !(v_scale < INFINITY)) v_scale = 0;
      }
    }
  }

  __device__ __forceinline__ void CapScores(scores_t<C, C::kTiles>& scores) const {
#pragma unroll
    for (int x = 0; x < C::kLaneColumns; ++x) {
      const float unit = columns.query_scale[at.column(x)];
#pragma unroll
      for (int i = 0; i < C::kTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          scores.s[i][half][x] = Cap(scores.s[i][half][x] * unit);
        }
      }
    }
  }

  /*! \brief Take the segment's offset away where a key was stored uncentred. */
  __device__ __forceinline__ void TakeOffsets(const uint8_t* stage,
                                              const float (&offset)[C::kLaneColumns],
                                              scores_t<C, C::kTiles>& scores) const {
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* scale = stage + i * C::kTile + C::kScales + (at.g + half * 8) * 4;
        if (*reinterpret_cast<const uint32_t*>(scale) & 0x8000u) {
#pragma unroll
          for (int x = 0; x < C::kLaneColumns; ++x) scores.s[i][half][x] -= offset[x];
        }
      }
    }
  }

  /*! \brief Hide tiles that have copies, a bit each. */
  static __device__ __forceinline__ void HideTiles(uint32_t copies,
                                                   scores_t<C, C::kTiles>& scores) {
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) {
      if (!(copies >> i & 1)) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scores.v_scale[i][half] = 0;
#pragma unroll
        for (int x = 0; x < C::kLaneColumns; ++x) scores.s[i][half][x] = -INFINITY;
      }
    }
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_MASK_CUH_
