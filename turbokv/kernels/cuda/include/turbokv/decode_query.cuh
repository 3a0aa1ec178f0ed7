// SPDX-License-Identifier: Apache-2.0
// The query of an item: rotated, scaled and split in two int8 terms.
#ifndef TURBOKV_DECODE_QUERY_CUH_
#define TURBOKV_DECODE_QUERY_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode_config.cuh"
#include "turbokv/decode_warp.cuh"
#include "turbokv/expand.cuh"
#include "turbokv/ptx.cuh"
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

/*! \brief Load row c of an item, 32 bits for each of a lane's coordinates however wide they are:
 * nothing waits for them here. Zeros where there is no row. */
template <class C>
__device__ __forceinline__ void LoadQuery(const decode_params_t& p, const request_t& r, int group,
                                          int head, int block, int c,
                                          uint32_t (&bits)[C::kHeadDim / 32]) {
  constexpr int kLane = C::kHeadDim / 32;
  const int row = block * C::kColumns + c, lane = threadIdx.x & 31;
  const bool is_wide = p.q_dtype == dtype_t::kFloat32;
  const int dim = p.rotated_query ? C::kHeadDim : p.head_dim;
  const int64_t at = (r.first_row + row / group) * p.q_stride_n +
                     static_cast<int64_t>(head * group + row % group) * p.q_stride_h + lane * kLane;
  const uint8_t* const from = static_cast<const uint8_t*>(p.q) + (is_wide ? 4 : 2) * at;
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    const bool valid = c < C::kColumns && row < r.rows && lane * kLane + i < dim;
    bits[i] = ptx::LoadBitsIf(valid, from + (is_wide ? 4 : 2) * i, is_wide);
  }
}

/*! \brief Rotate the query rows of an item, a warp a row, and split them for products with codes.
 *
 *  \param bits   Row `warp` of the item, see LoadQuery.
 *  \param rows   Receives the rotated rows, [kColumns, kHeadDim], zeros where there is no row.
 *  \param query  Receives them as integers: [2 terms, kColumns, kHeadDim], in the order of K's
 *                fragments.
 */
template <class C>
__device__ __forceinline__ void RotateQuery(const decode_params_t& p, const request_t& r, int group,
                                            int head, int block, uint32_t k_signs, float k_unit,
                                            uint32_t (&bits)[C::kHeadDim / 32], float* rows,
                                            uint8_t* query, columns_t<C>& columns) {
  using K = typename C::k_t;
  constexpr int kHeadDim = C::kHeadDim, kColumns = C::kColumns, kWarps = C::kWarps;
  constexpr int kLane = kHeadDim / 32;  // coordinates a lane holds
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, own_position = r.length - r.q_len;
  const float root = rsqrtf(static_cast<float>(kHeadDim));
  for (int c = warp; c < kColumns; c += kWarps) {
    const int row = block * kColumns + c;
    if (c != warp) LoadQuery<C>(p, r, group, head, block, c, bits);
    float x[kLane];
#pragma unroll
    for (int i = 0; i < kLane; ++i) x[i] = FromBits(bits[i], p.q_dtype);
    if (!p.rotated_query) {
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        if (k_signs >> i & 1) x[i] = -x[i];
      }
      WarpHadamard(x, lane);
#pragma unroll
      for (int i = 0; i < kLane; ++i) x[i] *= root;
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
 * scores: a warp 16 segments. `offsets` receives [segments, kColumns].
 *
 *  On tensor cores, every number as two of 11 bits, without the product of the two rests.
 */
template <class C>
__device__ __forceinline__ void ScoreOffsets(const decode_params_t& p, int head, int first_segment,
                                             int segments, const float* rows,
                                             const columns_t<C>& columns, float* offsets) {
  constexpr int kHeadDim = C::kHeadDim, kColumns = C::kColumns, kWarps = C::kWarps;
  constexpr int kNB = C::kBlocks8;
  constexpr int kAtOnce = 4;  // groups of 16 coordinates whose loads are in flight together
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  // A number and what its first 11 bits leave of it.
  auto high = [](float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); };
#pragma unroll 1
  for (int i0 = warp * 16; i0 < segments; i0 += kWarps * 16) {
    float sum[kNB][4] = {};
    const float* from[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t segment = first_segment + min(i0 + half * 8 + g, segments - 1);
      from[half] = p.k_offset_rotated + (segment * p.num_kv_heads + head) * kHeadDim + 4 * t;
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
        for (int n = 0; n < kNB; ++n) {
          const float4 q = *reinterpret_cast<const float4*>(
              rows + ((n * 8 + g) & (kColumns - 1)) * kHeadDim + j0 + 16 * k + 4 * t);
          const float b[2][2] = {{q.x, q.y}, {q.z, q.w}};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float top[4], rest[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) top[e] = high(a[i][e]), rest[e] = a[i][e] - top[e];
            const float b0 = high(b[i][0]), b1 = high(b[i][1]);
            ptx::MmaTf32(sum[n], top[0], top[1], top[2], top[3], b0, b1);
            ptx::MmaTf32(sum[n], top[0], top[1], top[2], top[3], b[i][0] - b0, b[i][1] - b1);
            ptx::MmaTf32(sum[n], rest[0], rest[1], rest[2], rest[3], b0, b1);
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kNB; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = i0 + e / 2 * 8 + g, c = n * 8 + 2 * t + e % 2;
        if (c < kColumns && i < segments) {
          offsets[i * kColumns + c] = sum[n][e] * columns.offset_gain[c];
        }
      }
    }
  }
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_QUERY_CUH_
