// SPDX-License-Identifier: Apache-2.0
// Compress new keys and values and write them to their slots: one launch.
//
// Contract: until the kernel before it has ended, it reads and writes nothing that others write. It
// writes the bits of the tokens in slot_mapping, their 16-bit copies and the rotated forms, nothing
// else. A kernel that starts before it has ended may read, before it waits, tiles of none of these
// tokens, page tables, lengths and slots of copies. None starts early unless launch_dependents asks
// for it, and after a large batch none does: beside the store of 0.1, of 128 CTAs, decode ran 14 to
// 18 us longer in a server's step than after it (docs/log).
#ifndef TURBOKV_STORE_CUH_
#define TURBOKV_STORE_CUH_

#include "turbokv/store/params.cuh"
#include "turbokv/types.cuh"
#if defined(__CUDACC__)
#include "turbokv/launch.cuh"
#include "turbokv/store/kernel.cuh"
#include "turbokv/store/small.cuh"
#endif

namespace turbokv {

#if defined(__CUDACC__)

namespace store_detail {

// Numbers of a role, a multiprocessor, up to which the kernel of small batches is the faster one;
// on an H200 both take 7.5 us there (docs/kernel-log.md).
constexpr int64_t kSmallBatch = 6144;

/*! \brief Launch the kernel of small batches. */
template <int PADDED_DIM, typename DTypeIn>
inline cudaError_t LaunchSmall(const store_params_t& params, int device, int multiprocessors,
                               cudaStream_t stream) {
  using C = small_traits_t<PADDED_DIM>;
  int major = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  const int heads = params.kv.num_kv_heads, rows = (params.nnz + C::kVectors - 1) / C::kVectors;
  // few warps meet many multiprocessors; many are fewer CTAs to start
  const int warps =
      static_cast<int64_t>(rows) * heads * 2 <= 2 * multiprocessors ? 1 : C::kMaxWarps;
  const dim3 grid(heads, (rows + warps - 1) / warps, 2);
  return VisitSmall<C, DTypeIn>(params, warps, [&](auto kernel, const auto& all) {
    return LaunchOverlapped(kernel, all, grid, warps * 32, 0, major, stream);
  });
}

/*! \brief Choose by the size of the batch, and launch. */
template <int PADDED_DIM, typename DTypeIn>
inline cudaError_t Launch(const store_params_t& params, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t numbers = static_cast<int64_t>(params.nnz) * params.kv.num_kv_heads * PADDED_DIM;
  if (numbers < multiprocessors * kSmallBatch) {
    return LaunchSmall<PADDED_DIM, DTypeIn>(params, device, multiprocessors, stream);
  }
  using C = store_traits_t<PADDED_DIM>;
  const int64_t units =
      (static_cast<int64_t>(params.nnz) + 15) / 16 * params.kv.num_kv_heads * C::kUnits;
  if (units > 1 << 30) return cudaErrorInvalidValue;
  return LaunchTwoRows(StoreKernel<C, DTypeIn>, params, C::kThreads, sizeof(store_shared_t<C>),
                       units, stream);
}

/*! \brief Check the arguments, choose the type of the inputs and launch. */
template <int PADDED_DIM>
inline cudaError_t Check(const store_params_t& params, cudaStream_t stream) {
  const int64_t rotated_strides = params.k_rotated_token_stride | params.k_rotated_head_stride |
                                  params.v_rotated_token_stride | params.v_rotated_head_stride;
  const bool rotated = params.k_rotated != nullptr || params.v_rotated != nullptr;
  const uintptr_t rotated_address =
      reinterpret_cast<uintptr_t>(params.k_rotated) | reinterpret_cast<uintptr_t>(params.v_rotated);
  if (!IsValid(params.kv, params.k_format.codebook.bits, params.v_format.codebook.bits) ||
      !IsValid(params.k_format.codebook) || !IsValid(params.v_format.codebook) ||
      PaddedDim(params.kv.head_dim) != PADDED_DIM ||
      params.k_format.head_dim != params.kv.head_dim ||
      params.v_format.head_dim != params.kv.head_dim ||
      (params.k_offset != nullptr && params.positions == nullptr) ||
      (rotated && (rotated_strides % 8 != 0 || rotated_address % 16 != 0 ||
                   params.rotated_dtype == dtype_t::kFloat32))) {
    return cudaErrorInvalidValue;
  }
  if (params.nnz <= 0) return params.nnz == 0 ? cudaSuccess : cudaErrorInvalidValue;
  switch (params.dtype) {
    case dtype_t::kFloat32:
      return Launch<PADDED_DIM, float>(params, stream);
    case dtype_t::kFloat16:
      return Launch<PADDED_DIM, half_t>(params, stream);
    case dtype_t::kBFloat16:
      return Launch<PADDED_DIM, bfloat16_t>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace store_detail

/*! \brief Compress keys and values and write them to their slots: one launch.
 *
 *  Neither allocates nor synchronises; a CUDA graph may capture it. Widths, scale rules and
 * optional outputs are chosen at run time.
 *
 *  \tparam PADDED_DIM  Coordinates stored per vector: 64, 128, 256 or 512; 0 to choose at run time.
 *  \return cudaErrorInvalidValue for what the format does not know or is not aligned.
 */
template <int PADDED_DIM = 0>
inline cudaError_t Store(const store_params_t& params, cudaStream_t stream) {
  if constexpr (PADDED_DIM == 0) {
    switch (PaddedDim(params.kv.head_dim)) {
      case 64:
        return Store<64>(params, stream);
      case 128:
        return Store<128>(params, stream);
      case 256:
        return Store<256>(params, stream);
      case 512:
        return Store<512>(params, stream);
    }
    return cudaErrorInvalidValue;
  } else {
    static_assert(PADDED_DIM == 64 || PADDED_DIM == 128 || PADDED_DIM == 256 || PADDED_DIM == 512,
                  "pages hold 64, 128, 256 or 512 coordinates");
    return store_detail::Check<PADDED_DIM>(params, stream);
  }
}

#endif  // __CUDACC__

}  // namespace turbokv

#endif  // TURBOKV_STORE_CUH_
