// SPDX-License-Identifier: Apache-2.0
// CUDA's bf16 on the host, as much as the headers use.
#ifndef TURBOKV_EMULATED_CUDA_BF16_H_
#define TURBOKV_EMULATED_CUDA_BF16_H_

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16(float x) {
  const uint32_t bits = BitCast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __float2bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) {
  return BitCast<float>(static_cast<uint32_t>(x.bits) << 16);
}

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

#endif  // TURBOKV_EMULATED_CUDA_BF16_H_
