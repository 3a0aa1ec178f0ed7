// SPDX-License-Identifier: Apache-2.0
// How store lays vectors out in warps, and what a CTA keeps in shared memory.
#ifndef TURBOKV_STORE_TRAITS_CUH_
#define TURBOKV_STORE_TRAITS_CUH_

#include "turbokv/compress.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace store_detail {

constexpr int kMaxExtra = 64;  // runs of heads that a CTA may leave for its end

/*! \brief Sizes of a variant.
 *
 *  \tparam PER_LANE  Consecutive coordinates that a lane holds, 8, 16 or 32: fewer make the chain
 * of instructions shorter, more make their number smaller. With 8 every token is written by itself,
 * whole tiles too.
 */
template <int PADDED_DIM, int PER_LANE>
struct store_traits_t {
  static constexpr int kPaddedDim = PADDED_DIM, kPerLane = PER_LANE;
  static constexpr int kLanes = PADDED_DIM / PER_LANE;  // lanes of a vector
  static constexpr int kVectors = 32 / kLanes;          // vectors a warp holds at a time
  static constexpr bool kSingle = PER_LANE == 8;
  // of a unit, at least a word of V if it may be a part of a whole tile
  static constexpr int kTokens = kVectors < 4 && !kSingle ? 4 : kVectors;
  static constexpr int kRounds = kTokens / kVectors;
  static constexpr int kUnits = kTokensPerTile / kTokens;  // units of 16 rows
  static constexpr int kWarps = PADDED_DIM <= 256 ? 8 : 4;
  static constexpr int kThreads = kWarps * 32;
  // CTAs a multiprocessor, which decide how many registers a thread may have
  static constexpr int kCtas = PER_LANE == 16 ? 3 : 2;
  static constexpr int kStaging = kTokens * PADDED_DIM;  // bytes a warp, enough for 8 bits
  static constexpr int kSignStride = PER_LANE + 4;  // floats; lanes then read from different banks
  // Whether a lane keeps a vector's sums until as many lanes have some and all divide at once; it
  // takes registers, which the others do not have.
  static constexpr bool kDefer = PER_LANE == 32;
  // Copies of the table of cells: a column for every lane, so that lookups never meet in a bank. In
  // a small batch filling them would take longer than meeting.
  static constexpr int kColumns = kSingle ? 1 : 32;
};

/*! \brief Shared memory of a CTA. */
template <class C>
struct store_shared_t {
  alignas(16) uint32_t table[kNumCells * C::kColumns];
  alignas(16) float signs[C::kLanes * C::kSignStride];
  alignas(16) uint8_t staging[C::kWarps * C::kStaging];
  uint2 extra[kMaxExtra];  // rows_unit, and first head and number of heads
  int num_extra;
};

}  // namespace store_detail
}  // namespace turbokv

#endif  // TURBOKV_STORE_TRAITS_CUH_
