// SPDX-License-Identifier: Apache-2.0
// Operands of 3-bit codes, which pages hold in units of 32 codes in three words of a lane
// (FORMAT.md, section 6).
#ifndef TURBOKV_DECODE_THREE_BITS_CUH_
#define TURBOKV_DECODE_THREE_BITS_CUH_

#include <cstdint>

#include "turbokv/codebook.cuh"
#include "turbokv/decode/tables.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/types.cuh"

namespace turbokv {

/*! \brief Units of a lane in a tile's part, and how they are read. */
template <int HEAD_DIM>
struct units3_t {
  static constexpr int kUnits = HEAD_DIM / 64;
  static constexpr int kWords = 3 * kUnits;

  /*! \brief Read a lane's words in chunks of 16, 8 and 4 bytes, each with all lanes together. */
  static __device__ __forceinline__ void Load(const uint8_t* part, int lane,
                                              uint32_t (&w)[kWords]) {
    constexpr int kWide = kWords / 4 * 4;
#pragma unroll
    for (int i = 0; i < kWide; i += 4) {
      const uint4 x = *reinterpret_cast<const uint4*>(part + i * 128 + lane * 16);
      w[i] = x.x, w[i + 1] = x.y, w[i + 2] = x.z, w[i + 3] = x.w;
    }
    constexpr int kPairs = kWide + (kWords - kWide) / 2 * 2;
    if constexpr (kPairs > kWide) {
      const uint2 x = *reinterpret_cast<const uint2*>(part + kWide * 128 + lane * 8);
      w[kWide] = x.x, w[kWide + 1] = x.y;
    }
    if constexpr (kWords > kPairs) {
      w[kPairs] = *reinterpret_cast<const uint32_t*>(part + kPairs * 128 + lane * 4);
    }
  }

  /*! \brief Levels of a unit: bytes of the low and the high half of each of four selectors. */
  static __device__ __forceinline__ void Expand(const uint32_t (&w)[kWords], int unit,
                                                const table_t& table, uint32_t (&low)[4],
                                                uint32_t (&high)[4]) {
    const uint32_t words[3] = {w[3 * unit], w[3 * unit + 1], w[3 * unit + 2]};
    uint32_t m[4];
    Selectors3(words, m);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      low[k] = ptx::Permute(table.a0, table.a1, m[k]);
      high[k] = ptx::Permute(table.a0, table.a1, m[k] >> 16);
    }
  }
};

/*! \brief K by 3 bits, see key_operand_t: lane (g, t) has HEAD_DIM / 4 coordinates of tokens g and
 * g + 8, unit u those from t * HEAD_DIM / 4 + 16 * u on. */
template <int HEAD_DIM>
struct key_operand3_t {
  static constexpr expand_t kKind = expand_t::kLookup3;
  static constexpr int kSteps = 1, kRegs = HEAD_DIM / 16;
  static constexpr int kBytes = 6 * HEAD_DIM;
  static constexpr bool kLacksSum = false, kEvenSum = false;
  struct codes_t {
    uint32_t w[units3_t<HEAD_DIM>::kWords];
  };

  static TURBOKV_HOST_DEVICE float Unit(const codebook_t& book) {
    return InverseExp2(book.frac_bits);
  }
  static __device__ __forceinline__ int ScoreStart(int) { return 0; }
  static __device__ __forceinline__ int QueryByte(int j) { return j; }
  static __host__ __device__ constexpr int CodeShift(int) { return 0; }
  static __host__ __device__ constexpr bool TwoTerms(bool) { return false; }

  static __device__ __forceinline__ void Load(const uint8_t* tile, int, int g, int t,
                                              codes_t& codes) {
    units3_t<HEAD_DIM>::Load(tile, 4 * g + t, codes.w);
  }

  template <bool SUM>
  static __device__ __forceinline__ void Expand(const codes_t& codes, const table_t& table,
                                                uint32_t (&a)[2][kRegs], uint32_t (&)[2][kRegs]) {
#pragma unroll
    for (int u = 0; u < units3_t<HEAD_DIM>::kUnits; ++u) {
      uint32_t low[4], high[4];
      units3_t<HEAD_DIM>::Expand(codes.w, u, table, low, high);
#pragma unroll
      for (int k = 0; k < 4; ++k) a[0][4 * u + k] = low[k], a[1][4 * u + k] = high[k];
    }
  }
};

/*! \brief V by 3 bits, see value_operand_t: sections are units. Four tokens of a coordinate lie
 * together: quads need no bytes moved. */
template <int HEAD_DIM>
struct value_operand3_t {
  static constexpr expand_t kKind = expand_t::kLookup3;
  static constexpr int kCodes = 8, kBlocks = 4, kSections = HEAD_DIM / 64;
  static constexpr int kBytes = 6 * HEAD_DIM;
  static constexpr uint32_t kNegatedOffset = 0xE480E480u;
  static constexpr int kCorrectionSteps = 4;
  static constexpr bool kAddPairs = false;
  static constexpr int kTerms = 1;
  struct codes_t {
    uint32_t w[units3_t<HEAD_DIM>::kWords];
  };

  static TURBOKV_HOST_DEVICE float Unit(const codebook_t& book) {
    return InverseExp2(book.frac_bits);
  }
  static __host__ __device__ constexpr float OutputUnit(int, int) { return 1; }
  static __host__ __device__ constexpr int Offset(int block, int half) { return 2 * block + half; }
  static __device__ __forceinline__ int Coordinate(int section, int block, int half, int g) {
    return (8 * section + g) * kCodes + Offset(block, half);
  }

  static __device__ __forceinline__ void Load(const uint8_t* v, int lane, codes_t& codes) {
    units3_t<HEAD_DIM>::Load(v, lane, codes.w);
  }

  /*! \brief Bytes of a block: tokens 2t, 2t + 1, 2t + 8 and 2t + 9 of row g, then of row g + 8. */
  static __device__ __forceinline__ void Quads(const codes_t& codes, int section, int block,
                                               const table_t& table, uint32_t (&a)[2]) {
    uint32_t low[4], high[4];
    units3_t<HEAD_DIM>::Expand(codes.w, section, table, low, high);
    a[0] = low[block], a[1] = high[block];
  }

  /*! \brief fp16 operands of a block. */
  static __device__ __forceinline__ void Expand(const codes_t& codes, int section, int block,
                                                const table_t& table, const table_t&,
                                                uint32_t (&a)[4]) {
    constexpr uint32_t k1024 = 0x64646464u;
    uint32_t quads[2];
    Quads(codes, section, block, table, quads);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      a[e] = ptx::Permute(quads[e % 2], k1024, e < 2 ? 0x4140 : 0x4342);
    }
  }
};

}  // namespace turbokv

#endif  // TURBOKV_DECODE_THREE_BITS_CUH_
