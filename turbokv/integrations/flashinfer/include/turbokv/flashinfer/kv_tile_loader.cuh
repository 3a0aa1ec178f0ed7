// SPDX-License-Identifier: Apache-2.0
// Fills the K/V tiles of FlashInfer's FA2 paged prefill kernel from compressed pages: codes come to
// shared memory by cp.async, and become 16-bit rows there, in the places where the kernel's own
// copies would have put them. The hooks are those of patches/flashinfer.
//
// After the kernel's shared memory lie, with N = CTA_TILE_KV / 16 tiles:
//   [N x (K codes, scales)] [N x (V codes, scales)] [N x entry_t] [2 x N kinds] [K, V levels_t]
// All scales of a tile travel twice, so that a copy of K and one of V are independent.
#ifndef TURBOKV_FLASHINFER_KV_TILE_LOADER_CUH_
#define TURBOKV_FLASHINFER_KV_TILE_LOADER_CUH_

#include <cuda_fp16.h>

#include <cstdint>
#include <flashinfer/cp_async.cuh>
#include <flashinfer/permuted_smem.cuh>

#include "turbokv/flashinfer/expand_half.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {

/*! \brief What the loader reads from a kernel's parameters, beside FlashInfer's page table. */
struct kv_tiles_params_t {
  const uint8_t* pages;       // [num_pages, num_kv_heads, page_head_bytes]
  int64_t page_stride;        // bytes, a multiple of 16
  int64_t head_stride;        // bytes, a multiple of 16
  const int32_t* tile_slots;  // [num_pages, page_size / 16]: slot in `window`, or -1; may be null
  const __half* window;       // [num_slots, num_kv_heads, 2 (K, V), 16, padded_dim]
  const float* k_offset;      // [num_segments, num_kv_heads, padded_dim], rotated; may be null
  codebook_t k_codebook, v_codebook;
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
  static constexpr uint32_t kScaleBytes = kLayout.bytes - kLayout.scales;
  static constexpr uint32_t kKeyStage = kLayout.v_base + kScaleBytes;
  static constexpr uint32_t kValueStage = kLayout.bytes - kLayout.v_base;

  enum kind_t : int32_t { kCodes, kCopy, kNothing };
  struct entry_t {
    const uint8_t* source;  // of K: the tile, or its 16-bit copy
    kind_t kind;
  };
  using levels_t = flashinfer_detail::levels_t;
  static constexpr uint32_t kTileBytes =
      kKeyStage + kValueStage + sizeof(entry_t) + 2 * sizeof(kind_t) + 2 * sizeof(levels_t);
  static constexpr uint32_t kSmemBytesPerRow = (kTileBytes + kTokens - 1) / kTokens;

  template <typename Storage>
  __device__ __forceinline__ KVTileLoader(const Params& params, Storage& storage,
                                          uint32_t request_idx, uint32_t kv_head_idx,
                                          uint32_t chunk_start, uint32_t chunk_end, uint32_t tid)
      : params_(params),
        k_smem_(reinterpret_cast<uint4*>(storage.k_smem)),
        v_smem_(reinterpret_cast<uint4*>(storage.v_smem)),
        stage_(reinterpret_cast<uint8_t*>(&storage) + sizeof(Storage)),
        indices_(params.paged_kv.indices + params.paged_kv.indptr[request_idx]),
        head_(kv_head_idx),
        start_(chunk_start),
        end_(chunk_end),
        tid_(tid) {}

  /*! \brief Start to bring what goes to the kernel's own tile of K or V: 16-bit copies. Codes are
   * on their way since `finish` has emptied their place, save those of the first tiles. */
  template <typename KTraits, bool IS_V>
  __device__ __forceinline__ void load(uint32_t iter) {
    namespace cp = flashinfer::cp_async;
    constexpr uint32_t kTiles = KTraits::CTA_TILE_KV / kTokens, kColumns = HEAD_DIM / 8;
    if (iter == 0) {
      if (!IS_V) Begin<kTiles>();
      Fetch<KTraits, IS_V>();
    }
    const entry_t* entries = Entries<kTiles>();
    if (params_.tiles.tile_slots != nullptr) {
#pragma unroll 1
      for (uint32_t tile = 0; tile < kTiles; ++tile) {
        const entry_t entry = entries[tile];
        if (entry.kind != kCopy) continue;
        const uint4* copy =
            reinterpret_cast<const uint4*>(entry.source) + (IS_V ? kTokens * kColumns : 0);
        for (uint32_t i = tid_; i < kTokens * kColumns; i += KTraits::NUM_THREADS) {
          const uint32_t row = tile * kTokens + i / kColumns;
          // zeros for tokens that were never written: their probability, 0, would not hide a NaN
          cp::pred_load_128b<cp::PrefetchMode::kNoPrefetch, cp::SharedMemFillMode::kFillZero>(
              (IS_V ? v_smem_ : k_smem_) + Place<KTraits>(row, i % kColumns), copy + i,
              Position<KTraits>(iter) + row < end_);
        }
      }
    }
    if (tid_ < kTiles) Kinds<kTiles>(IS_V)[tid_] = entries[tid_].kind;
  }

  /*! \brief Turn codes that have arrived into rows, for all threads to read; then start to bring
   *  the codes of the next tile. */
  template <typename KTraits, bool IS_V>
  __device__ __forceinline__ void finish(uint32_t iter) {
    constexpr uint32_t kTiles = KTraits::CTA_TILE_KV / kTokens;
    if constexpr (IS_V) {
      FinishValues<KTraits>(iter);
    } else {
      // The next tiles: a page looked up one iteration earlier, so that no load waits for another.
      entry_t next;
      const bool looks = tid_ < kTiles;
      if (looks) next = Entry<kTiles>(iter + 1);
      if (params_.tiles.k_offset != nullptr) {
        FinishKeys<KTraits, true>(iter);
      } else {
        FinishKeys<KTraits, false>(iter);
      }
      if (looks) Entries<kTiles>()[tid_] = next;
    }
    __syncthreads();
    Fetch<KTraits, IS_V>();
  }

 private:
  using role_codes_t = flashinfer_detail::codes_t;

  const Params& params_;
  uint4* k_smem_;
  uint4* v_smem_;
  uint8_t* stage_;
  const int32_t* indices_;
  uint32_t head_, start_, end_, tid_;
  int32_t page_ = 0;      // of tile tid_ of the next iteration
  uint32_t in_page_ = 0;  // and which tile of the page it is

  template <typename KTraits>
  __device__ __forceinline__ uint32_t Position(uint32_t iter) const {
    return start_ + iter * KTraits::CTA_TILE_KV;
  }
  template <typename KTraits>
  static __device__ __forceinline__ uint32_t Place(uint32_t row, uint32_t column) {
    return flashinfer::get_permuted_offset<KTraits::SWIZZLE_MODE_KV, HEAD_DIM / 8>(row, column);
  }
  __device__ __forceinline__ uint8_t* KeyStage(uint32_t tile) const {
    return stage_ + tile * kKeyStage;
  }
  template <uint32_t TILES>
  __device__ __forceinline__ uint8_t* ValueStage(uint32_t tile) const {
    return stage_ + TILES * kKeyStage + tile * kValueStage;
  }
  template <uint32_t TILES>
  __device__ __forceinline__ entry_t* Entries() const {
    return reinterpret_cast<entry_t*>(stage_ + TILES * (kKeyStage + kValueStage));
  }
  template <uint32_t TILES>
  __device__ __forceinline__ kind_t* Kinds(bool is_v) const {
    return reinterpret_cast<kind_t*>(Entries<TILES>() + TILES) + (is_v ? TILES : 0);
  }
  template <uint32_t TILES>
  __device__ __forceinline__ levels_t* Levels(bool is_v) const {
    return reinterpret_cast<levels_t*>(Entries<TILES>() + TILES +
                                       (TILES * 2 * sizeof(kind_t) + sizeof(entry_t) - 1) /
                                           sizeof(entry_t)) +
           (is_v ? 1 : 0);
  }

  /*! \brief Look up the page of this thread's tile at `iter`, if it has tokens. */
  template <uint32_t TILES>
  __device__ __forceinline__ void LookUp(uint32_t iter) {
    const uint32_t position = start_ + (iter * TILES + tid_) * kTokens;
    if (position >= end_) return;
    uint32_t index, token;
    params_.paged_kv.page_size.divmod(position, index, token);
    page_ = __ldg(indices_ + index);
    in_page_ = token / kTokens;
  }

  /*! \brief Where this thread's tile of `iter` lies; and look up the page of the next one. */
  template <uint32_t TILES>
  __device__ __forceinline__ entry_t Entry(uint32_t iter) {
    const kv_tiles_params_t& tiles = params_.tiles;
    entry_t entry = {nullptr, kNothing};
    if (start_ + (iter * TILES + tid_) * kTokens < end_) {
      int32_t slot = -1;
      if (tiles.tile_slots != nullptr) {
        const int64_t per_page = static_cast<uint32_t>(params_.paged_kv.page_size) / kTokens;
        slot = __ldg(tiles.tile_slots + page_ * per_page + in_page_);
      }
      if (slot >= 0) {
        const int64_t head = static_cast<int64_t>(slot) * params_.paged_kv.num_heads + head_;
        entry.source = reinterpret_cast<const uint8_t*>(tiles.window) +
                       head * (2 * kTokens * HEAD_DIM * sizeof(__half));
        entry.kind = kCopy;
      } else {
        entry.source = tiles.pages + page_ * tiles.page_stride + head_ * tiles.head_stride +
                       static_cast<int64_t>(in_page_) * kLayout.bytes;
        entry.kind = kCodes;
      }
    }
    LookUp<TILES>(iter + 1);
    return entry;
  }

  /*! \brief Start to bring the codes of the tiles that the entries tell of. */
  template <typename KTraits, bool IS_V>
  __device__ __forceinline__ void Fetch() const {
    namespace cp = flashinfer::cp_async;
    constexpr uint32_t kTiles = KTraits::CTA_TILE_KV / kTokens;
    constexpr uint32_t kChunks = (IS_V ? kValueStage : kKeyStage) / 16;
    const entry_t* entries = Entries<kTiles>();
    uint8_t* stage = IS_V ? ValueStage<kTiles>(0) : KeyStage(0);
    for (uint32_t i = tid_; i < kTiles * kChunks; i += KTraits::NUM_THREADS) {
      const uint32_t tile = i / kChunks, chunk = i % kChunks;
      const entry_t entry = entries[tile];
      if (entry.kind != kCodes) continue;
      uint32_t from = chunk * 16;
      if (IS_V) {
        from += kLayout.v_base;
      } else if (chunk * 16 >= kLayout.v_base) {
        from += kLayout.scales - kLayout.v_base;
      }
      cp::load_128b<cp::PrefetchMode::kNoPrefetch>(stage + i * 16, entry.source + from);
    }
  }

  template <uint32_t TILES>
  __device__ __forceinline__ void Begin() {
    static_assert(TILES <= 32, "a warp looks up the tiles");
    if (tid_ < TILES) {
      LookUp<TILES>(0);
      Entries<TILES>()[tid_] = Entry<TILES>(0);
    } else if (tid_ == 32) {
      *Levels<TILES>(false) = flashinfer_detail::MakeLevels<K_BITS>(params_.tiles.k_codebook);
    } else if (tid_ == 64) {
      *Levels<TILES>(true) = flashinfer_detail::MakeLevels<V_BITS>(params_.tiles.v_codebook);
    }
    __syncthreads();
  }

  static __device__ __forceinline__ uint4 Pack(const __half2 (&x)[4]) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(x);
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  /*! \brief A thread has one column of eight coordinates, and every kStep-th token. Eight of its
   *  chunks are read before the first is written: few warps are there to hide latency. */
  template <typename KTraits, bool CENTRED>
  __device__ __forceinline__ void FinishKeys(uint32_t iter) const {
    constexpr uint32_t kTiles = KTraits::CTA_TILE_KV / kTokens, kColumns = HEAD_DIM / 8;
    constexpr uint32_t kStep = KTraits::NUM_THREADS / kColumns, kRows = kTokens / kStep;
    static_assert(KTraits::NUM_THREADS % kColumns == 0 && kTokens % kStep == 0);
    constexpr uint32_t kMost = kRows < 8 ? 8 / kRows : 1, kBatch = kTiles < kMost ? kTiles : kMost;
    static_assert(kTiles % kBatch == 0);
    const kind_t* kinds = Kinds<kTiles>(false);
    const levels_t levels = *Levels<kTiles>(false);
    const uint32_t column = tid_ % kColumns;
    __half2 mu[4] = {};
    uint32_t segment = ~0u;
#pragma unroll 1
    for (uint32_t first = 0; first < kTiles; first += kBatch) {
      role_codes_t codes[kBatch * kRows];
      uint32_t scales[kBatch * kRows];
#pragma unroll
      for (uint32_t n = 0; n < kBatch * kRows; ++n) {
        const uint32_t token = tid_ / kColumns + n % kRows * kStep;
        const uint8_t* stage = KeyStage(first + n / kRows);
        scales[n] = *reinterpret_cast<const uint16_t*>(stage + kLayout.v_base + 4 * token);
        codes[n] = flashinfer_detail::LoadKeyCodes<HEAD_DIM, K_BITS>(stage, token, column);
      }
#pragma unroll
      for (uint32_t n = 0; n < kBatch * kRows; ++n) {
        const uint32_t tile = first + n / kRows;
        const bool has_codes = kinds[tile] == kCodes;
        if (CENTRED && n % kRows == 0 && has_codes) LoadOffset<KTraits>(iter, tile, segment, mu);
        __half2 x[4];
        flashinfer_detail::ExpandHalf<role_t::kKey, K_BITS>(codes[n], levels, x);
        const __half2 factor = __half2half2(__ushort_as_half(scales[n] & 0x7fffu));
        if constexpr (CENTRED) {
          // tokens marked by the sign of their scale were stored as they were
          const __half2 centred = __float2half2_rn(scales[n] & 0x8000u ? 0.f : 1.f);
#pragma unroll
          for (int j = 0; j < 4; ++j) x[j] = __hfma2(x[j], factor, __hmul2(mu[j], centred));
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) x[j] = __hmul2(x[j], factor);
        }
        const uint32_t row = tile * kTokens + tid_ / kColumns + n % kRows * kStep;
        if (has_codes) k_smem_[Place<KTraits>(row, column)] = Pack(x);
      }
    }
  }

  /*! \brief Have this thread's column of the offset of a tile's segment in `mu`. */
  template <typename KTraits>
  __device__ __forceinline__ void LoadOffset(uint32_t iter, uint32_t tile, uint32_t& segment,
                                             __half2 (&mu)[4]) const {
    const uint32_t own = (Position<KTraits>(iter) + tile * kTokens) / kTokensPerSegment;
    if (own == segment) return;
    segment = own;
    const int64_t row = static_cast<int64_t>(own) * params_.paged_kv.num_heads + head_;
    const float4* from = reinterpret_cast<const float4*>(params_.tiles.k_offset + row * HEAD_DIM +
                                                         tid_ % (HEAD_DIM / 8) * 8);
    const float4 a = __ldg(from), b = __ldg(from + 1);
    mu[0] = __floats2half2_rn(a.x, a.y), mu[1] = __floats2half2_rn(a.z, a.w);
    mu[2] = __floats2half2_rn(b.x, b.y), mu[3] = __floats2half2_rn(b.z, b.w);
  }

  /*! \brief A thread has one column of eight coordinates of the four tokens that share words, and
   *  reads two of those before it writes the first. */
  template <typename KTraits>
  __device__ __forceinline__ void FinishValues(uint32_t iter) const {
    constexpr uint32_t kTiles = KTraits::CTA_TILE_KV / kTokens, kColumns = HEAD_DIM / 8;
    constexpr uint32_t kTileThreads = 4 * kColumns, kStep = KTraits::NUM_THREADS / kTileThreads;
    static_assert(KTraits::NUM_THREADS % kTileThreads == 0);
    constexpr uint32_t kOwn = kTiles / kStep > 0 ? kTiles / kStep : 1, kBatch = kOwn < 2 ? 1 : 2;
    const kind_t* kinds = Kinds<kTiles>(true);
    const levels_t levels = *Levels<kTiles>(true);
    const uint32_t t = tid_ % 4, column = tid_ / 4 % kColumns;
    const uint32_t position = Position<KTraits>(iter);
    const uint32_t rows = end_ > position ? end_ - position : 0;
    if (kTiles < kStep && tid_ / kTileThreads >= kTiles)
      return;  // fewer tiles than there are hands
#pragma unroll 1
    for (uint32_t first = tid_ / kTileThreads; first < kTiles; first += kBatch * kStep) {
      role_codes_t codes[kBatch][4];
      uint32_t scales[kBatch][4];
#pragma unroll
      for (uint32_t n = 0; n < kBatch; ++n) {
        const uint8_t* stage = ValueStage<kTiles>(first + n * kStep);
        flashinfer_detail::LoadValueCodes<HEAD_DIM, V_BITS>(stage, t, column, codes[n]);
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
          const uint32_t token = flashinfer_detail::ValueToken<V_BITS>(t, lane);
          scales[n][lane] = *reinterpret_cast<const uint16_t*>(
              stage + (kLayout.scales - kLayout.v_base) + 4 * token + 2);
        }
      }
#pragma unroll
      for (uint32_t n = 0; n < kBatch; ++n) {
        const uint32_t tile = first + n * kStep;
        const bool is_copy = kinds[tile] == kCopy;
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
          const uint32_t row = tile * kTokens + flashinfer_detail::ValueToken<V_BITS>(t, lane);
          // tokens that were never written may have any scale, and their probability is 0
          const uint32_t scale = row < rows ? scales[n][lane] & 0x7fffu : 0;
          const __half2 factor = __half2half2(__ushort_as_half(scale));
          __half2 x[4];
          flashinfer_detail::ExpandHalf<role_t::kValue, V_BITS>(codes[n][lane], levels, x);
#pragma unroll
          for (int j = 0; j < 4; ++j) x[j] = __hmul2(x[j], factor);
          if (!is_copy) v_smem_[Place<KTraits>(row, column)] = Pack(x);
        }
      }
    }
  }
};

}  // namespace turbokv

#endif  // TURBOKV_FLASHINFER_KV_TILE_LOADER_CUH_
