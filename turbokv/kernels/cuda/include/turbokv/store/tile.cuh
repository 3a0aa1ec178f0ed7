// SPDX-License-Identifier: Apache-2.0
// Where store's vectors belong in tiles: K's bytes at their places, V's words that several tokens
// share, and which rows fill whole tiles.
#ifndef TURBOKV_STORE_TILE_CUH_
#define TURBOKV_STORE_TILE_CUH_

#include "turbokv/pack.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/store/encode.cuh"
#include "turbokv/store/traits.cuh"
#include "turbokv/store/vector.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace store_detail {

// --- K ---

/*! \brief Write a lane's codes of a token of K. All lanes of a warp call it; `token` is -1 for
 * none.
 */
template <class C, int BITS>
TURBOKV_DEVICE void WriteKey(uint8_t* tile, const tile_layout_t& layout, int token, int part,
                             const encoded_t<BITS, C::kPerLane>& encoded) {
  constexpr int kPerLane = C::kPerLane, kDim = C::kPaddedDim;
  if constexpr (BITS == 3) {
    if (token < 0) return;
    uint8_t* const to = tile + layout.k_base;
    TURBOKV_UNROLL
    for (int u = 0; u < kPerLane / 16; ++u) {
      uint32_t first_two, third;
      ThreeBitKey(encoded.base[2 * u], encoded.base[2 * u + 1], first_two, third);
      const int unit = part * (kPerLane / 16) + u;
      TURBOKV_UNROLL
      for (int k = 0; k < 3; ++k) {
        *reinterpret_cast<uint16_t*>(to + KeyHalfOffset(kDim, token, unit, k)) =
            static_cast<uint16_t>(k == 2 ? third : first_two >> (16 * k));
      }
    }
  } else {
    constexpr int kBytes = encoded_t<BITS, kPerLane>::kBytes, kRow = kDim * PlaneBits(BITS) / 8;
    if (token < 0) return;
    StoreBytes<kBytes>(tile + layout.k_base + KeyOffset(token, part * kBytes, kRow), encoded.base);
    if constexpr (HasHighBit(BITS)) {
      constexpr int kHighBytes = kPerLane / 8;
      const uint32_t high[1] = {encoded.high};
      StoreBytes<kHighBytes>(tile + layout.k_high + KeyOffset(token, part * kHighBytes, kDim / 8),
                             high);
    }
  }
}

// --- V ---

/*! \brief Put a lane's part of a token's planes where V is staged: rows of the base plane, then
 *  rows of the high plane. `index` is the token's row, of C::kTokens.
 */
template <class C, int BITS>
TURBOKV_DEVICE void StageValue(uint8_t* staging, int index, int part,
                               const encoded_t<BITS, C::kPerLane>& encoded) {
  constexpr int kPerLane = C::kPerLane, kDim = C::kPaddedDim;
  constexpr int kRow = kDim * PlaneBits(BITS) / 8;
  constexpr int kBytes = encoded_t<BITS, kPerLane>::kBytes;
  uint8_t* const to = staging + index * kRow + part * kBytes;
  if constexpr (BITS == 3) {
    uint32_t words[(kBytes + 3) / 4] = {};
    TURBOKV_UNROLL
    for (int i = 0; i < kPerLane / 8; ++i) {
      const uint32_t three = ThreeBitValue(encoded.base[i]);
      const int bit = 24 * i;
      words[bit / 32] |= three << (bit % 32);
      if (bit % 32 > 8) words[bit / 32 + 1] |= three >> (32 - bit % 32);
    }
    StoreBytes<kBytes>(to, words);
  } else {
    StoreBytes<kBytes>(to, encoded.base);
  }
  if constexpr (HasHighBit(BITS)) {
    constexpr int kHighBytes = kPerLane / 8;
    const uint32_t high[1] = {encoded.high};
    StoreBytes<kHighBytes>(staging + C::kTokens * kRow + index * (kDim / 8) + part * kHighBytes,
                           high);
  }
}

/*! \brief Write staged bytes of V of single tokens: other tokens own the bytes between.
 *
 *  A warp writes one token at a time, so that its bytes are in few sectors.
 */
template <class C, int BITS, int WIDTH, int RUN>
TURBOKV_DEVICE void ScatterValue(const uint8_t* rows, uint8_t* plane, int token, int lane) {
  constexpr int kBytes = C::kPaddedDim * WIDTH / 8;
#pragma unroll 2
  for (int v = 0; v < C::kVectors; ++v) {
    const int of = __shfl_sync(~0u, token, v * C::kLanes);
    const uint64_t address = __shfl_sync(~0u, reinterpret_cast<uint64_t>(plane), v * C::kLanes);
    if (of < 0) continue;
    uint8_t* const to = reinterpret_cast<uint8_t*>(address);
    TURBOKV_UNROLL
    for (int first = 0; first < kBytes; first += 32) {
      const int beta = first + lane;
      if (kBytes % 32 != 0 && beta >= kBytes) break;
      const uint32_t byte = rows[v * kBytes + beta];
      if constexpr (BITS == 3) {
        // its nibbles are bits of a word that other tokens may be writing just now
        const int e = (of >> 3) * 2 + (of & 1), unit = beta / 3;
        uint32_t* const word = reinterpret_cast<uint32_t*>(
            to + ValueWordOffset(C::kPaddedDim, of >> 1 & 3, unit, beta - 3 * unit));
        ptx::AndGlobal(word, ~(0x000f000fu << (4 * e)));
        ptx::OrGlobal(word, ((byte & 15) | (byte >> 4) << 16) << (4 * e));
      } else {
        to[ValueOffset(of, beta, RUN, BITS)] = static_cast<uint8_t>(byte);
      }
    }
  }
}

/*! \brief Words of 3-bit codes from a byte of each of four tokens: nibbles of even coordinates in
 *  the lower half, of odd ones in the upper.
 */
TURBOKV_DEVICE uint32_t ThreeBitWord(uint32_t bytes) {
  uint32_t even = bytes & 0x0f0f0f0f, odd = bytes >> 4 & 0x0f0f0f0f;
  even |= even >> 4, odd |= odd >> 4;
  return ptx::Permute(even, odd, 0x6420);
}

/*! \brief Interleave a staged plane of V of whole groups of four tokens into a tile.
 *
 *  Staging holds the tokens of a unit in the order group, k, e (see ValueLane). A lane turns four
 *  bytes of four tokens into four words.
 */
template <class C, int BITS, int WIDTH, int RUN>
TURBOKV_DEVICE void InterleaveValue(const uint8_t* staging, uint8_t* plane, int first_group,
                                    int lane) {
  constexpr int kGroups = C::kTokens / 4;
  constexpr int kBytes = C::kPaddedDim * WIDTH / 8;
  for (int i = lane; i < kGroups * (kBytes / 4); i += 32) {
    const int group = i % kGroups, beta = i / kGroups * 4;
    const uint8_t* from = staging + group * 4 * kBytes + beta;
    uint32_t in[4], out[4];
    TURBOKV_UNROLL
    for (int q = 0; q < 4; ++q) {
      in[BITS == 2 ? (q >> 1) + (q & 1) * 2 : q] =
          *reinterpret_cast<const uint32_t*>(from + q * kBytes);
    }
    const uint32_t low01 = ptx::Permute(in[0], in[1], 0x5140),
                   low23 = ptx::Permute(in[2], in[3], 0x5140);
    const uint32_t top01 = ptx::Permute(in[0], in[1], 0x7362),
                   top23 = ptx::Permute(in[2], in[3], 0x7362);
    out[0] = ptx::Permute(low01, low23, 0x5410);
    out[1] = ptx::Permute(low01, low23, 0x7632);
    out[2] = ptx::Permute(top01, top23, 0x5410);
    out[3] = ptx::Permute(top01, top23, 0x7632);
    const int t = first_group + group;
    if constexpr (BITS == 3) {
      TURBOKV_UNROLL
      for (int b = 0; b < 4; ++b) {
        const int unit = (beta + b) / 3;
        const int offset = ValueWordOffset(C::kPaddedDim, t, unit, beta + b - 3 * unit);
        *reinterpret_cast<uint32_t*>(plane + offset) = ThreeBitWord(out[b]);
      }
      continue;
    }
    uint8_t* to = plane + beta * 16 + t * 4 * RUN;
    if constexpr (RUN == 4) {
      *reinterpret_cast<uint4*>(to) = make_uint4(out[0], out[1], out[2], out[3]);
    } else if constexpr (RUN == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(out[0], out[1]);
      *reinterpret_cast<uint2*>(to + 32) = make_uint2(out[2], out[3]);
    } else {
      TURBOKV_UNROLL
      for (int b = 0; b < 4; ++b) *reinterpret_cast<uint32_t*>(to + b * 16) = out[b];
    }
  }
}

/*! \brief Write what is staged of V: single tokens after every round, whole tiles when all tokens
 *  of the unit are there.
 *
 *  \param last  Whether this is the last round of the unit.
 */
template <class C, int BITS>
TURBOKV_DEVICE void WriteValue(const uint8_t* staging, uint8_t* tile, const tile_layout_t& layout,
                               int token, bool whole, bool last, int lane) {
  constexpr int kWidth = PlaneBits(BITS);
  constexpr int kRun = ValueRun(C::kPaddedDim, BITS);
  constexpr bool kHigh = HasHighBit(BITS);
  constexpr int kHighRun = kHigh ? ValueHighRun(C::kPaddedDim, BITS) : 1;
  const uint8_t* const high = staging + C::kTokens * C::kPaddedDim * kWidth / 8;
  uint8_t* const base_plane = tile + layout.v_base;
  uint8_t* const high_plane = tile + layout.v_high;
  if (!whole) {
    ScatterValue<C, BITS, kWidth, kRun>(staging, base_plane, token, lane);
    if constexpr (kHigh) ScatterValue<C, BITS, 1, kHighRun>(high, high_plane, token, lane);
  } else {
    if (!last) return;
    const int first_group = __shfl_sync(~0u, token >> 1 & 3, 0);
    InterleaveValue<C, BITS, kWidth, kRun>(staging, base_plane, first_group, lane);
    if constexpr (kHigh) {
      InterleaveValue<C, BITS, 1, kHighRun>(high, high_plane, first_group, lane);
    }
  }
}

// --- rows ---

/*! \brief Which rows of a block of 16 belong to whole tiles.
 *
 *  A tile is whole if 16 consecutive rows fill it in order. The block where it starts writes it;
 * rows of other tiles are written by their own block, one by one.
 */
struct rows_t {
  int tile_start;   // row of the block where a whole tile starts, or -1
  uint32_t single;  // rows of the block that belong to no whole tile
};

TURBOKV_DEVICE rows_t FindRows(const int64_t* slot_mapping, int block_start, int nnz, int lane) {
  // rows block_start - 16 .. block_start + 31; what is absent differs from every slot
  const int early = block_start - 16 + lane, late = early + 32;
  const int64_t first = early >= 0 && early < nnz ? slot_mapping[early] : -1;
  const int64_t second = lane < 16 && late < nnz ? slot_mapping[late] : -1;
  const int64_t next_first = __shfl_sync(~0u, lane == 0 ? second : first, (lane + 1) & 31);
  const int64_t next_second = __shfl_down_sync(~0u, second, 1);
  const uint32_t low = __ballot_sync(~0u, first >= 0 && next_first == first + 1);
  const uint32_t top = __ballot_sync(~0u, second >= 0 && next_second == second + 1);
  const uint32_t chain = __funnelshift_r(low, top, lane);
  const bool starts = first >= 0 && first % kTokensPerTile == 0 && (chain & 0x7fff) == 0x7fff;
  const uint32_t all = __ballot_sync(~0u, starts);
  const uint32_t own = all >> 16, before = all & 0xfffe;
  const int rows = min(16, nnz - block_start);
  rows_t found;
  found.tile_start = own ? __ffs(own) - 1 : -1;
  found.single = (1u << rows) - 1;
  if (own) found.single &= (own & (0u - own)) - 1;
  // a tile that started i rows into the block before covers our first i rows
  if (before) found.single &= ~0u << (31 - __clz(before));
  return found;
}

}  // namespace store_detail
}  // namespace turbokv

#endif  // TURBOKV_STORE_TILE_CUH_
