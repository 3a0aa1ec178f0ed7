// SPDX-License-Identifier: Apache-2.0
// Number types and the arithmetic that fixes bytes: fp32 with one rounding after every operation,
// and conversions from and to 16 bits. The same functions run on the device and, without CUDA, on
// the host.
#ifndef TURBOKV_TYPES_CUH_
#define TURBOKV_TYPES_CUH_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define TURBOKV_HOST_DEVICE __host__ __device__ __forceinline__
#define TURBOKV_DEVICE __device__ __forceinline__
#else
#define TURBOKV_HOST_DEVICE inline
#endif

#if defined(__CUDA_ARCH__)
#define TURBOKV_UNROLL _Pragma("unroll")
#else
#define TURBOKV_UNROLL  // host compilers warn of pragmas they do not know
#endif

namespace turbokv {

#if defined(__CUDACC__)
using half_t = __half;
using bfloat16_t = __nv_bfloat16;
#else
/*! \brief 16-bit numbers where CUDA's are missing: their bits. */
struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};
#endif

/*! \brief Element type of a tensor whose type is known at run time. */
enum class dtype_t : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

TURBOKV_HOST_DEVICE constexpr int DTypeBytes(dtype_t dtype) {
  return dtype == dtype_t::kFloat32 ? 4 : 2;
}

// --- fp32 with one rounding an operation ---
// On the device these are never contracted to fused multiply-adds. Compile host code for targets
// that have a fused multiply-add with -ffp-contract=off.

TURBOKV_HOST_DEVICE float Add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

TURBOKV_HOST_DEVICE float Sub(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, -b);
#else
  return a - b;
#endif
}

TURBOKV_HOST_DEVICE float Mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

TURBOKV_HOST_DEVICE float Div(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

TURBOKV_HOST_DEVICE float Sqrt(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

TURBOKV_HOST_DEVICE float Abs(float a) {
#if defined(__CUDA_ARCH__)
  return fabsf(a);
#else
  return std::fabs(a);
#endif
}

/*! \brief Clamp to [-limit, limit]; NaN stays. */
TURBOKV_HOST_DEVICE float Clamp(float x, float limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}

TURBOKV_HOST_DEVICE uint32_t FloatBits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

TURBOKV_HOST_DEVICE float BitsFloat(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

// --- 16 bits, to nearest even ---

TURBOKV_HOST_DEVICE uint16_t FloatToHalfBits(float x) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = FloatBits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and up
  uint32_t exponent = magnitude >> 23, mantissa = (magnitude & 0x7fffff) | 0x800000;
  if (exponent < 102) return static_cast<uint16_t>(sign);  // below half the smallest subnormal
  // 13 bits go, and more if the result is subnormal
  const uint32_t shift = exponent >= 113 ? 13 : 126 - exponent;
  uint32_t kept = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
  if (rest > half || (rest == half && (kept & 1))) ++kept;
  // `kept` holds the implicit bit, so the exponent is one less; a carry moves on to it
  return static_cast<uint16_t>(sign | ((exponent >= 113 ? (exponent - 113) << 10 : 0) + kept));
#endif
}

TURBOKV_HOST_DEVICE float HalfBitsToFloat(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(bits));
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return BitsFloat(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return BitsFloat(sign | ((magnitude << 13) + (112u << 23)));
  const float value = static_cast<float>(magnitude) * (1.0f / 16777216.0f);  // subnormal: exact
  return sign ? -value : value;
#endif
}

TURBOKV_HOST_DEVICE uint16_t FloatToBFloat16Bits(float x) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = FloatBits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

TURBOKV_HOST_DEVICE float BFloat16BitsToFloat(uint16_t bits) {
  return BitsFloat(static_cast<uint32_t>(bits) << 16);
}

/*! \brief Element `i` of a tensor of any dtype as fp32: exact. */
TURBOKV_HOST_DEVICE float LoadElement(const void* data, int64_t i, dtype_t dtype) {
  if (dtype == dtype_t::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == dtype_t::kFloat16 ? HalfBitsToFloat(bits) : BFloat16BitsToFloat(bits);
}

/*! \brief Round `x` to element `i` of a tensor of any dtype. */
TURBOKV_HOST_DEVICE void StoreElement(void* data, int64_t i, dtype_t dtype, float x) {
  if (dtype == dtype_t::kFloat32) {
    static_cast<float*>(data)[i] = x;
  } else {
    static_cast<uint16_t*>(data)[i] =
        dtype == dtype_t::kFloat16 ? FloatToHalfBits(x) : FloatToBFloat16Bits(x);
  }
}

}  // namespace turbokv

#endif  // TURBOKV_TYPES_CUH_
