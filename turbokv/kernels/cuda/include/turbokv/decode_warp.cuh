// SPDX-License-Identifier: Apache-2.0
// What a warp does to vectors in decode: loads and stores of any dtype, the Walsh-Hadamard
// transform, signs, small integers.
#ifndef TURBOKV_DECODE_WARP_CUH_
#define TURBOKV_DECODE_WARP_CUH_

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

/*! \brief Walsh-Hadamard transform of a vector that a warp holds, N consecutive coordinates a lane.
 */
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

/*! \brief Bits i of a lane's N coordinates, from lane * N on: whether they are negated. Selected,
 * as indexing a parameter would copy it to local memory. */
template <int N>
__device__ __forceinline__ uint32_t LaneSigns(const uint32_t (&signs)[16], int lane) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) word = lane * N / 32 == i ? signs[i] : word;
  return word >> (lane * N % 32);
}

/*! \brief x / y of integers, x >= 0 and y > 0, for quotients below 2^21: a third of the
 * instructions of a division. */
__device__ __forceinline__ int Quotient(int x, int y) {
  int q = static_cast<int>(__fdividef(static_cast<float>(x), static_cast<float>(y)));
  const int rest = x - q * y;
  q += rest >= y ? 1 : 0;
  q -= rest < 0 ? 1 : 0;
  return q;
}

/*! \brief The last i with table[i] <= x, below n; table[0] <= x, in rising order. */
__device__ __forceinline__ int LastAtMost(const int* table, int n, int x) {
  int low = 0, high = n;
  while (high - low > 1) {
    const int mid = (low + high) >> 1;
    if (table[mid] <= x) {
      low = mid;
    } else {
      high = mid;
    }
  }
  return low;
}

/*! \brief x * y / z of integers, z > 0, for results below 2^21: a product of 64 bits, but no
 * division of such. */
__device__ __forceinline__ int ProductQuotient(int x, int y, int z) {
  int q = static_cast<int>(
      __fdividef(static_cast<float>(x) * static_cast<float>(y), static_cast<float>(z)));
  const int64_t rest = static_cast<int64_t>(x) * y - static_cast<int64_t>(q) * z;
  q += rest >= z ? 1 : 0;
  q -= rest < 0 ? 1 : 0;
  return q;
}

/*! \brief x * i / n of integers, 0 <= i <= n < 2^15, without a number of 64 bits. */
__device__ __forceinline__ int Share(int x, int i, int n) {
  const unsigned whole = static_cast<unsigned>(x) / n, rest = x - whole * n;
  return static_cast<int>(whole * i + rest * i / n);
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

#endif  // TURBOKV_DECODE_WARP_CUH_
