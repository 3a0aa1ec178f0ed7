// SPDX-License-Identifier: Apache-2.0
// The rotation: random signs, then the Walsh-Hadamard transform in Sylvester order (FORMAT.md,
// section 2). Strides run 1, 2, 4, ...: that order, and the order of tree sums, decide roundings
// and so bytes.
#ifndef TURBOKV_HADAMARD_CUH_
#define TURBOKV_HADAMARD_CUH_

#include "turbokv/types.cuh"

namespace turbokv {

enum class role_t : int32_t { kKey = 0, kValue = 1 };

constexpr int kMaxPaddedDim = 512;
constexpr uint32_t kDefaultSeed = 42;

/*! \brief Next power of two: the coordinates that are rotated and stored. */
TURBOKV_HOST_DEVICE constexpr int PaddedDim(int head_dim) {
  int dim = 1;
  while (dim < head_dim) dim *= 2;
  return dim;
}

/*! \brief Output of SplitMix64 (Steele et al., OOPSLA 2014) for state `x`. */
TURBOKV_HOST_DEVICE constexpr uint64_t SplitMix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

/*! \brief Whether the rotation negates coordinate `j`. */
TURBOKV_HOST_DEVICE constexpr bool IsNegated(role_t role, uint32_t seed, int j) {
  const uint64_t base = static_cast<uint64_t>(seed) + (role == role_t::kKey ? 0 : 500);
  return SplitMix64((base << 32) + static_cast<uint64_t>(j)) >> 63 != 0;
}

/*! \brief Unnormalised transform of N values in place, from stride FIRST on. */
template <int N, int FIRST = 1>
TURBOKV_HOST_DEVICE void Hadamard(float (&x)[N]) {
  TURBOKV_UNROLL
  for (int stride = FIRST; stride < N; stride *= 2) {
    TURBOKV_UNROLL
    for (int i = 0; i < N; ++i) {
      if ((i & stride) == 0) {
        const float a = x[i], b = x[i + stride];
        x[i] = Add(a, b);
        x[i + stride] = Sub(a, b);
      }
    }
  }
}

/*! \brief Sum of N values, neighbours first. */
template <int N>
TURBOKV_HOST_DEVICE float TreeSum(const float (&x)[N]) {
  float terms[N];
  TURBOKV_UNROLL
  for (int i = 0; i < N; ++i) terms[i] = x[i];
  TURBOKV_UNROLL
  for (int n = N / 2; n > 0; n /= 2) {
    TURBOKV_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      if (i < n) terms[i] = Add(terms[2 * i], terms[2 * i + 1]);
    }
  }
  return terms[0];
}

/*! \brief Sum of squares of N values, neighbours first. */
template <int N>
TURBOKV_HOST_DEVICE float TreeSumSquares(const float (&x)[N]) {
  float terms[N];
  TURBOKV_UNROLL
  for (int i = 0; i < N; ++i) terms[i] = Mul(x[i], x[i]);
  return TreeSum(terms);
}

#if defined(__CUDACC__)

/*! \brief The stages that follow Hadamard<N> when LANES neighbouring lanes hold N consecutive
 *  coordinates each, lane 0 of them the first.
 */
template <int N, int LANES>
TURBOKV_DEVICE void HadamardAcrossLanes(float (&x)[N], int lane) {
  TURBOKV_UNROLL
  for (int stride = 1; stride < LANES; stride *= 2) {
    // own * -+1 is exact, so the fused form rounds as the sum or difference does
    const float sign = (lane & stride) ? -1.0f : 1.0f;
    TURBOKV_UNROLL
    for (int i = 0; i < N; ++i) {
      x[i] = __fmaf_rn(x[i], sign, __shfl_xor_sync(~0u, x[i], stride));
    }
  }
}

/*! \brief Sum over LANES neighbouring lanes, neighbours first; every lane gets it. */
template <int LANES>
TURBOKV_DEVICE float TreeSumAcrossLanes(float x) {
  TURBOKV_UNROLL
  for (int stride = 1; stride < LANES; stride *= 2) {
    x = __fadd_rn(x, __shfl_xor_sync(~0u, x, stride));
  }
  return x;
}

#endif  // __CUDACC__

}  // namespace turbokv

#endif  // TURBOKV_HADAMARD_CUH_
