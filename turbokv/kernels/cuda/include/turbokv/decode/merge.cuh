// SPDX-License-Identifier: Apache-2.0
// The end of an item: its warps merged, and its parts of several CTAs combined.
#ifndef TURBOKV_DECODE_MERGE_CUH_
#define TURBOKV_DECODE_MERGE_CUH_

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

/*! \brief Put a warp's maxima and sums of its columns to shared memory. */
template <class C, class Softmax>
__device__ __forceinline__ void StoreMaxima(const Softmax& state, const lane_t<C>& at,
                                            columns_t<C>& columns) {
#pragma unroll
  for (int x = 0; x < C::kLaneColumns; ++x) {
    float sum = state.Sum(x);
#pragma unroll
    for (int q = 4; q < 32; q *= 2) sum += __shfl_xor_sync(~0u, sum, q);
    if (at.g == 0) {
      columns.warp_max[at.warp][at.column(x)] = state.Max(x);
      columns.warp_sum[at.warp][at.column(x)] = sum;
    }
  }
}

/*! \brief Merge the warps of a CTA into `rows`, [kColumns, kHeadDim], and the maxima and sums of
 * `columns`.
 *
 *  \param state  Closed.
 *  \param merge  Room for [kWarps, kMergeRegs, 32].
 */
template <class C, class Softmax>
__device__ __forceinline__ void MergeWarps(const Softmax& state, float v_unit, const lane_t<C>& at,
                                           float* merge, float* rows, columns_t<C>& columns) {
  using V = typename C::v_t;
  constexpr int kWarps = C::kWarps, kPerBlock = 2 * C::kLaneColumns;
  StoreMaxima<C>(state, at, columns);
  __syncthreads();
  float factor[C::kLaneColumns];
#pragma unroll
  for (int x = 0; x < C::kLaneColumns; ++x) {
    float top = columns.warp_max[0][at.column(x)];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) top = fmaxf(top, columns.warp_max[i][at.column(x)]);
    factor[x] = ptx::Exp2(state.Max(x) - top) * v_unit;
  }
  if (at.thread < C::kColumns) {
    const int c = at.thread;
    float top = columns.warp_max[0][c], sum = 0;
    for (int i = 1; i < kWarps; ++i) top = fmaxf(top, columns.warp_max[i][c]);
    for (int i = 0; i < kWarps; ++i) {
      sum += columns.warp_sum[i][c] * ptx::Exp2(columns.warp_max[i][c] - top);
    }
    columns.row_max[c] = top;
    columns.row_sum[c] = sum;
  }
  // registers of outputs: block of coordinates, half, column
#pragma unroll
  for (int chunk = 0; chunk < C::kOutRegs; chunk += C::kMergeRegs) {
    if (chunk > 0) __syncthreads();
#pragma unroll
    for (int q = 0; q < C::kMergeRegs; ++q) {
      const int i = (chunk + q) / kPerBlock, half = (chunk + q) / C::kLaneColumns % 2;
      const int x = (chunk + q) % C::kLaneColumns;
      merge[(at.warp * C::kMergeRegs + q) * 32 + at.lane] = state.Output(i, half, x) * factor[x];
    }
    __syncthreads();
    for (int j = at.thread; j < C::kMergeRegs * 32; j += C::kThreads) {
      const int reg = chunk + j / 32, i = reg / kPerBlock, half = reg / C::kLaneColumns % 2;
      float o = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) o += merge[w * C::kMergeRegs * 32 + j];
      // the same lane of every warp, which is this thread's
      const int c = at.column(reg % C::kLaneColumns);
      rows[c * C::kHeadDim + V::Coordinate(i / V::kBlocks, i % V::kBlocks, half, at.g)] = o;
    }
  }
  __syncthreads();
}

/*! \brief Leave a part of an item in the workspace; the last CTA to arrive combines them.
 *
 *  \param counter  The item's number, below all counters.
 *  \param own_part Which of this CTA's parts it is: of its items only the first (0) and the last
 *                  (1) can be parts.
 *  \param rehearses Whether to leave nothing, and go on as if all parts were there.
 *  \return whether this CTA has all of the item in `rows` and `columns`.
 */
template <class C>
__device__ __forceinline__ bool CombineParts(const decode_params_t& p, int counter, int own_part,
                                             const parts_t& parts, bool rehearses, float* rows,
                                             shared_t<C>& shared, const lane_t<C>& at) {
  constexpr int kHeadDim = C::kHeadDim, kColumns = C::kColumns;
  columns_t<C>& columns = shared.columns;
  int* counters = static_cast<int*>(p.workspace);
  // Partial results lie at the end, so that they are nowhere the counters of another batch.
  const int64_t bytes = static_cast<int64_t>(2) * gridDim.x * C::kPartial * 4;
  float* partials = reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) +
                                             (p.workspace_bytes - bytes) / 16 * 16);
  float* own = partials + static_cast<int64_t>(2 * blockIdx.x + own_part) * C::kPartial;
  const int own_vectors = rehearses ? 0 : kColumns * kHeadDim / 4;
  for (int i = at.thread; i < own_vectors; i += C::kThreads) {
    __stcg(reinterpret_cast<float4*>(own) + i, reinterpret_cast<const float4*>(rows)[i]);
  }
  if (at.thread < kColumns && !rehearses) {
    __stcg(own + kColumns * kHeadDim + at.thread, columns.row_max[at.thread]);
    __stcg(own + kColumns * kHeadDim + kColumns + at.thread, columns.row_sum[at.thread]);
  }
  __threadfence();
  __syncthreads();
  if (at.thread == 0) {
    const int arrived = atomicAdd(counters + counter, rehearses ? 0 : 1);
    const bool is_last = arrived == parts.count - 1 && !rehearses;
    if (is_last) counters[counter] = 0;
    shared.is_last = is_last || rehearses;
    __threadfence();
  }
  __syncthreads();
  if (!shared.is_last) return false;
  // Parts lie two partial results apart; only of the first CTA it may be the second one.
  const float* const first = partials + static_cast<int64_t>(2 * parts.first_cta) * C::kPartial;
  // Many loads in flight: at small batches their latency is what this costs.
  constexpr int kAtOnce = 16;
#pragma unroll 1
  for (int j = at.thread * 4; j < kColumns * kHeadDim; j += C::kThreads * 4) {
    const int c = j / kHeadDim;
    float top = -3e38f, sum = 0, x[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int i0 = 0; i0 < parts.count; i0 += kAtOnce) {
      const float* const from = first + static_cast<int64_t>(2 * i0) * C::kPartial;
      float tops[kAtOnce], sums[kAtOnce];
      float4 xs[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool valid = i0 + i < parts.count;
        const float* each = from + 2 * i * C::kPartial;
        if (i == 0 && i0 == 0) each += parts.first_part * C::kPartial;
        tops[i] = ptx::LoadCachedIf(valid, each + kColumns * kHeadDim + c, -3e38f);
        sums[i] = ptx::LoadCachedIf(valid, each + kColumns * kHeadDim + kColumns + c, 0.f);
        xs[i] = ptx::LoadCachedIf(valid, reinterpret_cast<const float4*>(each + j));
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
        sum += sums[i] * w;
        x[0] += xs[i].x * w, x[1] += xs[i].y * w, x[2] += xs[i].z * w, x[3] += xs[i].w * w;
      }
    }
    *reinterpret_cast<float4*>(rows + j) = make_float4(x[0], x[1], x[2], x[3]);
    if (j % kHeadDim == 0) columns.row_max[c] = top, columns.row_sum[c] = sum;
  }
  __syncthreads();
  return true;
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_MERGE_CUH_
