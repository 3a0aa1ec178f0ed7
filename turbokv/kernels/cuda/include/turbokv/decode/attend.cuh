// SPDX-License-Identifier: Apache-2.0
// What a warp does to the steps of an item: score, mask, softmax, accumulate; and 16-bit copies.
#ifndef TURBOKV_DECODE_ATTEND_CUH_
#define TURBOKV_DECODE_ATTEND_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "turbokv/decode/accumulate.cuh"
#include "turbokv/decode/copy_tile.cuh"
#include "turbokv/decode/integer_accumulate.cuh"
#include "turbokv/decode/integer_softmax.cuh"
#include "turbokv/decode/key_offset.cuh"
#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/mask.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/query.cuh"
#include "turbokv/decode/schedule.cuh"
#include "turbokv/decode/score.cuh"
#include "turbokv/decode/shared.cuh"
#include "turbokv/decode/softmax.cuh"
#include "turbokv/decode/tables.cuh"
#include "turbokv/decode/tile_stream.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/decode/vector.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief How V's levels and probabilities are multiplied, see Products. */
template <class C>
using softmax_t = std::conditional_t<C::kProducts == products_t::kInteger, integer_softmax_t<C>,
                                     half_softmax_t<C>>;

/*! \brief What a CTA works with, whatever the item. */
template <class C>
struct cta_t {
  const decode_params_t& p;
  shared_t<C>& shared;
  const lane_t<C>& at;
  int group;                      // query heads of a KV head
  int zero;                       // 0, unknown to the compiler
  float *merge, *rows, *offsets;  // see shared_plan_t
  uint8_t* query;
  const launch_params_t& launch;  // tables and units

  __device__ __forceinline__ cta_t(const decode_params_t& p, const launch_params_t& launch,
                                   uint8_t* base, const shared_plan_t<C>& plan, const lane_t<C>& at)
      : p(p),
        shared(*reinterpret_cast<shared_t<C>*>(base)),
        at(at),
        group(p.num_qo_heads / p.num_kv_heads),
        zero(min(launch.num_stages, 0)),
        merge(reinterpret_cast<float*>(base + plan.merge)),
        rows(reinterpret_cast<float*>(base + plan.rows)),
        offsets(reinterpret_cast<float*>(base + plan.offsets)),
        query(base + plan.query),
        launch(launch) {}

  /*! \brief Zero what steps read, for a CTA that rehearses them. */
  __device__ __forceinline__ void Clear(uint8_t* base, const shared_plan_t<C>& plan) const {
    const auto zero_words = [&](void* from, int bytes) {
#pragma unroll 1
      for (int i = at.thread; i < bytes / 4; i += C::kThreads) static_cast<uint32_t*>(from)[i] = 0;
    };
    zero_words(&shared.columns, sizeof(shared.columns));
    zero_words(&shared.limits, sizeof(shared.limits));
    zero_words(base + plan.ring, C::kStepBytes);  // the first stages of two warps
    zero_words(base + plan.ring + launch.num_stages * C::kStepBytes, C::kStepBytes);
    zero_words(rows, C::kColumns * C::kHeadDim * 6);  // and the query's terms after them
  }
};

/*! \brief A warp's attention to an item. */
template <class C>
struct attention_t {
  const cta_t<C>& cta;
  const item_t& item;
  tile_stream_t<C>& stream;
  const query_fragments_t<C>& query;
  const mask_t<C> mask;
  // In registers: ptxas had a word of it in a uniform one and copied that for every permute, 64
  // instructions a step. Of threadIdx.y it does not know that it is zero.
  const table_t v_table;
  softmax_t<C> state;
  int num_pending = 0;         // 16-bit copies that wait to be attended to
  int first_segment = 0;       // of the offsets in shared memory
  int clear_begin, clear_end;  // steps of the line in which no row needs a mask

  __device__ __forceinline__ attention_t(const cta_t<C>& cta, const item_t& item,
                                         const query_fragments_t<C>& query,
                                         tile_stream_t<C>& stream)
      : cta(cta),
        item(item),
        stream(stream),
        query(query),
        mask(cta.p, cta.shared.columns, cta.shared.limits, cta.at),
        v_table{cta.launch.v_table.a0 + threadIdx.y, cta.launch.v_table.a1 + threadIdx.y,
                cta.launch.v_table.b0 + threadIdx.y, cta.launch.v_table.b1 + threadIdx.y} {
    state.Reset();
    // step s begins at token (newest_step - (s - begin)) * kStepTokens
    const item_limits_t& limits = cta.shared.limits;
    const int from_newest = item.newest_step + item.begin;
    clear_begin = from_newest + 1 - limits.all_end / C::kStepTokens;
    // a part of few steps has one body only: reading another one's code would take longer
    if (item.end - item.begin <= 2 * C::kWarps) clear_begin = item.end;
    clear_end = from_newest + 1 - (max(limits.all_begin, 0) + C::kStepTokens - 1) / C::kStepTokens;
  }

  /*! \brief Take the second of two steps, which is another warp's, for one in which nothing is
   * rare: its code is not the first one's. */
  __device__ __forceinline__ void RehearseSteps() { clear_begin = 1, clear_end = 2; }

  /*! \brief Have the first of all copies attended to, though nothing was written to it. */
  __device__ __forceinline__ void RehearseCopy() {
    if constexpr (C::kAllFeatures) {
      if (cta.p.kv.tile_slots == nullptr || cta.p.kv.window == nullptr || cta.at.warp > 0) return;
      if (cta.at.lane == 0) cta.shared.warps[0].pending[0] = {0, 0};
      num_pending = 1;
    }
  }

  /*! \brief Attend to all steps and copies. Steps go from the newest to the oldest: tiles with
   * copies, mostly among the newest, are in L2 when the warps come to them in the end. */
  __device__ __forceinline__ void Run() {
    if constexpr (!C::kAllFeatures) {
#pragma unroll 1
      while (stream.step < item.end) Step();
    } else {
#pragma unroll 1
      for (int pass = item.begin; pass < item.end;) {
        pass = cta.p.k_offset_rotated != nullptr ? BeginPass(pass) : item.end;
        for (;;) {
#pragma unroll 1
          while (stream.step < pass && num_pending <= kPending - C::kTiles) Step();
          if (stream.step >= pass) break;
          __syncwarp();
#pragma unroll 1
          for (int i = 0; i < num_pending; ++i) Copy(cta.shared.warps[cta.at.warp].pending[i]);
          num_pending = 0;
          __syncwarp();
        }
      }
      if (cta.p.kv.tile_slots != nullptr) ShareCopies();
    }
    state.Close(query.unit);
  }

 private:
  __device__ __forceinline__ void Copy(const pending_copy_t& copy) {
    AttendCopy<C>(cta.p, copy, item.head, cta.rows, cta.launch.v_unit, cta.zero, query, mask,
                  cta.at, state);
  }

  /*! \brief Score the offsets of K of the steps from `begin` on, as many as fit; returns where
   * those steps end. */
  __device__ __forceinline__ int BeginPass(int begin) {
    constexpr int kStepsPerSegment = kTokensPerSegment / C::kStepTokens;
    const decode_params_t& p = cta.p;
    const int newest = item.newest_step - (begin - item.begin);  // step of the request
    const int last_segment = (newest * C::kStepTokens + C::kStepTokens - 1) / kTokensPerSegment;
    first_segment = max(0, last_segment - kSegmentsPerPass + 1);
    const int end = min(item.end, begin + newest + 1 - first_segment * kStepsPerSegment);
    const int oldest = newest - (end - 1 - begin);
    first_segment = max(first_segment, oldest * C::kStepTokens / kTokensPerSegment);
    const int segments = min(last_segment, p.num_segments - 1) - first_segment + 1;
    if (begin != item.begin) __syncthreads();
    ScoreOffsets<C>(p, item.head, first_segment, segments, cta.at, cta.rows, cta.shared.columns,
                    cta.offsets);
    __syncthreads();
    return end;
  }

  /*! \brief Go on to the warp's next step, and attend to it. */
  __device__ __forceinline__ void Step() {
    stream.Refill();
    const uint8_t* stage = stream.ring.Wait();
    const int step = stream.step;
    const int token0 = (item.newest_step - (step - item.begin)) * C::kStepTokens;
    // Tiles with copies have not been read: skip them here, attend to them later.
    const uint32_t copies = stream.Take();
    // Most steps need none of what few need and have code of their own: a branch further down would
    // split the block in which the compiler schedules (161 us became 151).
    bool is_clear = step >= clear_begin && step < clear_end;
    if constexpr (C::kAllFeatures) {
      if (copies != 0) Postpone(copies, token0);
      is_clear = is_clear && copies == 0 && !mask.capped && !AnyUncentred(stage);
    }
    // where there are registers for two
    constexpr bool kTwoBodies =
        C::kColumns == 4 ||
        (C::kColumns == 8 && !(C::kAllFeatures && C::kProducts == products_t::kInteger));
    if (kTwoBodies && is_clear) {
      Attend<false>(stage, token0, copies);
    } else if (copies != C::kAllTiles) {
      Attend<true>(stage, token0, copies);
    }
    __syncwarp();  // the stage may be filled again
    stream.ring.Advance();
  }

  /*! \brief Whether a key of a step was stored uncentred, which the sign of its scale says; false
   * if keys have no offsets. Tiles with copies are not there: their steps are not asked. */
  __device__ __forceinline__ bool AnyUncentred(const uint8_t* stage) const {
    if (cta.p.k_offset_rotated == nullptr) return false;
    uint32_t marks = 0;
#pragma unroll
    for (int i = 0; i < C::kTiles; i += 2) {
      const int tile = min(i + cta.at.lane / 16, C::kTiles - 1);
      marks |= *reinterpret_cast<const uint32_t*>(stage + tile * C::kTile + C::kScales +
                                                  cta.at.lane % 16 * 4);
    }
    return __any_sync(~0u, marks & 0x8000u);
  }

  /*! \brief Attend to a step; without RARE every row sees all of it as it is in the codes. */
  template <bool RARE>
  __device__ __forceinline__ void Attend(const uint8_t* stage, int token0, uint32_t copies) {
    scores_t<C, C::kTiles> scores;
    float offset[C::kLaneColumns];
    uint32_t marks = 0;
    const bool has_offset = LoadOffset(token0, offset);
    ScoreTiles<C>(stage, query, cta.launch.k_table, offset, cta.at, scores, marks);
    if constexpr (RARE) Mask(stage, token0, copies, has_offset, marks, offset, scores);
    AccumulateTiles<C>(stage, scores, query.unit, cta.zero, v_table, cta.launch.v_negative, cta.at,
                       state);
  }

  /*! \brief Note tiles with copies, a bit each, to be attended to later. */
  __device__ __forceinline__ void Postpone(uint32_t copies, int token0) {
    warp_shared_t<C>& own = cta.shared.warps[cta.at.warp];
    const int lane = cta.at.lane;
    if (lane < C::kTiles && (copies >> lane & 1)) {
      own.pending[num_pending + __popc(copies & ((1u << lane) - 1))] = {
          own.copy_slots[stream.ring.read * C::kTiles + lane], token0 + lane * kTokensPerTile};
    }
    num_pending += __popc(copies);
  }

  /*! \brief Score of the part of K that the step's segment shares; false if there is none. */
  __device__ __forceinline__ bool LoadOffset(int token0, float (&offset)[C::kLaneColumns]) const {
    if constexpr (!C::kAllFeatures) return false;
    const int segment = token0 / kTokensPerSegment;
    const bool has = cta.p.k_offset_rotated != nullptr && segment < cta.p.num_segments;
#pragma unroll
    for (int x = 0; x < C::kLaneColumns; ++x) {
      const int at = (segment - first_segment) * C::kColumns + cta.at.column(x);
      offset[x] = has ? cta.offsets[at] : 0.f;
    }
    return has;
  }

  /*! \brief What few steps need, behind one branch. */
  __device__ __forceinline__ void Mask(const uint8_t* stage, int token0, uint32_t copies,
                                       bool has_offset, uint32_t marks,
                                       const float (&offset)[C::kLaneColumns],
                                       scores_t<C, C::kTiles>& scores) const {
    if constexpr (!C::kAllFeatures) {
      mask.HideTokens(token0, scores);
    } else {
      const bool masked = mask.IsMasked(token0);
      const bool uncentred = has_offset && __any_sync(~0u, marks & 0x8000u);
      if (uncentred || masked || mask.capped || copies != 0) {
        if (uncentred) mask.TakeOffsets(stage, offset, scores);
        if (mask.capped) mask.CapScores(scores);
        if (masked) mask.HideTokens(token0, scores);
        if (copies != 0) mask.HideTiles(copies, scores);
      }
    }
  }

  /*! \brief The newest tokens are a few neighbouring tiles: all warps share the copies left. */
  __device__ __forceinline__ void ShareCopies() {
    const int warp = cta.at.warp;
    if (cta.at.lane == 0) cta.shared.warps[warp].num_pending = num_pending;
    __syncthreads();
    int before = 0;
#pragma unroll 1
    for (int w = 0; w < C::kWarps; ++w) {
      const warp_shared_t<C>& other = cta.shared.warps[w];
      for (int i = (warp - before % C::kWarps + C::kWarps) % C::kWarps; i < other.num_pending;
           i += C::kWarps) {
        Copy(other.pending[i]);
      }
      before += other.num_pending;
    }
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_ATTEND_CUH_
