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

/*! \brief Sizes at a head size. A lane holds 32 consecutive coordinates: fewer, and the same work
 * is more instructions.
 */
template <int PADDED_DIM>
struct store_traits_t {
  static constexpr int kPaddedDim = PADDED_DIM, kPerLane = 32;
  static constexpr int kLanes = PADDED_DIM / kPerLane;  // lanes of a vector
  static constexpr int kVectors = 32 / kLanes;          // vectors a warp holds at a time
  // of a unit, at least a word of V, as it may be a part of a whole tile
  static constexpr int kTokens = kVectors < 4 ? 4 : kVectors;
  static constexpr int kRounds = kTokens / kVectors;
  static constexpr int kUnits = kTokensPerTile / kTokens;  // units of 16 rows
  static constexpr int kWarps = PADDED_DIM <= 256 ? 8 : 4;
  static constexpr int kThreads = kWarps * 32;
  // CTAs a multiprocessor, which decide how many registers a thread may have
  static constexpr int kCtas = 2;
  static constexpr int kStaging = kTokens * PADDED_DIM;  // bytes a warp, enough for 8 bits
  static constexpr int kSignStride = kPerLane + 4;  // floats; lanes then read from different banks
  // Copies of the table of cells: a column for every lane, so that lookups never meet in a bank.
  static constexpr int kColumns = 32;
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
