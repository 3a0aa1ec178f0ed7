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
  // Outputs and sums count in units where a V scale of v_top is 2^kTopExponent; sums leave V's
  // scales out.
  float v_top, v_gain, v_exponent;

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
    v_exponent = kTopExponent + kLowestTopExponent;
  }

  /*! \brief Turn scores into probabilities, times V's scales, as B operands: tokens along k. `unit`
   * turns scores into powers of two. Without V scales (WINDOW) probabilities are multiplied by
   * kWindowGain. `zero` is 0, and if the compiler knew there would be two copies of the code.
   *
   * Maxima are raised only when a product with the old ones is too large for its 16 bits, or a sum
   * for comfort: what was computed is then computed again. After an item's first step that is
   * rare, so that no maximum over tokens is needed otherwise. */
  template <int TILES, bool WINDOW>
  __device__ __forceinline__ void Softmax(const float (&s)[TILES][kNB][2 * kHalves],
                                          const float (&v_scale)[TILES][kHalves],
                                          const float (&unit)[kNB][2], int zero,
                                          uint32_t (&pb)[TILES][kNB][2]) {
    float sum[kNB][2];
    int raised = zero;
    bool grows;
#pragma unroll 1
    do {
      if (raised != 0) Raise<TILES, WINDOW>(s, v_scale, unit);
      __half2 most = __float2half2_rn(0.f);
      grows = false;
#pragma unroll
      for (int n = 0; n < kNB; ++n) {
        // V's gain is in the exponent; sums count it as well
        const float exponent = WINDOW ? 0.f : v_exponent;
        const float c0 = fmaf(m[n][0], unit[n][0], -exponent);
        const float c1 = fmaf(m[n][1], unit[n][1], -exponent);
        sum[n][0] = l[n][0], sum[n][1] = l[n][1];
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            const float p0 = ptx::Exp2(fmaf(s[i][n][2 * half], unit[n][0], -c0));
            const float p1 = ptx::Exp2(fmaf(s[i][n][2 * half + 1], unit[n][1], -c1));
            if constexpr (WINDOW) {
              sum[n][0] = fmaf(p0, v_gain, sum[n][0]), sum[n][1] = fmaf(p1, v_gain, sum[n][1]);
            } else {
              sum[n][0] += p0, sum[n][1] += p1;
            }
            const float gain = WINDOW ? kWindowGain : v_scale[i][half];
            const __half2 product = __floats2half2_rn(p0 * gain, p1 * gain);
            most = __hmax2_nan(most, product);
            pb[i][n][half] = ptx::Transpose8x8(*reinterpret_cast<const uint32_t*>(&product));
          }
          // The matrix had token g in columns 0..3 and token g + 8 in 4..7: transposed, lanes of
          // g < 4 have the first half of column g, and those of g + 4 the second.
          if constexpr (kHalves == 1) pb[i][n][1] = __shfl_xor_sync(~0u, pb[i][n][0], 16);
        }
        grows |= !(fmaxf(sum[n][0], sum[n][1]) < kMostSum);
      }
      // neither is negative: they compare like integers, infinity and NaN above all
      const uint32_t both = *reinterpret_cast<const uint32_t*>(&most);
      grows |= max(both >> 16, both & 0xffff) > kMostProduct;
    } while (__any_sync(~0u, grows) && raised++ == 0);
#pragma unroll
    for (int n = 0; n < kNB; ++n) l[n][0] = sum[n][0], l[n][1] = sum[n][1];
  }

  /*! \brief Raise maxima to those of a step, and count what there is in their units. */
  template <int TILES, bool WINDOW>
  __device__ __forceinline__ void Raise(const float (&s)[TILES][kNB][2 * kHalves],
                                        const float (&v_scale)[TILES][kHalves],
                                        const float (&unit)[kNB][2]) {
    float shrink = 1;
    if constexpr (!WINDOW) {
      float largest = 0;
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) largest = fmaxf(largest, v_scale[i][half]);
      }
#pragma unroll
      for (int q = 1; q < 32; q *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, q));
      if (largest > v_top) {
        // the next power of two, exactly; dividing by it is exact as well
        const int ceiling = (__float_as_int(largest) & 0x7f800000) + 0x00800000;
        shrink = v_top * __int_as_float(0x7f000000 - ceiling);
        v_top = __int_as_float(ceiling);
        v_gain = (1 << kTopExponent) * __int_as_float(0x7f000000 - ceiling);
        v_exponent = static_cast<float>(kTopExponent + 127 - (ceiling >> 23));
      }
    }
#pragma unroll
    for (int n = 0; n < kNB; ++n) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        float y = m[n][x];
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
          for (int half = 0; half < kHalves; ++half) y = fmaxf(y, s[i][n][2 * half + x]);
        }
#pragma unroll
        for (int q = 2 * kHalves; q < 32; q *= 2) y = fmaxf(y, __shfl_xor_sync(~0u, y, q));
        const float f = ptx::Exp2((m[n][x] - y) * unit[n][x]) * shrink;
        m[n][x] = y;
        l[n][x] *= f;
        correction[n][x] *= f, correction[n][2 + x] *= f;
#pragma unroll
        for (int i = 0; i < C::kOutBlocks; ++i) o[n][i][x] *= f, o[n][i][2 + x] *= f;
      }
    }
  }

  /*! \brief 1 / v_gain, without a division. */
  __device__ __forceinline__ float PerGain() const { return v_top * (1.f / (1 << kTopExponent)); }

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
