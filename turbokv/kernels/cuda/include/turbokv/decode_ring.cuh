// SPDX-License-Identifier: Apache-2.0
// How tiles reach shared memory: a ring of stages for each warp.
#ifndef TURBOKV_DECODE_RING_CUH_
#define TURBOKV_DECODE_RING_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode_config.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief A warp's ring of stages in shared memory. The warp that reads a stage refills it: a slot
 * read by different warps in turn would need every warp to follow every phase of its barrier. */
template <class C>
struct ring_t {
  uint8_t* stages;
  uint32_t stages_address, barriers;
  int* slots;  // [stages, tiles]: where a tile lies in the 16-bit window, or -1
  int num_stages;
  int read = 0, parity = 0;

  /*! \brief Start to bring a step. Lane `first + i` knows the source of tile i, null for nothing
   * as the bits of `sources` say. Of a whole step every `run` tiles, all, half or one, are
   * neighbours. */
  __device__ __forceinline__ void Issue(int stage, const uint8_t* source, uint32_t sources,
                                        int first, int lane, int run) {
    constexpr uint32_t kAll = (1u << C::kTiles) - 1;
    const uint32_t present = sources >> first & kAll;
    const uint32_t to = stages_address + stage * C::kStepBytes;
    auto source_of = [&](int i) {
      return reinterpret_cast<const uint8_t*>(
          __shfl_sync(~0u, reinterpret_cast<unsigned long long>(source), first + i));
    };
    if (C::kBulk && run > 1 && present == kAll) {
      constexpr int kHalf = C::kTiles / 2;
      const uint32_t barrier = barriers + 8 * stage;
      const uint8_t* const from = source_of(0);
      const uint8_t* const second = source_of(kHalf);
      if (ptx::ElectOne()) {
        ptx::BarrierArriveExpect(barrier, C::kStepBytes);
        ptx::BulkCopy(to, from, run * C::kTile, barrier);
        if (run == kHalf) ptx::BulkCopy(to + kHalf * C::kTile, second, kHalf * C::kTile, barrier);
      }
      __syncwarp();
      return;
    }
    const uint8_t* from[C::kTiles];
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) from[i] = source_of(i);
    if constexpr (C::kBulk) {
      if (ptx::ElectOne()) {
        const uint32_t barrier = barriers + 8 * stage;
        ptx::BarrierArriveExpect(barrier, __popc(present) * C::kTile);
#pragma unroll
        for (int i = 0; i < C::kTiles; ++i) {
          if (from[i] != nullptr) ptx::BulkCopy(to + i * C::kTile, from[i], C::kTile, barrier);
        }
      }
      __syncwarp();
    } else {
#pragma unroll
      for (int i = 0; i < C::kTiles; ++i) {
        if (from[i] == nullptr) continue;
        for (int at = lane * 16; at < C::kTile; at += 512)
          ptx::AsyncCopy16(to + i * C::kTile + at, from[i] + at);
      }
    }
  }

  __device__ __forceinline__ const uint8_t* Wait() {
    if constexpr (C::kBulk) {
      ptx::BarrierWait(barriers + 8 * read, parity);
    } else {
      ptx::AsyncWait<1>();
      __syncwarp();
    }
    return stages + read * C::kStepBytes;
  }

  __device__ __forceinline__ void Advance() {
    if (++read == num_stages) read = 0, parity ^= 1;
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_RING_CUH_
