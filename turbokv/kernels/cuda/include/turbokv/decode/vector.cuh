// SPDX-License-Identifier: Apache-2.0
// What a warp does to a vector that it holds: loads and stores of any dtype, the Walsh-Hadamard
// transform, signs.
#ifndef TURBOKV_DECODE_VECTOR_CUH_
#define TURBOKV_DECODE_VECTOR_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/types.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief A number of a dtype, in the low bits. */
__device__ __forceinline__ float FromBits(uint32_t bits, dtype_t dtype) {
  if (dtype == dtype_t::kBFloat16) return __uint_as_float(bits << 16);
  if (dtype == dtype_t::kFloat32) return __uint_as_float(bits);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ void StoreAs(void* p, int64_t i, dtype_t dtype, float x) {
  if (dtype == dtype_t::kBFloat16) {
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16(x);
  } else if (dtype == dtype_t::kFloat16) {
    static_cast<__half*>(p)[i] = __float2half(x);
  } else {
    static_cast<float*>(p)[i] = x;
  }
}

/*! \brief Walsh-Hadamard transform of a vector that a warp holds, N consecutive coordinates per
 * lane. */
template <int N>
__device__ __forceinline__ void WarpHadamard(float (&x)[N], int lane) {
#pragma unroll
  for (int stride = 1; stride < N; stride *= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if ((i & stride) == 0) {
        const float a = x[i], b = x[i + stride];
        x[i] = a + b, x[i + stride] = a - b;
      }
    }
  }
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float other = __shfl_xor_sync(~0u, x[i], stride);
      x[i] = (lane & stride) ? other - x[i] : x[i] + other;
    }
  }
}

/*! \brief Bit i says whether coordinate lane * N + i is negated. Selected word by word: indexing a
 * parameter would copy it to local memory. */
template <int N>
__device__ __forceinline__ uint32_t LaneSigns(const uint32_t (&signs)[16], int lane) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) word = lane * N / 32 == i ? signs[i] : word;
  return word >> (lane * N % 32);
}

/*! \brief Sums of two pairs of fp16. */
__device__ __forceinline__ uint32_t AddHalf2(uint32_t a, uint32_t b) {
  const __half2 x =
      __hadd2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&x);
}

__device__ __forceinline__ uint32_t PackHalf2(float a, float b) {
  const __half2 x = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&x);
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_VECTOR_CUH_
