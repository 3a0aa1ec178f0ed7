// SPDX-License-Identifier: Apache-2.0
// How store lays a small batch out, and what its kernel is told: what the host can compute, it
// does.
#ifndef TURBOKV_STORE_SMALL_PARAMS_CUH_
#define TURBOKV_STORE_SMALL_PARAMS_CUH_

#include "turbokv/compress.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/store/params.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace store_detail {

/*! \brief How a small batch is laid out. */
template <int PADDED_DIM>
struct small_traits_t {
  static constexpr int kPaddedDim = PADDED_DIM;
  static constexpr int kPerLane = PADDED_DIM <= 128 ? 4 : PADDED_DIM / 32;
  static constexpr int kQuads = kPerLane / 4;
  static constexpr int kLanes = PADDED_DIM / kPerLane;  // lanes of a vector
  static constexpr int kVectors = 32 / kLanes;          // vectors of a warp
  static constexpr int kMaxWarps = 8;                   // of a CTA
};

/*! \brief What a warp needs to know of a role, besides what only some calls use. */
template <int PADDED_DIM>
struct small_role_t {
  const void* x;
  int64_t token_stride, head_stride;  // elements
  int32_t bits;
  scale_rule_t rule;
  float normaliser, scale_factor;
  int32_t base, high, scale;  // bytes from the start of the tile
  uint32_t signs[PADDED_DIM / 32];
  uint32_t entries[16];     // of lane_codebook_t
  uint32_t boundaries[16];  //
};

/*! \brief Parameters of the kernel. */
template <int PADDED_DIM>
struct small_params_t {
  uint8_t* pages;
  int64_t page_stride, head_stride;  // bytes
  const int64_t* slot_mapping;
  int32_t nnz, warps;         // warps of a CTA
  int32_t tile_bytes, shift;  // tiles of a page as a power of two; -1 if they are none
  bool launch_dependents;
  small_role_t<PADDED_DIM> roles[2];
};

/*! \brief The same and the call itself, for what calls rarely use. */
template <int PADDED_DIM>
struct small_call_t : small_params_t<PADDED_DIM> {
  store_params_t call;
  bool wide, wide_offset;  // quads of the inputs and of the offset can be loaded at once
};

template <int PADDED_DIM>
inline void FillRole(const store_params_t& call, role_t role, small_role_t<PADDED_DIM>& to) {
  const bool key = role == role_t::kKey;
  const vector_format_t& format = key ? call.k_format : call.v_format;
  const codebook_t& book = format.codebook;
  const tile_layout_t layout =
      TileLayout(PADDED_DIM, call.k_format.codebook.bits, call.v_format.codebook.bits);
  to.x = key ? call.k : call.v;
  to.token_stride = key ? call.k_token_stride : call.v_token_stride;
  to.head_stride = key ? call.k_head_stride : call.v_head_stride;
  to.bits = book.bits, to.rule = format.rule;
  to.normaliser = format.normaliser;
  to.scale_factor = format.rule == scale_rule_t::kPlain ? format.plain_factor : format.scale_factor;
  to.base = key ? layout.k_base : layout.v_base, to.high = key ? layout.k_high : layout.v_high;
  to.scale = ScaleOffset(layout, role, 0);
  for (int i = 0; i < PADDED_DIM / 32; ++i) to.signs[i] = format.signs[i];
  for (int i = 0; i < 16; ++i) {
    const bool used = book.bits <= 5 && i < NumMagnitudes(book);
    const float magnitude = used ? book.magnitudes[i] : 0;
    std::memcpy(&to.entries[i], &magnitude, 4);
    if (used) to.entries[i] |= CodeBase(book.bits, NumMagnitudes(book) + i);
    to.boundaries[i] =
        kCellOrigin + (used && i + 1 < NumMagnitudes(book) ? TwiceBoundary(book, i) : 256);
  }
}

/*! \brief What both kinds of parameters have. */
template <int PADDED_DIM>
inline void FillSmall(const store_params_t& call, int warps, small_params_t<PADDED_DIM>& to) {
  const int tiles = call.kv.page_size / kTokensPerTile;
  to.pages = call.kv.pages;
  to.page_stride = call.kv.page_stride, to.head_stride = call.kv.head_stride;
  to.slot_mapping = call.slot_mapping;
  to.nnz = call.nnz, to.warps = warps;
  to.launch_dependents = call.launch_dependents;
  to.tile_bytes =
      TileLayout(PADDED_DIM, call.k_format.codebook.bits, call.v_format.codebook.bits).bytes;
  to.shift = -1;
  for (int i = 0; i < 31; ++i) {
    if (tiles == 1 << i) to.shift = i;
  }
  FillRole<PADDED_DIM>(call, role_t::kKey, to.roles[0]);
  FillRole<PADDED_DIM>(call, role_t::kValue, to.roles[1]);
}

/*! \brief Whether the call uses nothing that the plain kernel leaves out. */
template <int PADDED_DIM, typename DTypeIn>
inline bool IsPlain(const store_params_t& call) {
  const int tiles = call.kv.page_size / kTokensPerTile;
  return call.kv.head_dim == PADDED_DIM && (tiles & (tiles - 1)) == 0 && call.k_offset == nullptr &&
         call.k_rotated == nullptr && call.v_rotated == nullptr && call.kv.window == nullptr &&
         HasAlignedPieces<DTypeIn, 4>(call);
}

}  // namespace store_detail
}  // namespace turbokv

#endif  // TURBOKV_STORE_SMALL_PARAMS_CUH_
