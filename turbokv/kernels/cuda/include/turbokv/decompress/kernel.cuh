// SPDX-License-Identifier: Apache-2.0
// Decompress's kernel: a row of the grid for K, one for V.
#ifndef TURBOKV_DECOMPRESS_KERNEL_CUH_
#define TURBOKV_DECOMPRESS_KERNEL_CUH_

#include "turbokv/decompress/params.cuh"
#include "turbokv/decompress/schedule.cuh"
#include "turbokv/decompress/worker.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace decompress_detail {

/*! \brief Set up the warps of a role, and choose the width. */
template <int PADDED_DIM, bool ROTATED, role_t ROLE>
TURBOKV_DEVICE void RunRole(const decompress_params_t& params, uint4* negate) {
  constexpr bool kKey = ROLE == role_t::kKey;
  if ((kKey ? params.out_k : params.out_v) == nullptr) {
    ptx::WaitForPrimary();  // else this kernel might seem done before the one before it
    return;
  }
  const vector_format_t& format = kKey ? params.k_format : params.v_format;
  if constexpr (!ROTATED) {
    for (int i = threadIdx.x; i < PADDED_DIM / 2; i += kWarps * 32) {
      const uint32_t bits = format.signs[i / 16] >> (i % 16 * 2);
      reinterpret_cast<uint32_t*>(negate)[i] = (bits & 1) << 15 | (bits & 2) << 30;
    }
    __syncthreads();
  }
  // All before this may overlap the end of the kernel before.
  ptx::WaitForPrimary();
  ptx::LaunchDependents();
  const int64_t strides = kKey ? params.k_token_stride | params.k_head_stride
                               : params.v_token_stride | params.v_head_stride;
  const int dim = ROTATED ? PADDED_DIM : format.head_dim;
  const decompress_worker_t<PADDED_DIM, ROTATED, ROLE> worker = {
      {
          params,
          format,
          static_cast<int>(threadIdx.x % 32),
          ((strides | dim) & 7) == 0 &&
              reinterpret_cast<uintptr_t>(kKey ? params.out_k : params.out_v) % 16 == 0,
          dim % 2 == 0 && reinterpret_cast<uintptr_t>(params.k_offset) % 8 == 0,
      },
      negate,
  };
  tile_schedule_t schedule(params, threadIdx.x / 32);
  switch (format.codebook.bits) {
    case 2:
      return worker.template Run<2>(schedule);
    case 3:
      return worker.template Run<3>(schedule);
    case 4:
      return worker.template Run<4>(schedule);
    case 5:
      return worker.template Run<5>(schedule);
    default:
      return worker.template Run<8>(schedule);
  }
}

/*! \brief One row of the grid expands K, the other V. A warp takes tiles, one head at a time. */
template <int PADDED_DIM, bool ROTATED>
__global__ void __launch_bounds__(kWarps * 32, PADDED_DIM <= 128   ? 4
                                               : PADDED_DIM == 256 ? 3
                                                                   : 2)
    DecompressPagesKernel(const __grid_constant__ decompress_params_t params) {
  __shared__ uint4 negate[ROTATED ? 1 : PADDED_DIM / 8];
  if (blockIdx.y == 0) {
    RunRole<PADDED_DIM, ROTATED, role_t::kKey>(params, negate);
  } else {
    RunRole<PADDED_DIM, ROTATED, role_t::kValue>(params, negate);
  }
}

}  // namespace decompress_detail
}  // namespace turbokv

#endif  // TURBOKV_DECOMPRESS_KERNEL_CUH_
