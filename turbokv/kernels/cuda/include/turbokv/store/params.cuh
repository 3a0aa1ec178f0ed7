// SPDX-License-Identifier: Apache-2.0
// The arguments of store.
#ifndef TURBOKV_STORE_PARAMS_CUH_
#define TURBOKV_STORE_PARAMS_CUH_

#include "turbokv/paged_kv.cuh"
#include "turbokv/types.cuh"
#include "turbokv/vector_format.cuh"

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
  // Whether the kernel of small batches lets the next one start once the kernel before has ended;
  // that of large batches never does.
  bool launch_dependents;
};

namespace store_detail {

/*! \brief Whether COUNT neighbouring elements of the inputs can be loaded at once, and vectors end
 *  where such pieces do.
 */
template <typename DTypeIn, int COUNT>
inline bool HasAlignedPieces(const store_params_t& params) {
  const int64_t numbers = params.k_token_stride | params.k_head_stride | params.v_token_stride |
                          params.v_head_stride | params.kv.head_dim;
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(params.k) | reinterpret_cast<uintptr_t>(params.v);
  return addresses % (COUNT * sizeof(DTypeIn)) == 0 && numbers % COUNT == 0;
}

}  // namespace store_detail

}  // namespace turbokv

#endif  // TURBOKV_STORE_PARAMS_CUH_
