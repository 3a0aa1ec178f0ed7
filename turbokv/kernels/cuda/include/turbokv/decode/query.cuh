// SPDX-License-Identifier: Apache-2.0
// The query of an item: rotated, scaled, split in two int8 terms, and as B operands of the scores.
//
// Scores are exact in the codes: the rotated query is scaled by its largest coordinate to integers
// of 16 bits (14 for most of 2-bit keys, see CodeShift) and split in two int8 terms, so that K's
// levels stay int8.
#ifndef TURBOKV_DECODE_QUERY_CUH_
#define TURBOKV_DECODE_QUERY_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/schedule.cuh"
#include "turbokv/decode/shared.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/decode/vector.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief Load row c of an item, 32 bits for each of a lane's coordinates however wide they are:
 * nothing waits for them here. Zeros where there is no row. */
template <class C>
__device__ __forceinline__ void LoadQuery(const decode_params_t& p, const item_t& item, int group,
                                          int c, int lane, uint32_t (&bits)[C::kLane]) {
  const int row = item.block * C::kColumns + c;
  const bool is_wide = p.q_dtype == dtype_t::kFloat32;
  const int dim = p.rotated_query ? C::kHeadDim : p.head_dim;
  const int64_t at = (item.request.first_row + row / group) * p.q_stride_n +
                     static_cast<int64_t>(item.head * group + row % group) * p.q_stride_h +
                     lane * C::kLane;
  const uint8_t* const from = static_cast<const uint8_t*>(p.q) + (is_wide ? 4 : 2) * at;
#pragma unroll
  for (int i = 0; i < C::kLane; ++i) {
    const bool valid = c < C::kColumns && row < item.request.rows && lane * C::kLane + i < dim;
    bits[i] = ptx::LoadBitsIf(valid, from + (is_wide ? 4 : 2) * i, is_wide);
  }
}

constexpr float kLeastQuery = 1e-28f;  // coordinates below count in units of this one's

/*! \brief Rotate the query rows of an item, a warp per row, and split them for products with codes.
 *
 *  \param bits   Row `warp` of the item, see LoadQuery.
 *  \param rows   Receives the rotated rows, [kColumns, kHeadDim], zeros where there is no row.
 *  \param query  Receives them as integers: [2 terms, kColumns, kHeadDim], in the order of K's
 *                fragments.
 */
template <class C>
__device__ __forceinline__ void RotateQuery(const decode_params_t& p, const item_t& item, int group,
                                            const lane_t<C>& at, float k_unit,
                                            uint32_t (&bits)[C::kLane], float* rows, uint8_t* query,
                                            columns_t<C>& columns) {
  using K = typename C::k_t;
  constexpr int kHeadDim = C::kHeadDim, kColumns = C::kColumns, kLane = C::kLane;
  const request_t& r = item.request;
  const int lane = at.lane, own_position = r.length - r.q_len;
  const float root = rsqrtf(static_cast<float>(kHeadDim));
  const uint32_t k_signs = LaneSigns<kLane>(p.k_signs, lane);
#pragma unroll 1
  for (int c = at.warp; c < kColumns; c += C::kWarps) {
    const int row = item.block * kColumns + c;
    if (c != at.warp) LoadQuery<C>(p, item, group, c, lane, bits);
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
    // NaN stays NaN and makes all scores of the row NaN. The least keeps what follows in range.
    float largest = kLeastQuery;
#pragma unroll
    for (int i = 0; i < kLane; ++i) largest = ptx::MaxNan(largest, fabsf(x[i]));
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      largest = ptx::MaxNan(largest, __shfl_xor_sync(~0u, largest, o));
    }
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
    if constexpr (K::kEvenSum) {
      if (lane == 0) q[0] += sum & 1;
      sum += sum & 1;
    }
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const int j = lane * kLane + i, high = (q[i] + 128) >> 8;
      const int byte = c * kHeadDim + K::QueryByte(j);
      query[byte] = high;
      query[kColumns * kHeadDim + byte] = q[i] - 256 * high;
      rows[c * kHeadDim + j] = x[i];
    }
    if (lane == 0) {
      // columns without a row see what the last row sees, so that they never call for masking
      const int position = own_position + min(row, r.rows - 1) / group;
      const int see_begin = p.window_left >= 0 ? position - p.window_left : 0;
      const int see_end = p.causal ? min(position + 1, r.length) : r.length;
      columns.see_begin[c] = see_begin;
      columns.see_end[c] = see_end;
      columns.query_sum[c] = sum;
      // Of a row that sees no token nothing shows, not even NaN: hidden scores, minus infinity,
      // have to stay that in powers of two.
      const bool sees = see_end > max(see_begin, 0);
      columns.query_scale[c] = sees ? largest / kTop * p.sm_scale * kLog2E * k_unit : 1.f;
      columns.offset_gain[c] = inverse / k_unit;
    }
  }
}

/*! \brief What a warp holds of an item's query. */
template <class C>
struct query_fragments_t {
  // B operands of blocks of eight columns. Four rows: columns 2h and 2h + 1 are the high and the
  // low term of row h. More: blocks of high terms, then as many of low ones.
  uint32_t operand[C::kQueryBlocks][C::kQueryRegs];
  int start[C::kQueryBlocks][4];  // of accumulators, see key_operand_t::ScoreStart
  float unit[C::kLaneColumns];    // turns scores into powers of two

  /*! \param zero 0, which the compiler must not know: it would copy registers for every product. */
  __device__ __forceinline__ void Load(const uint8_t* query, const columns_t<C>& columns,
                                       const lane_t<C>& at, bool capped, int zero) {
    using K = typename C::k_t;
    constexpr int kHeadDim = C::kHeadDim;
#pragma unroll
    for (int n = 0; n < C::kQueryBlocks; ++n) {
      // terms x rows in shared memory
      const int row = C::kColumns == 4 ? (at.g & 1) * 4 + (at.g >> 1) : n * 8 + at.g;
      const uint4* from =
          reinterpret_cast<const uint4*>(query + row * kHeadDim + at.t * (kHeadDim / 4));
#pragma unroll
      for (int i = 0; i < C::kQueryRegs / 4; ++i) {
        const uint4 x = from[i];
        operand[n][4 * i] = x.x, operand[n][4 * i + 1] = x.y;
        operand[n][4 * i + 2] = x.z, operand[n][4 * i + 3] = x.w;
      }
      start[n][0] = start[n][1] = start[n][2] = start[n][3] = 0;
    }
#pragma unroll
    for (int x = 0; x < C::kLaneColumns; ++x) {
      const int c = at.column(x);
      unit[x] = capped ? 1.f : columns.query_scale[c];
      if constexpr (K::kLacksSum) {
        // low terms bring what is lacking
        const int lacking = K::ScoreStart(columns.query_sum[c]);
        if constexpr (C::kColumns == 4) {
          start[0][0] = start[0][2] = zero;
          start[0][1] = lacking, start[0][3] = lacking + zero;
        } else {
          const int n = C::kTermBlocks + x / 2;
          start[n][x % 2] = lacking, start[n][2 + x % 2] = lacking + zero;
        }
      }
    }
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_QUERY_CUH_
