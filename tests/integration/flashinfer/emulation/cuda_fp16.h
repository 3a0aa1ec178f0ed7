// SPDX-License-Identifier: Apache-2.0
// What the tile loader uses of CUDA, for g++; fp16 with one rounding.
#ifndef TURBOKV_TESTS_EMULATION_CUDA_FP16_H_
#define TURBOKV_TESTS_EMULATION_CUDA_FP16_H_

#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __forceinline__ inline

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
void __syncthreads();

struct __half {
  _Float16 x;
};
struct __half2 {
  _Float16 x, y;
};
inline __half __ushort_as_half(uint16_t bits) {
  __half h;
  std::memcpy(&h, &bits, 2);
  return h;
}
inline __half2 __half2half2(__half h) { return {h.x, h.x}; }
inline __half2 __float2half2_rn(float x) { return {_Float16(x), _Float16(x)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {_Float16(x), _Float16(y)}; }
// products of two fp16 numbers are exact in double, and so are sums with a third of like size
inline _Float16 Fma16(_Float16 a, _Float16 b, _Float16 c) {
  return _Float16(double(a) * double(b) + double(c));
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return {Fma16(a.x, b.x, _Float16(0)), Fma16(a.y, b.y, _Float16(0))};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {Fma16(a.x, b.x, c.x), Fma16(a.y, b.y, c.y)};
}
inline __half2 __hsub2(__half2 a, __half2 b) {
  return {_Float16(float(a.x) - float(b.x)), _Float16(float(a.y) - float(b.y))};
}

#endif  // TURBOKV_TESTS_EMULATION_CUDA_FP16_H_
