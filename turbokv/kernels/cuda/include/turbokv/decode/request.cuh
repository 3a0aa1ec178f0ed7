// SPDX-License-Identifier: Apache-2.0
// What a request means for decode, and how a CTA knows it.
#ifndef TURBOKV_DECODE_REQUEST_CUH_
#define TURBOKV_DECODE_REQUEST_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode/integer.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/traits.cuh"

namespace turbokv {
namespace decode_detail {

struct request_t {
  int length, first_row, rows;  // KV tokens; query rows are (token, head in group) pairs
  int q_len, blocks;            // query tokens; blocks of kColumns rows
  int first_step, steps;        // a window may skip steps
};

/*! \brief Tokens of request b in the cache. */
__device__ __forceinline__ int RequestLength(const decode_params_t& p, int b) {
  if (p.kv.kv_lens != nullptr) return max(__ldg(p.kv.kv_lens + b), 0);
  const int pages = __ldg(p.kv.kv_indptr + b + 1) - __ldg(p.kv.kv_indptr + b);
  return pages > 0 ? max((pages - 1) * p.kv.page_size + __ldg(p.kv.kv_last_page_len + b), 0) : 0;
}

/*! \brief Read a request from global memory; without qo_indptr leaves its query rows. */
__device__ __forceinline__ void ReadRequest(const decode_params_t& p, int b, int& length,
                                            int& first_row, int& q_len) {
  length = RequestLength(p, b);
  if (p.qo_indptr == nullptr) return;
  first_row = __ldg(p.qo_indptr + b), q_len = __ldg(p.qo_indptr + b + 1) - first_row;
}

/*! \brief Requests in shared memory: the steps before each and, if cached, its length and query
 * rows, so that nobody waits for global memory to know them. */
template <class C>
struct requests_t {
  const decode_params_t& p;
  int group;  // query heads of a KV head
  bool cached;
  int* prefix;   // [batch_size + 1]: steps before a request
  int* lengths;  // [batch_size + 1], the last unused; if cached
  int* starts;   // [batch_size + 1]: query rows before a request; if cached, with qo_indptr

  /*! \param memory See shared_plan_t. Few requests have a copy for each warp. */
  __device__ __forceinline__ requests_t(const decode_params_t& p, bool cached, int* memory,
                                        int warp)
      : p(p), group(p.num_qo_heads / p.num_kv_heads), cached(cached) {
    const int each = p.batch_size + 1, arrays = !cached ? 1 : p.qo_indptr != nullptr ? 3 : 2;
    prefix = memory + (p.batch_size <= kWarpRequests ? warp * arrays * each : 0);
    lengths = prefix + each;
    starts = lengths + each;
  }

  /*! \brief What a request means, by its tokens and its query rows. */
  __device__ __forceinline__ request_t Make(int length, int first_row, int q_len) const {
    request_t r;
    r.length = length;
    r.first_row = first_row;
    r.q_len = q_len;
    r.rows = r.q_len * group;
    r.blocks = (r.rows + C::kColumns - 1) / C::kColumns;
    const int begin = p.window_left >= 0 ? max(0, r.length - r.q_len - p.window_left) : 0;
    r.first_step = begin / C::kStepTokens;
    // A request without tokens still has one step, which loads nothing, so that its output is
    // written.
    r.steps = max(1, (r.length + C::kStepTokens - 1) / C::kStepTokens - r.first_step);
    return r;
  }

  /*! \brief Read request b from global memory, and keep it if requests are cached. */
  __device__ __forceinline__ request_t Fetch(int b) const {
    int length, first_row = b * p.max_q_len, q_len = p.max_q_len;
    ReadRequest(p, b, length, first_row, q_len);
    if (cached) {
      lengths[b] = length;
      if (p.qo_indptr != nullptr) {
        starts[b] = first_row;
        if (b + 1 == p.batch_size) starts[b + 1] = first_row + q_len;
      }
    }
    return Make(length, first_row, q_len);
  }

  __device__ __forceinline__ request_t Get(int b) const {
    int length, first_row = b * p.max_q_len, q_len = p.max_q_len;
    if (cached) {
      length = lengths[b];
      if (p.qo_indptr != nullptr) first_row = starts[b], q_len = starts[b + 1] - first_row;
    } else {
      ReadRequest(p, b, length, first_row, q_len);
    }
    return Make(length, first_row, q_len);
  }

  /*! \brief The request that a step of the line belongs to. */
  __device__ __forceinline__ int Find(int step) const {
    return LastNotAbove(prefix, p.batch_size, step);
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_REQUEST_CUH_
