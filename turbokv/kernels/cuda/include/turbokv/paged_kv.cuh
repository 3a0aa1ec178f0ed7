// SPDX-License-Identifier: Apache-2.0
// A view of a compressed, paged KV cache of one layer, and 64-bit addresses in it.
#ifndef TURBOKV_PAGED_KV_CUH_
#define TURBOKV_PAGED_KV_CUH_

#include "turbokv/pack.cuh"
#include "turbokv/types.cuh"

namespace turbokv {

constexpr int kTokensPerSegment = 256;  // logical positions that share an offset of centred keys

/*! \brief Compressed pages, who owns them, and the 16-bit copies of some tiles.
 *
 *  Either `page_table` is dense, [batch_size, table_stride], or `kv_indptr` is set and the pages of
 *  request b are page_table[kv_indptr[b]] to page_table[kv_indptr[b + 1] - 1]. A kernel that only
 *  writes slots needs no table. All pointers but `pages` may be null where they are not needed.
 */
struct paged_kv_t {
  uint8_t* pages;        // [num_pages, num_kv_heads, page_head_bytes], 16-byte aligned
  int64_t page_stride;   // bytes, a multiple of 16
  int64_t head_stride;   // bytes, a multiple of 16
  int32_t page_size;     // tokens, a multiple of 16
  int32_t num_kv_heads;  //
  int32_t head_dim;      // elements of a vector before padding, 33 to 512

  const int32_t* page_table;
  int64_t table_stride;             // elements between rows of a dense table
  const int32_t* kv_indptr;         // [batch_size + 1]
  const int32_t* kv_lens;           // [batch_size]
  const int32_t* kv_last_page_len;  // [batch_size]; read with kv_indptr if kv_lens is null

  const int32_t* tile_slots;  // [num_pages, page_size / 16]: slot in `window`, or -1
  half_t* window;             // [num_slots, num_kv_heads, 2 (K, V), 16, padded_dim], rotated space
};

/*! \brief Position of page `index` of request `b` in `page_table`. */
TURBOKV_HOST_DEVICE int64_t TableEntry(const paged_kv_t& kv, int b, int64_t index) {
  return index + (kv.kv_indptr != nullptr ? static_cast<int64_t>(kv.kv_indptr[b])
                                          : static_cast<int64_t>(b) * kv.table_stride);
}

/*! \brief Tokens of request `b`. */
TURBOKV_HOST_DEVICE int KvLength(const paged_kv_t& kv, int b) {
  if (kv.kv_lens != nullptr) return kv.kv_lens[b];
  const int pages = kv.kv_indptr[b + 1] - kv.kv_indptr[b];
  return pages > 0 ? (pages - 1) * kv.page_size + kv.kv_last_page_len[b] : 0;
}

/*! \brief First byte of a tile: `tile` counts within the page. */
TURBOKV_HOST_DEVICE uint8_t* TileAddress(const paged_kv_t& kv, int64_t page, int head, int tile,
                                         int tile_bytes) {
  return kv.pages + page * kv.page_stride + head * kv.head_stride +
         static_cast<int64_t>(tile) * tile_bytes;
}

/*! \brief Slot of a tile's 16-bit copy, or -1. */
TURBOKV_HOST_DEVICE int TileSlot(const paged_kv_t& kv, int64_t page, int tile) {
  if (kv.tile_slots == nullptr) return -1;
  return kv.tile_slots[page * (kv.page_size / kTokensPerTile) + tile];
}

/*! \brief First element of a token's vector in the 16-bit copies. */
TURBOKV_HOST_DEVICE half_t* WindowAddress(const paged_kv_t& kv, int slot, int head, role_t role,
                                          int token, int padded_dim) {
  const int64_t vectors =
      (static_cast<int64_t>(slot) * kv.num_kv_heads + head) * 2 + static_cast<int64_t>(role);
  return kv.window + (vectors * kTokensPerTile + token) * padded_dim;
}

/*! \brief Whether strides and sizes are such as kernels can use. */
inline bool IsValid(const paged_kv_t& kv, int k_bits, int v_bits) {
  return kv.pages != nullptr && kv.head_dim > 32 && kv.head_dim <= kMaxPaddedDim &&
         kv.page_size > 0 && kv.page_size % kTokensPerTile == 0 && kv.num_kv_heads > 0 &&
         IsPageWidth(k_bits) && IsPageWidth(v_bits) && kv.page_stride % 16 == 0 &&
         kv.head_stride % 16 == 0 && reinterpret_cast<uintptr_t>(kv.pages) % 16 == 0 &&
         (kv.tile_slots == nullptr) == (kv.window == nullptr) &&
         reinterpret_cast<uintptr_t>(kv.window) % 16 == 0;
}

}  // namespace turbokv

#endif  // TURBOKV_PAGED_KV_CUH_
