// SPDX-License-Identifier: Apache-2.0
// Fills the K/V tiles of FlashInfer's FA2 paged prefill kernel from compressed pages: codes come to
// shared memory by cp.async, and become 16-bit rows there, in the places where the kernel's own
// copies would have put them. The hooks are those of patches/flashinfer.
//
// What an iteration of the kernel reads is group `iter` of CTA_TILE_KV tokens. While it is
// computed, group iter + 1 is expanded (tile_filler.cuh) and the codes of group iter + 2 arrive;
// its pages were looked up before. So each has two places or more, and one barrier an iteration is
// enough.
//
// After the kernel's shared memory lie, with N = CTA_TILE_KV / 16 tiles:
//   [K of odd groups] [V of odd groups] [2 x N x codes and scales] then, for four groups each,
//   [N x entry_t] [N x page] [N x slot]
#ifndef TURBOKV_FLASHINFER_KV_TILE_LOADER_CUH_
#define TURBOKV_FLASHINFER_KV_TILE_LOADER_CUH_

#include <cuda_fp16.h>

#include <cstdint>
#include <flashinfer/cp_async.cuh>

#include "turbokv/flashinfer/shared_memory.cuh"
#include "turbokv/flashinfer/tile_filler.cuh"
#include "turbokv/paged_kv.cuh"

namespace turbokv {

/*! \brief What the loader reads from a kernel's parameters, beside FlashInfer's page table. */
struct kv_tiles_params_t {
  const uint8_t* pages;       // [num_pages, num_kv_heads, page_head_bytes]
  uint32_t page_stride;       // in 16 bytes
  uint32_t head_stride;       // in 16 bytes
  const int32_t* tile_slots;  // [num_pages, page_size / 16]: slot in `window`, or -1; may be null
  const __half* window;       // [num_slots, num_kv_heads, 2 (K, V), 16, padded_dim]
  const float* k_offset;      // [num_segments, num_kv_heads, padded_dim], rotated; may be null
  flashinfer_detail::levels_t k_levels, v_levels;  // MakeLevels of the codebooks
};

/*! \brief A loader for FlashInfer's attention variants.
 *
 *  \tparam HEAD_DIM Coordinates stored, which is also the kernel's head size: 64, 128 or 256.
 *  The kernel's K/V type is fp16. Params has kv_tiles_params_t `tiles` and FlashInfer's `paged_kv`.
 */
template <int HEAD_DIM, int K_BITS, int V_BITS, typename Params>
struct KVTileLoader {
  static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256, "as FlashInfer's kernels");
  static constexpr bool kIsStock = false;
  static constexpr uint32_t kTokens = kTokensPerTile;
  static constexpr tile_layout_t kLayout = TileLayout(HEAD_DIM, K_BITS, V_BITS);

  enum kind_t : uint32_t { kNothing, kCodes, kCopy };
  using entry_t = uint64_t;  // of K: where the tile or its 16-bit copy lies, plus a kind_t
  static constexpr uint32_t kRing = 4, kKindMask = 15;
  static constexpr uint32_t kRowBytes = HEAD_DIM * sizeof(__half), kColumns = HEAD_DIM / 8;
  static constexpr uint32_t kTileBytes =
      2 * kTokens * kRowBytes + 2 * kLayout.bytes + kRing * (sizeof(entry_t) + 2 * sizeof(int32_t));
  static constexpr uint32_t kSmemBytesPerRow = kTileBytes / kTokens;
  static_assert(kTileBytes % kTokens == 0);

  template <typename Storage>
  __device__ __forceinline__ KVTileLoader(const Params& params, Storage& storage,
                                          uint32_t request_idx, uint32_t kv_head_idx,
                                          uint32_t chunk_start, uint32_t chunk_end, uint32_t tid)
      : params_(params),
        k_smem_(reinterpret_cast<uint8_t*>(storage.k_smem)),
        v_smem_(reinterpret_cast<uint8_t*>(storage.v_smem)),
        own_(reinterpret_cast<uint8_t*>(&storage) + sizeof(Storage)),
        indices_(params.paged_kv.indices + params.paged_kv.indptr[request_idx]),
        head_(kv_head_idx),
        start_(chunk_start),
        end_(chunk_end),
        tid_(tid) {}

  /*! \brief Have group 0 in its place, for all threads after the next barrier. */
  template <typename KTraits>
  __device__ __forceinline__ void begin() {
    namespace cp = flashinfer::cp_async;
    constexpr uint32_t kTiles = Tiles<KTraits>();
    static_assert(kTiles <= 32 && KTraits::NUM_THREADS == 128, "a warp looks up the tiles");
    if (tid_ < kTiles) {
      for (uint32_t group = 0; group < kRing; ++group) {
        int32_t page = 0, slot = -1;
        uint32_t index, in_page;
        if (Find<kTiles>(group, index, in_page)) {
          page = __ldg(indices_ + index);
          if (params_.tiles.tile_slots != nullptr) slot = __ldg(Slot(page, in_page));
        }
        Pages<kTiles>(group)[tid_] = page;
        Slots<kTiles>(group)[tid_] = slot;
        if (group < 3) WriteEntry<kTiles>(group);
      }
      // next(0) looks up the page of group 5, and the slot of group 4
      uint32_t index, in_page;
      if (Find<kTiles>(4, index, in_page)) Pages<kTiles>(4)[tid_] = __ldg(indices_ + index);
    }
    __syncthreads();
    Fetch<KTraits>(0);
    Fetch<KTraits>(1);
    FetchCopies<KTraits>(0);
    cp::commit_group();
    cp::wait_group<0>();
    __syncthreads();
    ClearUnwritten<KTraits>(0);
    if (params_.tiles.k_offset != nullptr) ExpandCentred<KTraits>(0);
    auto fill = filler<KTraits>(0);
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) fill.step(i, 8);
  }

  /*! \brief After the barrier of an iteration: point to its group, and start to bring others. */
  template <typename KTraits, typename Smem>
  __device__ __forceinline__ void next(uint32_t iter, Smem& k_smem, Smem& v_smem) {
    constexpr uint32_t kTiles = Tiles<KTraits>();
    k_smem = Smem(Keys<KTraits>(iter));
    v_smem = Smem(Values<KTraits>(iter));
    Fetch<KTraits>(iter + 2);
    FetchCopies<KTraits>(iter + 1);
    LookAhead<kTiles>(iter);
    ClearUnwritten<KTraits>(iter + 1);
    if (params_.tiles.k_offset != nullptr) ExpandCentred<KTraits>(iter + 1);
  }

  /*! \brief What expands a group, step by step, once its codes have arrived. */
  template <typename KTraits>
  __device__ __forceinline__ auto filler(uint32_t group) const {
    constexpr uint32_t kTiles = Tiles<KTraits>();
    uint32_t copies = 0;
    if (params_.tiles.tile_slots != nullptr) {
#pragma unroll
      for (uint32_t tile = 0; tile < kTiles; ++tile) {
        copies |= Kind(Entries<kTiles>(group)[tile]) == kCopy ? 1u << tile : 0u;
      }
    }
    const bool centred = params_.tiles.k_offset != nullptr;
    return tile_filler_t<HEAD_DIM, K_BITS, V_BITS, KTraits>(
        Stage<kTiles>(group), Keys<KTraits>(group), Values<KTraits>(group), params_.tiles.k_levels,
        params_.tiles.v_levels, centred ? ~0u : copies, copies, tid_);
  }

 private:
  const Params& params_;
  uint8_t* k_smem_;
  uint8_t* v_smem_;
  uint8_t* own_;
  const int32_t* indices_;
  uint32_t head_, start_, end_, tid_;

  template <typename KTraits>
  static constexpr uint32_t Tiles() {
    return KTraits::CTA_TILE_KV / kTokens;
  }
  static __device__ __forceinline__ kind_t Kind(entry_t entry) {
    return static_cast<kind_t>(static_cast<uint32_t>(entry) & kKindMask);
  }
  static __device__ __forceinline__ const uint8_t* Source(entry_t entry) {
    return reinterpret_cast<const uint8_t*>(entry & ~static_cast<entry_t>(kKindMask));
  }

  // --- places in shared memory ---

  template <typename KTraits>
  __device__ __forceinline__ uint8_t* Keys(uint32_t group) const {
    return group % 2 == 0 ? k_smem_ : own_;
  }
  template <typename KTraits>
  __device__ __forceinline__ uint8_t* Values(uint32_t group) const {
    return group % 2 == 0 ? v_smem_ : own_ + KTraits::CTA_TILE_KV * kRowBytes;
  }
  template <uint32_t TILES>
  __device__ __forceinline__ uint8_t* Stage(uint32_t group) const {
    return own_ + 2 * TILES * kTokens * kRowBytes + group % 2 * (TILES * kLayout.bytes);
  }
  template <uint32_t TILES>
  __device__ __forceinline__ entry_t* Entries(uint32_t group) const {
    return reinterpret_cast<entry_t*>(own_ + 2 * TILES * (kTokens * kRowBytes + kLayout.bytes)) +
           group % kRing * TILES;
  }
  template <uint32_t TILES>
  __device__ __forceinline__ int32_t* Pages(uint32_t group) const {
    return reinterpret_cast<int32_t*>(Entries<TILES>(0) + kRing * TILES) + group % kRing * TILES;
  }
  template <uint32_t TILES>
  __device__ __forceinline__ int32_t* Slots(uint32_t group) const {
    return Pages<TILES>(0) + kRing * TILES + group % kRing * TILES;
  }

  // --- looking up ---

  /*! \brief Which page of the request, and which tile of it, is this lane's tile of a group; false
   * if it has no tokens. */
  template <uint32_t TILES>
  __device__ __forceinline__ bool Find(uint32_t group, uint32_t& index, uint32_t& in_page) const {
    const uint32_t position = start_ + (group * TILES + tid_ % 32) * kTokens;
    uint32_t token;
    params_.paged_kv.page_size.divmod(position, index, token);
    in_page = token / kTokens;
    return position < end_;
  }
  __device__ __forceinline__ const int32_t* Slot(int32_t page, uint32_t in_page) const {
    const int64_t per_page = static_cast<uint32_t>(params_.paged_kv.page_size) / kTokens;
    return params_.tiles.tile_slots + page * per_page + in_page;
  }

  /*! \brief Write where this lane's tile of a group lies, of which page and slot are known. */
  template <uint32_t TILES>
  __device__ __forceinline__ void WriteEntry(uint32_t group) const {
    const kv_tiles_params_t& tiles = params_.tiles;
    const uint32_t lane = tid_ % 32;
    entry_t entry = kNothing;
    uint32_t index, in_page;
    if (Find<TILES>(group, index, in_page)) {
      const int32_t page = Pages<TILES>(group)[lane];
      const int32_t slot = tiles.tile_slots != nullptr ? Slots<TILES>(group)[lane] : -1;
      if (slot >= 0) {
        const int64_t vector = static_cast<int64_t>(slot) * params_.paged_kv.num_heads + head_;
        entry =
            reinterpret_cast<entry_t>(tiles.window) + vector * (2 * kTokens * kRowBytes) + kCopy;
      } else {
        const entry_t offset =
            static_cast<entry_t>(static_cast<uint32_t>(page)) * tiles.page_stride +
            static_cast<entry_t>(head_) * tiles.head_stride + in_page * (kLayout.bytes / 16);
        entry = reinterpret_cast<entry_t>(tiles.pages) + offset * 16 + kCodes;
      }
    }
    Entries<TILES>(group)[lane] = entry;
  }

  /*! \brief Write entries of group iter + 3; start to look up slots of the one after it, and pages
   *  of the next. A warp does each: what it needs has arrived before the barrier. */
  template <uint32_t TILES>
  __device__ __forceinline__ void LookAhead(uint32_t iter) const {
    const uint32_t warp = tid_ / 32, lane = tid_ % 32;
    if (lane >= TILES) return;
    uint32_t index, in_page;
    if (warp == 0) {
      WriteEntry<TILES>(iter + 3);
    } else if (warp == 1) {
      if (params_.tiles.tile_slots != nullptr && Find<TILES>(iter + 4, index, in_page)) {
        flashinfer_detail::CopyWord(Slots<TILES>(iter + 4) + lane,
                                    Slot(Pages<TILES>(iter + 4)[lane], in_page));
      }
    } else if (warp == 2) {
      if (Find<TILES>(iter + 5, index, in_page)) {
        flashinfer_detail::CopyWord(Pages<TILES>(iter + 5) + lane, indices_ + index);
      }
    }
  }

  // --- bringing ---

  /*! \brief Start to bring codes and scales of a group: a warp copies a tile. */
  template <typename KTraits>
  __device__ __forceinline__ void Fetch(uint32_t group) const {
    namespace cp = flashinfer::cp_async;
    constexpr uint32_t kTiles = Tiles<KTraits>(), kWarps = KTraits::NUM_THREADS / 32;
    constexpr uint32_t kChunks = kLayout.bytes / 16;
    const uint32_t lane = tid_ % 32;
#pragma unroll
    for (uint32_t first = 0; first < kTiles; first += kWarps) {
      const uint32_t tile = first + tid_ / 32;
      if (kTiles % kWarps != 0 && tile >= kTiles) break;
      const entry_t entry = Entries<kTiles>(group)[tile];
      if (Kind(entry) != kCodes) continue;
      const uint8_t* from = Source(entry) + lane * 16;
      uint8_t* to = Stage<kTiles>(group) + tile * kLayout.bytes + lane * 16;
#pragma unroll
      for (uint32_t i = 0; i < kChunks; i += 32) {
        if (i + 32 <= kChunks || i + lane < kChunks) {
          cp::load_128b<cp::PrefetchMode::kNoPrefetch>(to + i * 16, from + i * 16);
        }
      }
    }
  }

  /*! \brief Start to bring the 16-bit copies of a group to its place. */
  template <typename KTraits>
  __device__ __forceinline__ void FetchCopies(uint32_t group) const {
    namespace cp = flashinfer::cp_async;
    constexpr uint32_t kTiles = Tiles<KTraits>(), kChunks = kTokens * kColumns;
    if (params_.tiles.tile_slots == nullptr) return;
    const uint32_t end = start_ + group * KTraits::CTA_TILE_KV < end_
                             ? end_ - (start_ + group * KTraits::CTA_TILE_KV)
                             : 0;
#pragma unroll 1
    for (uint32_t tile = 0; tile < kTiles; ++tile) {
      const entry_t entry = Entries<kTiles>(group)[tile];
      if (Kind(entry) != kCopy) continue;
#pragma unroll 1
      for (uint32_t i = tid_; i < 2 * kChunks; i += KTraits::NUM_THREADS) {
        const uint32_t row = tile * kTokens + i % kChunks / kColumns;
        uint8_t* place = i < kChunks ? Keys<KTraits>(group) : Values<KTraits>(group);
        // zeros for tokens that were never written: their probability, 0, would not hide a NaN
        cp::pred_load_128b<cp::PrefetchMode::kNoPrefetch, cp::SharedMemFillMode::kFillZero>(
            reinterpret_cast<uint4*>(place) + PlaceOf<HEAD_DIM, KTraits>(row, i % kColumns),
            reinterpret_cast<const uint4*>(Source(entry)) + i, row < end);
      }
    }
  }

  /*! \brief Have scales of 0 for V of tokens that were never written: they may have any, and a
   *  probability of 0 does not hide a NaN. The last groups of a chunk only. */
  template <typename KTraits>
  __device__ __forceinline__ void ClearUnwritten(uint32_t group) const {
    constexpr uint32_t kTiles = Tiles<KTraits>();
    const uint32_t first = start_ + group * KTraits::CTA_TILE_KV;
    if (first + KTraits::CTA_TILE_KV <= end_) return;
    for (uint32_t row = tid_; row < KTraits::CTA_TILE_KV; row += KTraits::NUM_THREADS) {
      if (first + row < end_) continue;
      uint8_t* tile = Stage<kTiles>(group) + row / kTokens * kLayout.bytes;
      *reinterpret_cast<uint16_t*>(tile + kLayout.scales + 4 * (row % kTokens) + 2) = 0;
    }
    __syncthreads();
  }

  // --- centred keys ---

  /*! \brief Expand K of a group whose keys were centred: to levels times scales comes the offset of
   *  the segment. Not one of the filler's steps, which have no registers left for it. */
  template <typename KTraits>
  __device__ __forceinline__ void ExpandCentred(uint32_t group) const {
    constexpr uint32_t kTiles = Tiles<KTraits>(), kStep = KTraits::NUM_THREADS / kColumns;
    const uint32_t column = tid_ % kColumns;
    uint4* place = reinterpret_cast<uint4*>(Keys<KTraits>(group));
    __half2 mu[4] = {};
    uint32_t segment = ~0u;
#pragma unroll 1
    for (uint32_t tile = 0; tile < kTiles; ++tile) {
      if (Kind(Entries<kTiles>(group)[tile]) != kCodes) continue;
      const uint8_t* stage = Stage<kTiles>(group) + tile * kLayout.bytes;
      const uint32_t own =
          (start_ + group * KTraits::CTA_TILE_KV + tile * kTokens) / kTokensPerSegment;
      if (own != segment) LoadOffset(own, column, mu);
      segment = own;
#pragma unroll
      for (uint32_t token = tid_ / kColumns; token < kTokens; token += kStep) {
        const uint32_t scale =
            *reinterpret_cast<const uint16_t*>(stage + kLayout.scales + 4 * token);
        const auto codes = flashinfer_detail::LoadKeyCodes<HEAD_DIM, K_BITS>(stage, token, column);
        __half2 x[4];
        flashinfer_detail::Widen<role_t::kKey, K_BITS>(
            flashinfer_detail::LookUp<role_t::kKey, K_BITS>(codes, params_.tiles.k_levels),
            params_.tiles.k_levels, x);
        const __half2 factor = __half2half2(__ushort_as_half(scale & 0x7fffu));
        // tokens marked by the sign of their scale were stored as they were
        const __half2 centred = __float2half2_rn(scale & 0x8000u ? 0.f : 1.f);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = __hfma2(x[j], factor, __hmul2(mu[j], centred));
        place[PlaceOf<HEAD_DIM, KTraits>(tile * kTokens + token, column)] =
            flashinfer_detail::Pack(x);
      }
    }
  }

  /*! \brief Have a column of the offset of a segment in `mu`. */
  __device__ __forceinline__ void LoadOffset(uint32_t segment, uint32_t column,
                                             __half2 (&mu)[4]) const {
    const int64_t row = static_cast<int64_t>(segment) * params_.paged_kv.num_heads + head_;
    const float4* from =
        reinterpret_cast<const float4*>(params_.tiles.k_offset + row * HEAD_DIM + column * 8);
    const float4 a = __ldg(from), b = __ldg(from + 1);
    mu[0] = __floats2half2_rn(a.x, a.y), mu[1] = __floats2half2_rn(a.z, a.w);
    mu[2] = __floats2half2_rn(b.x, b.y), mu[3] = __floats2half2_rn(b.z, b.w);
  }
};

}  // namespace turbokv

#endif  // TURBOKV_FLASHINFER_KV_TILE_LOADER_CUH_
