// SPDX-License-Identifier: Apache-2.0
// CUDA's fp16 on the host, as much as the headers use.
#ifndef TURBOKV_EMULATED_CUDA_FP16_H_
#define TURBOKV_EMULATED_CUDA_FP16_H_

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  if (rest > 0x7c00) return BitCast<float>(0x7fffffffu);  // the NaN of every instruction
  if (rest == 0x7c00) return BitCast<float>(sign | 0x7f800000u);
  const float magnitude = rest >= 0x400 ? BitCast<float>((rest << 13) + (112u << 23))
                                        : static_cast<float>(rest) * 5.9604644775390625e-8f;
  return BitCast<float>(BitCast<uint32_t>(magnitude) | sign);
}
inline __half __float2half(float x) {
  const uint32_t bits = BitCast<uint32_t>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {0x7fff};
  if (rest >= 0x47800000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (rest < 0x38800000) {  // subnormal
    const float scaled = BitCast<float>(rest) * 16777216.f;
    return {static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(scaled)))};
  }
  const uint32_t rounded = rest + 0xfff + (rest >> 13 & 1) - (112u << 23);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}
inline __half __float2half_rn(float x) { return __float2half(x); }
inline __half __ushort_as_half(unsigned short x) { return {x}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline __half2 __float2half2_rn(float x) { return __floats2half2_rn(x, x); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline float __low2float(__half2 x) { return __half2float(x.x); }
inline float __high2float(__half2 x) { return __half2float(x.y); }
inline __half2 __hadd2(__half2 a, __half2 b) {
  return __floats2half2_rn(__low2float(a) + __low2float(b), __high2float(a) + __high2float(b));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __floats2half2_rn(std::fma(__low2float(a), __low2float(b), __low2float(c)),
                           std::fma(__high2float(a), __high2float(b), __high2float(c)));
}
inline __half HMaxNan(__half a, __half b) {
  const float x = __half2float(a), y = __half2float(b);
  return std::isnan(x) || std::isnan(y) ? __half{0x7fff} : x > y ? a : b;
}
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {HMaxNan(a.x, b.x), HMaxNan(a.y, b.y)}; }

#endif  // TURBOKV_EMULATED_CUDA_FP16_H_
