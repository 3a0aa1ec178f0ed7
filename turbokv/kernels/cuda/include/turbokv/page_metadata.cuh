// SPDX-License-Identifier: Apache-2.0
// Page tables as attention kernels read them, from a scheduler's block table and lengths.
#ifndef TURBOKV_PAGE_METADATA_CUH_
#define TURBOKV_PAGE_METADATA_CUH_

#include "turbokv/types.cuh"

namespace turbokv {

/*! \brief Arguments of PageMetadata. */
struct page_metadata_params_t {
  const int32_t* seq_lens;     // [batch_size]; zero and negative lengths have no pages
  const int32_t* block_table;  // [batch_size, max_pages]
  int64_t block_table_stride;  // elements between rows
  int32_t batch_size, max_pages, page_size;
  int32_t* kv_indptr;         // out, [batch_size + 1]
  int32_t* kv_indices;        // out, [batch_size * max_pages]; untouched past kv_indptr[batch_size]
  int32_t* kv_last_page_len;  // out, [batch_size]; 0 for a request without pages
};

/*! \brief Pages of a request: ceil(length / page_size), from 0 to max_pages, without overflow. */
TURBOKV_HOST_DEVICE int CountPages(int length, int page_size, int max_pages) {
  if (length <= 0) return 0;
  const int pages = (length - 1) / page_size + 1;
  return pages < max_pages ? pages : max_pages;
}

/*! \brief Tokens in the last of `pages` pages. */
TURBOKV_HOST_DEVICE int LastPageLength(int length, int pages, int page_size) {
  if (pages == 0) return 0;
  const int64_t rest = length - static_cast<int64_t>(pages - 1) * page_size;
  return static_cast<int>(rest < page_size ? rest : page_size);
}

#if defined(__CUDACC__)

namespace page_metadata_detail {

constexpr int kWarps = 8;  // and requests a CTA
constexpr int kPagesPerStep = 128;
constexpr int kMaxGridY = 256;

/*! \brief Warp w of CTA (x, y) owns request 8 x + w, its pages 128 y and up, by 128 gridDim.y.
 *
 *  Every CTA sums the page counts of all requests before its own for itself. That repeats work (the
 *  square of the batch over 8, cached reads) but needs no second launch, no scratch memory and no
 *  order among CTAs, so that any batch fits a CUDA graph.
 */
template <int WARPS>
__global__ void __launch_bounds__(WARPS * 32)
    PageMetadataKernel(const __grid_constant__ page_metadata_params_t params) {
  __shared__ int counts[WARPS], sums[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = blockIdx.x * WARPS, row = first_row + warp;
  const int length = row < params.batch_size ? params.seq_lens[row] : 0;
  const int pages = CountPages(length, params.page_size, params.max_pages);
  if (lane == 0) counts[warp] = pages;
  __syncthreads();
  int most = 0;
  TURBOKV_UNROLL
  for (int i = 0; i < WARPS; ++i) most = max(most, counts[i]);
  const int first_page = blockIdx.y * kPagesPerStep;
  if (blockIdx.y != 0 && first_page >= most) return;  // the same for the whole CTA

  int before = 0;
  for (int i = threadIdx.x; i < first_row; i += WARPS * 32) {
    before += CountPages(params.seq_lens[i], params.page_size, params.max_pages);
  }
  before = __reduce_add_sync(~0u, before);
  if (lane == 0) sums[warp] = before;
  __syncthreads();
  int begin = 0;
  TURBOKV_UNROLL
  for (int i = 0; i < WARPS; ++i) begin += sums[i] + (i < warp ? counts[i] : 0);
  if (blockIdx.y == 0 && lane == 0) {
    if (row == 0) params.kv_indptr[0] = 0;
    if (row < params.batch_size) {
      params.kv_indptr[row + 1] = begin + pages;
      params.kv_last_page_len[row] = LastPageLength(length, pages, params.page_size);
    }
  }
  const int32_t* source = params.block_table + row * params.block_table_stride;
  for (int step = first_page; step < pages; step += kPagesPerStep * gridDim.y) {
    TURBOKV_UNROLL
    for (int i = 0; i < kPagesPerStep; i += 32) {
      const int page = step + i + lane;
      if (page < pages) params.kv_indices[static_cast<int64_t>(begin) + page] = source[page];
    }
  }
}

}  // namespace page_metadata_detail

/*! \brief Flatten a block table into page indices, one run of pages per request: one launch.
 *
 *  Neither allocates nor synchronises; a CUDA graph may capture it, and replays read the lengths
 *  and the table of that moment. Lengths beyond max_pages * page_size count as that many tokens.
 */
inline cudaError_t PageMetadata(const page_metadata_params_t& params, cudaStream_t stream) {
  using namespace page_metadata_detail;
  if (params.batch_size < 0 || params.max_pages < 0 || params.page_size < 1) {
    return cudaErrorInvalidValue;
  }
  const int rows = (params.batch_size + kWarps - 1) / kWarps;
  const int columns = params.max_pages / kPagesPerStep + (params.max_pages % kPagesPerStep != 0);
  const dim3 grid(rows > 1 ? rows : 1, columns < 1 ? 1 : columns < kMaxGridY ? columns : kMaxGridY);
  PageMetadataKernel<kWarps><<<grid, kWarps * 32, 0, stream>>>(params);
  return cudaGetLastError();
}

#endif  // __CUDACC__

}  // namespace turbokv

#endif  // TURBOKV_PAGE_METADATA_CUH_
