// SPDX-License-Identifier: Apache-2.0
// Small integer arithmetic of decode's bookkeeping: divisions that cost little, and searches.
#ifndef TURBOKV_DECODE_INTEGER_CUH_
#define TURBOKV_DECODE_INTEGER_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace turbokv {
namespace decode_detail {

/*! \brief x / y of integers, x >= 0 and y > 0, for quotients below 2^21: a third of the
 * instructions of a division. */
__device__ __forceinline__ int FastDiv(int x, int y) {
  int q = static_cast<int>(__fdividef(static_cast<float>(x), static_cast<float>(y)));
  const int rest = x - q * y;
  q += rest >= y ? 1 : 0;
  q -= rest < 0 ? 1 : 0;
  return q;
}

/*! \brief x * y / z of integers, z > 0, for results below 2^21: a product of 64 bits, but no
 * division of such. */
__device__ __forceinline__ int FastMulDiv(int x, int y, int z) {
  int q = static_cast<int>(
      __fdividef(static_cast<float>(x) * static_cast<float>(y), static_cast<float>(z)));
  const int64_t rest = static_cast<int64_t>(x) * y - static_cast<int64_t>(q) * z;
  q += rest >= z ? 1 : 0;
  q -= rest < 0 ? 1 : 0;
  return q;
}

/*! \brief Where the i-th of n equal parts of x begins, 0 <= i <= n < 2^15: x * i / n without a
 * number of 64 bits. */
__device__ __forceinline__ int PartBegin(int x, int i, int n) {
  const unsigned quotient = static_cast<unsigned>(x) / n, rest = x - quotient * n;
  return static_cast<int>(quotient * i + rest * i / n);
}

/*! \brief The last i below n with table[i] <= x; table rises and table[0] <= x. */
__device__ __forceinline__ int LastNotAbove(const int* table, int n, int x) {
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

/*! \brief Sum of x over the lanes up to this one. */
__device__ __forceinline__ int WarpScan(int x, int lane) {
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int y = __shfl_up_sync(~0u, x, o);
    if (lane >= o) x += y;
  }
  return x;
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_INTEGER_CUH_
