// SPDX-License-Identifier: Apache-2.0
// All sizes of a variant of the kernel, each with its reason.
#ifndef TURBOKV_DECODE_TRAITS_CUH_
#define TURBOKV_DECODE_TRAITS_CUH_

#include <cstdint>
#include <type_traits>

#include "turbokv/decode/key_operand.cuh"
#include "turbokv/decode/tables.cuh"
#include "turbokv/decode/three_bits.cuh"
#include "turbokv/decode/tile_copy.cuh"
#include "turbokv/decode/value_operand.cuh"
#include "turbokv/pack.cuh"

namespace turbokv {
namespace decode_detail {

constexpr int kSegmentsPerPass = 256;  // offsets kept in shared memory at a time
constexpr int kMaxStages = 8;
constexpr int kMaxCtasPerSm = 4;
constexpr int kMaxCtas = 1 << 15;  // of a launch, see PartBegin
// Tiles with 16-bit copies that a warp collects before it attends to them alone; at the end of an
// item all warps share what is left.
constexpr int kPending = 16;
constexpr int kMaxAligned = 256;   // requests whose items may get an integer number of CTAs
constexpr int kWarpRequests = 31;  // requests that every warp lays out for itself
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNever = -1e30f;  // a running maximum that has seen nothing

/*! \brief What a CTA runs ahead of those that attend, without a result.
 *
 *  With few requests a launch takes as long as its instructions take to come from DRAM, where a
 *  server's weights have left them: everybody waits for the same lines, one after the other. A few
 *  CTAs that begin with later stages bring their code to L2 meanwhile.
 */
enum class rehearsal_t { kNone, kStart, kSteps, kCopies, kEnd };
constexpr int kRehearsals = 4;

/*! \brief How probabilities are multiplied with values. */
enum class products_t {
  kHalf,     // levels as fp16, probabilities as fp16: any width
  kInteger,  // levels as int8, probabilities as integers of 16 bits in two terms
};

/*! \brief The product of a variant, here and nowhere else. An architecture whose int8 products are
 * slow would choose here.
 *
 *  Integers need registers for two terms and for the outputs in fp32 that they are added to. With
 *  eight rows lookups of 4 bits need V's bytes moved as well: measured, 192 us instead of 174.
 */
constexpr products_t Products(int head_dim, int v_bits, bool uniform2, int columns) {
  const bool is_width = v_bits == 3 || (v_bits == 4 && columns == 4) || (v_bits == 2 && uniform2);
  return is_width && columns <= 8 && head_dim * columns <= 1024 ? products_t::kInteger
                                                                : products_t::kHalf;
}

/*! \brief How integer products see k. */
enum class order_t {
  kPairs,  // of a tile, (token, which coordinate of a pair): the bytes as lookups leave them
  kQuads,  // of two tiles, four tokens of one coordinate side by side
};

/*! \brief What a variant can be asked for. Whatever a variant lacks costs it nothing. */
enum class features_t {
  kPlain,  // lengths, causal masks, a window, sinks
  kAll,    // 16-bit copies of tiles, offsets of centred keys and a cap on scores as well
};

/*!
 *  \tparam HEAD_DIM Coordinates stored per vector: 64, 128, 256 or 512.
 *  \tparam K_BITS, V_BITS Widths of codes.
 *  \tparam UNIFORM2 Whether 2-bit codebooks are {m, 3 m}, which need no lookup.
 *  \tparam COLUMNS  Query rows an item takes at once: 4, 8 or 16.
 *  \tparam COPY     How tiles reach shared memory: bulk_copy_t or async_copy_t.
 *  \tparam CTAS     CTAs of a multiprocessor at a time. With several, some compute while others
 *                   start or end an item and so wait; with one, fewer parts are merged.
 *  \tparam FEATURES What the variant can be asked for.
 */
template <int HEAD_DIM, int K_BITS, int V_BITS, bool UNIFORM2, int COLUMNS, class COPY, int CTAS,
          features_t FEATURES>
struct decode_traits_t {
  using k_t = std::conditional_t<K_BITS == 3, key_operand3_t<HEAD_DIM>,
                                 key_operand_t<HEAD_DIM, K_BITS, UNIFORM2>>;
  using v_t = std::conditional_t<V_BITS == 3, value_operand3_t<HEAD_DIM>,
                                 value_operand_t<HEAD_DIM, V_BITS, UNIFORM2>>;
  using copy_t = COPY;
  static constexpr int kHeadDim = HEAD_DIM, kKBits = K_BITS, kVBits = V_BITS, kColumns = COLUMNS;
  static constexpr bool kAllFeatures = FEATURES == features_t::kAll;
  static constexpr products_t kProducts = Products(HEAD_DIM, V_BITS, UNIFORM2, COLUMNS);
  // How integer products see k. Lookups of 4 bits leave two coordinates of a token side by side:
  // probabilities take that order.
  static constexpr order_t kOrder = V_BITS == 4 ? order_t::kPairs : order_t::kQuads;
  // What tables hold, see MakeTable; two terms may be operands one after the other.
  static constexpr bytes_t kKeyBytes =
      K_BITS == 4 && COLUMNS == 4 ? bytes_t::kSignedSum : bytes_t::kSigned;
  static constexpr bytes_t kValueBytes = kProducts == products_t::kHalf ? bytes_t::kOffset128
                                         : V_BITS == 4 && kOrder == order_t::kPairs
                                             ? bytes_t::kSignedSum
                                             : bytes_t::kSigned;
  static_assert(COLUMNS == 4 || COLUMNS == 8 || COLUMNS == 16, "an mma has eight columns");

  // --- tiles and steps
  static constexpr int kTile = TileLayout(HEAD_DIM, K_BITS, V_BITS).bytes;
  static constexpr int kScales = kTile - 64;  // offset of a tile's 16 pairs of scales
  // Tiles per step: as many as keep a step under 9 KB, if the registers for their scores suffice.
  // Steps of eight tiles leave warps without any in small batches: only where they gain most.
  static constexpr int kTiles = HEAD_DIM == 64 && COLUMNS <= 8 && kTile <= 1100 ? 8
                                : kTile <= 2200                                 ? 4
                                : kTile <= 4352                                 ? 2
                                                                                : 1;
  static constexpr uint32_t kAllTiles = (1u << kTiles) - 1;  // a bit per tile of a step
  static constexpr int kStepTokens = kTiles * kTokensPerTile;
  static constexpr int kStepBytes = kTiles * kTile;

  // --- threads
  // Eight warps, where two stages each fit: more would have too few registers.
  static constexpr int kCtas = CTAS;
  static constexpr int kWarps = (COPY::kStageRoom / (2 * kStepBytes) >= 8 ? 8 : 4) / kCtas;
  static constexpr int kThreads = kWarps * 32;
  static constexpr bool kRehearses = COPY::kOverlapsLaunches && CTAS == 1;

  // --- fragments
  // A product has eight columns. With four query rows the two terms of the query stand side by side
  // in them; with more rows each term has blocks of its own.
  static constexpr int kTermBlocks = COLUMNS == 16 ? 2 : 1;  // blocks of rows
  static constexpr int kQueryBlocks = COLUMNS == 4 ? 1 : 2 * kTermBlocks;
  static constexpr int kLaneColumns = COLUMNS / 4;  // columns whose scores and outputs a lane has
  static constexpr int kBlockColumns = kLaneColumns / kTermBlocks;  // of those, in each block
  static constexpr bool kSumTables = K_BITS == 4 && COLUMNS == 4;   // see MakeTable
  static constexpr int kQueryRegs = HEAD_DIM / 16;
  static constexpr int kOutBlocks = HEAD_DIM / 16;  // of 16 coordinates
  static constexpr int kLane = HEAD_DIM / 32;       // coordinates per lane of a vector a warp holds

  // --- merging
  static constexpr int kOutRegs = kOutBlocks * 2 * kLaneColumns;  // outputs of a lane
  // Outputs that warps merge at a time: more would need more shared memory.
  static constexpr int kMaxMergeRegs = CTAS == 4 ? 16 : 32;
  static constexpr int kMergeRegs = kOutRegs <= kMaxMergeRegs ? kOutRegs : kMaxMergeRegs;
  static constexpr int kPartial = COLUMNS * HEAD_DIM + 2 * COLUMNS;  // floats of a partial result
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_TRAITS_CUH_
