// SPDX-License-Identifier: Apache-2.0
// The arguments of decompress.
#ifndef TURBOKV_DECOMPRESS_PARAMS_CUH_
#define TURBOKV_DECOMPRESS_PARAMS_CUH_

#include "turbokv/paged_kv.cuh"
#include "turbokv/types.cuh"
#include "turbokv/vector_format.cuh"

namespace turbokv {

/*! \brief Arguments of DecompressPages. Strides are in elements; the last dimension is contiguous.
 *
 *  Request b contributes the tokens from token_begin[b] on that rows out_indptr[b] to
 *  out_indptr[b + 1] - 1 of the outputs have room for. Without `out_indptr` there is one request,
 *  and it fills all rows.
 */
struct decompress_params_t {
  paged_kv_t kv;  // pages and page_table or kv_indptr; lengths are not read
  vector_format_t k_format, v_format;
  const int32_t* token_begin;  // [batch_size], or null: first_token for every request
  const int32_t* out_indptr;   // [batch_size + 1], ascending from 0 to num_rows; or null
  int32_t first_token, batch_size;
  int32_t num_rows;  // of the outputs
  void* out_k;       // [num_rows, num_kv_heads, padded_dim if rotated else head_dim], or null
  void* out_v;       // as out_k
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  dtype_t dtype;          // kFloat16 or kBFloat16
  bool rotated;           // stay in rotated space
  const float* k_offset;  // [num_segments, num_kv_heads, as out_k], in the space of out_k; or null
};

}  // namespace turbokv

#endif  // TURBOKV_DECOMPRESS_PARAMS_CUH_
