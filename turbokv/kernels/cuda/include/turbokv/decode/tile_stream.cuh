// SPDX-License-Identifier: Apache-2.0
// The tiles that a warp attends to, on their way from the page table to the stages of its ring.
//
// The page of a tile comes from the page table, the slot of its 16-bit copy from another table, by
// its page: loads whose latencies would add up. So page ids are read two look-ups ahead and slots
// one, a look-up being as many steps as have 32 tiles; to shared memory, as registers that a load
// will fill would be copied, and so waited for, in every step.
#ifndef TURBOKV_DECODE_TILE_STREAM_CUH_
#define TURBOKV_DECODE_TILE_STREAM_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode/integer.cuh"
#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/request.cuh"
#include "turbokv/decode/schedule.cuh"
#include "turbokv/decode/shared.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

template <class C>
struct tile_stream_t {
  static constexpr int kTiles = C::kTiles;
  static constexpr int kSteps = 32 / kTiles;  // of a look-up
  // Head and tile of the page share an integer; Decode checks that both fit.
  static constexpr int kTileBits = 20;

  const decode_params_t& p;
  const schedule_t<C>& schedule;
  const requests_t<C>& requests;
  warp_shared_t<C>& own;  // this warp's
  const lane_t<C>& at;
  typename C::copy_t::template ring_t<C> ring;
  int begin, num_steps;  // of the line: this CTA's first step; steps of this warp
  int step;              // of the line: what this warp attends to next
  int tiles_per_page;
  int contiguous;  // tiles of a full step that lie together
  bool first_is_issued = false, first_is_old = false;
  int first_head_tile = 0;  // of the first look-up

  int request = 0, request_begin = 0, request_end = 0;  // of the last look-up
  int page = -1, head_tile = 0;                         // of the next look-up, one tile per lane
  int after_head_tile = 0;                              // of the one after it
  bool tile_is_old = false;  // whether no token of the last look-up's tile is a query's own
  // Of this look-up's tiles, one per lane: where it lies, its head, its copy's slot; and a bit for
  // each lane that has a source, or a copy.
  const uint8_t* source = nullptr;
  int source_head = 0, slot = -1;
  uint32_t present = 0, with_copies = 0;
  int issued = 0, attended = 0, write_stage = 0;  // steps: to stages, and read from them
  int depth = 2;                                  // how many may be issued and not read
  // Which tiles of the steps in flight have copies, the oldest step in the lowest bits.
  uint64_t copies_in_flight = 0;

  __device__ __forceinline__ tile_stream_t(const decode_params_t& p, const schedule_t<C>& schedule,
                                           warp_shared_t<C>& own, const lane_t<C>& at,
                                           uint8_t* ring_memory, int num_stages)
      : p(p),
        schedule(schedule),
        requests(schedule.requests),
        own(own),
        at(at),
        begin(schedule.begin) {
    ring.Attach(ring_memory + at.warp * num_stages * C::kStepBytes, own.barriers, num_stages);
    ring.Init(at.lane);
    step = begin + at.warp;
    const int rest = schedule.end - step;
    num_steps = rest > 0 ? (rest + C::kWarps - 1) / C::kWarps : 0;
    tiles_per_page = p.kv.page_size / kTokensPerTile;
    contiguous = tiles_per_page % kTiles == 0   ? kTiles
                 : tiles_per_page == kTiles / 2 ? kTiles / 2
                                                : 1;
  }

  /*! \brief Request the page ids of this warp's first look-ups. */
  __device__ __forceinline__ void RequestPages() {
    const int32_t* entry;
#pragma unroll 1
    for (int chunk = 0; chunk < 3; ++chunk) {
      first_head_tile = head_tile, head_tile = after_head_tile;
      after_head_tile = LookUp(chunk, entry);
      if (chunk == 0) first_is_old = __all_sync(~0u, at.lane >= kTiles || tile_is_old);
      CopyAsync(chunk == 0 ? own.next_slots : chunk == 1 ? own.next_pages : own.pages, entry);
      ptx::AsyncCommit();
    }
  }

  /*! \brief Issue the first step unless, if `early`, the kernel before may still write it. */
  __device__ __forceinline__ void Start(bool early) {
    ptx::AsyncWait<2>();
    const int first_page = own.next_slots[at.lane];
    source_head = first_head_tile >> kTileBits;
    if constexpr (C::kAllFeatures) {
      const int32_t* const entry = SlotEntry(first_page, first_head_tile);
      slot = ptx::LoadIf(entry != nullptr, entry, -1);
    }
    // whether there is a copy is not known yet: the first step is copied with all its tiles
    source = SourceOf(first_page, first_head_tile, -1);
    present = __ballot_sync(~0u, source != nullptr);
    if (num_steps > 0 && (first_is_old || !early)) {
      ring.Issue(0, source, present, 0, at.lane, contiguous);
      first_is_issued = true;
    }
    ptx::AsyncWait<1>();
    page = own.next_pages[at.lane];
    if constexpr (C::kAllFeatures) CopyAsync(own.next_slots, SlotEntry(page, head_tile));
    ptx::AsyncCommit();
  }

  /*! \brief Issue the first step if Start has not, and record it. */
  __device__ __forceinline__ void Continue() {
    if (num_steps > 0 && !first_is_issued) {
      ring.Issue(0, source, present, 0, at.lane, contiguous);
    }
    if constexpr (C::kAllFeatures) {
      with_copies = __ballot_sync(~0u, slot >= 0);
      if (num_steps > 0) RecordCopies(0);
    }
    issued = write_stage = 1;
  }

  /*! \brief Issue as many steps as may be in flight.
   *
   *  A multiprocessor's requests are served in order, instruction fetches included. Filling the
   *  ring at once delayed the first step by 8 us: so one step is issued at first, one more by the
   *  loop, and two for each one attended to until the ring is full.
   */
  __device__ __forceinline__ void Refill() {
#pragma unroll 1
    for (; issued - attended < depth; ++issued) {
      if (issued < num_steps) {
        ring.Issue(write_stage, source, present, FirstLane(issued), at.lane, contiguous);
        Record(write_stage);
      }
      ring.Commit();
      if (++write_stage == ring.num_stages) write_stage = 0;
    }
    depth = min(depth + 1, ring.num_stages);
  }

  /*! \brief Go on to the next step; which tiles of the present one have 16-bit copies, as a bit
   * each. */
  __device__ __forceinline__ uint32_t Take() {
    ++attended, step += C::kWarps;
    if constexpr (!C::kAllFeatures) return 0;
    const uint32_t copies = static_cast<uint32_t>(copies_in_flight) & C::kAllTiles;
    copies_in_flight >>= kTiles;
    return copies;
  }

 private:
  /*! \brief The lane that has a step's first tile in its look-up. */
  static __device__ __forceinline__ int FirstLane(int step_of_warp) {
    return static_cast<unsigned>(step_of_warp) % kSteps * kTiles;
  }

  /*! \brief Where the page of this lane's tile of a look-up is written, null if there is nothing to
   * read; returns its head << kTileBits | tile of the page. */
  __device__ __forceinline__ int LookUp(int chunk, const int32_t*& entry) {
    entry = nullptr;
    if (chunk * kSteps >= num_steps) return 0;
    const int i = chunk * kSteps + at.lane / kTiles;  // of this warp's steps
    const int looked_up = begin + at.warp + C::kWarps * i;
    int head, step_of_request;
    request_t r;
    if (schedule.has_aligned_item) {
      const item_t& item = schedule.aligned_item;
      r = item.request, request = item.index, head = item.head;
      step_of_request = max(item.newest_step - (looked_up - item.begin), 0);
    } else {
      // mostly the request of the last look-up
      if (__any_sync(~0u, looked_up < request_begin || looked_up >= request_end)) {
        request = requests.Find(looked_up);
        request_begin = requests.prefix[request], request_end = requests.prefix[request + 1];
      }
      r = requests.Get(request);
      const int x = looked_up - request_begin, number = FastDiv(x, r.steps);
      head = FastDiv(number, r.blocks);
      step_of_request = r.first_step + r.steps - 1 - (x - number * r.steps);
    }
    const int tile = step_of_request * kTiles + at.lane % kTiles;
    const int page_of_request = FastDiv(tile, tiles_per_page);
    if (i < num_steps && tile * kTokensPerTile < r.length) {
      entry = p.kv.page_table + TableEntry(p.kv, request, page_of_request);
    }
    tile_is_old = (tile + 1) * kTokensPerTile <= r.length - r.q_len;
    return head << kTileBits | (tile - page_of_request * tiles_per_page);
  }

  static __device__ __forceinline__ int TileOf(int head_tile) {
    return head_tile & ((1 << kTileBits) - 1);
  }

  __device__ __forceinline__ const int32_t* SlotEntry(int page_id, int where) const {
    if (p.kv.tile_slots == nullptr || page_id < 0) return nullptr;
    return p.kv.tile_slots + static_cast<int64_t>(page_id) * tiles_per_page + TileOf(where);
  }

  /*! \brief Where a tile lies; null if nothing is to be read, as it has a copy. */
  __device__ __forceinline__ const uint8_t* SourceOf(int page_id, int where, int copy_slot) const {
    if (page_id < 0 || copy_slot >= 0) return nullptr;
    return TileAddress(p.kv, page_id, where >> kTileBits, TileOf(where), C::kTile);
  }

  /*! \brief Copy an integer per lane to shared memory; -1 without a source. */
  __device__ __forceinline__ void CopyAsync(int* to, const int32_t* from) const {
    if (from == nullptr) {
      to[at.lane] = -1;
    } else {
      ptx::AsyncCopy4(ptx::SharedAddress(to + at.lane), from);
    }
  }

  /*! \brief Record which tiles of the step just issued have copies. */
  __device__ __forceinline__ void RecordCopies(int stage) {
    const int first = FirstLane(issued);
    const uint32_t copies = with_copies >> first & C::kAllTiles;
    if (copies == 0) return;
    copies_in_flight |= static_cast<uint64_t>(copies) << (issued - attended) * kTiles;
    const int tile = at.lane - first;
    if (tile >= 0 && tile < kTiles) {
      own.copy_slots[stage * kTiles + tile] = slot;
      if (C::copy_t::kOverlapsLaunches && slot >= 0) {
        // attended to later than other tiles: time enough to bring it to L2
        const int64_t vectors = (static_cast<int64_t>(slot) * p.num_kv_heads + source_head) * 2;
        ptx::BulkPrefetch(p.kv.window + vectors * kTokensPerTile * C::kHeadDim,
                          4 * kTokensPerTile * C::kHeadDim);
      }
    }
  }

  /*! \brief After the issue of a step: record its copies, and at a look-up's end go on to the next.
   */
  __device__ __forceinline__ void Record(int stage) {
    if constexpr (C::kAllFeatures) RecordCopies(stage);
    if (FirstLane(issued + 1) != 0) return;
    // The ring's Wait has waited for all groups but the newest, if there are groups of tiles.
    if (!C::copy_t::kWaitsForLookUps || attended == 0) ptx::AsyncWait<0>();
    if constexpr (C::kAllFeatures) slot = own.next_slots[at.lane];
    source = SourceOf(page, head_tile, slot), source_head = head_tile >> kTileBits;
    present = __ballot_sync(~0u, source != nullptr);
    if constexpr (C::kAllFeatures) with_copies = __ballot_sync(~0u, slot >= 0);
    page = own.pages[at.lane], head_tile = after_head_tile;
    if constexpr (C::kAllFeatures) CopyAsync(own.next_slots, SlotEntry(page, head_tile));
    const int32_t* entry;
    after_head_tile = LookUp((issued + 1) / kSteps + 2, entry);
    CopyAsync(own.pages, entry);
    if constexpr (!C::copy_t::kWaitsForLookUps) ptx::AsyncCommit();
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_TILE_STREAM_CUH_
