// SPDX-License-Identifier: Apache-2.0
// Compress new keys and values and write them to their slots: one launch.
#ifndef TURBOKV_STORE_CUH_
#define TURBOKV_STORE_CUH_

#include "turbokv/pack.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/types.cuh"
#include "turbokv/vector_format.cuh"
#if defined(__CUDACC__)
#include "turbokv/launch.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/store_tile.cuh"
#include "turbokv/store_vector.cuh"
#endif

namespace turbokv {

/*! \brief Arguments of Store. Strides are in elements; the last dimension is contiguous. */
struct store_params_t {
  paged_kv_t kv;  // pages, strides, page_size, num_kv_heads, head_dim; tile_slots and window if any
  vector_format_t k_format, v_format;
  const void* k;  // [nnz, num_kv_heads, head_dim]
  const void* v;  // [nnz, num_kv_heads, head_dim]
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  dtype_t dtype;                // of k and v
  int32_t nnz;                  //
  const int64_t* slot_mapping;  // [nnz]: page * page_size + token, or -1 to skip; slots differ
  const int64_t* positions;     // [nnz], logical; read with k_offset
  const float* k_offset;        // [num_segments, num_kv_heads, head_dim], original space; or null
  void* k_rotated;              // [nnz, num_kv_heads, padded_dim], not centred; or null
  void* v_rotated;              // as k_rotated
  int64_t k_rotated_token_stride, k_rotated_head_stride;
  int64_t v_rotated_token_stride, v_rotated_head_stride;
  dtype_t rotated_dtype;  // kFloat16 or kBFloat16
};

#if defined(__CUDACC__)

namespace store_detail {

constexpr int kMaxExtra = 64;  // runs of heads that a CTA may leave for its end

/*! \brief Where a vector comes from and goes to, in head 0. */
template <typename DTypeIn>
struct place_t {
  const DTypeIn* x;  // this lane's coordinates
  uint8_t* tile;
  int row;    // of the inputs, or -1: the lanes only take part in exchanges
  int live;   // how many of the lane's coordinates exist, if positive
  int token;  // of the tile, or -1: nothing is stored
  int copy;   // slot of the tile's 16-bit copy, or -1
};

template <int PADDED_DIM, int PER_LANE, typename DTypeIn>
struct worker_t {
  using C = config_t<PADDED_DIM, PER_LANE>;
  const store_params_t& params;
  const vector_format_t& format;
  role_t role;
  const float* signs;  // shared, this lane's
  uint8_t* staging;    // shared, this warp's
  uint32_t column;     // see Encode
  int lane;            // of the warp
  bool wide, wide_offset;

  TURBOKV_DEVICE tile_layout_t Layout() const {
    return TileLayout(PADDED_DIM, params.k_format.codebook.bits, params.v_format.codebook.bits);
  }

  TURBOKV_DEVICE place_t<DTypeIn> Locate(int row) const {
    const bool key = role == role_t::kKey;
    const int at = lane % C::kLanes * PER_LANE;
    // absent vectors have the addresses of others, never used: a null would make them generic
    const int any = max(row, 0);
    const int64_t slot = row >= 0 ? params.slot_mapping[row] : -1;
    place_t<DTypeIn> place;
    place.row = row;
    place.live = row >= 0 ? format.head_dim - at : 0;
    place.x = static_cast<const DTypeIn*>(key ? params.k : params.v) + at +
              any * (key ? params.k_token_stride : params.v_token_stride);
    const uint32_t tile_number = static_cast<uint32_t>(max(slot, int64_t{0}) >> 4);  // below 2^32
    const uint32_t tiles_per_page = params.kv.page_size / kTokensPerTile;
    const uint32_t page = tile_number / tiles_per_page, tile = tile_number % tiles_per_page;
    place.tile = TileAddress(params.kv, page, 0, tile, Layout().bytes);
    place.token = slot >= 0 ? static_cast<int>(slot) & 15 : -1;
    place.copy = slot >= 0 ? TileSlot(params.kv, page, tile) : -1;
    return place;
  }

  /*! \brief Offset of centred keys for this lane, or null. */
  TURBOKV_DEVICE const float* Offset(const place_t<DTypeIn>& place, int head) const {
    if (place.token < 0) return nullptr;  // positions of skipped rows mean nothing
    const int64_t position = params.positions[place.row];
    const int64_t segment = position > 0 ? position / kTokensPerSegment : 0;
    return params.k_offset + (segment * params.kv.num_kv_heads + head) * format.head_dim +
           lane % C::kLanes * PER_LANE;
  }

  /*! \brief Write the 16-bit forms of a rotated vector that are asked for. */
  TURBOKV_DEVICE void Copies(const place_t<DTypeIn>& place, int head,
                             const float (&y)[PER_LANE]) const {
    const bool key = role == role_t::kKey;
    const int at = lane % C::kLanes * PER_LANE;
    uint16_t* rotated = static_cast<uint16_t*>(key ? params.k_rotated : params.v_rotated);
    if (rotated != nullptr && place.row >= 0) {
      rotated += place.row * (key ? params.k_rotated_token_stride : params.v_rotated_token_stride) +
                 head * (key ? params.k_rotated_head_stride : params.v_rotated_head_stride) + at;
      StoreRotated(rotated, params.rotated_dtype, y, format.inverse_root);
    }
    if (place.copy >= 0) {
      half_t* window = WindowAddress(params.kv, place.copy, head, role, place.token, PADDED_DIM);
      StoreRotated(reinterpret_cast<uint16_t*>(window) + at, dtype_t::kFloat16, y,
                   format.inverse_root);
    }
  }

  /*! \brief Compress one vector a group of kLanes lanes and write it.
   *
   *  \param whole  Whether the vectors' tile is being written as a whole; the same in a warp.
   *  \param round  Which kVectors of the unit's tokens these are.
   */
  TURBOKV_DEVICE void Vector(const place_t<DTypeIn>& place, int head, bool whole, int round) const {
    const bool key = role == role_t::kKey;
    const bool centring = key && params.k_offset != nullptr;
    const DTypeIn* x = place.x + head * (key ? params.k_head_stride : params.v_head_stride);
    // 16-bit forms are not centred, so centred keys that have one are rotated twice
    const bool copies =
        (key ? params.k_rotated : params.v_rotated) != nullptr || params.kv.window != nullptr;
    float y[PER_LANE], squares = 0.0f;
    bool uncentred = false;
#pragma unroll 1
    for (int pass = centring && copies ? 0 : 1; pass < 2; ++pass) {
      bool clamp = false;
#pragma unroll 1
      while (true) {
        Load(x, place.live, wide, y);
        if (pass == 1 && centring) {
          const float* offset = Offset(place, head);
          const float full = TreeSumAcrossLanes<C::kLanes>(TreeSumSquares(y));
          if (offset != nullptr) Centre(offset, place.live, wide_offset, y);
          const float centred = TreeSumAcrossLanes<C::kLanes>(TreeSumSquares(y));
          uncentred = full < centred;
          if (uncentred) Load(x, place.live, wide, y);
        }
        if (clamp) {
          TURBOKV_UNROLL
          for (int i = 0; i < PER_LANE; ++i) y[i] = Clamp(y[i], kInputLimit);
        }
        Rotate<C::kLanes>(signs, lane, y);
        squares = TreeSumAcrossLanes<C::kLanes>(TreeSumSquares(y));
        // No coordinate can have been beyond the limit unless the sum is: it is rare that clamping
        // does anything, so it is not done before that is known.
        if (clamp || __all_sync(~0u, squares < kInputLimit * kInputLimit)) break;
        clamp = true;
      }
      if (copies && (pass == 0 || !centring)) Copies(place, head, y);
    }

    switch (format.codebook.bits) {
      case 2:
        return Finish<2>(y, squares, uncentred, place, head, whole, round);
      case 3:
        return Finish<3>(y, squares, uncentred, place, head, whole, round);
      case 4:
        return Finish<4>(y, squares, uncentred, place, head, whole, round);
      case 5:
        return Finish<5>(y, squares, uncentred, place, head, whole, round);
      default:
        return Finish<8>(y, squares, uncentred, place, head, whole, round);
    }
  }

  /*! \brief Quantise a rotated vector and write codes and scale. */
  template <int BITS>
  TURBOKV_DEVICE void Finish(const float (&y)[PER_LANE], float squares, bool uncentred,
                             const place_t<DTypeIn>& place, int head, bool whole, int round) const {
    constexpr int kWidth = PlaneBits(BITS), kRowBytes = PADDED_DIM * kWidth / 8;
    constexpr int kBytes = PER_LANE * kWidth / 8, kHighBytes = PER_LANE / 8;  // of a lane
    constexpr bool kHigh = HasHighBit(BITS);
    constexpr int kRun = ValueRun(PADDED_DIM, BITS);
    constexpr int kHighRun = kHigh ? ValueHighRun(PADDED_DIM, BITS) : 1;
    const int part = lane % C::kLanes;
    const tile_layout_t layout = Layout();
    uint8_t* const tile = place.tile + head * params.kv.head_stride;
    int token = place.token;
    // the compiler would compute all offsets that depend on it once for all heads, and spill them
    asm volatile("" : "+r"(token));
    const float root = Sqrt(squares);
    encoded_t<BITS, PER_LANE> encoded;
    Encode(y, CellFactor(format, squares, root), column, role, encoded);
    const float product = TreeSumAcrossLanes<C::kLanes>(encoded.product);
    const float energy = TreeSumAcrossLanes<C::kLanes>(encoded.energy);
    if (token >= 0 && part == 0) {
      const uint16_t scale = StoredScale(format, squares, root, product, energy);
      *reinterpret_cast<uint16_t*>(tile + ScaleOffset(layout, role, token)) =
          static_cast<uint16_t>(scale | (uncentred ? 0x8000 : 0));
    }
    if (role == role_t::kKey) {
      if (token >= 0) {
        StoreWords<kBytes>(tile + layout.k_base + KeyOffset(token, part * kBytes, kRowBytes),
                           encoded.base);
        if (kHigh) {
          StoreHigh<PER_LANE>(
              tile + layout.k_high + KeyOffset(token, part * kHighBytes, PADDED_DIM / 8),
              encoded.high);
        }
      }
    } else {
      // single tokens leave after every round, whole tiles when all tokens of the unit are there
      const int index = (whole ? round * C::kVectors : 0) + lane / C::kLanes;
      uint8_t* const high_staging = staging + C::kTokens * kRowBytes;
      uint8_t* const base_plane = tile + layout.v_base;
      uint8_t* const high_plane = tile + layout.v_high;
      StoreWords<kBytes>(staging + index * kRowBytes + part * kBytes, encoded.base);
      if (kHigh) {
        StoreHigh<PER_LANE>(high_staging + index * (PADDED_DIM / 8) + part * kHighBytes,
                            encoded.high);
      }
      __syncwarp();
      if (!whole) {
        ScatterValue<PADDED_DIM, PER_LANE, BITS, kWidth, kRun>(staging, base_plane, token, lane);
        if constexpr (kHigh) {
          ScatterValue<PADDED_DIM, PER_LANE, BITS, 1, kHighRun>(high_staging, high_plane, token,
                                                                lane);
        }
      } else if constexpr (!C::kSingle) {
        if (round + 1 == C::kRounds) {
          const int first_group = __shfl_sync(~0u, token >> 1 & 3, 0);
          InterleaveValue<PADDED_DIM, C::kTokens, BITS, kWidth, kRun>(staging, base_plane,
                                                                      first_group, lane);
          if constexpr (kHigh) {
            InterleaveValue<PADDED_DIM, C::kTokens, BITS, 1, kHighRun>(high_staging, high_plane,
                                                                       first_group, lane);
          }
        }
      }
      __syncwarp();
    }
  }
};

/*! \brief One row of the grid compresses K, the other V.
 *
 *  A warp takes units of kTokens rows of 16 and one head. kLanes = PADDED_DIM / PER_LANE
 * neighbouring lanes hold a vector, PER_LANE consecutive coordinates each: that many stages of the
 * transform stay in registers, and a lane's codes are whole words, or half of one at 8. K's words
 * go straight to their place. Four tokens of V share words, so units of a tile that is written as a
 * whole interleave their tokens in shared memory; other tokens write their bytes one by one.
 */
template <int PADDED_DIM, int PER_LANE, typename DTypeIn>
__global__ void __launch_bounds__(config_t<PADDED_DIM, PER_LANE>::kWarps * 32,
                                  PER_LANE == 16 ? 4 : 2)
    StoreKernel(const __grid_constant__ store_params_t params) {
  using C = config_t<PADDED_DIM, PER_LANE>;
  __shared__ alignas(16) uint32_t table[kNumCells * 32];
  __shared__ alignas(16) float signs[C::kLanes * C::kSignStride];
  __shared__ alignas(16) uint8_t staging[C::kWarps * C::kStaging];
  __shared__ uint2 extra[kMaxExtra];
  __shared__ int num_extra;
  TouchConstants(params);
  const role_t role = blockIdx.y == 0 ? role_t::kKey : role_t::kValue;
  const vector_format_t& format = blockIdx.y == 0 ? params.k_format : params.v_format;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // Every warp has a run of units, as many as the others or one more. Heads come first, so that
  // rows are looked up once for a run of heads; CTAs come before warps, so that a small batch meets
  // many multiprocessors.
  const bool key = role == role_t::kKey;
  const uint32_t heads = params.kv.num_kv_heads, nnz = params.nnz;
  const uint32_t num_units = (nnz + 15) / 16 * heads * C::kUnits;
  const uint32_t num_warps = gridDim.x * C::kWarps, own = warp * gridDim.x + blockIdx.x;
  const uint32_t run = num_units / num_warps, longer = num_units % num_warps;
  uint32_t unit = own * run + min(own, longer);
  const uint32_t end = unit + run + (own < longer ? 1 : 0);
  // bring the first rows of a unit nearer
  const auto touch = [&](uint32_t first_unit) {
    const uint32_t rows_unit = first_unit / heads, first_row = rows_unit / C::kUnits * 16;
    const uint32_t row = first_row + rows_unit % C::kUnits * C::kTokens + lane / C::kLanes;
    // FindRows reads from 16 rows before to 31 after
    const int near = static_cast<int>(first_row) - 16 + 2 * lane;
    Touch(params.slot_mapping + min(max(near, 0), static_cast<int>(nnz) - 1));
    Touch(static_cast<const DTypeIn*>(key ? params.k : params.v) +
          min(row, nnz - 1) * (key ? params.k_token_stride : params.v_token_stride) +
          first_unit % heads * (key ? params.k_head_stride : params.v_head_stride) +
          min(lane % C::kLanes * PER_LANE, format.head_dim - 1));
  };
  // The table does not depend on the kernel before. One warp waits for that instead, and brings
  // the rows of the CTA's first warp: in a small batch no other has any.
  constexpr int kFillers = (C::kWarps - 1) * 32;
  if (warp == C::kWarps - 1) {
    ptx::WaitForPrimary();
    const uint32_t first = blockIdx.x * run + min(blockIdx.x, longer);
    if (first < num_units) touch(first);
  } else {
    if (threadIdx.x == 0) num_extra = 0;
    FillTable<kFillers>(format.codebook, table, threadIdx.x);
    for (int j = threadIdx.x; j < PADDED_DIM; j += kFillers) {
      signs[j / PER_LANE * C::kSignStride + j % PER_LANE] = IsNegated(format, j) ? -1.0f : 1.0f;
    }
    ptx::WaitForPrimary();
  }
  // LaunchDependents is not called on purpose. With it, the decode kernel that follows ran 14 to 18
  // us longer in a server's step than when it starts after this kernel has ended
  // (docs/kernel-log.md).
  if (warp > 0 && unit < end) touch(unit);
  __syncthreads();

  const int64_t strides = key ? params.k_token_stride | params.k_head_stride
                              : params.v_token_stride | params.v_head_stride;
  const uintptr_t address = reinterpret_cast<uintptr_t>(key ? params.k : params.v);
  constexpr int kChunk = 16 / sizeof(DTypeIn);
  const uint32_t table_address = static_cast<uint32_t>(__cvta_generic_to_shared(table));
  const worker_t<PADDED_DIM, PER_LANE, DTypeIn> worker = {
      params,
      format,
      role,
      signs + lane % C::kLanes * C::kSignStride,
      staging + warp * C::kStaging,
      table_address + lane * 4 - kCellOrigin * 128,
      lane,
      address % 16 == 0 && (strides | format.head_dim) % kChunk == 0,
      reinterpret_cast<uintptr_t>(params.k_offset) % 16 == 0 && format.head_dim % 4 == 0,
  };

  const bool keep_skipped = (key ? params.k_rotated : params.v_rotated) != nullptr;
  // A unit in whose rows a whole tile and single ones meet is double work. Left to one warp, all
  // would wait for it: its single rows are done last, by all warps of the CTA.
  bool own_done = false;
  uint32_t turn = warp, item = 0;  // the queued heads that are this warp's
  while (true) {
    uint32_t rows_unit;
    int head_begin, head_end;
    const bool is_own = unit < end;
    if (is_own) {
      rows_unit = unit / heads;
      head_begin = unit % heads;
      head_end = min(heads, head_begin + end - unit);
      unit += head_end - head_begin;
    } else {
      if (!own_done) __syncthreads();
      own_done = true;
      const uint32_t items = min(num_extra, kMaxExtra);
      while (item < items && turn >= (extra[item].y >> 16)) turn -= extra[item++].y >> 16;
      if (item == items) break;
      rows_unit = extra[item].x;
      head_begin = (extra[item].y & 0xffff) + turn;
      head_end = head_begin + 1;
      turn += C::kWarps;
    }
    const int part = rows_unit % C::kUnits, first_row = rows_unit / C::kUnits * 16;
    rows_t rows = {-1, nnz - first_row < 16 ? (1u << (nnz - first_row)) - 1 : 0xffffu};
    if constexpr (!C::kSingle) rows = FindRows(params.slot_mapping, first_row, nnz, lane);
    const uint32_t single = rows.single >> (part * C::kTokens) & ((1u << C::kTokens) - 1);
    // the row of a vector in a pass: first a whole tile, then single rows
    const auto row_of = [&](bool whole, int round) {
      const int index = round * C::kVectors + lane / C::kLanes;
      if (whole) {
        // tokens 2t, 2t + 1, 2t + 8 and 2t + 9 in turn
        const int group = part * (C::kTokens / 4) + index / 4;
        return first_row + rows.tile_start + 2 * group + (index & 1) + (index & 2) * 4;
      }
      const int row = first_row + part * C::kTokens + index;
      if ((single >> index & 1) == 0) return -1;
      return keep_skipped || params.slot_mapping[row] >= 0 ? row : -1;
    };
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      const bool whole = pass == 0;
      if (whole ? rows.tile_start < 0 || !is_own : single == 0) continue;
      if (!whole && is_own && rows.tile_start >= 0) {
        int place = 0;
        if (lane == 0) place = atomicAdd(&num_extra, 1);
        place = __shfl_sync(~0u, place, 0);
        if (place < kMaxExtra) {
          extra[place] = make_uint2(rows_unit, head_begin | (head_end - head_begin) << 16);
          continue;
        }
      }
      if constexpr (C::kRounds == 1) {
        const place_t<DTypeIn> place = worker.Locate(row_of(whole, 0));
        if (!__any_sync(~0u, place.row >= 0)) continue;
#pragma unroll 1
        for (int head = head_begin; head < head_end; ++head) worker.Vector(place, head, whole, 0);
      } else {
#pragma unroll 1
        for (int i = head_begin * C::kRounds; i < head_end * C::kRounds; ++i) {
          const int round = i % C::kRounds;
          const place_t<DTypeIn> place = worker.Locate(row_of(whole, round));
          if (!__any_sync(~0u, place.row >= 0)) continue;
          worker.Vector(place, i / C::kRounds, whole, round);
        }
      }
    }
  }
}

template <int PADDED_DIM, int PER_LANE, typename DTypeIn>
inline cudaError_t LaunchWith(const store_params_t& params, cudaStream_t stream) {
  using C = config_t<PADDED_DIM, PER_LANE>;
  const int64_t units =
      (static_cast<int64_t>(params.nnz) + 15) / 16 * params.kv.num_kv_heads * C::kUnits;
  if (units > 1 << 30) return cudaErrorInvalidValue;
  return LaunchTwoRows(StoreKernel<PADDED_DIM, PER_LANE, DTypeIn>, params, C::kWarps * 32, units,
                       stream);
}

/*! \brief Choose how many coordinates a lane holds, and launch. */
template <int PADDED_DIM, typename DTypeIn>
inline cudaError_t Launch(const store_params_t& params, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t lanes = static_cast<int64_t>(params.nnz) * params.kv.num_kv_heads * PADDED_DIM / 16;
  if constexpr (PADDED_DIM <= 256) {
    if (lanes < multiprocessors * 64) return LaunchWith<PADDED_DIM, 8, DTypeIn>(params, stream);
  }
  if (lanes < multiprocessors * 512) {
    return LaunchWith<PADDED_DIM, 16, DTypeIn>(params, stream);
  }
  return LaunchWith<PADDED_DIM, 32, DTypeIn>(params, stream);
}

/*! \brief Check the arguments, choose the type of the inputs and launch. */
template <int PADDED_DIM>
inline cudaError_t Check(const store_params_t& params, cudaStream_t stream) {
  const int64_t rotated_strides = params.k_rotated_token_stride | params.k_rotated_head_stride |
                                  params.v_rotated_token_stride | params.v_rotated_head_stride;
  const bool rotated = params.k_rotated != nullptr || params.v_rotated != nullptr;
  const uintptr_t rotated_address =
      reinterpret_cast<uintptr_t>(params.k_rotated) | reinterpret_cast<uintptr_t>(params.v_rotated);
  if (!IsValid(params.kv, params.k_format.codebook.bits, params.v_format.codebook.bits) ||
      !IsValid(params.k_format.codebook) || !IsValid(params.v_format.codebook) ||
      PaddedDim(params.kv.head_dim) != PADDED_DIM ||
      params.k_format.head_dim != params.kv.head_dim ||
      params.v_format.head_dim != params.kv.head_dim ||
      (params.k_offset != nullptr && params.positions == nullptr) ||
      (rotated && (rotated_strides % 8 != 0 || rotated_address % 16 != 0 ||
                   params.rotated_dtype == dtype_t::kFloat32))) {
    return cudaErrorInvalidValue;
  }
  if (params.nnz <= 0) return params.nnz == 0 ? cudaSuccess : cudaErrorInvalidValue;
  switch (params.dtype) {
    case dtype_t::kFloat32:
      return Launch<PADDED_DIM, float>(params, stream);
    case dtype_t::kFloat16:
      return Launch<PADDED_DIM, half_t>(params, stream);
    case dtype_t::kBFloat16:
      return Launch<PADDED_DIM, bfloat16_t>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace store_detail

/*! \brief Compress keys and values and write them to their slots: one launch.
 *
 *  Neither allocates nor synchronises; a CUDA graph may capture it. Widths, scale rules and
 * optional outputs are chosen at run time.
 *
 *  \tparam PADDED_DIM  Coordinates stored per vector: 64, 128, 256 or 512; 0 to choose at run time.
 *  \return cudaErrorInvalidValue for what the format does not know or is not aligned.
 */
template <int PADDED_DIM = 0>
inline cudaError_t Store(const store_params_t& params, cudaStream_t stream) {
  if constexpr (PADDED_DIM == 0) {
    switch (PaddedDim(params.kv.head_dim)) {
      case 64:
        return Store<64>(params, stream);
      case 128:
        return Store<128>(params, stream);
      case 256:
        return Store<256>(params, stream);
      case 512:
        return Store<512>(params, stream);
    }
    return cudaErrorInvalidValue;
  } else {
    static_assert(PADDED_DIM == 64 || PADDED_DIM == 128 || PADDED_DIM == 256 || PADDED_DIM == 512,
                  "pages hold 64, 128, 256 or 512 coordinates");
    return store_detail::Check<PADDED_DIM>(params, stream);
  }
}

#endif  // __CUDACC__

}  // namespace turbokv

#endif  // TURBOKV_STORE_CUH_
