// SPDX-License-Identifier: Apache-2.0
// What a warp of store does with vectors: find their places, compress them, write them.
#ifndef TURBOKV_STORE_WORKER_CUH_
#define TURBOKV_STORE_WORKER_CUH_

#include "turbokv/paged_kv.cuh"
#include "turbokv/store/encode.cuh"
#include "turbokv/store/params.cuh"
#include "turbokv/store/tile.cuh"
#include "turbokv/store/traits.cuh"
#include "turbokv/store/vector.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace store_detail {

/*! \brief Where a vector comes from and goes to, in one head. */
template <typename DTypeIn>
struct vector_place_t {
  const DTypeIn* x;  // this lane's coordinates
  uint8_t* tile;
  int row;    // of the inputs, or -1: the lanes only take part in exchanges
  int live;   // how many of the lane's coordinates exist, if positive
  int token;  // of the tile, or -1: nothing is stored
  int copy;   // slot of the tile's 16-bit copy, or -1
};

/*! \brief A rotated vector in lanes. */
template <int PER_LANE>
struct rotated_t {
  float y[PER_LANE];
  float squares;   // tree sum of the vector's y * y
  bool uncentred;  // a key that centring would lengthen
};

/*! \brief The sums of a vector whose scale is not stored yet. */
struct pending_t {
  float squares, root, product, energy;
  uint16_t* to;  // or null
  uint32_t mark;
};

template <class C, typename DTypeIn>
struct store_worker_t {
  static constexpr int kPerLane = C::kPerLane;

  const store_params_t& params;
  const vector_format_t& format;
  const role_t role;
  const float* const signs;  // shared, this lane's
  uint8_t* const staging;    // shared, this warp's
  const uint32_t column;     // see Encode
  const int lane;            // of the warp
  const bool wide, wide_offset;
  // Every lane of a vector has its sums, so each keeps another vector's until all divide at once.
  pending_t pending;
  int turn;

  TURBOKV_DEVICE store_worker_t(const store_params_t& p, role_t r, store_shared_t<C>& shared)
      : params(p),
        format(r == role_t::kKey ? p.k_format : p.v_format),
        role(r),
        signs(shared.signs + threadIdx.x % 32 % C::kLanes * C::kSignStride),
        staging(shared.staging + threadIdx.x / 32 * C::kStaging),
        column(ptx::SharedAddress(shared.table) +
               (threadIdx.x % C::kColumns - kCellOrigin * C::kColumns) * 4),
        lane(threadIdx.x % 32),
        wide(IsWide(p, r)),
        wide_offset(reinterpret_cast<uintptr_t>(p.k_offset) % 16 == 0 && p.kv.head_dim % 4 == 0),
        pending{1.0f, 1.0f, 1.0f, 1.0f, nullptr, 0},
        turn(0) {}

  static TURBOKV_DEVICE bool IsWide(const store_params_t& p, role_t r) {
    constexpr int kChunk = 16 / sizeof(DTypeIn);
    const bool key = r == role_t::kKey;
    const int64_t strides =
        key ? p.k_token_stride | p.k_head_stride : p.v_token_stride | p.v_head_stride;
    const uintptr_t address = reinterpret_cast<uintptr_t>(key ? p.k : p.v);
    return address % 16 == 0 && (strides | p.kv.head_dim) % kChunk == 0;
  }

  TURBOKV_DEVICE bool IsKey() const { return role == role_t::kKey; }
  TURBOKV_DEVICE int64_t TokenStride() const {
    return IsKey() ? params.k_token_stride : params.v_token_stride;
  }
  TURBOKV_DEVICE int64_t HeadStride() const {
    return IsKey() ? params.k_head_stride : params.v_head_stride;
  }
  TURBOKV_DEVICE tile_layout_t Layout() const {
    const int k_bits = params.k_format.codebook.bits, v_bits = params.v_format.codebook.bits;
    return TileLayout(C::kPaddedDim, k_bits, v_bits);
  }
  TURBOKV_DEVICE int Part() const { return lane % C::kLanes; }

  /*! \brief Where row `row` (or none, -1) comes from and goes to in head `head`. */
  TURBOKV_DEVICE vector_place_t<DTypeIn> Locate(int row, int head) const {
    const int at = Part() * kPerLane;
    // absent vectors have the addresses of others, never used: a null would make them generic
    const int any = max(row, 0);
    const int64_t slot = row >= 0 ? params.slot_mapping[row] : -1;
    vector_place_t<DTypeIn> place;
    place.row = row;
    place.live = row >= 0 ? format.head_dim - at : 0;
    place.x = static_cast<const DTypeIn*>(IsKey() ? params.k : params.v) + at +
              any * TokenStride() + head * HeadStride();
    const uint32_t tile_number = static_cast<uint32_t>(max(slot, int64_t{0}) >> 4);  // below 2^32
    const uint32_t tiles_per_page = params.kv.page_size / kTokensPerTile;
    const uint32_t page = tile_number / tiles_per_page, tile = tile_number % tiles_per_page;
    place.tile = TileAddress(params.kv, page, head, tile, Layout().bytes);
    place.token = slot >= 0 ? static_cast<int>(slot) & 15 : -1;
    place.copy = slot >= 0 ? TileSlot(params.kv, page, tile) : -1;
    return place;
  }

  /*! \brief Move on to the next head. */
  TURBOKV_DEVICE void Advance(vector_place_t<DTypeIn>& place) const {
    place.x += HeadStride();
    place.tile += params.kv.head_stride;
  }

  /*! \brief Offset of centred keys for this lane, or null. */
  TURBOKV_DEVICE const float* Offset(const vector_place_t<DTypeIn>& place, int head) const {
    if (place.token < 0) return nullptr;  // positions of skipped rows mean nothing
    const int64_t position = params.positions[place.row];
    const int64_t segment = position > 0 ? position / kTokensPerSegment : 0;
    return params.k_offset + (segment * params.kv.num_kv_heads + head) * format.head_dim +
           Part() * kPerLane;
  }

  /*! \brief Read and rotate a vector. \param centring  Whether to subtract the offset of keys. */
  TURBOKV_DEVICE void ReadRotated(const vector_place_t<DTypeIn>& place, int head, bool centring,
                                  rotated_t<kPerLane>& x) const {
    x.uncentred = false;
    bool clamp = false;
#pragma unroll 1
    while (true) {
      Load(place.x, place.live, wide, x.y);
      if (centring) {
        const float* offset = Offset(place, head);
        const float full = TreeSumAcrossLanes<C::kLanes>(TreeSumSquares(x.y));
        if (offset != nullptr) Centre(offset, place.live, wide_offset, x.y);
        const float centred = TreeSumAcrossLanes<C::kLanes>(TreeSumSquares(x.y));
        x.uncentred = full < centred;
        if (x.uncentred) Load(place.x, place.live, wide, x.y);
      }
      if (clamp) {
        TURBOKV_UNROLL
        for (int i = 0; i < kPerLane; ++i) x.y[i] = Clamp(x.y[i], kInputLimit);
      }
      Rotate<C::kLanes>(signs, lane, x.y);
      x.squares = TreeSumAcrossLanes<C::kLanes>(TreeSumSquares(x.y));
      // No coordinate can have been beyond the limit unless the sum is: it is rare that clamping
      // does anything, so it is not done before that is known.
      if (clamp || __all_sync(~0u, x.squares < kInputLimit * kInputLimit)) return;
      clamp = true;
    }
  }

  /*! \brief Write the 16-bit forms of a rotated vector that are asked for. */
  TURBOKV_DEVICE void WriteCopies(const vector_place_t<DTypeIn>& place, int head,
                                  const float (&y)[kPerLane]) const {
    const int at = Part() * kPerLane;
    uint16_t* rotated = static_cast<uint16_t*>(IsKey() ? params.k_rotated : params.v_rotated);
    if (rotated != nullptr && place.row >= 0) {
      rotated +=
          place.row * (IsKey() ? params.k_rotated_token_stride : params.v_rotated_token_stride) +
          head * (IsKey() ? params.k_rotated_head_stride : params.v_rotated_head_stride) + at;
      StoreRotated(rotated, params.rotated_dtype, y, format.inverse_root);
    }
    if (place.copy >= 0) {
      half_t* window = WindowAddress(params.kv, place.copy, head, role, place.token, C::kPaddedDim);
      StoreRotated(reinterpret_cast<uint16_t*>(window) + at, dtype_t::kFloat16, y,
                   format.inverse_root);
    }
  }

  /*! \brief Compress one vector a group of kLanes lanes and write it.
   *
   *  \param whole  Whether the vectors' tile is being written as a whole; the same in a warp.
   *  \param round  Which kVectors of the unit's tokens these are.
   */
  TURBOKV_DEVICE void Vector(const vector_place_t<DTypeIn>& place, int head, bool whole,
                             int round) {
    const bool centring = IsKey() && params.k_offset != nullptr;
    const bool copies =
        (IsKey() ? params.k_rotated : params.v_rotated) != nullptr || params.kv.window != nullptr;
    rotated_t<kPerLane> x;
    // 16-bit forms are not centred, so centred keys that have one are rotated twice
#pragma unroll 1
    for (int pass = centring && copies ? 0 : 1; pass < 2; ++pass) {
      ReadRotated(place, head, pass == 1 && centring, x);
      if (copies && (pass == 0 || !centring)) WriteCopies(place, head, x.y);
    }
    switch (format.codebook.bits) {
      case 2:
        return Finish<2>(x, place, whole, round);
      case 3:
        return Finish<3>(x, place, whole, round);
      case 4:
        return Finish<4>(x, place, whole, round);
      case 5:
        return Finish<5>(x, place, whole, round);
      default:
        return Finish<8>(x, place, whole, round);
    }
  }

  /*! \brief Quantise a rotated vector and write its codes. */
  template <int BITS>
  TURBOKV_DEVICE void Finish(const rotated_t<kPerLane>& x, const vector_place_t<DTypeIn>& place,
                             bool whole, int round) {
    const float root = Sqrt(x.squares);
    encoded_t<BITS, kPerLane> encoded;
    Encode<BITS, C::kColumns * 4>(x.y, CellFactor(format, x.squares, root), column, role, encoded);
    const float product = TreeSumAcrossLanes<C::kLanes>(encoded.product);
    const float energy = TreeSumAcrossLanes<C::kLanes>(encoded.energy);
    int token = place.token;
    // the compiler would compute all offsets that depend on it once for all heads, and spill them
    asm volatile("" : "+r"(token));
    const tile_layout_t layout = Layout();
    if (turn == Part()) {
      pending = {x.squares, root, product, energy, nullptr, x.uncentred ? 0x8000u : 0u};
      if (token >= 0) {
        pending.to = reinterpret_cast<uint16_t*>(place.tile + ScaleOffset(layout, role, token));
      }
    }
    ++turn;
    if (IsKey()) {
      WriteKey<C, BITS>(place.tile, layout, token, Part(), encoded);
    } else {
      const int index = (whole ? round * C::kVectors : 0) + lane / C::kLanes;
      StageValue<C, BITS>(staging, index, Part(), encoded);
      __syncwarp();
      WriteValue<C, BITS>(staging, place.tile, layout, token, whole, round + 1 == C::kRounds, lane);
      __syncwarp();
    }
  }

  /*! \brief Store the scales that lanes keep. */
  TURBOKV_DEVICE void WriteScales() {
    const uint16_t scale =
        StoredScale(format, pending.squares, pending.root, pending.product, pending.energy);
    if (pending.to != nullptr) *pending.to = static_cast<uint16_t>(scale | pending.mark);
    pending.to = nullptr;
    turn = 0;
  }
};

}  // namespace store_detail
}  // namespace turbokv

#endif  // TURBOKV_STORE_WORKER_CUH_
