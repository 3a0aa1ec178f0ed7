// SPDX-License-Identifier: Apache-2.0
// Store's kernel: who compresses which rows, and what happens before the first.
#ifndef TURBOKV_STORE_KERNEL_CUH_
#define TURBOKV_STORE_KERNEL_CUH_

#include "turbokv/ptx.cuh"
#include "turbokv/store/params.cuh"
#include "turbokv/store/traits.cuh"
#include "turbokv/store/worker.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace store_detail {

/*! \brief The units of a warp, as many as other warps have or one more.
 *
 *  Heads come first, so that rows are looked up once for a run of heads; CTAs come before warps, so
 *  that a small batch meets many multiprocessors.
 */
template <class C>
struct units_t {
  uint32_t run, longer;  // units of a warp; so many warps have one more

  TURBOKV_DEVICE explicit units_t(const store_params_t& params) {
    const uint32_t all =
        static_cast<uint32_t>(params.nnz + 15) / 16 * params.kv.num_kv_heads * C::kUnits;
    const uint32_t num_warps = gridDim.x * C::kWarps;
    run = all / num_warps, longer = all % num_warps;
  }
  TURBOKV_DEVICE uint32_t Begin(uint32_t warp) const {
    const uint32_t index = warp * gridDim.x + blockIdx.x;
    return index * run + min(index, longer);
  }
  TURBOKV_DEVICE uint32_t End(uint32_t warp) const {
    return Begin(warp) + run + (warp * gridDim.x + blockIdx.x < longer ? 1 : 0);
  }
};

/*! \brief Have the first rows of a unit brought nearer. */
template <class C, typename DTypeIn>
TURBOKV_DEVICE void TouchRows(const store_params_t& params, role_t role, uint32_t unit, int lane) {
  const bool key = role == role_t::kKey;
  const uint32_t heads = params.kv.num_kv_heads, nnz = params.nnz;
  const uint32_t rows_unit = unit / heads, first_row = rows_unit / C::kUnits * 16;
  const uint32_t row = first_row + rows_unit % C::kUnits * C::kTokens + lane / C::kLanes;
  // FindRows reads from 16 rows before to 31 after
  const int near = static_cast<int>(first_row) - 16 + 2 * lane;
  ptx::Touch(params.slot_mapping + min(max(near, 0), static_cast<int>(nnz) - 1));
  ptx::Touch(static_cast<const DTypeIn*>(key ? params.k : params.v) +
             min(row, nnz - 1) * (key ? params.k_token_stride : params.v_token_stride) +
             unit % heads * (key ? params.k_head_stride : params.v_head_stride) +
             min(lane % C::kLanes * C::kPerLane, params.kv.head_dim - 1));
}

/*! \brief Fill shared memory, and wait for the kernel before: nothing that is read until then
 *  depends on it.
 *
 *  One warp waits at once instead, and brings the rows of the CTA's first warp.
 */
template <class C, typename DTypeIn>
TURBOKV_DEVICE void Prepare(const store_params_t& params, role_t role, const units_t<C>& units,
                            store_shared_t<C>& shared) {
  constexpr int kFillers = (C::kWarps - 1) * 32;
  const vector_format_t& format = role == role_t::kKey ? params.k_format : params.v_format;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp == C::kWarps - 1) {
    ptx::WaitForPrimary();
    if (units.Begin(0) < units.End(0)) TouchRows<C, DTypeIn>(params, role, units.Begin(0), lane);
  } else {
    if (threadIdx.x == 0) shared.num_extra = 0;
    FillTable<kFillers, C::kColumns>(format.codebook, shared.table, threadIdx.x);
#pragma unroll 1
    for (int j = threadIdx.x; j < C::kPaddedDim; j += kFillers) {
      shared.signs[j / C::kPerLane * C::kSignStride + j % C::kPerLane] =
          IsNegated(format, j) ? -1.0f : 1.0f;
    }
    ptx::WaitForPrimary();
  }
  if (warp > 0 && units.Begin(warp) < units.End(warp)) {
    TouchRows<C, DTypeIn>(params, role, units.Begin(warp), lane);
  }
  __syncthreads();
}

/*! \brief A run of heads of the same rows. */
struct heads_t {
  uint32_t rows_unit;
  int begin, end;
};

/*! \brief Which row a vector of a round is: of a whole tile, or of single rows. */
template <class C>
TURBOKV_DEVICE int RowOf(const store_params_t& params, role_t role, uint32_t rows_unit,
                         const rows_t& rows, bool whole, int round) {
  const int part = rows_unit % C::kUnits, first_row = rows_unit / C::kUnits * 16;
  const int index = round * C::kVectors + threadIdx.x % 32 / C::kLanes;
  if (whole) {
    // tokens 2t, 2t + 1, 2t + 8 and 2t + 9 in turn
    const int group = part * (C::kTokens / 4) + index / 4;
    return first_row + rows.tile_start + 2 * group + (index & 1) + (index & 2) * 4;
  }
  const int row = first_row + part * C::kTokens + index;
  if ((rows.single >> (part * C::kTokens + index) & 1) == 0) return -1;
  const bool keep_skipped = (role == role_t::kKey ? params.k_rotated : params.v_rotated) != nullptr;
  return keep_skipped || params.slot_mapping[row] >= 0 ? row : -1;
}

/*! \brief Compress the whole tile or the single rows of a unit, a run of heads. */
template <class C, typename DTypeIn>
TURBOKV_DEVICE void Compress(store_worker_t<C, DTypeIn>& worker, const heads_t& heads,
                             const rows_t& rows, bool whole) {
  if constexpr (C::kRounds == 1) {
    const int row = RowOf<C>(worker.params, worker.role, heads.rows_unit, rows, whole, 0);
    vector_place_t<DTypeIn> place = worker.Locate(row, heads.begin);
    if (!__any_sync(~0u, place.row >= 0)) return;
#pragma unroll 1
    for (int head = heads.begin; head < heads.end; ++head) {
      worker.Vector(place, head, whole, 0);
      if (worker.turn == C::kLanes) worker.WriteScales();
      worker.Advance(place);
    }
  } else {
#pragma unroll 1
    for (int i = heads.begin * C::kRounds; i < heads.end * C::kRounds; ++i) {
      const int round = i % C::kRounds, head = i / C::kRounds;
      const int row = RowOf<C>(worker.params, worker.role, heads.rows_unit, rows, whole, round);
      const vector_place_t<DTypeIn> place = worker.Locate(row, head);
      if (!__any_sync(~0u, place.row >= 0)) continue;
      worker.Vector(place, head, whole, round);
      if (worker.turn == C::kLanes) worker.WriteScales();
    }
  }
}

/*! \brief Leave single rows of a warp's heads to the end; false where there is no room. */
template <class C>
TURBOKV_DEVICE bool Postpone(const heads_t& heads, store_shared_t<C>& shared) {
  int place = 0;
  if (threadIdx.x % 32 == 0) place = atomicAdd(&shared.num_extra, 1);
  place = __shfl_sync(~0u, place, 0);
  if (place >= kMaxExtra) return false;
  const int count = heads.end - heads.begin;
  shared.extra[place] = {heads.rows_unit, static_cast<uint32_t>(heads.begin | count << 16)};
  return true;
}

/*! \brief The heads that a warp takes next of its own units. */
TURBOKV_DEVICE heads_t NextOwn(uint32_t num_heads, uint32_t& unit, uint32_t end) {
  heads_t heads;
  heads.rows_unit = unit / num_heads;
  heads.begin = unit % num_heads;
  heads.end = min(num_heads, heads.begin + end - unit);
  unit += heads.end - heads.begin;
  return heads;
}

/*! \brief All units of a warp, then its share of what the CTA left for its end.
 *
 *  A unit in whose rows a whole tile and single ones meet is double work. Left to one warp, all
 *  would wait for it: its single rows are done last, by all warps of the CTA.
 */
template <class C, typename DTypeIn>
TURBOKV_DEVICE void Work(store_worker_t<C, DTypeIn>& worker, uint32_t unit, uint32_t end,
                         store_shared_t<C>& shared) {
  const store_params_t& params = worker.params;
  // the queued heads that are this warp's
  uint32_t turn = threadIdx.x / 32, item = 0;
  bool own_done = false;
  while (true) {
    heads_t heads;
    const bool is_own = unit < end;
    if (is_own) {
      heads = NextOwn(params.kv.num_kv_heads, unit, end);
    } else {
      if (!own_done) __syncthreads();
      own_done = true;
      const uint32_t items = min(shared.num_extra, kMaxExtra);
      while (item < items && turn >= (shared.extra[item].y >> 16)) {
        turn -= shared.extra[item++].y >> 16;
      }
      if (item == items) break;
      heads.rows_unit = shared.extra[item].x;
      heads.begin = (shared.extra[item].y & 0xffff) + turn;
      heads.end = heads.begin + 1;
      turn += C::kWarps;
    }
    const int part = heads.rows_unit % C::kUnits, first_row = heads.rows_unit / C::kUnits * 16;
    const rows_t rows = FindRows(params.slot_mapping, first_row, params.nnz, worker.lane);
    const bool single = (rows.single >> (part * C::kTokens) & ((1u << C::kTokens) - 1)) != 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      const bool whole = pass == 0;
      if (whole ? rows.tile_start < 0 || !is_own : !single) continue;
      if (!whole && is_own && rows.tile_start >= 0 && Postpone(heads, shared)) continue;
      Compress(worker, heads, rows, whole);
    }
  }
  if (worker.turn > 0) worker.WriteScales();
}

/*! \brief One row of the grid compresses K, the other V.
 *
 *  A warp takes units of kTokens rows of 16 and one head. kLanes neighbouring lanes hold a vector,
 * kPerLane consecutive coordinates each: that many stages of the transform stay in registers, and a
 * lane's codes are whole words. K's words go straight to their place. Four tokens of V share words,
 * so units of a tile that is written as a whole interleave their tokens in shared memory; other
 * tokens write their bytes one by one.
 */
template <class C, typename DTypeIn>
__global__ void __launch_bounds__(C::kThreads, C::kCtas)
    StoreKernel(const __grid_constant__ store_params_t params) {
  store_shared_t<C>& shared = *reinterpret_cast<store_shared_t<C>*>(ptx::DynamicShared());
  const role_t role = blockIdx.y == 0 ? role_t::kKey : role_t::kValue;
  const units_t<C> units(params);
  Prepare<C, DTypeIn>(params, role, units, shared);
  store_worker_t<C, DTypeIn> worker(params, role, shared);
  const uint32_t warp = threadIdx.x / 32;
  Work(worker, units.Begin(warp), units.End(warp), shared);
}

}  // namespace store_detail
}  // namespace turbokv

#endif  // TURBOKV_STORE_KERNEL_CUH_
