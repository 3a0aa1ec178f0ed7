// SPDX-License-Identifier: Apache-2.0
// The online softmax of a warp with probabilities as integers of 16 bits, for int8 products.
//
// A column's probabilities are 2^(score - c): c, its exponent, is chosen so that the largest
// product with a V scale in a step is 2^kTopBits. Products of later steps, rounded to integers,
// must fit 16 bits, and the largest of most must have more than kLowBits of them. Else exponents
// are chosen again: a step that costs a third more, for which the integers that were summed so far
// are added to outputs in fp32.
//
// Every step adds the same rounding, half a unit a token. What it may be relative to is what was
// summed so far, so that steps of few bits may follow ones of many: as many as there is credit for.
// Each step of enough bits earns as much as one of few costs, so that these are at most half and
// rounding grows by a factor of sqrt(2) at most over that of steps which all have kLowBits. A step
// whose largest product has just become 2^kHighestBits has 2^13 times the square of one of
// kLowBits: credit for kMostCredit steps is a 500th of that.
#ifndef TURBOKV_DECODE_INTEGER_SOFTMAX_CUH_
#define TURBOKV_DECODE_INTEGER_SOFTMAX_CUH_

#include <cstdint>

#include "turbokv/decode/lane.cuh"
#include "turbokv/decode/probability.cuh"
#include "turbokv/decode/score.cuh"
#include "turbokv/decode/traits.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace decode_detail {

// More bits round less and are chosen again more often. Of steps of 64 tokens, keys and values of
// unit variance and four rows, 8% are, and 12% with centred keys, at errors of up to 3e-4.
constexpr int kTopBits = 13, kLowBits = 9;
// Where the largest product of a step goes that has too many or too few.
constexpr float kHighestBits = 15.5f, kLowestBits = 11;
// In steps: the most, and that of an item's first step.
constexpr int kMostCredit = 16, kFirstCredit = 4;
// How far below the largest score seen exponents may be, in powers of two: what is less is nothing
// beside it, and sums stay inside fp32.
constexpr float kExponentRange = 60;
constexpr float kMaxIntegerSum = 1.2e30f;  // 2^100
// Sums of products of bytes stay inside 32 bits for so many tokens.
constexpr int kMaxIntegerTokens = 32000;

template <class C>
struct integer_softmax_t {
  using V = typename C::v_t;
  static constexpr int kColumns = C::kLaneColumns;
  using probabilities_t = integer_probabilities_t<C>;
  static constexpr bool kUniform = V::kKind == expand_t::kUniform2;
  // Of four rows in quads both terms are columns of one product; else each is a product of its own.
  static constexpr int kTerms = probabilities_t::kOperands;
  static constexpr int kBlocks = C::kOrder == order_t::kPairs ? C::kOutBlocks / 2 : C::kOutBlocks;

  int acc[kTerms][kBlocks][4];  // since the last flush
  int ones[kTerms][4];          // sums of the integers themselves, if levels lack a constant
  float o[C::kOutBlocks][2][kColumns];  // until the last flush
  float constant[kColumns];             // the same of `ones`
  float c[kColumns], l[kColumns];  // exponents and sums of probabilities, which count no V scale
  float peak[kColumns];            // the largest score seen when exponents were chosen
  int steps;                       // since the last flush
  int fresh;                       // 1 before an item's first step, which has no exponents to try
  int credit;                      // steps in which some column of this lane may have few bits

  __device__ __forceinline__ void Reset() {
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
      c[x] = peak[x] = kNever, l[x] = constant[x] = 0;
#pragma unroll
      for (int i = 0; i < C::kOutBlocks; ++i) o[i][0][x] = o[i][1][x] = 0;
    }
    ClearIntegers();
    fresh = 1, credit = 0;
  }

  /*! \brief Turn scores into integers, as B operands. `unit` turns scores into powers of two;
   * `zero` is 0, which the compiler must not know: it would emit the loop twice. */
  __device__ __forceinline__ void Probabilities(const scores_t<C, C::kTiles>& scores,
                                                const float (&unit)[kColumns], int zero,
                                                const lane_t<C>& at, probabilities_t& p) {
    uint32_t n[C::kTiles][2][kColumns];
    float sum[kColumns];
    int tries = fresh;
    bool good, enough_of_all;
#pragma unroll 1
    do {
      if (tries != 0) ChooseExponents(scores, unit);
      good = enough_of_all = true;
#pragma unroll
      for (int x = 0; x < kColumns; ++x) {
        uint32_t seen = 0;
        sum[x] = l[x];
#pragma unroll
        for (int i = 0; i < C::kTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float e = ptx::Exp2(fmaf(scores.s[i][half][x], unit[x], -c[x]));
            sum[x] += e;
            // Adding 2^23 rounds to an integer, in the low bits.
            n[i][half][x] = __float_as_uint(fmaf(e, scores.v_scale[i][half], 8388608.f));
          }
          seen |= n[i][0][x] | n[i][1][x];
        }
        // infinity and NaN have other high bits than 2^23 as well
        const bool fits = (seen & 0x7FFF0000u) == 0x4B000000u && sum[x] < kMaxIntegerSum;
        const bool enough = (seen & (0x10000u - (1u << kLowBits))) != 0;
        const uint32_t lanes = 0x11111111u << at.t;  // those of this column
        const bool any_is_enough = (__ballot_sync(~0u, enough) & lanes) != 0;
        enough_of_all &= any_is_enough;
        good &= fits & (any_is_enough | (credit > 0));
      }
    } while (!__all_sync(~0u, good) && tries++ == 0);
    fresh = zero;
    credit = max(min(credit + (enough_of_all ? 1 : -1), kMostCredit), 0);
#pragma unroll
    for (int x = 0; x < kColumns; ++x) l[x] = sum[x];
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) p.Pack(i, n[i], at.g);
  }

  /*! \brief After a step's products: add integers to fp32 before they can overflow. */
  __device__ __forceinline__ void CountStep() {
    if (++steps == kMaxIntegerTokens / C::kStepTokens) Flush();
  }

  /*! \brief See half_softmax_t. */
  __device__ __forceinline__ void CopyProbabilities(const scores_t<C, 1>& scores,
                                                    const float (&unit)[kColumns], float v_unit,
                                                    int, half_probabilities_t<C, 1>& p,
                                                    float (&gain)[kColumns]) {
    float e[2][kColumns], to[kColumns];
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
      const float z0 = scores.s[0][0][x] * unit[x], z1 = scores.s[0][1][x] * unit[x];
      float top = WarpMax(fmaxf(fmaxf(z0, z1), kNever));
      peak[x] = fmaxf(peak[x], top);
      to[x] = fmaxf(c[x], top - kExponentRange);
      if (!(c[x] > kNever)) to[x] = top - kTopBits;
      e[0][x] = ptx::Exp2(z0 - top), e[1][x] = ptx::Exp2(z1 - top);
      gain[x] = ptx::Exp2(top - to[x]);
    }
    Rescale(to);
    __half2 unused = __float2half2_rn(0.f);
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
      l[x] += (e[0][x] + e[1][x]) * gain[x];
      gain[x] = __fdividef(gain[x], v_unit * kCopyGain);
    }
#pragma unroll
    for (int n = 0; n < C::kTermBlocks; ++n) {
      float product[2][C::kBlockColumns];
#pragma unroll
      for (int y = 0; y < C::kBlockColumns; ++y) {
        product[0][y] = e[0][n * 2 + y] * kCopyGain, product[1][y] = e[1][n * 2 + y] * kCopyGain;
      }
      p.Pack(0, n, product, unused);
    }
  }

  __device__ __forceinline__ void AddCopy(int block, int half, int x, float value) {
    o[block][half][x] += value / OutputUnit(block, half);
  }

  __device__ __forceinline__ void Close(const float (&)[kColumns]) { Flush(); }
  __device__ __forceinline__ float Max(int x) const { return c[x]; }
  __device__ __forceinline__ float Sum(int x) const { return l[x]; }
  __device__ __forceinline__ float Output(int block, int half, int x) const {
    const float raw = o[block][half][x] * OutputUnit(block, half);
    return kUniform ? raw - 1.5f * constant[x] : raw;
  }

 private:
  /*! \brief What an output of 1 stands for: uniform codes are masked out of their bytes, where
   * field f counts 4^f. */
  static __host__ __device__ constexpr float OutputUnit(int block, int half) {
    return kUniform ? 1.f / (1 << (2 * (2 * (block % 2) + half))) : 1.f;
  }

  /*! \brief The largest over the lanes of a column. */
  static __device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
    for (int q = 4; q < 32; q *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, q));
    return x;
  }

  __device__ __forceinline__ void ClearIntegers() {
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        ones[term][e] = 0;
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) acc[term][i][e] = 0;
      }
    }
    steps = 0;
  }

  /*! \brief Add the integers summed so far to the outputs. */
  __device__ __forceinline__ void Flush() {
    auto both = [](int high, int low) {
      return fmaf(static_cast<float>(high), 256.f, static_cast<float>(low));
    };
#pragma unroll
    for (int i = 0; i < C::kOutBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int x = 0; x < kColumns; ++x) {
          if constexpr (C::kOrder == order_t::kPairs) {
            // blocks 2m and 2m + 1 are rows g and g + 8; columns are the coordinates of a pair
            const int e = i % 2 * 2 + half;
            o[i][half][x] += both(acc[0][i / 2][e], acc[kTerms - 1][i / 2][e]);
          } else if constexpr (C::kColumns == 4) {
            o[i][half][x] += both(acc[0][i][2 * half], acc[0][i][2 * half + 1]);
          } else {
            o[i][half][x] += both(acc[0][i][2 * half + x], acc[kTerms - 1][i][2 * half + x]);
          }
        }
      }
    }
    if constexpr (kUniform) {
#pragma unroll
      for (int x = 0; x < kColumns; ++x) {
        constant[x] += both(ones[0][x], C::kColumns == 4 ? ones[0][1] : ones[kTerms - 1][x]);
      }
    }
    ClearIntegers();
  }

  /*! \brief Count everything relative to other exponents. */
  __device__ __forceinline__ void Rescale(const float (&to)[kColumns]) {
    bool changes = false;
#pragma unroll
    for (int x = 0; x < kColumns; ++x) changes |= to[x] != c[x];
    if (!__any_sync(~0u, changes)) return;
    if (steps > 0) Flush();
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
      const float f = ptx::Exp2(c[x] - to[x]);
      c[x] = to[x], l[x] *= f, constant[x] *= f;
#pragma unroll
      for (int i = 0; i < C::kOutBlocks; ++i) o[i][0][x] *= f, o[i][1][x] *= f;
    }
  }

  /*! \brief Choose exponents for a step. One in which a column sees nothing, or next to nothing
   * beside what it saw before, or for which there is credit, leaves that column's as it is. */
  __device__ __forceinline__ void ChooseExponents(const scores_t<C, C::kTiles>& scores,
                                                  const float (&unit)[kColumns]) {
    float to[kColumns];
    int earned = kMostCredit;
    // NaN if a V scale is NaN or infinite, which integers cannot show: sums do
    float lost = 0;
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) {
      lost = fmaf(scores.v_scale[i][0], 0.f, fmaf(scores.v_scale[i][1], 0.f, lost));
    }
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
      l[x] += lost;
      float top = kNever, product = kNever;
#pragma unroll
      for (int i = 0; i < C::kTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float z = scores.s[i][half][x] * unit[x];
          top = fmaxf(top, z);
          product = fmaxf(product, z + __log2f(scores.v_scale[i][half]));
        }
      }
      peak[x] = fmaxf(peak[x], WarpMax(top));
      product = WarpMax(product);
      const float bits = product - c[x], lowest = peak[x] - kExponentRange;
      float chosen = c[x];
      int left = credit;
      if (!(c[x] > kNever)) {
        chosen = product - kTopBits;
        left = kFirstCredit;
      } else if (bits > 15.9f) {
        chosen = product - kHighestBits;
        left = kMostCredit;
      } else if (credit <= 0 && bits < kLowBits + 0.1f && product - kLowestBits >= lowest) {
        chosen = product - kLowestBits;
      }
      earned = min(earned, left);
      to[x] = fmaxf(chosen, lowest);
      // an infinite score: what it is worth is not known
      if (!(to[x] < -kNever)) l[x] = NAN;
    }
    credit = earned;
    Rescale(to);
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_INTEGER_SOFTMAX_CUH_
