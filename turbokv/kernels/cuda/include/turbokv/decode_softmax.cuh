// SPDX-License-Identifier: Apache-2.0
// The online softmax of a warp (Milakov and Gimelshein, arXiv:1805.02867) and the output it scales.
#ifndef TURBOKV_DECODE_SOFTMAX_CUH_
#define TURBOKV_DECODE_SOFTMAX_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode_config.cuh"
#include "turbokv/decode_warp.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief Online softmax and output of the columns a lane holds: rows of the fragments are tokens
 * in scores and coordinates in outputs, columns are 2t and 2t + 1 of each block of eight. With four
 * columns, lanes t and t ^ 2 have the same: the first holds token g, the second g + 8, and outputs
 * of columns four to seven mean nothing. */
template <class C>
struct state_t {
  static constexpr int kNB = C::kBlocks8, kHalves = C::kHalves;
  float o[kNB][C::kOutBlocks][4];
  float correction[kNB][4];  // what the constant in V's operands has added to every output, negated
  float m[kNB][2], l[kNB][2];
  float v_top, v_gain;  // outputs count in units where a V scale of v_top is 2^kTopExponent

  __device__ __forceinline__ void Reset() {
#pragma unroll
    for (int n = 0; n < kNB; ++n) {
#pragma unroll
      for (int i = 0; i < C::kOutBlocks; ++i) o[n][i][0] = o[n][i][1] = o[n][i][2] = o[n][i][3] = 0;
      correction[n][0] = correction[n][1] = correction[n][2] = correction[n][3] = 0;
      m[n][0] = m[n][1] = kNever;
      l[n][0] = l[n][1] = 0;
    }
    v_top = kLowestTop;
    v_gain = (1 << kTopExponent) / kLowestTop;
  }

  /*! \brief Turn scores into probabilities, times V's scales, as B operands: tokens along k. `unit`
   * turns scores into powers of two, `slack` is kSlack in scores. Without V scales (WINDOW)
   * probabilities are multiplied by kWindowGain. */
  template <int TILES, bool WINDOW>
  __device__ __forceinline__ void Softmax(const float (&s)[TILES][kNB][2 * kHalves],
                                          const float (&v_scale)[TILES][kHalves],
                                          const float (&unit)[kNB][2], const float (&slack)[kNB][2],
                                          uint32_t (&pb)[TILES][kNB][2]) {
    float top[kNB][2], v_largest = 0;
    bool grows = false;
#pragma unroll
    for (int n = 0; n < kNB; ++n) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        top[n][x] = s[0][n][x];
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
          for (int half = i == 0; half < kHalves; ++half) {
            top[n][x] = fmaxf(top[n][x], s[i][n][2 * half + x]);
          }
        }
        grows |= top[n][x] > m[n][x] + slack[n][x];
      }
    }
    if constexpr (!WINDOW) {
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) v_largest = fmaxf(v_largest, v_scale[i][half]);
      }
      grows |= v_largest > v_top;
    }
    // Rare after the first steps, so the exact maximum over tokens waits until a lane asks for it.
    if (__any_sync(~0u, grows)) Rescale<WINDOW>(top, v_largest, unit);
#pragma unroll
    for (int n = 0; n < kNB; ++n) {
      const float c0 = m[n][0] * unit[n][0], c1 = m[n][1] * unit[n][1];
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const float p0 = ptx::Exp2(fmaf(s[i][n][2 * half], unit[n][0], -c0));
          const float p1 = ptx::Exp2(fmaf(s[i][n][2 * half + 1], unit[n][1], -c1));
          l[n][0] += p0, l[n][1] += p1;
          const float gain = WINDOW ? kWindowGain : v_scale[i][half] * v_gain;
          pb[i][n][half] = ptx::Transpose8x8(PackHalf2(p0 * gain, p1 * gain));
        }
        // The matrix had token g in columns 0..3 and token g + 8 in 4..7: transposed, lanes of
        // g < 4 have the first half of column g, and those of g + 4 the second.
        if constexpr (kHalves == 1) pb[i][n][1] = __shfl_xor_sync(~0u, pb[i][n][0], 16);
      }
    }
  }

  template <bool WINDOW>
  __device__ __forceinline__ void Rescale(const float (&top)[kNB][2], float v_largest,
                                          const float (&unit)[kNB][2]) {
    float shrink = 1;
    if constexpr (!WINDOW) {
#pragma unroll
      for (int q = 1; q < 32; q *= 2)
        v_largest = fmaxf(v_largest, __shfl_xor_sync(~0u, v_largest, q));
      if (v_largest > v_top) {
        // the next power of two, exactly; dividing by it is exact as well
        const int ceiling = (__float_as_int(v_largest) & 0x7f800000) + 0x00800000;
        shrink = v_top * __int_as_float(0x7f000000 - ceiling);
        v_top = __int_as_float(ceiling);
        v_gain = (1 << kTopExponent) * __int_as_float(0x7f000000 - ceiling);
      }
    }
#pragma unroll
    for (int n = 0; n < kNB; ++n) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        float y = top[n][x];
#pragma unroll
        for (int q = 2 * kHalves; q < 32; q *= 2) y = fmaxf(y, __shfl_xor_sync(~0u, y, q));
        y = fmaxf(m[n][x], y);
        const float f = ptx::Exp2((m[n][x] - y) * unit[n][x]);
        m[n][x] = y;
        l[n][x] *= f;
        const float fo = f * shrink;
        correction[n][x] *= fo, correction[n][2 + x] *= fo;
#pragma unroll
        for (int i = 0; i < C::kOutBlocks; ++i) o[n][i][x] *= fo, o[n][i][2 + x] *= fo;
      }
    }
  }

  __device__ __forceinline__ void Flush() {
#pragma unroll
    for (int n = 0; n < kNB; ++n) {
#pragma unroll
      for (int i = 0; i < C::kOutBlocks; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[n][i][e] += correction[n][e];
      }
      correction[n][0] = correction[n][1] = correction[n][2] = correction[n][3] = 0;
    }
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_SOFTMAX_CUH_
