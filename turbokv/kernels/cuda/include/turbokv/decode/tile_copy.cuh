// SPDX-License-Identifier: Apache-2.0
// How tiles reach shared memory: each warp has a ring of stages, and a type for each way to fill
// it.
//
// A type of copy has constants and a ring_t<C> with Init, Issue, Commit, Wait and Advance. A new
// architecture's copies are another such type.
#ifndef TURBOKV_DECODE_TILE_COPY_CUH_
#define TURBOKV_DECODE_TILE_COPY_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief A warp's ring of stages in shared memory. The warp that reads a stage refills it: a slot
 * read by different warps in turn would need every warp to follow every phase of its barrier. */
template <class C>
struct ring_base_t {
  uint8_t* stages;
  uint32_t stages_address, barriers;
  int num_stages;
  int read = 0, parity = 0;

  __device__ __forceinline__ void Attach(uint8_t* memory, uint64_t* own_barriers, int stages_of) {
    stages = memory;
    stages_address = ptx::SharedAddress(memory);
    barriers = ptx::SharedAddress(own_barriers);
    num_stages = stages_of;
  }

  __device__ __forceinline__ void Advance() {
    if (++read == num_stages) read = 0, parity ^= 1;
  }

  /*! \brief Where lane `i` says that a tile lies. */
  static __device__ __forceinline__ const uint8_t* SourceOf(const uint8_t* source, int i) {
    return reinterpret_cast<const uint8_t*>(
        __shfl_sync(~0u, reinterpret_cast<unsigned long long>(source), i));
  }
};

/*! \brief cp.async.bulk, whose bytes an mbarrier counts: sm_90 and up. */
struct bulk_copy_t {
  static constexpr bool kOverlapsLaunches = true;  // programmatic dependent launch is there too
  static constexpr int kStageRoom = 160 * 1024;    // shared memory for two stages of every warp
  static constexpr int kMaxStagesInFlight = 8;
  // Whether Wait waits for what was committed before the tiles, too.
  static constexpr bool kWaitsForLookUps = false;

  template <class C>
  struct ring_t : ring_base_t<C> {
    using ring_base_t<C>::SourceOf;

    /*! \brief Make the barriers ready, which no other warp uses. */
    __device__ __forceinline__ void Init(int lane) {
      if (lane == 0) {
        for (int i = 0; i < this->num_stages; ++i) ptx::BarrierInit(this->barriers + 8 * i, 1);
        ptx::BarrierInitFence();
      }
      __syncwarp();
    }

    /*! \brief Start to copy a step. Lane `first + i` knows the source of tile i, null for nothing
     * as the bits of `sources` say. Of a full step every `contiguous` tiles, all, half or one, are
     * neighbours. */
    __device__ __forceinline__ void Issue(int stage, const uint8_t* source, uint32_t sources,
                                          int first, int lane, int contiguous) {
      const uint32_t present = sources >> first & C::kAllTiles;
      const uint32_t to = this->stages_address + stage * C::kStepBytes;
      const uint32_t barrier = this->barriers + 8 * stage;
      // Without copies all tiles of a step in one page may be copied, written or not.
      if (contiguous == C::kTiles && (C::kAllFeatures ? present == C::kAllTiles : present != 0)) {
        const uint8_t* const from = SourceOf(source, first);
        if (ptx::ElectOne()) {
          ptx::BarrierArriveExpect(barrier, C::kStepBytes);
          ptx::BulkCopy(to, from, C::kStepBytes, barrier);
        }
        __syncwarp();
        return;
      }
      if (C::kTiles > 1 && contiguous == C::kTiles / 2 && present == C::kAllTiles) {
        constexpr int kHalf = C::kTiles > 1 ? C::kTiles / 2 : 1;
        const uint8_t* const from = SourceOf(source, first);
        const uint8_t* const second = SourceOf(source, first + kHalf);
        if (ptx::ElectOne()) {
          ptx::BarrierArriveExpect(barrier, C::kStepBytes);
          ptx::BulkCopy(to, from, kHalf * C::kTile, barrier);
          ptx::BulkCopy(to + kHalf * C::kTile, second, kHalf * C::kTile, barrier);
        }
        __syncwarp();
        return;
      }
      const uint8_t* from[C::kTiles];
#pragma unroll
      for (int i = 0; i < C::kTiles; ++i) from[i] = SourceOf(source, first + i);
      if (ptx::ElectOne()) {
        ptx::BarrierArriveExpect(barrier, __popc(present) * C::kTile);
#pragma unroll
        for (int i = 0; i < C::kTiles; ++i) {
          if (from[i] != nullptr) ptx::BulkCopy(to + i * C::kTile, from[i], C::kTile, barrier);
        }
      }
      __syncwarp();
    }

    __device__ __forceinline__ void Commit() {}

    /*! \brief Wait for the step to be read, and return its stage. */
    __device__ __forceinline__ const uint8_t* Wait() {
      ptx::BarrierWait(this->barriers + 8 * this->read, this->parity);
      return this->stages + this->read * C::kStepBytes;
    }
  };
};

/*! \brief 16-byte cp.async: sm_80 and up. */
struct async_copy_t {
  static constexpr bool kOverlapsLaunches = false;
  static constexpr int kStageRoom = 80 * 1024;  // these devices may have 100 KB of shared memory
  static constexpr int kMaxStagesInFlight = 2;  // Wait waits for all groups but one
  static constexpr bool kWaitsForLookUps = true;

  template <class C>
  struct ring_t : ring_base_t<C> {
    using ring_base_t<C>::SourceOf;

    __device__ __forceinline__ void Init(int) {}

    __device__ __forceinline__ void Issue(int stage, const uint8_t* source, uint32_t, int first,
                                          int lane, int) {
      const uint32_t to = this->stages_address + stage * C::kStepBytes;
      const uint8_t* from[C::kTiles];
#pragma unroll
      for (int i = 0; i < C::kTiles; ++i) from[i] = SourceOf(source, first + i);
#pragma unroll
      for (int i = 0; i < C::kTiles; ++i) {
        if (from[i] == nullptr) continue;
        for (int at = lane * 16; at < C::kTile; at += 512) {
          ptx::AsyncCopy16(to + i * C::kTile + at, from[i] + at);
        }
      }
    }

    __device__ __forceinline__ void Commit() { ptx::AsyncCommit(); }

    __device__ __forceinline__ const uint8_t* Wait() {
      ptx::AsyncWait<1>();
      __syncwarp();
      return this->stages + this->read * C::kStepBytes;
    }
  };
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_TILE_COPY_CUH_
