// SPDX-License-Identifier: Apache-2.0
// The online softmax of a warp (Milakov and Gimelshein, arXiv:1805.02867) and the output it scales,
// with probabilities in fp16.
#ifndef TURBOKV_DECODE_SOFTMAX_CUH_
#define TURBOKV_DECODE_SOFTMAX_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "turbokv/decode/probability.cuh"
#include "turbokv/decode/score.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

constexpr int kLowestTopExponent = 30;
constexpr float kLowestTop = 1.f / (1 << kLowestTopExponent);  // below every positive fp16
// Maxima are raised to those seen only when a probability times a V scale, which with them is at
// most 2 to kTopExponent, exceeds kMaxProduct: so rarely that it costs nothing. Both are inside
// fp16, as is the sum of two, and far from its subnormals. The sum of probabilities is watched as
// well, for V scales of zero.
constexpr int kTopExponent = 11;
constexpr uint32_t kMaxProduct = (14 + 15) << 10;  // bits of 2^14 in fp16
constexpr float kMaxSum = 1.2e24f;                 // 2^80: fp32 has room for more

/*! \brief Online softmax and output of this lane's columns. Outputs are in the fragments of
 * products: coordinates as rows; with four query rows odd columns mean nothing. */
template <class C>
struct half_softmax_t {
  using V = typename C::v_t;
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
          p.Pack(i, n, product, largest);
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

  /*! \brief Turn scores of a 16-bit copy into probabilities for fp16 products. What those give,
   * times `gain`, AddCopy takes; `v_unit` is that of V's levels. */
  __device__ __forceinline__ void CopyProbabilities(const scores_t<C, 1>& scores,
                                                    const float (&unit)[kColumns], float v_unit,
                                                    int zero, half_probabilities_t<C, 1>& p,
                                                    float (&gain)[kColumns]) {
    Probabilities<true>(scores, unit, zero, p);
#pragma unroll
    for (int x = 0; x < kColumns; ++x) gain[x] = __fdividef(v_gain, v_unit * kCopyGain);
  }

  /*! \brief Add to the output of a block of coordinates. */
  __device__ __forceinline__ void AddCopy(int block, int half, int x, float value) {
    o[x / 2][block][2 * half + x % 2] += value / V::OutputUnit(block % V::kBlocks, half);
  }

  /*! \brief After the last step: what Max, Sum and Output are. */
  __device__ __forceinline__ void Close(const float (&unit)[kColumns]) {
#pragma unroll
    for (int x = 0; x < kColumns; ++x) m[x] *= unit[x];
  }
  /*! \brief In powers of two, what the sum and outputs of a column are relative to. */
  __device__ __forceinline__ float Max(int x) const { return m[x]; }
  /*! \brief This lane's part of the sum of probabilities. */
  __device__ __forceinline__ float Sum(int x) const { return l[x] * PerGain(); }
  /*! \brief In V's unit. */
  __device__ __forceinline__ float Output(int block, int half, int x) const {
    const int n = x / 2, e = 2 * half + x % 2;
    const float raw = o[n][block][e] * V::OutputUnit(block % V::kBlocks, half);
    return (raw + correction[n][e]) * PerGain();
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

 private:
  /*! \brief 1 / v_gain, without a division. */
  __device__ __forceinline__ float PerGain() const { return v_top * (1.f / (1 << kTopExponent)); }

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
