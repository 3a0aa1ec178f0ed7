// SPDX-License-Identifier: Apache-2.0
// Rotation of queries before, and of outputs after, an attention kernel that works in rotated space
// and in fp16. A warp has a vector; a lane HEAD_DIM / 32 neighbouring coordinates of it.
#ifndef TURBOKV_FLASHINFER_ROTATE_CUH_
#define TURBOKV_FLASHINFER_ROTATE_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/hadamard.cuh"
#include "turbokv/types.cuh"

namespace turbokv {

/*! \brief Vectors on either side of a rotation. Strides are in elements. */
struct rotate_params_t {
  void* outside;  // [num_tokens, num_heads, head_dim]
  int64_t outside_stride_n, outside_stride_h;
  dtype_t dtype;
  __half* rotated;  // [num_tokens, num_heads, padded_dim], contiguous
  int32_t num_tokens, num_heads, head_dim;
  const int32_t* live_tokens;          // on the device: tokens from *live_tokens on are left alone
  uint32_t signs[kMaxPaddedDim / 32];  // bit j % 32 of word j / 32: coordinate j is negated
  const float* lse;  // [num_tokens, num_heads]; copied to `lse_outside` unless null
  float* lse_outside;
  int64_t lse_stride_n, lse_stride_h;
};

namespace flashinfer_detail {

constexpr int kRotateWarps = 4;
constexpr float kNothingSeen = -4.9e4f;

template <int PADDED_DIM, bool INVERSE>
__global__ void __launch_bounds__(kRotateWarps * 32)
    RotateKernel(const __grid_constant__ rotate_params_t p) {
  constexpr int kOwn = PADDED_DIM / 32;
  __shared__ uint32_t signs[PADDED_DIM / 32];  // indexing a parameter would copy it to local memory
  if (threadIdx.x < PADDED_DIM / 32) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < PADDED_DIM / 32; ++i) word = threadIdx.x == i ? p.signs[i] : word;
    signs[threadIdx.x] = word;
  }
  __syncthreads();
  const int lane = threadIdx.x % 32, first = lane * kOwn;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kRotateWarps + threadIdx.x / 32;
  if (vector >= static_cast<int64_t>(p.num_tokens) * p.num_heads) return;
  const int64_t token = vector / p.num_heads, head = vector % p.num_heads;
  if (token >= __ldg(p.live_tokens)) return;
  const int64_t at = token * p.outside_stride_n + head * p.outside_stride_h;
  __half* rotated = p.rotated + vector * PADDED_DIM;
  const uint32_t negated = signs[first / 32] >> (first % 32);
  const float root = rsqrtf(static_cast<float>(PADDED_DIM));
  float x[kOwn];
  if constexpr (INVERSE) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) x[i] = __half2float(rotated[first + i]);
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float value =
          first + i < p.head_dim ? LoadElement(p.outside, at + first + i, p.dtype) : 0.f;
      x[i] = (negated >> i & 1) ? -value : value;
    }
  }
  Hadamard(x);
  HadamardAcrossLanes<kOwn, 32>(x, lane);
  if constexpr (INVERSE) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float value = x[i] * ((negated >> i & 1) ? -root : root);
      if (first + i < p.head_dim) StoreElement(p.outside, at + first + i, p.dtype, value);
    }
    if (p.lse_outside != nullptr && lane == 0) {
      // FlashInfer's infinity is 5e4; of what saw no token, callers want the real one
      const float lse = p.lse[vector];
      p.lse_outside[token * p.lse_stride_n + head * p.lse_stride_h] =
          lse <= kNothingSeen ? __int_as_float(0xff800000) : lse;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) rotated[first + i] = __float2half_rn(x[i] * root);
  }
}

}  // namespace flashinfer_detail

/*! \brief Bring `outside` to rotated space, or with INVERSE `rotated` back; one launch. */
template <int PADDED_DIM, bool INVERSE>
cudaError_t Rotate(const rotate_params_t& params, cudaStream_t stream) {
  constexpr int kWarps = flashinfer_detail::kRotateWarps;
  const int64_t vectors = static_cast<int64_t>(params.num_tokens) * params.num_heads;
  if (vectors == 0) return cudaSuccess;
  const int64_t blocks = (vectors + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  flashinfer_detail::RotateKernel<PADDED_DIM, INVERSE>
      <<<static_cast<unsigned>(blocks), kWarps * 32, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace turbokv

#endif  // TURBOKV_FLASHINFER_ROTATE_CUH_
