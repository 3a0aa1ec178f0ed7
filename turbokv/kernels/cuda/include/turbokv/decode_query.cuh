// SPDX-License-Identifier: Apache-2.0
// The query of an item: rotated, scaled and split in two int8 terms.
#ifndef TURBOKV_DECODE_QUERY_CUH_
#define TURBOKV_DECODE_QUERY_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode_config.cuh"
#include "turbokv/decode_warp.cuh"
#include "turbokv/expand.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief What is shared about the columns of an item, its query rows. */
template <class C>
struct columns_t {
  static constexpr int kColumns = C::kColumns;
  float query_scale[kColumns];                 // from a product to a score in powers of two
  float offset_gain[kColumns];                 // from a product with the query to a score
  int query_sum[kColumns];                     // of the query's integers
  int see_begin[kColumns], see_end[kColumns];  // tokens a row may see
  float warp_max[C::kWarps][kColumns], warp_sum[C::kWarps][kColumns];
  float row_max[kColumns], row_sum[kColumns];  // of all warps
};

/*! \brief Rotate the query rows of an item, a warp a row, and split them for products with codes.
 *
 *  \param rows   Receives the rotated rows, [kColumns, kHeadDim], zeros where there is no row.
 *  \param query  Receives them as integers: [2 terms, kColumns, kHeadDim], in the order of K's
 *                fragments.
 */
template <class C>
__device__ __forceinline__ void RotateQuery(const decode_params_t& p, const request_t& r, int group,
                                            int head, int block, uint32_t k_signs, float k_unit,
                                            float* rows, uint8_t* query, columns_t<C>& columns) {
  using K = typename C::k_t;
  constexpr int kHeadDim = C::kHeadDim, kColumns = C::kColumns, kWarps = C::kWarps;
  constexpr int kLane = kHeadDim / 32;  // coordinates a lane holds
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, own_position = r.length - r.q_len;
  const float root = rsqrtf(static_cast<float>(kHeadDim));
  for (int c = warp; c < kColumns; c += kWarps) {
    const int row = block * kColumns + c;
    float x[kLane];
#pragma unroll
    for (int i = 0; i < kLane; ++i) x[i] = 0;
    if (row < r.rows) {
      const int64_t at = (r.first_row + row / group) * p.q_stride_n +
                         static_cast<int64_t>(head * group + row % group) * p.q_stride_h;
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        const int j = lane * kLane + i;
        if (j < (p.rotated_query ? kHeadDim : p.head_dim)) x[i] = LoadAs(p.q, at + j, p.q_dtype);
      }
      if (!p.rotated_query) {
#pragma unroll
        for (int i = 0; i < kLane; ++i) {
          if (k_signs >> i & 1) x[i] = -x[i];
        }
        WarpHadamard(x, lane);
#pragma unroll
        for (int i = 0; i < kLane; ++i) x[i] *= root;
      }
    }
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kLane; ++i) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
    for (int o = 1; o < 32; o *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
    if (!(largest > 0)) largest = 1;
    constexpr float kTop = 127.f * 256.f;
    const float inverse = kTop / largest;
    int sum = 0, q[kLane];
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const int shift = K::CodeShift(lane * kLane + i);
      q[i] = __float2int_rn(x[i] * inverse * (1.f / (1 << shift)));
      sum += q[i] << shift;
    }
    sum = __reduce_add_sync(~0u, sum);
    if constexpr (K::kKind == expand_t::kUniform2) {
      // half of three times the sum is subtracted from every product, see `first`
      if (lane == 0) q[0] += sum & 1;
      sum += sum & 1;
    }
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const int j = lane * kLane + i, high = (q[i] + 128) >> 8;
      const int at = c * kHeadDim + K::QueryByte(j);
      query[at] = high;
      query[kColumns * kHeadDim + at] = q[i] - 256 * high;
      rows[c * kHeadDim + j] = x[i];
    }
    if (lane == 0) {
      // columns without a row see what the last row sees, so that they never call for masking
      const int position = own_position + min(row, r.rows - 1) / group;
      columns.see_begin[c] = p.window_left >= 0 ? position - p.window_left : 0;
      columns.see_end[c] = p.causal ? min(position + 1, r.length) : r.length;
      columns.query_sum[c] = sum;
      columns.query_scale[c] = largest / kTop * p.sm_scale * kLog2E * k_unit;
      columns.offset_gain[c] =
          inverse / k_unit;  // from a product with the query to the unit of scores
    }
  }
}

/*! \brief Products of an item's query with the offsets of `segments` segments of K, in the unit of
 * scores: a warp a few segments. `offsets` receives [segments, kColumns]. */
template <class C>
__device__ __forceinline__ void ScoreOffsets(const decode_params_t& p, int head, int first_segment,
                                             int segments, const float* rows,
                                             const columns_t<C>& columns, float* offsets) {
  constexpr int kHeadDim = C::kHeadDim, kColumns = C::kColumns, kWarps = C::kWarps;
  constexpr int kLane = kHeadDim / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  // Segments whose loads are in flight together; with four rows each, a lane a sum.
  constexpr int kAtOnce = kLane <= 4 ? 8 : 32 / kLane, kSums = 4 * kAtOnce;
#pragma unroll 1
  for (int i0 = warp * kAtOnce; i0 < segments; i0 += kWarps * kAtOnce) {
    float mu[kAtOnce][kLane];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int segment = first_segment + min(i0 + i, segments - 1);
      const float* from =
          p.k_offset_rotated + (static_cast<int64_t>(segment) * p.num_kv_heads + head) * kHeadDim;
#pragma unroll
      for (int k = 0; k < kLane; ++k) mu[i][k] = __ldg(from + lane + 32 * k);
    }
#pragma unroll 1
    for (int c0 = 0; c0 < kColumns; c0 += 4) {
      float dots[kSums];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float q[kLane];
#pragma unroll
        for (int k = 0; k < kLane; ++k) q[k] = rows[(c0 + c) * kHeadDim + lane + 32 * k];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          float dot = 0;
#pragma unroll
          for (int k = 0; k < kLane; ++k) dot = fmaf(mu[i][k], q[k], dot);
          dots[4 * i + c] = dot;
        }
      }
      const float dot = SumSpread(dots, lane);
      const int index = lane / (32 / kSums), i = i0 + index / 4, c = c0 + index % 4;
      if (lane % (32 / kSums) == 0 && i < segments) {
        offsets[i * kColumns + c] = dot * columns.offset_gain[c];
      }
    }
  }
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_QUERY_CUH_
