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
  const bool by_warp;  // whether every warp lays out all requests
  requests_t<C> requests;
  int total = 0, ctas = 0;                   // steps on the line; CTAs that have any
  int item_ctas = 0, first_cta_of_item = 0;  // if items have an integer number of CTAs
  int begin = 0, end = 0;                    // this CTA's part

  __device__ __forceinline__ schedule_t(const decode_params_t& p, bool cached, int* memory,
                                        shared_t<C>& shared, const lane_t<C>& at)
      : p(p),
        shared(shared),
        at(at),
        by_warp(p.batch_size <= kWarpRequests),
        requests(p, cached, memory, at.warp) {}

  /*! \brief Lay all steps in a line and take this CTA's part; false if there is none for it.
   *
   *  When there are fewer items than CTAs, every item gets an integer number of CTAs, so that no
   *  CTA takes part in two merges. Requests get CTAs by their length, rounded down, unless the
   *  rounding would cost more than a tenth. Else all CTAs get equally many steps.
   */
  __device__ __forceinline__ bool TakePart() {
    LayOut();
    bool aligned = false, idle = false;
    if (p.batch_size <= kMaxAligned) Align(aligned, idle);
    Sync();
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
    item_t item;
    item.index = requests.Find(step);
    item.request = requests.Get(item.index);
    const request_t& r = item.request;
    const int x = step - requests.prefix[item.index], number = FastDiv(x, r.steps);
    const int before = x - number * r.steps;
    item.head = FastDiv(number, r.blocks), item.block = number - item.head * r.blocks;
    item.begin = step, item.end = min(end, step + r.steps - before);
    item.line_begin = step - before;
    item.newest_step = r.first_step + r.steps - 1 - before;
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
  /*! \brief The CTA whose part a step is in, if parts are equal. */
  __device__ __forceinline__ int Owner(int step) const {
    return static_cast<int>((static_cast<int64_t>(step + 1) * ctas - 1) / total);
  }

  __device__ __forceinline__ int StepsOf(const request_t& r) const {
    return r.steps * r.blocks * p.num_kv_heads;
  }

  /*! \brief CTAs that a request gets, and whether rounding them down costs too much. */
  __device__ __forceinline__ int CtasOf(const request_t& r, bool& uneven) const {
    const int items = r.blocks * p.num_kv_heads;
    const int each = max(1, FastMulDiv(ctas, r.steps, max(total, 1)));
    const int max_steps = total / max(ctas, 1) * 11 / 10 + 1;
    uneven |= items > 0 && r.steps > max_steps * each;
    return items * each;
  }

  /*! \brief This CTA's part if request b has the CTAs from `first` to `last`. */
  __device__ __forceinline__ void TakeAligned(int b, int first, int last) {
    const request_t r = requests.Get(b);
    item_ctas = FastDiv(last - first, r.blocks * p.num_kv_heads);
    const int item = FastDiv(static_cast<int>(blockIdx.x) - first, item_ctas);
    first_cta_of_item = first + item * item_ctas;
    const int part = blockIdx.x - first_cta_of_item;
    const int line_begin = requests.prefix[b] + item * r.steps;
    const int each = FastDiv(r.steps, item_ctas), rest = r.steps - each * item_ctas;
    begin = line_begin + each * part + FastDiv(rest * part, item_ctas);
    end = line_begin + each * (part + 1) + FastDiv(rest * (part + 1), item_ctas);
  }

  // --- Few requests: a lane has one, every warp does the same, and none waits for another. Many: a
  // thread has one. The same code for both, as code that runs once is read from memory.

  __device__ __forceinline__ void Sync() const {
    if (by_warp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  /*! \brief Sum over the threads up to this one; adds the sum over all to `carry`. */
  __device__ __forceinline__ int Scan(int x, int& carry) {
    x = WarpScan(x, at.lane);
    int before = carry;
    if (by_warp) {
      carry += __shfl_sync(~0u, x, 31);
      return before + x;
    }
    if (at.lane == 31) shared.warps[at.warp].total = x;
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < C::kWarps; ++i) {
      const int each = shared.warps[i].total;
      if (i < at.warp) before += each;
      carry += each;
    }
    __syncthreads();
    return before + x;
  }

  __device__ __forceinline__ void LayOut() {
#pragma unroll 1
    for (int base = 0; base < p.batch_size; base += by_warp ? 32 : C::kThreads) {
      const int b = base + (by_warp ? at.lane : at.thread);
      int steps = b < p.batch_size ? StepsOf(requests.Fetch(b)) : 0;
      steps = Scan(steps, total);
      if (b < p.batch_size) requests.prefix[b + 1] = steps;
      if (b == 0) requests.prefix[0] = 0;
    }
    ctas = min(static_cast<int>(gridDim.x), total);
    if (by_warp) __syncwarp();
  }

  __device__ __forceinline__ void Align(bool& aligned, bool& idle) {
    const int cta = blockIdx.x;
    // the stream, which has not begun, has room for few
    int* const cta_prefix = by_warp ? shared.warps[at.warp].pages : shared.cta_prefix;
    int given = 0;
    bool uneven = false;
#pragma unroll 1
    for (int base = 0; base < p.batch_size; base += by_warp ? 32 : C::kThreads) {
      const int b = base + (by_warp ? at.lane : at.thread);
      int own = b < p.batch_size ? CtasOf(requests.Get(b), uneven) : 0;
      own = Scan(own, given);
      if (b < p.batch_size) cta_prefix[b + 1] = own;
      if (b == 0) cta_prefix[0] = 0;
    }
    uneven |= given > ctas;
    if (by_warp) {
      uneven = __any_sync(~0u, uneven);
      __syncwarp();
    } else {
      uneven = __syncthreads_or(uneven);
    }
    aligned = !uneven;
    if (!aligned) return;
    idle = cta >= given;
    if (idle) return;
    const int b = LastNotAbove(cta_prefix, p.batch_size, cta);
    TakeAligned(b, cta_prefix[b], cta_prefix[b + 1]);
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_SCHEDULE_CUH_
