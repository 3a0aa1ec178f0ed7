// SPDX-License-Identifier: Apache-2.0
// What a warp does to vectors in decode: loads and stores of any dtype, the Walsh-Hadamard
// transform, sums, signs.
#ifndef TURBOKV_DECODE_WARP_CUH_
#define TURBOKV_DECODE_WARP_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/types.cuh"

namespace turbokv {
namespace decode_detail {

__device__ __forceinline__ float LoadAs(const void* p, int64_t i, dtype_t dtype) {
  if (dtype == dtype_t::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  if (dtype == dtype_t::kFloat16) return __half2float(static_cast<const __half*>(p)[i]);
  return static_cast<const float*>(p)[i];
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

/*! \brief Sum N values over the lanes of a warp together: lane l gets the sum of value l / (32 /
 * N).
 */
template <int N, int LANES = 32>
__device__ __forceinline__ float SumSpread(const float (&x)[N], int lane) {
  if constexpr (N == 1) {
    float sum = x[0];
#pragma unroll
    for (int q = LANES / 2; q > 0; q /= 2) sum += __shfl_xor_sync(~0u, sum, q);
    return sum;
  } else {
    constexpr int kHalf = N / 2;
    const bool upper = lane & (LANES / 2);
    float y[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float keep = upper ? x[i + kHalf] : x[i], give = upper ? x[i] : x[i + kHalf];
      y[i] = keep + __shfl_xor_sync(~0u, give, LANES / 2);
    }
    return SumSpread<kHalf, LANES / 2>(y, lane);
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

__device__ __forceinline__ uint32_t PackHalf2(float a, float b) {
  const __half2 x = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&x);
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_WARP_CUH_
