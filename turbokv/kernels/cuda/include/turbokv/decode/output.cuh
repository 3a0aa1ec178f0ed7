// SPDX-License-Identifier: Apache-2.0
// Rows of an item: normalised, un-rotated and written.
#ifndef TURBOKV_DECODE_OUTPUT_CUH_
#define TURBOKV_DECODE_OUTPUT_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/schedule.cuh"
#include "turbokv/decode/shared.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/decode/vector.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief Write the rows of an item and their LSE, a warp per row; nothing if it `rehearses`. */
template <class C>
__device__ __forceinline__ void WriteRows(const decode_params_t& p, const item_t& item, int group,
                                          const lane_t<C>& at, bool rehearses, const float* rows,
                                          const columns_t<C>& columns) {
  constexpr int kHeadDim = C::kHeadDim, kLane = C::kLane;
  const request_t& r = item.request;
  const int lane = at.lane;
  const float root = rsqrtf(static_cast<float>(kHeadDim));
  const uint32_t v_signs = LaneSigns<kLane>(p.v_signs, lane);
#pragma unroll 1
  for (int c = at.warp; c < C::kColumns; c += C::kWarps) {
    const int row = item.block * C::kColumns + c;
    if (row >= r.rows) continue;
    const int qo_head = item.head * group + row % group;
    const int64_t token = r.first_row + row / group;
    float top = columns.row_max[c], sum = columns.row_sum[c], f = 1;
    if (p.sinks != nullptr) {
      const float sink = __ldg(p.sinks + qo_head) * kLog2E, higher = fmaxf(top, sink);
      f = ptx::Exp2(top - higher);
      sum = sum * f + ptx::Exp2(sink - higher);
      top = higher;
    }
    f = sum > 0 ? f / sum : 0.f;
    // NaN must not turn into zero
    if (isnan(sum)) f = sum;
    float x[kLane];
#pragma unroll
    for (int i = 0; i < kLane; ++i) x[i] = rows[c * kHeadDim + lane * kLane + i] * f;
    if (!p.rotated_output) {
      WarpHadamard(x, lane);
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        x[i] *= v_signs >> i & 1 ? -root : root;
      }
    }
    const int dim = rehearses ? 0 : p.rotated_output ? kHeadDim : p.head_dim;
    const int64_t to = token * p.out_stride_n + qo_head * p.out_stride_h;
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const int j = lane * kLane + i;
      if (j < dim) StoreAs(p.out, to + j, p.out_dtype, x[i]);
    }
    if (p.lse != nullptr && lane == 0 && !rehearses) {
      p.lse[token * p.lse_stride_n + qo_head] = sum > 0      ? top + log2f(sum)
                                                : isnan(sum) ? sum
                                                             : -INFINITY;
    }
  }
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_OUTPUT_CUH_
