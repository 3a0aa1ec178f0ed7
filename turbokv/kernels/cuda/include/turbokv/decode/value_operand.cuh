// SPDX-License-Identifier: Apache-2.0
// V of a tile as the A operand of a product, fp16 or int8: coordinates as rows and tokens as k.
// FORMAT.md section 6 orders the bytes of a tile for exactly this.
#ifndef TURBOKV_DECODE_VALUE_OPERAND_CUH_
#define TURBOKV_DECODE_VALUE_OPERAND_CUH_

#include <cstdint>

#include "turbokv/codebook.cuh"
#include "turbokv/decode/tables.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {

/*! \brief V of a tile, but by 3 bits: lane (g, t) reads tokens {2t, 2t + 1, 2t + 8, 2t + 9} of
 * coordinates (8 * section + g) * kCodes + 0..kCodes - 1. Each section makes kBlocks A operands (16
 * coordinates x 16 tokens); row g of block b is coordinate Offset(b, 0), row g + 8 is Offset(b, 1).
 */
template <int HEAD_DIM, int BITS, bool UNIFORM2>
struct value_operand_t {
  static constexpr expand_t kKind = ExpandKind(BITS, UNIFORM2);
  static constexpr int kBase = PlaneBits(BITS);
  static constexpr bool kHigh = HasHighBit(BITS);
  static constexpr int kRowBytes = HEAD_DIM * kBase / 8;
  static constexpr int kWords = kRowBytes / 8 < 4 ? kRowBytes / 8 : 4;  // words a lane and section
  static constexpr int kHighWords =
      kHigh ? kWords / kBase : 0;                    // of high bits: a byte of four tokens each
  static constexpr int kCodes = kWords * 8 / kBase;  // coordinates a lane and section
  static constexpr int kSections = HEAD_DIM / 8 / kCodes;
  static constexpr int kBlocks = kCodes / 2;
  static constexpr int kBytes = 16 * (kRowBytes + (kHigh ? HEAD_DIM / 8 : 0));
  // The fp16 operand is a level plus a constant: 1152, of which 1024 comes with the byte and 128
  // with its sign, or 1.5 codes. The product of its negative, two fp16 numbers, with the same
  // rounded probabilities takes it away again. It must not wait for more than kCorrectionSteps
  // steps, or it swamps the sum; 0 is for ever.
  static constexpr uint32_t kNegatedOffset =
      kKind == expand_t::kUniform2 ? 0xBE00BE00u : 0xE480E480u;
  static constexpr int kCorrectionSteps = kKind == expand_t::kUniform2 ? 0 : 4;
  // Where the constant is of the levels' own size, the probabilities of two tiles may be added in
  // fp16 before the product.
  static constexpr bool kAddPairs = kKind == expand_t::kUniform2;

  /*! \brief What an operand of 1 stands for, without the vector's scale. */
  static TURBOKV_HOST_DEVICE float Unit(const codebook_t& book) {
    return InverseExp2(book.frac_bits) *
           (kKind == expand_t::kUniform2 ? 2 * book.magnitudes[0] : 1);
  }

  /*! \brief What outputs of a block and half have to be multiplied by to count in that unit:
   * subnormals of kUniform2 count in units of their own, see Expand. */
  static __host__ __device__ constexpr float OutputUnit(int block, int half) {
    return kKind == expand_t::kUniform2
               ? static_cast<float>(1 << (24 - 2 * (2 * (block % 2) + half)))
               : 1.f;
  }

  static __host__ __device__ constexpr int Offset(int block, int half) {
    return kBase == 2 && kKind == expand_t::kUniform2 ? block / 2 * 4 + block % 2 * 2 + half
           : kBase == 2                               ? block / 2 * 4 + block % 2 + 2 * half
                                                      : 2 * block + half;
  }
  static __device__ __forceinline__ int Coordinate(int section, int block, int half, int g) {
    return (8 * section + g) * kCodes + Offset(block, half);
  }

  /*! \brief Codes of a section, and their high bits. */
  struct section_t {
    uint32_t w[kWords], h[2];
  };
  struct codes_t {
    section_t sections[kSections];
  };

  static __device__ __forceinline__ void Load(const uint8_t* v, int lane, codes_t& codes) {
#pragma unroll
    for (int section = 0; section < kSections; ++section) {
      LoadSection(v, section, lane, codes.sections[section].w, codes.sections[section].h);
    }
  }

  static __device__ __forceinline__ void LoadSection(const uint8_t* v, int section, int lane,
                                                     uint32_t (&w)[kWords], uint32_t (&h)[2]) {
    const uint8_t* p = v + section * (kWords * 128) + lane * (kWords * 4);
    if constexpr (kWords == 4) {
      const uint4 x = *reinterpret_cast<const uint4*>(p);
      w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
    } else {
      static_assert(kWords == 2, "head_dim is at least 64");
      const uint2 x = *reinterpret_cast<const uint2*>(p);
      w[0] = x.x, w[1] = x.y;
    }
    h[0] = h[1] = 0;
    if constexpr (kHigh) {
      const uint8_t* q =
          v + 16 * kRowBytes + section * (kHighWords * 128) + lane * (kHighWords * 4);
      if constexpr (kHighWords == 2) {
        const uint2 x = *reinterpret_cast<const uint2*>(q);
        h[0] = x.x, h[1] = x.y;
      } else {
        static_assert(kHighWords == 1, "one or two bytes a token");
        h[0] = *reinterpret_cast<const uint32_t*>(q);
      }
    }
  }

  /*! \brief fp16 operands of bytes [token 0 row g, token 0 row g + 8, token 1 row g, token 1 row g
   * + 8]. */
  static __device__ __forceinline__ void Widen(uint32_t low, uint32_t high, uint32_t (&a)[4]) {
    constexpr uint32_t k1024 = 0x64646464u;
    a[0] = ptx::Permute(low, k1024, 0x4240);
    a[1] = ptx::Permute(low, k1024, 0x4341);
    a[2] = ptx::Permute(high, k1024, 0x4240);
    a[3] = ptx::Permute(high, k1024, 0x4341);
  }

  /*! \brief The A operand of `block`: tokens {2t, 2t + 1} in a[0] and a[1], {2t + 8, 2t + 9} in
   * a[2], a[3].
   *
   *  kUniform2: fp16 subnormals, the code times 4^field * 2^-24; field = 2 * (block % 2) + half.
   */
  static __device__ __forceinline__ void Expand(const codes_t& codes, int section, int block,
                                                const table_t& table, const table_t& negative,
                                                uint32_t (&a)[4]) {
    using ptx::Permute;
    const auto& w = codes.sections[section].w;
    const auto& h = codes.sections[section].h;
    if constexpr (kKind == expand_t::kUniform2) {
      const uint32_t x = w[block / 2], y = x >> 8;
      const uint32_t mask = 0x00030003u << (block % 2 * 4);
      a[0] = x & mask, a[1] = x & (mask << 2), a[2] = y & mask, a[3] = y & (mask << 2);
    } else if constexpr (kKind == expand_t::kSignMagnitude5) {
      const uint32_t p = h[0] << (7 - 2 * block), q = h[0] << (6 - 2 * block);
      uint32_t bytes[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t positive = Permute(p, q, i ? 0xFBEAu : 0xD9C8u);
        const uint32_t x = w[block] >> (16 * i), y = (w[block] ^ 0x88888888u) >> (16 * i);
        const uint32_t plus =
            Permute(table.a0, table.a1, x) | Permute(table.b0, table.b1, y) | 0x80808080u;
        const uint32_t minus =
            Permute(negative.a0, negative.a1, x) | Permute(negative.b0, negative.b1, y);
        bytes[i] = (plus & positive) | (minus & ~positive);
      }
      Widen(bytes[0], bytes[1], a);
    } else if constexpr (kKind == expand_t::kBytes8) {
      constexpr uint32_t k1024 = 0x64646464u;
      const uint32_t x = w[2 * block], y = w[2 * block + 1];
      a[0] = Permute(x, k1024, 0x4140), a[1] = Permute(y, k1024, 0x4140);
      a[2] = Permute(x, k1024, 0x4342), a[3] = Permute(y, k1024, 0x4342);
    } else {
      uint32_t low, high;
      LookUp(codes.sections[section], block, table, low, high);
      Widen(low, high, a);
    }
  }

  /*! \brief Bytes of a block by lookup: `low` has [token 2t row g, token 2t row g + 8, token 2t + 1
   * row g, token 2t + 1 row g + 8], `high` tokens 2t + 8 and 2t + 9. Not for kUniform2, kBytes8 and
   * kSignMagnitude5. */
  static __device__ __forceinline__ void LookUp(const section_t& codes, int block,
                                                const table_t& table, uint32_t& low,
                                                uint32_t& high) {
    using ptx::Permute;
    if constexpr (kKind == expand_t::kPaired4) {
      uint32_t terms[2][2];
      LookUpTerms(codes, block, table, terms);
      low = terms[0][0] ^ terms[1][0], high = terms[0][1] ^ terms[1][1];
    } else {
      const uint32_t x = Permute(codes.w[block / 2], 0, 0x3120);
      const uint32_t s = (x >> (block % 2 * 2)) & 0x33333333u;
      low = Permute(table.a0, table.a1, s), high = Permute(table.a0, table.a1, s >> 16);
    }
  }

  // Lookups of 4 bits are two, see MakeTable: with kSignedSum both may be operands, one after the
  // other, of products that are added.
  static constexpr int kTerms = kKind == expand_t::kPaired4 ? 2 : 1;

  /*! \brief The same before the terms of a level are put together: [term][low, high]. */
  static __device__ __forceinline__ void LookUpTerms(const section_t& codes, int block,
                                                     const table_t& table,
                                                     uint32_t (&terms)[kTerms][2]) {
    using ptx::Permute;
    if constexpr (kKind == expand_t::kPaired4) {
      const uint32_t x = codes.w[block], y = x ^ 0x88888888u;
      terms[0][0] = Permute(table.a0, table.a1, x);
      terms[0][1] = Permute(table.a0, table.a1, x >> 16);
      terms[1][0] = Permute(table.b0, table.b1, y);
      terms[1][1] = Permute(table.b0, table.b1, y >> 16);
    } else {
      LookUp(codes, block, table, terms[0][0], terms[0][1]);
    }
  }

  /*! \brief Bytes of a block: four tokens of row g, then of row g + 8: 2t, 2t + 1, 2t + 8 and
   * 2t + 9, or with kUniform2, whose codes count 4^field, 2t, 2t + 8, 2t + 1 and 2t + 9. */
  static __device__ __forceinline__ void Quads(const codes_t& codes, int section, int block,
                                               const table_t& table, uint32_t (&a)[2]) {
    if constexpr (kKind == expand_t::kUniform2) {
      const uint32_t x = codes.sections[section].w[block / 2];
      const uint32_t mask = 0x03030303u << (block % 2 * 4);
      a[0] = x & mask, a[1] = x & (mask << 2);
    } else {
      uint32_t low, high;
      LookUp(codes.sections[section], block, table, low, high);
      a[0] = ptx::Permute(low, high, 0x6420), a[1] = ptx::Permute(low, high, 0x7531);
    }
  }
};

}  // namespace turbokv

#endif  // TURBOKV_DECODE_VALUE_OPERAND_CUH_
