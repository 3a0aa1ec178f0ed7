// SPDX-License-Identifier: Apache-2.0
// The end of an item: warps merged, parts of several CTAs combined, rows un-rotated and written.
#ifndef TURBOKV_DECODE_OUTPUT_CUH_
#define TURBOKV_DECODE_OUTPUT_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode_config.cuh"
#include "turbokv/decode_query.cuh"
#include "turbokv/decode_softmax.cuh"
#include "turbokv/decode_warp.cuh"
#include "turbokv/expand.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief Merge the warps of a CTA into `rows`, [kColumns, kHeadDim], and the maxima and sums of
 * `columns`. `merge` has room for [kWarps, kMergeRegs, 32]; `unit` turns scores into powers of two.
 */
template <class C>
__device__ __forceinline__ void MergeWarps(state_t<C>& state, const float (&unit)[C::kBlocks8][2],
                                           float v_unit, float* merge, float* rows,
                                           columns_t<C>& columns) {
  using V = typename C::v_t;
  constexpr int kHeadDim = C::kHeadDim, kColumns = C::kColumns, kWarps = C::kWarps;
  constexpr int kNB = C::kBlocks8, kHalves = C::kHalves;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  auto column = [&](int n, int x) { return (n * 8 + 2 * t + x) & (kColumns - 1); };
#pragma unroll
  for (int n = 0; n < kNB; ++n) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
#pragma unroll
      for (int q = 2 * kHalves; q < 32; q *= 2)
        state.l[n][x] += __shfl_xor_sync(~0u, state.l[n][x], q);
      state.m[n][x] *= unit[n][x];
      if (g == 0 && (kColumns > 4 || t < 2)) {
        columns.warp_max[warp][column(n, x)] = state.m[n][x];
        columns.warp_sum[warp][column(n, x)] = state.l[n][x] * state.PerGain();
      }
    }
  }
  __syncthreads();
  float factor[kNB][2];
#pragma unroll
  for (int n = 0; n < kNB; ++n) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      float top = columns.warp_max[0][column(n, x)];
#pragma unroll
      for (int i = 1; i < kWarps; ++i) top = fmaxf(top, columns.warp_max[i][column(n, x)]);
      factor[n][x] = ptx::Exp2(state.m[n][x] - top) * (v_unit * state.PerGain());
    }
  }
  if (tid < kColumns) {
    float top = columns.warp_max[0][tid], sum = 0;
    for (int i = 1; i < kWarps; ++i) top = fmaxf(top, columns.warp_max[i][tid]);
    for (int i = 0; i < kWarps; ++i)
      sum += columns.warp_sum[i][tid] * ptx::Exp2(columns.warp_max[i][tid] - top);
    columns.row_max[tid] = top;
    columns.row_sum[tid] = sum;
  }
  constexpr int kRegs = kNB * C::kOutBlocks * 4;
#pragma unroll
  for (int chunk = 0; chunk < kRegs; chunk += C::kMergeRegs) {
    if (chunk > 0) __syncthreads();
#pragma unroll
    for (int q = 0; q < C::kMergeRegs; ++q) {
      const int n = (chunk + q) / (C::kOutBlocks * 4), i = (chunk + q) / 4 % C::kOutBlocks,
                e = q % 4;
      float x = state.o[n][i][e];
      if constexpr (V::kKind == expand_t::kUniform2) {
        x = x * static_cast<float>(1 << (24 - 2 * (2 * (i % 2) + e / 2))) + state.correction[n][e];
      } else {
        x += state.correction[n][e];
      }
      merge[(warp * C::kMergeRegs + q) * 32 + lane] = x * factor[n][e & 1];
    }
    __syncthreads();
    for (int at = tid; at < C::kMergeRegs * 32; at += C::kThreads) {
      const int reg = chunk + at / 32, n = reg / (C::kOutBlocks * 4), i = reg / 4 % C::kOutBlocks;
      const int gg = at % 32 / 4, c = n * 8 + at % 4 * 2 + (reg & 1);
      if (c < kColumns) {
        float x = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) x += merge[w * C::kMergeRegs * 32 + at];
        rows[c * kHeadDim + V::Coordinate(i / V::kBlocks, i % V::kBlocks, reg >> 1 & 1, gg)] = x;
      }
    }
  }
  __syncthreads();
}

/*! \brief The CTAs that share an item. */
struct parts_t {
  int first_cta, count;
  int first_part;  // of its first CTA: 0 or 1, see Combine
};

/*! \brief Leave a part of an item in the workspace; the last CTA to arrive combines them.
 *
 *  \param counter  The item's number, below all counters.
 *  \param own_part Which of this CTA's parts it is: of its items only the first (0) and the last
 * (1) can be parts.
 *  \return whether this CTA has all of the item in `rows` and `columns`.
 */
template <class C>
__device__ __forceinline__ bool Combine(const decode_params_t& p, int counter, int own_part,
                                        const parts_t& parts, float* rows, columns_t<C>& columns) {
  __shared__ int is_last;
  constexpr int kHeadDim = C::kHeadDim, kColumns = C::kColumns;
  const int tid = threadIdx.x;
  int* counters = static_cast<int*>(p.workspace);
  // Partial results lie at the end, so that they are nowhere the counters of another batch.
  const int64_t bytes = static_cast<int64_t>(2) * gridDim.x * C::kPartial * 4;
  float* partials = reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) +
                                             (p.workspace_bytes - bytes) / 16 * 16);
  float* mine = partials + static_cast<int64_t>(2 * blockIdx.x + own_part) * C::kPartial;
  for (int at = tid; at < kColumns * kHeadDim / 4; at += C::kThreads) {
    __stcg(reinterpret_cast<float4*>(mine) + at, reinterpret_cast<const float4*>(rows)[at]);
  }
  if (tid < kColumns) {
    __stcg(mine + kColumns * kHeadDim + tid, columns.row_max[tid]);
    __stcg(mine + kColumns * kHeadDim + kColumns + tid, columns.row_sum[tid]);
  }
  __threadfence();
  __syncthreads();
  if (tid == 0) {
    const int arrived = atomicAdd(counters + counter, 1);
    is_last = arrived == parts.count - 1;
    if (is_last) counters[counter] = 0;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return false;
  auto part = [&](int i) {
    return partials +
           static_cast<int64_t>(2 * (parts.first_cta + i) + (i == 0 ? parts.first_part : 0)) *
               C::kPartial;
  };
  // Many loads in flight: at small batches their latency is what this costs.
  constexpr int kAtOnce = 16;
  for (int at = tid * 4; at < kColumns * kHeadDim; at += C::kThreads * 4) {
    const int c = at / kHeadDim;
    float top = -3e38f, sum = 0, x[4] = {0, 0, 0, 0};
    for (int i0 = 0; i0 < parts.count; i0 += kAtOnce) {
      float tops[kAtOnce], sums_of[kAtOnce];
      float4 xs[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool valid = i0 + i < parts.count;
        const float* from = part(valid ? i0 + i : 0);
        tops[i] = valid ? __ldcg(from + kColumns * kHeadDim + c) : -3e38f;
        sums_of[i] = valid ? __ldcg(from + kColumns * kHeadDim + kColumns + c) : 0.f;
        xs[i] =
            valid ? __ldcg(reinterpret_cast<const float4*>(from + at)) : make_float4(0, 0, 0, 0);
      }
      float higher = top;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) higher = fmaxf(higher, tops[i]);
      const float f = ptx::Exp2(top - higher);
      sum *= f, x[0] *= f, x[1] *= f, x[2] *= f, x[3] *= f;
      top = higher;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float w = ptx::Exp2(tops[i] - higher);
        sum += sums_of[i] * w;
        x[0] += xs[i].x * w, x[1] += xs[i].y * w, x[2] += xs[i].z * w, x[3] += xs[i].w * w;
      }
    }
    *reinterpret_cast<float4*>(rows + at) = make_float4(x[0], x[1], x[2], x[3]);
    if (at % kHeadDim == 0) columns.row_max[c] = top, columns.row_sum[c] = sum;
  }
  __syncthreads();
  return true;
}

/*! \brief Normalise, un-rotate and write the rows of an item: a warp a row. */
template <class C>
__device__ __forceinline__ void WriteRows(const decode_params_t& p, const request_t& r, int group,
                                          int head, int block, uint32_t v_signs, const float* rows,
                                          const columns_t<C>& columns) {
  constexpr int kHeadDim = C::kHeadDim, kColumns = C::kColumns, kWarps = C::kWarps;
  constexpr int kLane = kHeadDim / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const float root = rsqrtf(static_cast<float>(kHeadDim));
  for (int c = warp; c < kColumns; c += kWarps) {
    const int row = block * kColumns + c;
    if (row >= r.rows) continue;
    const int qo_head = head * group + row % group;
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
    const int64_t at = token * p.out_stride_n + qo_head * p.out_stride_h;
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const int j = lane * kLane + i;
      if (j < (p.rotated_output ? kHeadDim : p.head_dim)) StoreAs(p.out, at + j, p.out_dtype, x[i]);
    }
    if (p.lse != nullptr && lane == 0) {
      p.lse[token * p.lse_stride_n + qo_head] = sum > 0      ? top + log2f(sum)
                                                : isnan(sum) ? sum
                                                             : -INFINITY;
    }
  }
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_OUTPUT_CUH_
