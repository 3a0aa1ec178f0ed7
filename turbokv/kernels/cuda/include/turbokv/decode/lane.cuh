// SPDX-License-Identifier: Apache-2.0
// Where a thread stands: its warp, its lane, and what a lane has of the fragments of a product.
#ifndef TURBOKV_DECODE_LANE_CUH_
#define TURBOKV_DECODE_LANE_CUH_

#include <cuda_runtime.h>

namespace turbokv {
namespace decode_detail {

/*! \brief A thread's place; see the picture in README.md. lane = 4 * g + t as in PTX, whose names
 * are groupID and threadID_in_group. */
template <class C>
struct lane_t {
  int thread, warp, lane, g, t;

  __device__ __forceinline__ lane_t()
      : thread(threadIdx.x),
        warp(threadIdx.x >> 5),
        lane(threadIdx.x & 31),
        g((threadIdx.x & 31) >> 2),
        t(threadIdx.x & 3) {}

  /*! \brief Which column of an item, of its query rows, is this lane's x-th. */
  __device__ __forceinline__ int column(int x) const {
    return C::kColumns == 4 ? t : x / 2 * 8 + 2 * t + x % 2;
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_LANE_CUH_
