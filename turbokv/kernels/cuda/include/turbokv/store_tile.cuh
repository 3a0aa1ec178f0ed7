// SPDX-License-Identifier: Apache-2.0
// Where store's vectors belong: which rows fill whole tiles, and the planes of V, whose words four
// tokens share.
#ifndef TURBOKV_STORE_TILE_CUH_
#define TURBOKV_STORE_TILE_CUH_

#include "turbokv/pack.cuh"
#include "turbokv/store_vector.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace store_detail {

/*! \brief Write bytes of V of single tokens from shared memory: other tokens own the bytes between.
 *
 *  A warp writes one token at a time, so that its bytes are in few sectors.
 */
template <int PADDED_DIM, int PER_LANE, int BITS, int WIDTH, int RUN>
TURBOKV_DEVICE void ScatterValue(const uint8_t* rows, uint8_t* plane, int token, int lane) {
  using C = config_t<PADDED_DIM, PER_LANE>;
  constexpr int kBytes = PADDED_DIM * WIDTH / 8;
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
      to[ValueOffset(of, beta, RUN, BITS)] = rows[v * kBytes + beta];
    }
  }
}

/*! \brief Interleave a plane of V of whole groups of four tokens from shared memory into a tile.
 *
 *  Staging holds the tokens of a unit, kWidth bits a coordinate, in the order group, k, e (see
 *  ValueLane). A lane turns four bytes of four tokens into four words.
 */
template <int PADDED_DIM, int TOKENS, int BITS, int WIDTH, int RUN>
TURBOKV_DEVICE void InterleaveValue(const uint8_t* staging, uint8_t* plane, int first_group,
                                    int lane) {
  constexpr int kGroups = TOKENS / 4;
  constexpr int kBytes = PADDED_DIM * WIDTH / 8;
  for (int i = lane; i < kGroups * (kBytes / 4); i += 32) {
    const int group = i % kGroups, beta = i / kGroups * 4;
    const uint8_t* from = staging + group * 4 * kBytes + beta;
    uint32_t in[4], out[4];
    TURBOKV_UNROLL
    for (int q = 0; q < 4; ++q) {
      in[BITS == 2 ? (q >> 1) + (q & 1) * 2 : q] =
          *reinterpret_cast<const uint32_t*>(from + q * kBytes);
    }
    const uint32_t low01 = __byte_perm(in[0], in[1], 0x5140),
                   low23 = __byte_perm(in[2], in[3], 0x5140);
    const uint32_t top01 = __byte_perm(in[0], in[1], 0x7362),
                   top23 = __byte_perm(in[2], in[3], 0x7362);
    out[0] = __byte_perm(low01, low23, 0x5410);
    out[1] = __byte_perm(low01, low23, 0x7632);
    out[2] = __byte_perm(top01, top23, 0x5410);
    out[3] = __byte_perm(top01, top23, 0x7632);
    uint8_t* to = plane + beta * 16 + (first_group + group) * 4 * RUN;
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
