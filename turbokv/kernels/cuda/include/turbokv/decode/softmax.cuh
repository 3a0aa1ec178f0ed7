// SPDX-License-Identifier: Apache-2.0
// The online softmax of a warp (Milakov and Gimelshein, arXiv:1805.02867) and the output it scales,
// with probabilities in fp16.
#ifndef TURBOKV_DECODE_SOFTMAX_CUH_
#define TURBOKV_DECODE_SOFTMAX_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "turbokv/decode/score.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/decode/vector.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

constexpr int kLowestTopExponent = 30;
constexpr float kLowestTop = 1.f / (1 << kLowestTopExponent);  // below every positive fp16
constexpr float kCopyGain = 1024.f;  // of the probabilities of 16-bit copies
// Maxima are raised to those seen only when a probability times a V scale, which with them is at
// most 2 to kTopExponent, exceeds kMaxProduct: so rarely that it costs nothing. Both are inside
// fp16, as is the sum of two, and far from its subnormals. The sum of probabilities is watched as
// well, for V scales of zero.
constexpr int kTopExponent = 11;
constexpr uint32_t kMaxProduct = (14 + 15) << 10;  // bits of 2^14 in fp16
constexpr float kMaxSum = 1.2e24f;                 // 2^80: fp32 has room for more

/*! \brief Probabilities of TILES tiles as B operands of fp16 products: tokens along k. */
template <class C, int TILES>
struct half_probabilities_t {
  uint32_t b[TILES][C::kTermBlocks][2];
};

/*! \brief Online softmax and output of this lane's columns. Outputs are in the fragments of
 * products: coordinates as rows; with four query rows odd columns mean nothing. */
template <class C>
struct half_softmax_t {
  static constexpr int kColumns = C::kLaneColumns, kBlocks = C::kTermBlocks;
  static constexpr int kPerBlock = C::kBlockColumns;
  float o[kBlocks][C::kOutBlocks][4];
  float correction[kBlocks][4];  // products with value_operand_t::kNegatedOffset
  float m[kColumns], l[kColumns];
  // Outputs and sums count in units where a V scale of v_top is 2^kTopExponent; sums leave V's
  // scales out.
  float v_top, v_gain, v_exponent;
  int uncorrected;  // steps

  __device__ __forceinline__ void Reset() {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < C::kOutBlocks; ++i) o[n][i][0] = o[n][i][1] = o[n][i][2] = o[n][i][3] = 0;
      correction[n][0] = correction[n][1] = correction[n][2] = correction[n][3] = 0;
    }
#pragma unroll
    for (int x = 0; x < kColumns; ++x) m[x] = kNever, l[x] = 0;
    v_top = kLowestTop;
    v_gain = (1 << kTopExponent) / kLowestTop;
    v_exponent = kTopExponent + kLowestTopExponent;
    uncorrected = 0;
  }

  /*! \brief Turn scores into probabilities, times V's scales. Those of copies (COPIES) have no V
   * scales and are multiplied by kCopyGain.
   *
   *  Maxima are raised only when a product with the old ones is too large for its 16 bits, or a sum
   *  for comfort: what was computed is then computed again. After an item's first step that is
   *  rare, so that no maximum over tokens is needed otherwise.
   *
   *  \param unit  Turns scores into powers of two.
   *  \param zero  0, which the compiler must not know: it would peel the loop and emit it twice.
   */
  template <bool COPIES, int TILES>
  __device__ __forceinline__ void Probabilities(const scores_t<C, TILES>& scores,
                                                const float (&unit)[kColumns], int zero,
                                                half_probabilities_t<C, TILES>& p) {
    float sum[kColumns];
    int raised = zero;
    bool grows;
#pragma unroll 1
    do {
      if (raised != 0) Raise<COPIES>(scores, unit);
      __half2 largest = __float2half2_rn(0.f);
      grows = false;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        float c[kPerBlock];
#pragma unroll
        for (int y = 0; y < kPerBlock; ++y) {
          // V's gain is in the exponent; sums count it as well
          c[y] = fmaf(m[n * 2 + y], unit[n * 2 + y], COPIES ? 0.f : -v_exponent);
          sum[n * 2 + y] = l[n * 2 + y];
        }
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
          float product[2][kPerBlock];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int y = 0; y < kPerBlock; ++y) {
              const int x = n * 2 + y;
              const float e = ptx::Exp2(fmaf(scores.s[i][half][x], unit[x], -c[y]));
              sum[x] = COPIES ? fmaf(e, v_gain, sum[x]) : sum[x] + e;
              product[half][y] = e * (COPIES ? kCopyGain : scores.v_scale[i][half]);
            }
          }
          Pack(product, p.b[i][n], largest);
        }
#pragma unroll
        for (int y = 0; y < kPerBlock; ++y) grows |= !(sum[n * 2 + y] < kMaxSum);
      }
      // none is negative: they compare like integers, infinity and NaN above all
      const uint32_t both = *reinterpret_cast<const uint32_t*>(&largest);
      grows |= max(both >> 16, both & 0xffff) > kMaxProduct;
    } while (__any_sync(~0u, grows) && raised++ == 0);
#pragma unroll
    for (int x = 0; x < kColumns; ++x) l[x] = sum[x];
  }

  /*! \brief Add what the constant in V's operands has cost to the outputs. */
  __device__ __forceinline__ void Correct() {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < C::kOutBlocks; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[n][i][e] += correction[n][e];
      }
      correction[n][0] = correction[n][1] = correction[n][2] = correction[n][3] = 0;
    }
    uncorrected = 0;
  }

  /*! \brief 1 / v_gain, without a division. */
  __device__ __forceinline__ float PerGain() const { return v_top * (1.f / (1 << kTopExponent)); }

 private:
  /*! \brief B operands of a tile: rows g of the fragment become k. */
  static __device__ __forceinline__ void Pack(const float (&product)[2][kPerBlock],
                                              uint32_t (&b)[2], __half2& largest) {
    if constexpr (C::kColumns == 4) {
      // Tokens g and g + 8 side by side. Transposed, even columns have tokens 2t and 2t + 1 of row
      // g / 2, odd ones 2t + 8 and 2t + 9: outputs use the even ones.
      const __half2 pair = __floats2half2_rn(product[0][0], product[1][0]);
      largest = __hmax2_nan(largest, pair);
      b[0] = ptx::Transpose8x8(*reinterpret_cast<const uint32_t*>(&pair));
      b[1] = __shfl_xor_sync(~0u, b[0], 4);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const __half2 pair = __floats2half2_rn(product[half][0], product[half][kPerBlock - 1]);
        largest = __hmax2_nan(largest, pair);
        b[half] = ptx::Transpose8x8(*reinterpret_cast<const uint32_t*>(&pair));
      }
    }
  }

  /*! \brief Raise maxima to those of a step, and count what there is in their units. */
  template <bool COPIES, int TILES>
  __device__ __forceinline__ void Raise(const scores_t<C, TILES>& scores,
                                        const float (&unit)[kColumns]) {
    const float shrink = COPIES ? 1.f : RaiseGain(scores);
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
      float y = m[x];
#pragma unroll
      for (int i = 0; i < TILES; ++i) y = fmaxf(fmaxf(y, scores.s[i][0][x]), scores.s[i][1][x]);
#pragma unroll
      for (int q = 4; q < 32; q *= 2) y = fmaxf(y, __shfl_xor_sync(~0u, y, q));
      const float f = ptx::Exp2((m[x] - y) * unit[x]) * shrink;
      m[x] = y;
      l[x] *= f;
      const int n = x / 2, e = x % 2;
      correction[n][e] *= f, correction[n][2 + e] *= f;
#pragma unroll
      for (int i = 0; i < C::kOutBlocks; ++i) o[n][i][e] *= f, o[n][i][2 + e] *= f;
    }
  }

  /*! \brief Choose a gain for larger V scales, if there are; by how much outputs shrink. */
  template <int TILES>
  __device__ __forceinline__ float RaiseGain(const scores_t<C, TILES>& scores) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      largest = fmaxf(fmaxf(largest, scores.v_scale[i][0]), scores.v_scale[i][1]);
    }
#pragma unroll
    for (int q = 1; q < 32; q *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, q));
    if (!(largest > v_top)) return 1;
    // the next power of two, exactly; dividing by it is exact as well
    const int ceiling = (__float_as_int(largest) & 0x7f800000) + 0x00800000;
    const float shrink = v_top * __int_as_float(0x7f000000 - ceiling);
    v_top = __int_as_float(ceiling);
    v_gain = (1 << kTopExponent) * __int_as_float(0x7f000000 - ceiling);
    v_exponent = static_cast<float>(kTopExponent + 127 - (ceiling >> 23));
    return shrink;
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_SOFTMAX_CUH_
