// SPDX-License-Identifier: Apache-2.0
// Shared memory of a CTA: a structure of fixed size, and arrays whose sizes a launch decides. Host
// and device compute both from here.
#ifndef TURBOKV_DECODE_SHARED_CUH_
#define TURBOKV_DECODE_SHARED_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode/params.cuh"
#include "turbokv/decode/traits.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief What a CTA knows of the columns of an item, its query rows. */
template <class C>
struct columns_t {
  static constexpr int kColumns = C::kColumns;
  float query_scale[kColumns];  // from a product to a score in powers of two
  float offset_gain[kColumns];  // from a product with the query to the unit of scores
  int query_sum[kColumns];      // of the query's integers
  int see_begin[kColumns], see_end[kColumns];  // tokens a row may see
  float warp_max[C::kWarps][kColumns], warp_sum[C::kWarps][kColumns];
  float row_max[kColumns], row_sum[kColumns];  // of all warps
};

/*! \brief Tokens of an item: from `all_begin` to `all_end` every row sees every token; from
 * `length` on nothing has been written. */
struct item_limits_t {
  int all_begin, all_end, length;
};

/*! \brief A tile that has a 16-bit copy. */
struct pending_copy_t {
  int slot, token;  // where its copy is; its first token
};

/*! \brief What each warp has for itself. */
template <class C>
struct alignas(16) warp_shared_t {
  uint64_t barriers[kMaxStages];
  // page ids and slots of copies, fetched ahead of the tiles that they address: see tile_stream_t
  int pages[32], next_pages[32], next_slots[32];
  int copy_slots[kMaxStages * C::kTiles];  // of the tiles in the ring: slot of its copy, or -1
  pending_copy_t pending[kPending];
  int num_pending, total;
};

template <class C>
struct alignas(128) shared_t {
  warp_shared_t<C> warps[C::kWarps];
  columns_t<C> columns;
  item_limits_t limits;
  int is_last;                      // whether this CTA combines the parts of an item
  int cta_prefix[kMaxAligned + 1];  // CTAs before a request
};

/*! \brief Where the arrays after shared_t lie, in bytes from its start. */
template <class C>
struct shared_plan_t {
  int ring;   // [kWarps, num_stages, kStepBytes]
  int merge;  // float [kWarps, kMergeRegs, 32], from an item's end on
  // float [segments, kColumns]: scores of the offsets of K, until an item's end. It has the room of
  // merge: room of its own would cost long requests a stage.
  int offsets;
  int rows;      // float [kColumns, kHeadDim]: the rotated query, at an item's end its output
  int query;     // [2 terms, kColumns, kHeadDim], in the order of K's fragments
  int requests;  // int [copies, arrays, batch_size + 1], see requests_t
  int bytes;

  /*! \param cached Whether lengths and query rows of requests are kept as well as their steps. */
  __host__ __device__ shared_plan_t(const decode_params_t& p, int num_stages, bool cached) {
    ring = sizeof(shared_t<C>);
    merge = ring + C::kWarps * num_stages * C::kStepBytes;
    offsets = merge;
    int room = C::kWarps * C::kMergeRegs * 128;
    if (C::kAllFeatures && p.k_offset_rotated != nullptr) {
      const int segments = p.num_segments < kSegmentsPerPass ? p.num_segments : kSegmentsPerPass;
      const int needed = segments * C::kColumns * 4;
      room = needed > room ? needed : room;
    }
    rows = merge + room;
    query = rows + C::kColumns * C::kHeadDim * 4;
    requests = query + C::kColumns * C::kHeadDim * 2;
    // few requests: a copy for each warp, so that none waits for another
    const int copies = p.batch_size <= kWarpRequests ? C::kWarps : 1;
    const int arrays = !cached ? 1 : p.qo_indptr != nullptr ? 3 : 2;
    bytes = requests + copies * arrays * (p.batch_size + 1) * 4;
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_SHARED_CUH_
