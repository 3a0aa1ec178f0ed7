// SPDX-License-Identifier: Apache-2.0
// Scores of the part of centred keys that a segment of 256 tokens shares.
#ifndef TURBOKV_DECODE_KEY_OFFSET_CUH_
#define TURBOKV_DECODE_KEY_OFFSET_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/schedule.cuh"
#include "turbokv/decode/shared.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief Bring an item's offsets to L2: their scores would have to wait for them. */
template <class C>
__device__ __forceinline__ void PrefetchOffsets(const decode_params_t& p, const item_t& item,
                                                const lane_t<C>& at) {
  constexpr int kLines = C::kHeadDim * 4 / 128;
  const int last = min(item.request.length / kTokensPerSegment, p.num_segments - 1);
  for (int i = at.thread; i < (last + 1) * kLines && i < kSegmentsPerPass * kLines;
       i += C::kThreads) {
    const int64_t segment = last - i / kLines;
    ptx::Prefetch(p.k_offset_rotated + (segment * p.num_kv_heads + item.head) * C::kHeadDim +
                  i % kLines * 32);
  }
}

/*! \brief Products of an item's query with the offsets of `segments` segments of K, in the unit of
 * scores: 16 segments per warp. `offsets` receives [segments, kColumns].
 *
 *  On tensor cores, every number as two of 11 bits, without the product of the two rests.
 */
template <class C>
__device__ __forceinline__ void ScoreOffsets(const decode_params_t& p, int head, int first_segment,
                                             int segments, const lane_t<C>& at, const float* rows,
                                             const columns_t<C>& columns, float* offsets) {
  constexpr int kHeadDim = C::kHeadDim, kColumns = C::kColumns;
  constexpr int kBlocks = C::kTermBlocks;
  constexpr int kAtOnce = 4;  // groups of 16 coordinates whose loads are in flight together
  // A number and what its first 11 bits leave of it.
  auto high = [](float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); };
#pragma unroll 1
  for (int i0 = at.warp * 16; i0 < segments; i0 += C::kWarps * 16) {
    float sums[kBlocks][3][4] = {};  // three chains, as a product waits for the one it adds to
    const float* from[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t segment = first_segment + min(i0 + half * 8 + at.g, segments - 1);
      from[half] = p.k_offset_rotated + (segment * p.num_kv_heads + head) * kHeadDim + 4 * at.t;
    }
#pragma unroll 1
    for (int j0 = 0; j0 < kHeadDim; j0 += 16 * kAtOnce) {
      float4 mu[kAtOnce][2];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mu[k][half] = __ldg(reinterpret_cast<const float4*>(from[half] + j0 + 16 * k));
        }
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        // lane t has coordinates 4 t to 4 t + 3 of 16: two for each of two products
        const float a[2][4] = {{mu[k][0].x, mu[k][1].x, mu[k][0].y, mu[k][1].y},
                               {mu[k][0].z, mu[k][1].z, mu[k][0].w, mu[k][1].w}};
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          const float4 q = *reinterpret_cast<const float4*>(
              rows + ((n * 8 + at.g) & (kColumns - 1)) * kHeadDim + j0 + 16 * k + 4 * at.t);
          const float b[2][2] = {{q.x, q.y}, {q.z, q.w}};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float top[4], rest[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) top[e] = high(a[i][e]), rest[e] = a[i][e] - top[e];
            const float b0 = high(b[i][0]), b1 = high(b[i][1]);
            ptx::MmaTf32(sums[n][0], top[0], top[1], top[2], top[3], b0, b1);
            ptx::MmaTf32(sums[n][1], top[0], top[1], top[2], top[3], b[i][0] - b0, b[i][1] - b1);
            ptx::MmaTf32(sums[n][2], rest[0], rest[1], rest[2], rest[3], b0, b1);
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = i0 + e / 2 * 8 + at.g, c = n * 8 + 2 * at.t + e % 2;
        if (c < kColumns && i < segments) {
          const float sum = sums[n][0][e] + (sums[n][1][e] + sums[n][2][e]);
          offsets[i * kColumns + c] = sum * columns.offset_gain[c];
        }
      }
    }
  }
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_KEY_OFFSET_CUH_
