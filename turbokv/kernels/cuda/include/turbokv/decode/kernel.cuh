// SPDX-License-Identifier: Apache-2.0
// Fused decode attention over compressed pages, in one launch: the order of its stages.
//
// The grid is persistent. A step is one to eight tiles (16 tokens each) of one KV head; all steps
// of all requests and heads form one line, and every CTA takes a contiguous part of it. Within a
// CTA whole steps go to warps in turn: each warp has its own online softmax and its own ring of
// stages, which it refills itself, so that the loop has no CTA barrier. Where an item (request, KV
// head, block of query rows) ends, the CTA merges its warps; an item that spans CTAs is finished by
// the last of them to arrive.
#ifndef TURBOKV_DECODE_KERNEL_CUH_
#define TURBOKV_DECODE_KERNEL_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode/attend.cuh"
#include "turbokv/decode/key_offset.cuh"
#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/mask.cuh"
#include "turbokv/decode/merge.cuh"
#include "turbokv/decode/output.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/query.cuh"
#include "turbokv/decode/schedule.cuh"
#include "turbokv/decode/shared.cuh"
#include "turbokv/decode/tile_stream.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief See all that the kernel before has written; the next one may start where there is room.
 */
template <class C>
__device__ __forceinline__ void JoinStream() {
  if constexpr (C::copy_t::kOverlapsLaunches) ptx::WaitForPrimary(), ptx::LaunchDependents();
}

/*! \brief What this CTA rehearses. */
template <class C>
__device__ __forceinline__ rehearsal_t RoleOf(const launch_params_t& launch) {
  const int number = static_cast<int>(blockIdx.x) - launch.num_workers;
  return C::kRehearses && number >= 0 ? static_cast<rehearsal_t>(1 + number) : rehearsal_t::kNone;
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtas)
    DecodeKernel(const __grid_constant__ decode_params_t p,
                 const __grid_constant__ launch_params_t launch) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (C::copy_t::kOverlapsLaunches) return;  // never launched there: nothing to compile
#endif
  uint8_t* const base = ptx::DynamicShared();
  shared_t<C>& shared = *reinterpret_cast<shared_t<C>*>(base);
  const shared_plan_t<C> plan(p, launch.num_stages, launch.cached);
  const lane_t<C> at;

  const rehearsal_t role = RoleOf<C>(launch);
  const bool rehearses = role != rehearsal_t::kNone;
  if (!launch.early) JoinStream<C>();
  schedule_t<C> schedule(p, launch, reinterpret_cast<int*>(base + plan.requests), shared, at);
  if (rehearses) {
    schedule.Rehearse(role);
  } else if (!schedule.TakePart()) {
    // or this kernel might seem done before the one before it
    if (launch.early) JoinStream<C>();
    return;
  }
  tile_stream_t<C> stream(p, schedule, shared.warps[at.warp], at, base + plan.ring,
                          launch.num_stages);
  const bool starts = !rehearses || role == rehearsal_t::kStart;
  if (starts) stream.RequestPages();
  const cta_t<C> cta(p, launch, base, plan, at);
#pragma unroll 1
  for (int begin = schedule.begin; begin < schedule.end;) {
    const item_t item = schedule.Item(begin);
    const bool is_first = begin == schedule.begin;
    if (starts) {
      uint32_t query_bits[C::kLane];  // of the row that this warp rotates first
      if (!launch.early) LoadQuery<C>(p, item, cta.group, at.warp, at.lane, query_bits);
      if (is_first) {
        if (C::kAllFeatures && p.k_offset_rotated != nullptr) PrefetchOffsets<C>(p, item, at);
        stream.Start(launch.early);
        if (launch.early && !rehearses) JoinStream<C>();
      }
      if (launch.early) LoadQuery<C>(p, item, cta.group, at.warp, at.lane, query_bits);
      if (at.thread == 0) shared.limits = ItemLimits<C>(p, item, cta.group);
      RotateQuery<C>(p, item, cta.group, at, launch.k_unit, query_bits, cta.rows, cta.query,
                     shared.columns);
      if (is_first) stream.Continue();
    } else {
      cta.Clear(base, plan);
    }
    __syncthreads();

    if (!rehearses || role == rehearsal_t::kSteps || role == rehearsal_t::kCopies) {
      query_fragments_t<C> query;
      query.Load(cta.query, shared.columns, at, C::kAllFeatures && p.logits_soft_cap > 0, cta.zero);
      attention_t<C> attention(cta, item, query, stream);
      if (role == rehearsal_t::kSteps) attention.RehearseSteps();
      if (role == rehearsal_t::kCopies) attention.RehearseCopy();
      attention.Run();

      MergeWarps<C>(attention.state, launch.v_unit, at, cta.merge, cta.rows, shared.columns);
    }
    if (!rehearses || role == rehearsal_t::kEnd) {
      bool write = true;
      if (schedule.IsShared(item)) {
        // Items of all requests, at most max_q_len rows each.
        const int max_blocks = (p.max_q_len * cta.group + C::kColumns - 1) / C::kColumns;
        const int counter = (item.index * p.num_kv_heads + item.head) * max_blocks + item.block;
        write = CombineParts<C>(p, counter, is_first ? 0 : 1, schedule.Parts(item), rehearses,
                                cta.rows, shared, at);
      }
      if (write) {
        WriteRows<C>(p, item, cta.group, at, rehearses, cta.rows, shared.columns);
      }
    }
    if (rehearses) break;
    __syncthreads();  // the next item reuses rows
    begin = item.end;
  }
  if (rehearses && launch.early) JoinStream<C>();
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_KERNEL_CUH_
