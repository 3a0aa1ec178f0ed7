// SPDX-License-Identifier: Apache-2.0
// Batch prefill over compressed pages: plan, and run = rotate queries, attend, un-rotate outputs.
// Arguments were checked in Python; what is checked here would otherwise write out of bounds.
#include "turbokv_batch_prefill_config.inc"
//
#include <flashinfer/attention/scheduler.cuh>
#include <turbokv/flashinfer/rotate.cuh>

#include "tvm/ffi/container/array.h"
#include "tvm_ffi_utils.h"

namespace flashinfer {

template <uint32_t CTA_TILE_Q, uint32_t HEAD_DIM_QK, uint32_t HEAD_DIM_VO,
          PosEncodingMode POS_ENCODING_MODE, bool USE_FP16_QK_REDUCTION, MaskMode MASK_MODE,
          typename AttentionVariant, typename Params>
cudaError_t BatchPrefillWithPagedKVCacheDispatched(Params params, typename Params::DTypeO* tmp_v,
                                                   float* tmp_s, bool enable_pdl,
                                                   cudaStream_t stream);

}  // namespace flashinfer

using tvm::ffi::Array;
using tvm::ffi::Optional;

namespace {

constexpr int kSignWords = turbokv::kMaxPaddedDim / 32;

// A format is [frac_bits, sign words, magnitudes], as turbokv/integrations/flashinfer/jit.py says.
turbokv::codebook_t ReadCodebook(const Array<int64_t>& format, int bits) {
  turbokv::codebook_t codebook = {};
  codebook.bits = bits;
  codebook.frac_bits = static_cast<int32_t>(format[0]);
  const int count = bits == 8 ? 0 : 1 << (bits - 1);
  TVM_FFI_ICHECK_EQ(static_cast<int64_t>(format.size()), 1 + kSignWords + count);
  for (int i = 0; i < count; ++i) {
    codebook.magnitudes[i] = static_cast<int8_t>(format[1 + kSignWords + i]);
  }
  return codebook;
}

void ReadSigns(const Array<int64_t>& format, uint32_t (&signs)[kSignWords]) {
  for (int i = 0; i < kSignWords; ++i) signs[i] = static_cast<uint32_t>(format[1 + i]);
}

turbokv::rotate_params_t RotateParams(TensorView outside, half* rotated, TensorView qo_indptr,
                                      const Array<int64_t>& format) {
  turbokv::rotate_params_t params = {};
  params.outside = outside.data_ptr();
  params.outside_stride_n = outside.stride(0);
  params.outside_stride_h = outside.stride(1);
  const int64_t code = encode_dlpack_dtype(outside.dtype());
  TVM_FFI_ICHECK(code == float32_code || code == float16_code || code == bfloat16_code);
  params.dtype = code == float32_code   ? turbokv::dtype_t::kFloat32
                 : code == float16_code ? turbokv::dtype_t::kFloat16
                                        : turbokv::dtype_t::kBFloat16;
  params.rotated = rotated;
  params.num_tokens = static_cast<int32_t>(outside.size(0));
  params.num_heads = static_cast<int32_t>(outside.size(1));
  params.head_dim = static_cast<int32_t>(outside.size(2));
  params.live_tokens = static_cast<const int32_t*>(qo_indptr.data_ptr()) + qo_indptr.size(0) - 1;
  ReadSigns(format, params.signs);
  return params;
}

void Check(cudaError_t status, const char* what) {
  TVM_FFI_ICHECK(status == cudaSuccess) << what << ": " << cudaGetErrorString(status);
}

}  // namespace

Array<int64_t> TurboKVBatchPrefillPlan(TensorView float_workspace, TensorView int_workspace,
                                       TensorView pinned_int_workspace, TensorView qo_indptr,
                                       TensorView kv_indptr, int64_t total_num_rows,
                                       int64_t batch_size, int64_t num_qo_heads,
                                       int64_t num_kv_heads, int64_t page_size,
                                       bool enable_cuda_graph, int64_t window_left,
                                       int64_t fixed_split_size, bool disable_split_kv) {
  // Chunks begin at whole tiles, so a window may need one more token less than a tile.
  constexpr int64_t kSlack = AttentionVariant::KVTileLoader::kTokens - 1;
  PrefillPlanInfo plan_info;
  ffi::CUDADeviceGuard device_guard(float_workspace.device().device_id);
  const cudaStream_t stream = get_stream(float_workspace.device());
  Check(PrefillPlan<int32_t>(
            float_workspace.data_ptr(), float_workspace.size(0) * get_element_size(float_workspace),
            int_workspace.data_ptr(), pinned_int_workspace.data_ptr(),
            int_workspace.size(0) * get_element_size(int_workspace), plan_info,
            static_cast<int32_t*>(qo_indptr.data_ptr()),
            static_cast<int32_t*>(kv_indptr.data_ptr()), total_num_rows, batch_size, num_qo_heads,
            num_kv_heads, HEAD_DIM, HEAD_DIM, page_size, enable_cuda_graph,
            /*sizeof_dtype_o=*/2, window_left >= 0 ? window_left + kSlack : -1, fixed_split_size,
            disable_split_kv, /*num_colocated_ctas=*/0, stream),
        "TurboKV prefill failed to plan");
  return Array(plan_info.ToVector());
}

// scratch: fp16 [q.size(0), num_qo_heads, HEAD_DIM], queries and then outputs in rotated space: a
// row is read by the one block that writes it, or by none that runs at that time.
void TurboKVBatchPrefillRun(TensorView float_workspace, TensorView int_workspace,
                            Array<int64_t> plan_info_vec, TensorView q, TensorView pages,
                            TensorView qo_indptr, TensorView kv_indptr, TensorView kv_indices,
                            TensorView kv_last_page_len, TensorView out, Optional<TensorView> lse,
                            TensorView scratch, Optional<TensorView> lse_scratch, int64_t page_size,
                            bool causal, int64_t window_left, double sm_scale,
                            double logits_soft_cap, Array<int64_t> k_format,
                            Array<int64_t> v_format, Optional<TensorView> k_offset,
                            Optional<TensorView> tile_slots, Optional<TensorView> window,
                            bool enable_pdl) {
  PrefillPlanInfo plan_info;
  plan_info.FromVector(std::vector<int64_t>(plan_info_vec.begin(), plan_info_vec.end()));
  const int64_t num_qo_heads = q.size(1), num_kv_heads = pages.size(1);
  const int64_t batch_size = kv_indptr.size(0) - 1;
  TVM_FFI_ICHECK_EQ(pages.size(2),
                    turbokv::PageHeadBytes(HEAD_DIM, K_BITS, V_BITS, static_cast<int>(page_size)));
  TVM_FFI_ICHECK(scratch.numel() >= q.size(0) * num_qo_heads * HEAD_DIM);
  TVM_FFI_ICHECK(!lse.has_value() || lse_scratch.has_value());
  TVM_FFI_ICHECK(reinterpret_cast<uintptr_t>(pages.data_ptr()) % 16 == 0);

  ffi::CUDADeviceGuard device_guard(float_workspace.device().device_id);
  const cudaStream_t stream = get_stream(float_workspace.device());
  void* float_buffer = float_workspace.data_ptr();
  void* int_buffer = int_workspace.data_ptr();
  half* rotated = static_cast<half*>(scratch.data_ptr());

  Check(turbokv::Rotate<HEAD_DIM, false>(RotateParams(q, rotated, qo_indptr, k_format), stream),
        "TurboKV prefill failed to rotate queries");

  PagedParams params;
  params.q = rotated;
  params.o = rotated;
  params.paged_kv = paged_kv_t<half, int32_t>(
      num_kv_heads, page_size, HEAD_DIM, batch_size, QKVLayout::kHND, /*k_data=*/nullptr,
      /*v_data=*/nullptr, static_cast<int32_t*>(kv_indices.data_ptr()),
      static_cast<int32_t*>(kv_indptr.data_ptr()),
      static_cast<int32_t*>(kv_last_page_len.data_ptr()));
  params.q_indptr = static_cast<int32_t*>(qo_indptr.data_ptr());
  params.lse = lse.has_value() ? static_cast<float*>(lse_scratch.value().data_ptr()) : nullptr;
  params.group_size = uint_fastdiv(num_qo_heads / num_kv_heads);
  params.tiles.pages = static_cast<const uint8_t*>(pages.data_ptr());
  TVM_FFI_ICHECK(pages.stride(0) % 16 == 0 && pages.stride(0) / 16 <= UINT32_MAX);
  TVM_FFI_ICHECK(pages.stride(1) % 16 == 0 && pages.stride(1) / 16 <= UINT32_MAX);
  params.tiles.page_stride = static_cast<uint32_t>(pages.stride(0) / 16);
  params.tiles.head_stride = static_cast<uint32_t>(pages.stride(1) / 16);
  params.tiles.tile_slots =
      tile_slots.has_value() ? static_cast<const int32_t*>(tile_slots.value().data_ptr()) : nullptr;
  params.tiles.window =
      window.has_value() ? static_cast<const half*>(window.value().data_ptr()) : nullptr;
  params.tiles.k_offset =
      k_offset.has_value() ? static_cast<const float*>(k_offset.value().data_ptr()) : nullptr;
  params.tiles.k_levels =
      turbokv::flashinfer_detail::MakeLevels<K_BITS>(ReadCodebook(k_format, K_BITS));
  params.tiles.v_levels =
      turbokv::flashinfer_detail::MakeLevels<V_BITS>(ReadCodebook(v_format, V_BITS));
  params.sm_scale = static_cast<float>(sm_scale);
  params.logits_soft_cap = static_cast<float>(logits_soft_cap);
  params.num_qo_heads = num_qo_heads;
  params.q_stride_n = num_qo_heads * HEAD_DIM;
  params.q_stride_h = HEAD_DIM;
  params.window_left = window_left;

  params.request_indices =
      GetPtrFromBaseOffset<int32_t>(int_buffer, plan_info.request_indices_offset);
  params.qo_tile_indices =
      GetPtrFromBaseOffset<int32_t>(int_buffer, plan_info.qo_tile_indices_offset);
  params.kv_tile_indices =
      GetPtrFromBaseOffset<int32_t>(int_buffer, plan_info.kv_tile_indices_offset);
  params.o_indptr = GetPtrFromBaseOffset<int32_t>(int_buffer, plan_info.o_indptr_offset);
  params.kv_chunk_size_ptr =
      GetPtrFromBaseOffset<int32_t>(int_buffer, plan_info.kv_chunk_size_ptr_offset);
  params.merge_indptr = nullptr;
  params.block_valid_mask = nullptr;
  half* tmp_v = nullptr;
  float* tmp_s = nullptr;
  if (plan_info.split_kv) {
    params.merge_indptr = GetPtrFromBaseOffset<int32_t>(int_buffer, plan_info.merge_indptr_offset);
    tmp_v = GetPtrFromBaseOffset<half>(float_buffer, plan_info.v_offset);
    tmp_s = GetPtrFromBaseOffset<float>(float_buffer, plan_info.s_offset);
    if (plan_info.enable_cuda_graph) {
      params.block_valid_mask =
          GetPtrFromBaseOffset<bool>(int_buffer, plan_info.block_valid_mask_offset);
    }
  }
  params.padded_batch_size = plan_info.padded_batch_size;
  params.max_total_num_rows = plan_info.total_num_rows;
  params.total_num_rows =
      plan_info.enable_cuda_graph
          ? GetPtrFromBaseOffset<uint32_t>(int_buffer, plan_info.total_num_rows_offset)
          : nullptr;
  params.partition_kv = false;  // the launcher decides

  const MaskMode mask_mode = causal ? MaskMode::kCausal : MaskMode::kNone;
  cudaError_t status = cudaSuccess;
  DISPATCH_CTA_TILE_Q(plan_info.cta_tile_q, CTA_TILE_Q, {
    if constexpr (CTA_TILE_Q != 32) {
      if (mask_mode == MaskMode::kCausal) {
        status = BatchPrefillWithPagedKVCacheDispatched<CTA_TILE_Q, HEAD_DIM, HEAD_DIM,
                                                        PosEncodingMode::kNone, false,
                                                        MaskMode::kCausal, AttentionVariant>(
            params, tmp_v, tmp_s, enable_pdl, stream);
      } else {
        status = BatchPrefillWithPagedKVCacheDispatched<CTA_TILE_Q, HEAD_DIM, HEAD_DIM,
                                                        PosEncodingMode::kNone, false,
                                                        MaskMode::kNone, AttentionVariant>(
            params, tmp_v, tmp_s, enable_pdl, stream);
      }
    }
  });
  Check(status, "TurboKV prefill failed");

  turbokv::rotate_params_t back = RotateParams(out, rotated, qo_indptr, v_format);
  if (lse.has_value()) {
    back.lse = params.lse;
    back.lse_outside = static_cast<float*>(lse.value().data_ptr());
    back.lse_stride_n = lse.value().stride(0);
    back.lse_stride_h = lse.value().stride(1);
  }
  Check(turbokv::Rotate<HEAD_DIM, true>(back, stream),
        "TurboKV prefill failed to un-rotate outputs");
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan, TurboKVBatchPrefillPlan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, TurboKVBatchPrefillRun);
