// SPDX-License-Identifier: Apache-2.0
// From staged codes of a group of tiles to the rows of K and V that FlashInfer's kernel reads, in
// small steps: the kernel takes one between every few of its matrix products, so that the
// arithmetic here is done while tensor cores work.
#ifndef TURBOKV_FLASHINFER_TILE_FILLER_CUH_
#define TURBOKV_FLASHINFER_TILE_FILLER_CUH_

#include <cuda_fp16.h>

#include <cstdint>
#include <flashinfer/permuted_smem.cuh>

#include "turbokv/flashinfer/expand_half.cuh"
#include "turbokv/flashinfer/shared_memory.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {

/*! \brief Where the kernel has 16-byte column `column` of a row. */
template <int HEAD_DIM, typename KTraits>
__device__ __forceinline__ uint32_t PlaceOf(uint32_t row, uint32_t column) {
  return flashinfer::get_permuted_offset<KTraits::SWIZZLE_MODE_KV, HEAD_DIM / 8>(row, column);
}

/*! \brief Expands one group of CTA_TILE_KV tokens of K and V.
 *
 *  A chunk is eight coordinates of a token; a thread has the same column of all its chunks, and V
 * in units of four tokens that share words. A chunk is read two chunks early, then looked up in one
 *  half step and written in the next: what a step needs is there, and few registers are held.
 */
template <int HEAD_DIM, int K_BITS, int V_BITS, typename KTraits>
struct tile_filler_t {
  static constexpr tile_layout_t kLayout = TileLayout(HEAD_DIM, K_BITS, V_BITS);
  static constexpr uint32_t kTokens = kTokensPerTile, kColumns = HEAD_DIM / 8;
  static constexpr uint32_t kThreads = KTraits::NUM_THREADS;
  static constexpr uint32_t kTiles = KTraits::CTA_TILE_KV / kTokens;
  // K: tokens at a time, and chunks of a tile
  static constexpr uint32_t kKeyStep = kThreads / kColumns, kKeyRows = kTokens / kKeyStep;
  static_assert(kThreads % kColumns == 0 && kTokens % kKeyStep == 0);
  // V: threads of a tile, tiles at a time, and units of a thread
  static constexpr uint32_t kTileThreads = 4 * kColumns, kValueStep = kThreads / kTileThreads;
  static_assert(kThreads % kTileThreads == 0);
  static constexpr uint32_t kUnits = kTiles / kValueStep > 0 ? kTiles / kValueStep : 1;
  static constexpr uint32_t kValueChunks = 4 * kUnits;
  static constexpr uint32_t kHalves = 2 * (kValueChunks + kTiles * kKeyRows);

  /*! \brief Copies have bit `tile` set for tiles of K and of V that are left alone. */
  __device__ __forceinline__ tile_filler_t(const uint8_t* stage, uint8_t* keys, uint8_t* values,
                                           const flashinfer_detail::levels_t& k_levels,
                                           const flashinfer_detail::levels_t& v_levels,
                                           uint32_t k_copies, uint32_t v_copies, uint32_t tid)
      : stage_(stage),
        keys_(reinterpret_cast<uint4*>(keys)),
        values_(reinterpret_cast<uint4*>(values)),
        k_levels_(k_levels),
        v_levels_(v_levels),
        k_copies_(k_copies),
        v_copies_(v_copies),
        tid_(tid) {
    Read(0);
    Read(1);
  }

  /*! \brief Do step `i` of `num_steps`, constants both; in order. */
  __device__ __forceinline__ void step(uint32_t i, uint32_t num_steps) {
    const uint32_t each = (kHalves + num_steps - 1) / num_steps;
#pragma unroll
    for (uint32_t n = 0; n < each; ++n) {
      const uint32_t half = i * each + n;
      if (half >= kHalves) continue;
      const uint32_t chunk = half / 2;
      if (half % 2 == 0) {
        bytes_ = chunk < kValueChunks ? LookUpValue(chunk) : LookUpKey(chunk);
      } else {
        if (chunk < kValueChunks) {
          WriteValue(chunk);
        } else {
          WriteKey(chunk - kValueChunks);
        }
        Read(chunk + 2);
      }
    }
  }

 private:
  using codes_t = flashinfer_detail::codes_t;

  const uint8_t* stage_;
  uint4* keys_;
  uint4* values_;
  const flashinfer_detail::levels_t& k_levels_;
  const flashinfer_detail::levels_t& v_levels_;
  uint32_t k_copies_, v_copies_, tid_;
  // what has been read: of V a unit, with the one after it in the other half; of K two chunks
  codes_t value_codes_[2][4], key_codes_[2];
  uint32_t value_scales_[2][4];  // in the upper halves
  uint32_t key_scales_[2];
  flashinfer_detail::bytes8_t bytes_;  // of the chunk at hand

  __device__ __forceinline__ void Read(uint32_t chunk) {
    if (chunk < kValueChunks) {
      if (chunk % 4 == 0) ReadValues(chunk / 4);
    } else if (chunk < kHalves / 2) {
      ReadKey(chunk - kValueChunks);
    }
  }

  __device__ __forceinline__ uint32_t ValueTile(uint32_t unit) const {
    return tid_ / kTileThreads + unit * kValueStep;
  }

  __device__ __forceinline__ void ReadValues(uint32_t unit) {
    const uint32_t tile = kTiles < kValueStep ? ValueTile(unit) % kTiles : ValueTile(unit);
    const uint8_t* stage = stage_ + tile * kLayout.bytes;
    const uint32_t t = tid_ % 4;
    flashinfer_detail::LoadValueCodes<HEAD_DIM, V_BITS>(
        stage + kLayout.v_base, t, tid_ / 4 % kColumns, value_codes_[unit % 2]);
    // tokens 2 t and 2 t + 1 are neighbours, and so are 2 t + 8 and 2 t + 9
    const uint2 low = *reinterpret_cast<const uint2*>(stage + kLayout.scales + 8 * t);
    const uint2 high = *reinterpret_cast<const uint2*>(stage + kLayout.scales + 32 + 8 * t);
    uint32_t(&scales)[4] = value_scales_[unit % 2];
    scales[0] = low.x, scales[1] = low.y, scales[2] = high.x, scales[3] = high.y;
  }

  __device__ __forceinline__ flashinfer_detail::bytes8_t LookUpValue(uint32_t chunk) const {
    return flashinfer_detail::LookUp<role_t::kValue, V_BITS>(value_codes_[chunk / 4 % 2][chunk % 4],
                                                             v_levels_);
  }

  __device__ __forceinline__ void WriteValue(uint32_t chunk) const {
    const uint32_t unit = chunk / 4, lane = chunk % 4;
    const uint32_t k = V_BITS == 2 ? lane % 2 : lane / 2, e = V_BITS == 2 ? lane / 2 : lane % 2;
    const uint32_t factor =
        ptx::Permute(value_scales_[unit % 2][2 * k + e], 0, 0x3232) & 0x7fff7fffu;
    __half2 x[4];
    flashinfer_detail::Widen<role_t::kValue, V_BITS>(bytes_, v_levels_, x);
    // rows that are 8 apart have the same order of columns
    const uint32_t place = PlaceOf<HEAD_DIM, KTraits>(
        tid_ / kTileThreads * kTokens + tid_ % 4 * 2 + e, tid_ / 4 % kColumns);
    uint32_t left_alone = v_copies_ >> ValueTile(unit) & 1;
    if (kTiles < kValueStep) left_alone |= ValueTile(unit) >= kTiles;  // more hands than tiles
    flashinfer_detail::StoreUnless(
        values_ + place + (unit * kValueStep * kTokens + 8 * k) * kColumns, left_alone,
        Scaled(x, factor));
  }

  __device__ __forceinline__ void ReadKey(uint32_t n) {
    const uint32_t token = tid_ / kColumns + n % kKeyRows * kKeyStep;
    const uint8_t* stage = stage_ + n / kKeyRows * kLayout.bytes;
    key_codes_[n % 2] =
        flashinfer_detail::LoadKeyCodes<HEAD_DIM, K_BITS>(stage, token, tid_ % kColumns);
    key_scales_[n % 2] = *reinterpret_cast<const uint16_t*>(stage + kLayout.scales + 4 * token);
  }

  __device__ __forceinline__ flashinfer_detail::bytes8_t LookUpKey(uint32_t chunk) const {
    return flashinfer_detail::LookUp<role_t::kKey, K_BITS>(key_codes_[(chunk - kValueChunks) % 2],
                                                           k_levels_);
  }

  __device__ __forceinline__ void WriteKey(uint32_t n) const {
    const uint32_t row = n % kKeyRows * kKeyStep, tile = n / kKeyRows;
    const uint32_t factor = ptx::Permute(key_scales_[n % 2], 0, 0x1010) & 0x7fff7fffu;
    __half2 x[4];
    flashinfer_detail::Widen<role_t::kKey, K_BITS>(bytes_, k_levels_, x);
    const uint32_t place = PlaceOf<HEAD_DIM, KTraits>(tid_ / kColumns + row % 8, tid_ % kColumns);
    flashinfer_detail::StoreUnless(keys_ + place + (tile * kTokens + row / 8 * 8) * kColumns,
                                   k_copies_ & 1u << tile, Scaled(x, factor));
  }

  static __device__ __forceinline__ uint4 Scaled(__half2 (&x)[4], uint32_t factor) {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = __hmul2(x[j], *reinterpret_cast<const __half2*>(&factor));
    return flashinfer_detail::Pack(x);
  }
};

}  // namespace turbokv

#endif  // TURBOKV_FLASHINFER_TILE_FILLER_CUH_
