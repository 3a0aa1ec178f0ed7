// SPDX-License-Identifier: Apache-2.0
// Expand tokens of compressed pages to 16 bits: one launch for ranges of one or several requests.
//
// The way back to original space is a matrix product on tensor cores. The Hadamard matrix of 2^n
// rows is that of 32 in every block of 32 coordinates (int8 products with +-1), then that of 2^n /
// 32 across blocks (additions). Levels are int8, so all of it is exact in integers; only then comes
// the scale. A result is rounded twice, in fp32 and to 16 bits, whatever head_dim is.
#ifndef TURBOKV_DECOMPRESS_PAGES_CUH_
#define TURBOKV_DECOMPRESS_PAGES_CUH_

#include "turbokv/decompress/params.cuh"
#include "turbokv/types.cuh"
#if defined(__CUDACC__)
#include "turbokv/decompress/kernel.cuh"
#include "turbokv/launch.cuh"
#endif

namespace turbokv {

#if defined(__CUDACC__)

namespace decompress_detail {

/*! \brief Check the arguments and launch. */
template <int PADDED_DIM>
inline cudaError_t Launch(const decompress_params_t& params, cudaStream_t stream) {
  if (!IsValid(params.kv, params.k_format.codebook.bits, params.v_format.codebook.bits) ||
      !IsValid(params.k_format.codebook) || !IsValid(params.v_format.codebook) ||
      PaddedDim(params.kv.head_dim) != PADDED_DIM ||
      params.k_format.head_dim != params.kv.head_dim ||
      params.v_format.head_dim != params.kv.head_dim || params.kv.page_table == nullptr ||
      params.dtype == dtype_t::kFloat32 || params.num_rows < 0 || params.batch_size < 1 ||
      (params.batch_size > 1 && params.out_indptr == nullptr) || params.first_token < 0) {
    return cudaErrorInvalidValue;
  }
  if (params.num_rows == 0) return cudaSuccess;
  const int64_t units = NumTiles(params) * params.kv.num_kv_heads;
  if (units > 1 << 30) return cudaErrorInvalidValue;
  return LaunchTwoRows(params.rotated ? DecompressPagesKernel<PADDED_DIM, true>
                                      : DecompressPagesKernel<PADDED_DIM, false>,
                       params, kWarps * 32, 0, units, stream);
}

}  // namespace decompress_detail

/*! \brief Expand tokens of compressed pages to fp16 or bf16: one launch.
 *
 *  Neither allocates nor synchronises; a CUDA graph may capture it. Tiles that have a 16-bit
 *  copy are read from it. Offsets of keys are added, but not to tokens marked uncentred and not to
 *  16-bit copies.
 *
 *  \tparam PADDED_DIM  Coordinates stored per vector: 64, 128, 256 or 512; 0 to choose at run time.
 *  \return cudaErrorInvalidValue for what the format does not know or is not aligned.
 */
template <int PADDED_DIM = 0>
inline cudaError_t DecompressPages(const decompress_params_t& params, cudaStream_t stream) {
  if constexpr (PADDED_DIM == 0) {
    switch (PaddedDim(params.kv.head_dim)) {
      case 64:
        return DecompressPages<64>(params, stream);
      case 128:
        return DecompressPages<128>(params, stream);
      case 256:
        return DecompressPages<256>(params, stream);
      case 512:
        return DecompressPages<512>(params, stream);
    }
    return cudaErrorInvalidValue;
  } else {
    static_assert(PADDED_DIM == 64 || PADDED_DIM == 128 || PADDED_DIM == 256 || PADDED_DIM == 512,
                  "pages hold 64, 128, 256 or 512 coordinates");
    return decompress_detail::Launch<PADDED_DIM>(params, stream);
  }
}

#endif  // __CUDACC__

}  // namespace turbokv

#endif  // TURBOKV_DECOMPRESS_PAGES_CUH_
