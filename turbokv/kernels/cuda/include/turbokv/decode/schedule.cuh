// SPDX-License-Identifier: Apache-2.0
// Who does which steps: all steps of all requests and heads form one line, and every CTA takes a
// contiguous part of it (stream-K, Osama et al., PPoPP 2023).
#ifndef TURBOKV_DECODE_SCHEDULE_CUH_
#define TURBOKV_DECODE_SCHEDULE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode/integer.cuh"
#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/request.cuh"
#include "turbokv/decode/shared.cuh"
#include "turbokv/decode/traits.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief The CTAs that share an item. */
struct parts_t {
  int first_cta, count;
  int first_part;  // which of its first CTA's parts is the item's: 0 or 1, see CombineParts
};

/*! \brief An item, as much of it as a CTA attends to. */
struct item_t {
  request_t request;
  int index, head, block;  // request; KV head; block of query rows
  int begin, end;          // steps on the line
  int line_begin;          // first step of the whole item on the line
  int newest_step;         // step of the request that `begin` is; they go from new to old
};

template <class C>
struct schedule_t {
  const decode_params_t& p;
  shared_t<C>& shared;
  const lane_t<C>& at;
  requests_t<C> requests;
  int num_workers;                           // CTAs that could have a part
  int total = 0, ctas = 0;                   // steps on the line; CTAs that have any
  int item_ctas = 0, first_cta_of_item = 0;  // if items have an integer number of CTAs
  int begin = 0, end = 0;                    // this CTA's part
  bool has_aligned_item = false;             // whether it is of one item, and known
  item_t aligned_item;

  __device__ __forceinline__ schedule_t(const decode_params_t& p, const launch_params_t& launch,
                                        int* memory, shared_t<C>& shared, const lane_t<C>& at)
      : p(p),
        shared(shared),
        at(at),
        requests(p, launch.cached, memory, at.warp),
        num_workers(launch.num_workers) {}

  /*! \brief Take an item without tokens, of which nothing will be written: one of two parts, of a
   * step; of two for two warps to rehearse, or of none. */
  __device__ __forceinline__ void Rehearse(rehearsal_t role) {
    const int steps = role == rehearsal_t::kSteps ? 2 : role == rehearsal_t::kCopies ? 0 : 1;
    begin = 0, end = max(steps, 1);
    item_ctas = 2, has_aligned_item = true;
    aligned_item = {};
    aligned_item.request.steps = 2, aligned_item.request.q_len = 1;
    if (role == rehearsal_t::kEnd) aligned_item.request.rows = requests.group;
    aligned_item.end = steps, aligned_item.newest_step = max(steps - 1, 0);
  }

  /*! \brief Lay all steps in a line and take this CTA's part; false if there is none for it.
   *
   *  When there are fewer items than CTAs, every item gets an integer number of CTAs, so that no
   *  CTA takes part in two merges. Requests get CTAs by their length, rounded down, unless the
   *  rounding would cost more than a tenth. Else all CTAs get equally many steps.
   */
  __device__ __forceinline__ bool TakePart() {
    bool aligned = false, idle = false;
    if (p.batch_size <= kWarpRequests) {
      LayOutByWarp(aligned, idle);
      __syncwarp();
    } else {
      LayOutByCta();
      if (p.batch_size <= kMaxAligned) AlignByCta(aligned, idle);
      __syncthreads();
    }
    if (idle) return false;
    if (!aligned) {
      const int cta = blockIdx.x;
      if (cta >= ctas) return false;
      begin = PartBegin(total, cta, ctas), end = PartBegin(total, cta + 1, ctas);
    }
    return true;
  }

  /*! \brief The item that a step of this CTA's part belongs to. */
  __device__ __forceinline__ item_t Item(int step) const {
    if (has_aligned_item) return aligned_item;
    item_t item;
    const int b = requests.Find(step);
    item.request = requests.Get(b);
    const int x = step - requests.prefix[b], number = FastDiv(x, item.request.steps);
    item.begin = step;
    MakeItem(item, b, number, x - number * item.request.steps);
    return item;
  }

  /*! \brief Whether other CTAs attend to the item as well. */
  __device__ __forceinline__ bool IsShared(const item_t& item) const {
    return item.end - item.begin != item.request.steps;
  }

  __device__ __forceinline__ parts_t Parts(const item_t& item) const {
    parts_t parts = {first_cta_of_item, item_ctas, 0};
    if (item_ctas == 0) {
      parts.first_cta = Owner(item.line_begin);
      parts.count = Owner(item.line_begin + item.request.steps - 1) - parts.first_cta + 1;
      parts.first_part = PartBegin(total, parts.first_cta, ctas) >= item.line_begin ? 0 : 1;
    }
    return parts;
  }

 private:
  /*! \brief The rest of an item by its number among its request's, if `before` of its steps are
   * those of CTAs before; `begin` is this CTA's first of them. */
  __device__ __forceinline__ void MakeItem(item_t& item, int b, int number, int before) const {
    const request_t& r = item.request;
    item.index = b;
    item.head = FastDiv(number, r.blocks), item.block = number - item.head * r.blocks;
    item.end = min(end, item.begin + r.steps - before);
    item.line_begin = item.begin - before;
    item.newest_step = r.first_step + r.steps - 1 - before;
  }

  /*! \brief The CTA whose part a step is in, if parts are equal. */
  __device__ __forceinline__ int Owner(int step) const {
    return static_cast<int>((static_cast<int64_t>(step + 1) * ctas - 1) / total);
  }

  /*! \brief CTAs that each item of a request gets, and whether rounding them down costs too much.
   */
  __device__ __forceinline__ int CtasOf(const request_t& r, bool& uneven) const {
    const int each = max(1, FastMulDiv(ctas, r.steps, max(total, 1)));
    const int max_steps = FastDiv(total, max(ctas, 1)) * 11 / 10 + 1;
    uneven |= r.blocks > 0 && r.steps > max_steps * each;
    return each;
  }

  /*! \brief This CTA's part if the items of a request, whose first step is `line`, have the CTAs
   * from `first` on, item_ctas each; returns the item's number. */
  __device__ __forceinline__ int TakeAligned(int steps, int line, int first) {
    const int item = FastDiv(static_cast<int>(blockIdx.x) - first, item_ctas);
    first_cta_of_item = first + item * item_ctas;
    const int part = blockIdx.x - first_cta_of_item, line_begin = line + item * steps;
    const int each = FastDiv(steps, item_ctas), rest = steps - each * item_ctas;
    begin = line_begin + each * part + FastDiv(rest * part, item_ctas);
    end = line_begin + each * (part + 1) + FastDiv(rest * (part + 1), item_ctas);
    return item;
  }

  /*! \brief Few requests: a lane has one, every warp does the same, and none waits for another.
   * What a single request takes before its first copy is mostly this. */
  __device__ __forceinline__ void LayOutByWarp(bool& aligned, bool& idle) {
    const int b = at.lane, cta = blockIdx.x;
    request_t r = {};
    if (b < p.batch_size) r = requests.Fetch(b);
    const int items = r.blocks * p.num_kv_heads;
    const int last_step = WarpScan(r.steps * items, b);
    if (b < p.batch_size) requests.prefix[b + 1] = last_step;
    if (b == 0) requests.prefix[0] = 0;
    total = __shfl_sync(~0u, last_step, 31);
    ctas = min(num_workers, total);
    bool uneven = false;
    const int each = CtasOf(r, uneven), own = items * each;
    const int last = WarpScan(own, b), given = __shfl_sync(~0u, last, 31);
    aligned = !__any_sync(~0u, uneven) && given <= ctas;
    if (!aligned) return;
    idle = cta >= given;
    if (idle) return;
    // the first request whose CTAs end after this one
    const int found = __popc(__ballot_sync(~0u, last <= cta));
    item_ctas = __shfl_sync(~0u, each, found);
    request_t& of = aligned_item.request;
    const int line = __shfl_sync(~0u, last_step - r.steps * items, found);
    const int first = __shfl_sync(~0u, last - own, found);
    of = requests.Make(__shfl_sync(~0u, r.length, found), __shfl_sync(~0u, r.first_row, found),
                       __shfl_sync(~0u, r.q_len, found));
    const int number = TakeAligned(of.steps, line, first);
    aligned_item.begin = begin;
    MakeItem(aligned_item, found, number, begin - line - number * of.steps);
    has_aligned_item = true;
  }

  // --- many requests: a thread has one

  /*! \brief Sum over the threads up to this one; adds the sum over all to `carry`. */
  __device__ __forceinline__ int CtaScan(int x, int& carry) {
    x = WarpScan(x, at.lane);
    if (at.lane == 31) shared.warps[at.warp].total = x;
    __syncthreads();
    int before = carry;
#pragma unroll 1
    for (int i = 0; i < C::kWarps; ++i) {
      const int each = shared.warps[i].total;
      if (i < at.warp) before += each;
      carry += each;
    }
    __syncthreads();
    return before + x;
  }

  __device__ __forceinline__ void LayOutByCta() {
#pragma unroll 1
    for (int base = 0; base < p.batch_size; base += C::kThreads) {
      const int b = base + at.thread;
      int steps = 0;
      if (b < p.batch_size) {
        const request_t r = requests.Fetch(b);
        steps = r.steps * r.blocks * p.num_kv_heads;
      }
      steps = CtaScan(steps, total);
      if (b < p.batch_size) requests.prefix[b + 1] = steps;
    }
    if (at.thread == 0) requests.prefix[0] = 0;
    ctas = min(num_workers, total);
  }

  __device__ __forceinline__ void AlignByCta(bool& aligned, bool& idle) {
    const int cta = blockIdx.x;
    int given = 0;
    bool uneven = false;
#pragma unroll 1
    for (int base = 0; base < p.batch_size; base += C::kThreads) {
      const int b = base + at.thread;
      int own = 0;
      if (b < p.batch_size) {
        const request_t r = requests.Get(b);
        own = CtasOf(r, uneven) * r.blocks * p.num_kv_heads;
      }
      own = CtaScan(own, given);
      if (b < p.batch_size) shared.cta_prefix[b + 1] = own;
    }
    if (at.thread == 0) shared.cta_prefix[0] = 0;
    aligned = !__syncthreads_or(uneven || given > ctas);
    if (!aligned) return;
    idle = cta >= given;
    if (idle) return;
    const int b = LastNotAbove(shared.cta_prefix, p.batch_size, cta);
    const request_t r = requests.Get(b);
    const int first = shared.cta_prefix[b];
    item_ctas = FastDiv(shared.cta_prefix[b + 1] - first, r.blocks * p.num_kv_heads);
    TakeAligned(r.steps, requests.prefix[b], first);
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_SCHEDULE_CUH_
