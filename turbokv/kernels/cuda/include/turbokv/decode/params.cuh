// SPDX-License-Identifier: Apache-2.0
// What a caller of decode says: tensors, scales, options.
#ifndef TURBOKV_DECODE_PARAMS_CUH_
#define TURBOKV_DECODE_PARAMS_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/codebook.cuh"
#include "turbokv/decode/tables.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/types.cuh"

namespace turbokv {

/*! \brief Which instructions copy tiles to shared memory. */
enum class decode_body_t {
  kAuto,   // bulk copies on sm_90 and up, else asynchronous copies
  kBulk,   // cp.async.bulk and mbarriers: sm_90 and up
  kAsync,  // 16-byte cp.async: sm_80 and up
};

struct decode_options_t {
  decode_body_t body = decode_body_t::kAuto;
  int num_ctas = 0;  // 0: as many as run at a time
  // Whether the kernel may read metadata and old pages before the kernel before it has ended. The
  // caller promises that no kernel since the last one that ran alone writes lengths, qo_indptr,
  // page tables, tile_slots or codes of tokens older than a request's own queries. (It may write q,
  // k_offset_rotated, 16-bit copies, and the tokens of the queries themselves, as Store does.)
  bool early = false;
};

/*! \brief Arguments of decode. Strides are in elements. */
struct decode_params_t {
  paged_kv_t kv;
  const void* q;  // [nnz, num_qo_heads, head_dim]
  int64_t q_stride_n, q_stride_h;
  dtype_t q_dtype;
  void* out;  // [nnz, num_qo_heads, head_dim], or padded_dim if rotated_output
  int64_t out_stride_n, out_stride_h;
  dtype_t out_dtype;
  float* lse;  // [nnz, num_qo_heads], base 2; may be null
  int64_t lse_stride_n;
  const int32_t* qo_indptr;  // [batch_size + 1]; null: max_q_len rows each
  int32_t batch_size, num_qo_heads, num_kv_heads, head_dim, max_q_len;
  float sm_scale, logits_soft_cap;
  int32_t window_left;
  bool causal;
  const float* sinks;  // [num_qo_heads], natural units; may be null
  // [num_segments, num_kv_heads, padded_dim], 16-byte aligned; may be null
  const float* k_offset_rotated;
  int32_t num_segments;
  uint32_t k_signs[16], v_signs[16];  // bit j % 32 of word j / 32: coordinate j is negated
  codebook_t k_codebook, v_codebook;
  bool rotated_query, rotated_output;
  // Zeros before the first call; every call leaves its counters, at the start, zero. Its partial
  // results are at the end: calls of all sizes for which there is room may take turns.
  void* workspace;  // 16-byte aligned
  int64_t workspace_bytes;
};

namespace decode_detail {

/*! \brief What the launch adds to the arguments; see PlanLaunch. */
struct launch_params_t {
  int num_workers;                       // CTAs that attend; those after them rehearse
  int num_stages;                        // of each warp's ring
  bool cached;                           // whether requests are kept in shared memory
  bool early;                            // see decode_options_t
  table_t k_table, v_table, v_negative;  // of codebooks, see MakeTable
  float k_unit, v_unit;                  // what an operand of 1 stands for
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_PARAMS_CUH_
