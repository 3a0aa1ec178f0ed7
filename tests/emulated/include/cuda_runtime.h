// SPDX-License-Identifier: Apache-2.0
// What the headers use of CUDA, on the host; see simt.h.
#ifndef TURBOKV_EMULATED_CUDA_RUNTIME_H_
#define TURBOKV_EMULATED_CUDA_RUNTIME_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#define threadIdx (simt::dim_t{static_cast<unsigned>(simt::current), 0, 0})
#define blockIdx (simt::block_index)
#define gridDim (simt::grid_size)

using std::isnan;
using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorNoKernelImageForDevice,
};

struct int2 {
  int x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- numbers ---

template <class To, class From>
To BitCast(From x) {
  static_assert(sizeof(To) == sizeof(From), "equal sizes");
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}
inline float __uint_as_float(uint32_t x) { return BitCast<float>(x); }
inline float __int_as_float(int x) { return BitCast<float>(x); }
// Instructions of a GPU give one NaN, whatever that of the host is.
inline uint32_t __float_as_uint(float x) {
  return std::isnan(x) ? 0x7fffffffu : BitCast<uint32_t>(x);
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t n) {
  n &= 31;
  return n ? high << n | low >> (32 - n) : high;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t n) {
  n &= 31;
  return n ? low >> n | high << (32 - n) : low;
}
inline uint32_t __vmaxu4(uint32_t a, uint32_t b) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i += 8) r |= std::max(a >> i & 255, b >> i & 255) << i;
  return r;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __log2f(float x) { return std::log2(x); }
inline int __float2int_rn(float x) {  // saturates, and NaN is zero
  if (std::isnan(x)) return 0;
  return static_cast<int>(std::nearbyint(std::clamp<double>(x, -2147483648.0, 2147483647.0)));
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }

// --- memory ---

template <class T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) simt::Fail("a load that is not aligned");
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return __ldg(p);
}
template <class T>
void __stcg(T* p, T x) {
  *p = x;
}
inline void __threadfence() {}
inline int atomicAdd(int* p, int x) {
  const int before = *p;
  *p += x;
  return before;
}

// --- warps ---

enum { kShuffle = 1, kVote, kReduce, kSync, kMma = 16 };

template <class T>
struct shuffle_t {
  T x;
  int from;
};
template <class T>
T Shuffle(T x, int from) {
  return simt::Together<shuffle_t<T>, T>(kShuffle, shuffle_t<T>{x, from & 31},
                                         [](const shuffle_t<T>* in, T* out) {
                                           for (int i = 0; i < 32; ++i) out[i] = in[in[i].from].x;
                                         });
}
inline int Lane() { return simt::current % 32; }
template <class T>
T __shfl_sync(uint32_t, T x, int from) {
  return Shuffle(x, from);
}
template <class T>
T __shfl_xor_sync(uint32_t, T x, int mask) {
  return Shuffle(x, Lane() ^ mask);
}
template <class T>
T __shfl_up_sync(uint32_t, T x, int by) {
  return Shuffle(x, Lane() >= by ? Lane() - by : Lane());
}
template <class T>
T __shfl_down_sync(uint32_t, T x, int by) {
  return Shuffle(x, Lane() + by < 32 ? Lane() + by : Lane());
}
inline uint32_t __ballot_sync(uint32_t, bool x) {
  return simt::Together<int, uint32_t>(kVote, static_cast<int>(x),
                                       [](const int* in, uint32_t* out) {
                                         uint32_t bits = 0;
                                         for (int i = 0; i < 32; ++i)
                                           bits |= static_cast<uint32_t>(in[i] != 0) << i;
                                         for (int i = 0; i < 32; ++i) out[i] = bits;
                                       });
}
inline bool __any_sync(uint32_t m, bool x) { return __ballot_sync(m, x) != 0; }
inline bool __all_sync(uint32_t m, bool x) { return __ballot_sync(m, x) == ~0u; }
inline int __reduce_add_sync(uint32_t, int x) {
  return simt::Together<int, int>(kReduce, x, [](const int* in, int* out) {
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += in[i];
    for (int i = 0; i < 32; ++i) out[i] = sum;
  });
}
inline void __syncwarp(uint32_t = ~0u) {
  simt::Together<int, int>(kSync, 0, [](const int*, int* out) {
    for (int i = 0; i < 32; ++i) out[i] = 0;
  });
}
inline void __syncthreads() { simt::MeetAll(false); }
inline bool __syncthreads_or(bool x) { return simt::MeetAll(x); }

#endif  // TURBOKV_EMULATED_CUDA_RUNTIME_H_
