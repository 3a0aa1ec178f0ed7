// SPDX-License-Identifier: Apache-2.0
// What decode is asked (decode_params_t), the sizes that a variant of its kernel has (config_t),
// and what a request means for it (request_t).
#ifndef TURBOKV_DECODE_CONFIG_CUH_
#define TURBOKV_DECODE_CONFIG_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/codebook.cuh"
#include "turbokv/expand.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/types.cuh"

namespace turbokv {

/*! \brief Which of the two bodies brings tiles to shared memory. */
enum class decode_body_t {
  kAuto,   // bulk copies on sm_90 and up, else asynchronous copies
  kBulk,   // cp.async.bulk and mbarriers: sm_90 and up
  kAsync,  // 16-byte cp.async: sm_80 and up
};

struct decode_options_t {
  decode_body_t body = decode_body_t::kAuto;
  int num_ctas = 0;  // 0: as many as run at a time
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

constexpr int kSegmentsPerPass = 256;  // offsets kept in shared memory at a time
constexpr int kMaxStages = 8;
constexpr int kMaxCtas = 4;         // of a multiprocessor
constexpr int kMostCtas = 1 << 15;  // of a launch, see Share
constexpr int kFlushSteps = 4;      // how long the correction of V's offset may wait, see Flush
// Tiles kept in 16 bits that a warp collects before it attends to them alone; at the end of an item
// all warps share what is left.
constexpr int kPending = 16;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNever = -1e30f;  // a running maximum that has seen nothing
constexpr int kLowestTopExponent = 30;
constexpr float kLowestTop = 1.f / (1 << kLowestTopExponent);  // below every positive fp16
constexpr float kWindowGain = 1024.f;
// Maxima are raised to those seen only when a probability times a V scale, which with them is at
// most 2 to kTopExponent, exceeds kMostProduct: so rarely that it costs nothing. Both are inside
// fp16, as is the sum of two, and far from its subnormals. The sum of probabilities is watched as
// well, for V scales of zero.
constexpr int kTopExponent = 11;
constexpr uint32_t kMostProduct = (14 + 15) << 10;  // bits of 2^14 in fp16
constexpr float kMostSum = 1.2e24f;                 // 2^80: fp32 has room for more

template <int HEAD_DIM, int K_BITS, int V_BITS, bool UNIFORM2, int COLUMNS, bool BULK, int CTAS>
struct config_t {
  static constexpr int kHeadDim = HEAD_DIM, kKBits = K_BITS, kVBits = V_BITS, kColumns = COLUMNS;
  static constexpr bool kBulk = BULK;
  using k_t = k_fragment_t<HEAD_DIM, K_BITS, UNIFORM2>;
  using v_t = v_fragment_t<HEAD_DIM, V_BITS, UNIFORM2>;
  static constexpr int kTile = TileLayout(HEAD_DIM, K_BITS, V_BITS).bytes;
  // Tiles a step: as many as keep a step under 9 KB, if the registers for their scores suffice.
  // Steps of eight tiles leave warps without any in small batches: only where they gain most.
  static constexpr int kTiles = HEAD_DIM == 64 && COLUMNS <= 8 && kTile <= 1100 ? 8
                                : kTile <= 2200                                 ? 4
                                : kTile <= 4352                                 ? 2
                                                                                : 1;
  static constexpr int kStepTokens = kTiles * kTokensPerTile;
  static constexpr int kStepBytes = kTiles * kTile;
  // CTAs of a multiprocessor at a time. With several, some compute while others start or end an
  // item and so wait for memory and for their own warps; with one, fewer parts are merged.
  static constexpr int kCtas = CTAS;
  // Eight warps, where two stages each fit: more would have too few registers. Devices with
  // asynchronous copies only may have 100 KB of shared memory.
  static constexpr int kStageRoom =
      (BULK ? 160 : 80) * 1024 / (2 * kStepBytes);  // warps with two stages
  static constexpr int kWarps = (kStageRoom >= 8 ? 8 : 4) / kCtas;
  static constexpr int kThreads = kWarps * 32;
  // Requests whose items may get whole CTAs.
  static constexpr int kMaxAligned = 256;
  static constexpr int kBlocks8 = COLUMNS == 16 ? 2 : 1;  // column blocks of an mma
  // With four columns the two terms of the query share a column block, else each has its own.
  static constexpr int kTerms = COLUMNS == 4 ? 1 : 2;
  // Tokens of a tile whose scores a lane has, see Scores. With four columns a fragment holds every
  // score twice, so that lanes share the work: one token each.
  static constexpr int kHalves = COLUMNS == 4 ? 1 : 2;
  static constexpr bool kSumTables = K_BITS == 4 && COLUMNS == 4;
  static constexpr int kQueryRegs = HEAD_DIM / 16;
  static constexpr int kOutBlocks = HEAD_DIM / 16;
  // Outputs that warps merge at a time: more would need more shared memory.
  static constexpr int kMostMergeRegs = CTAS == 4 ? 16 : 32;
  static constexpr int kMergeRegs =
      kBlocks8 * HEAD_DIM / 4 <= kMostMergeRegs ? kBlocks8 * HEAD_DIM / 4 : kMostMergeRegs;
  static constexpr int kPartial = COLUMNS * HEAD_DIM + 2 * COLUMNS;  // floats of a partial result

  // Static shared memory is a little less.
  static constexpr int kStaticBytes =
      kWarps * (kMaxStages * (8 + 4 * kTiles) + 384 + 8 * COLUMNS + 8 * kPending + 8) +
      32 * COLUMNS + 4 * (kMaxAligned + 1) + 256;

  /*! \param cached Whether requests are kept in shared memory, see DecodeKernel. */
  static int SharedBytes(int stages, const decode_params_t& p, bool cached) {
    const int most = p.num_segments < kSegmentsPerPass ? p.num_segments : kSegmentsPerPass;
    const int segments = p.k_offset_rotated != nullptr ? most : 0;
    // steps before a request; if cached its tokens, and query rows before it
    const int per_request = !cached ? 4 : p.qo_indptr != nullptr ? 12 : 8;
    return kWarps * stages * kStepBytes + kWarps * kMergeRegs * 128 + COLUMNS * HEAD_DIM * 6 +
           segments * COLUMNS * 4 + (p.batch_size + 1) * per_request;
  }
};

struct request_t {
  int length, first_row, rows;  // KV tokens; query rows are (token, head in group) pairs
  int q_len, blocks;            // query tokens; blocks of COLUMNS rows
  int first_step, steps;        // a window may skip steps
};

/*! \brief Tokens of request b in the cache. */
__device__ __forceinline__ int RequestLength(const decode_params_t& p, int b) {
  if (p.kv.kv_lens != nullptr) return max(__ldg(p.kv.kv_lens + b), 0);
  const int pages = __ldg(p.kv.kv_indptr + b + 1) - __ldg(p.kv.kv_indptr + b);
  return pages > 0 ? max((pages - 1) * p.kv.page_size + __ldg(p.kv.kv_last_page_len + b), 0) : 0;
}

/*! \brief What a request means, by its tokens and the position of its query rows; `group` query
 * heads share a KV head. */
template <class C>
__device__ __forceinline__ request_t Request(const decode_params_t& p, int group, int length,
                                             int first_row, int q_len) {
  request_t r;
  r.length = length;
  r.first_row = first_row;
  r.q_len = q_len;
  r.rows = r.q_len * group;
  r.blocks = (r.rows + C::kColumns - 1) / C::kColumns;
  const int begin = p.window_left >= 0 ? max(0, r.length - r.q_len - p.window_left) : 0;
  r.first_step = begin / C::kStepTokens;
  // A request without tokens still has one step, which loads nothing, so that its output is
  // written.
  r.steps = max(1, (r.length + C::kStepTokens - 1) / C::kStepTokens - r.first_step);
  return r;
}

/*! \brief Read a request from global memory; without qo_indptr leaves its query rows. */
__device__ __forceinline__ void ReadRequest(const decode_params_t& p, int b, int& length,
                                            int& first_row, int& q_len) {
  length = RequestLength(p, b);
  if (p.qo_indptr == nullptr) return;
  first_row = __ldg(p.qo_indptr + b), q_len = __ldg(p.qo_indptr + b + 1) - first_row;
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_CONFIG_CUH_
