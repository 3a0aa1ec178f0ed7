// SPDX-License-Identifier: Apache-2.0
// From the codes of a tile in shared memory to rows of fp16: eight coordinates at a time, which are
// 16 bytes of a row. FORMAT.md section 6 says where the codes lie; pack.cuh computes it.
#ifndef TURBOKV_FLASHINFER_EXPAND_HALF_CUH_
#define TURBOKV_FLASHINFER_EXPAND_HALF_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "turbokv/codebook.cuh"
#include "turbokv/expand.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/ptx.cuh"

namespace turbokv {
namespace flashinfer_detail {

/*! \brief What turns codes of a role into fp16 levels; part of a kernel's parameters. */
struct levels_t {
  table_t table;      // of bytes: levels + 128; magnitudes at 5 bits; unused at 8
  uint32_t exponent;  // four equal bytes that, above a byte b, make the fp16 number 2^-f (1024 + b)
  uint32_t offset;    // two fp16 numbers: 2^-f times 1152, or 1024 where bytes are magnitudes
};

template <int BITS>
TURBOKV_HOST_DEVICE levels_t MakeLevels(const codebook_t& codebook) {
  levels_t levels = {};
  if constexpr (BITS != 8) levels.table = MakeTable<BITS, bytes_t::kOffset128>(codebook);
  // 2^-f (1024 + b) is exact, and so is the difference: a level is an integer times 2^-f.
  levels.exponent = static_cast<uint32_t>(25 - codebook.frac_bits) * 0x04040404u;
  const uint32_t offset = (BITS == 5 ? 0x6400u : 0x6480u) - (codebook.frac_bits << 10);
  levels.offset = offset << 16 | offset;
  return levels;
}

/*! \brief Eight codes of a token: `base` is their part of the base plane, lowest coordinate first
 *  (at 3 bits a nibble for each code, four in each word); `high` at 5 bits one byte of the high
 *  plane, or of K the two bytes of 16 coordinates, shifted so that the bits of these eight come
 *  first in each. */
struct codes_t {
  uint32_t base[2];
  uint32_t high;
};

/*! \brief Levels of eight codes as bytes, before they are widened. */
struct bytes8_t {
  uint32_t bytes[2];  // coordinates 0..3 and 4..7
  uint32_t signs;     // at 5 bits: bit 2 i or i of either half says whether a level is positive
};

template <role_t ROLE, int BITS>
__device__ __forceinline__ bytes8_t LookUp(const codes_t& codes, const levels_t& levels) {
  using ptx::Permute;
  bytes8_t x = {};
  if constexpr (BITS == 4 || BITS == 5) {
    const uint32_t w = codes.base[0], flipped = w ^ 0x88888888u;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t a = Permute(levels.table.a0, levels.table.a1, w >> (16 * i));
      const uint32_t b = Permute(levels.table.b0, levels.table.b1, flipped >> (16 * i));
      x.bytes[i] = a ^ b;  // at 5 bits one of them is zero
    }
  } else if constexpr (BITS == 3) {
    x.bytes[0] = Permute(levels.table.a0, levels.table.a1, codes.base[0]);
    x.bytes[1] = Permute(levels.table.a0, levels.table.a1, codes.base[1]);
  } else if constexpr (BITS == 2) {
    const uint32_t even = Permute(levels.table.a0, levels.table.a1, codes.base[0] & 0x3333u);
    const uint32_t odd = Permute(levels.table.a0, levels.table.a1, codes.base[0] >> 2 & 0x3333u);
    x.bytes[0] = Permute(even, odd, 0x5140);
    x.bytes[1] = Permute(even, odd, 0x7362);
  } else {
    x.bytes[0] = codes.base[0];  // code 128 is zero
    x.bytes[1] = codes.base[1];
  }
  if constexpr (BITS == 5) {
    x.signs = ROLE == role_t::kKey ? Permute(codes.high, 0, 0x4140) : codes.high | codes.high << 15;
  }
  return x;
}

/*! \brief The same levels as four pairs of fp16, in the order of the coordinates: exact. */
template <role_t ROLE, int BITS>
__device__ __forceinline__ void Widen(const bytes8_t& from, const levels_t& levels,
                                      __half2 (&x)[4]) {
  const __half2 offset = *reinterpret_cast<const __half2*>(&levels.offset);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t wide =
        ptx::Permute(from.bytes[i / 2], levels.exponent, i % 2 == 0 ? 0x4140 : 0x4342);
    x[i] = __hsub2(*reinterpret_cast<const __half2*>(&wide), offset);
    if constexpr (BITS == 5) {
      const uint32_t negative =
          ~(from.signs << (ROLE == role_t::kKey ? 15 - i : 15 - 2 * i)) & 0x80008000u;
      uint32_t bits = *reinterpret_cast<const uint32_t*>(&x[i]) ^ negative;
      x[i] = *reinterpret_cast<const __half2*>(&bits);
    }
  }
}

__device__ __forceinline__ uint4 Pack(const __half2 (&x)[4]) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(x);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

/*! \brief 3-bit codes that the upper bits of nibbles hold. */
__device__ __forceinline__ uint32_t UpperCodes(uint32_t w0, uint32_t w1, uint32_t w2) {
  return (w0 >> 3 & 0x11111111u) | (w1 >> 2 & 0x22222222u) | (w2 >> 1 & 0x44444444u);
}

/*! \brief Codes of coordinates 8 * chunk and up of a token of K. `part` is K's part of a tile. */
template <int HEAD_DIM, int BITS>
__device__ __forceinline__ codes_t LoadKeyCodes(const uint8_t* part, int token, int chunk) {
  constexpr int kBase = PlaneBits(BITS), kRow = HEAD_DIM * kBase / 8;
  codes_t codes = {};
  if constexpr (BITS == 3) {
    // a unit is two chunks: the third half-word and the upper bits of all three are the second
    uint32_t halves[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      halves[k] =
          *reinterpret_cast<const uint16_t*>(part + KeyHalfOffset(HEAD_DIM, token, chunk / 2, k));
    }
    const bool second = chunk % 2 != 0;
    codes.base[0] = (second ? halves[2] : halves[0]) & 0x7777u;
    codes.base[1] = second ? UpperCodes(halves[0], halves[1], halves[2]) : halves[1] & 0x7777u;
    return codes;
  }
  const uint8_t* base = part + KeyOffset(token, chunk * kBase, kRow);
  if constexpr (kBase == 8) {
    const uint2 w = *reinterpret_cast<const uint2*>(base);
    codes.base[0] = w.x, codes.base[1] = w.y;
  } else if constexpr (kBase == 4) {
    codes.base[0] = *reinterpret_cast<const uint32_t*>(base);
  } else {
    codes.base[0] = *reinterpret_cast<const uint16_t*>(base);
  }
  const uint8_t* high = part + kTokensPerTile * kRow;
  if constexpr (BITS == 5) {
    // 16 coordinates share two bytes: even ones the first, odd ones the second
    const uint32_t pair =
        *reinterpret_cast<const uint16_t*>(high + KeyOffset(token, chunk / 2 * 2, HEAD_DIM / 8));
    codes.high = pair >> (chunk % 2 * 4);
  }
  return codes;
}

/*! \brief Which token of a tile has byte `lane` of the words that token 2 t begins. */
template <int BITS>
__device__ __forceinline__ int ValueToken(int t, int lane) {
  return BITS == 2 ? lane % 2 * 8 + 2 * t + lane / 2 : lane / 2 * 8 + 2 * t + lane % 2;
}

/*! \brief LoadValueCodes at 3 bits: a unit, whose nibbles are of four tokens. */
template <int HEAD_DIM>
__device__ __forceinline__ void LoadThreeBitValues(const uint8_t* part, int t, int chunk,
                                                   codes_t (&codes)[4]) {
  using ptx::Permute;
  uint32_t words[4];
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    words[k] = *reinterpret_cast<const uint32_t*>(part + ValueWordOffset(HEAD_DIM, t, chunk, k));
  }
  words[3] = UpperCodes(words[0], words[1], words[2]);
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    uint32_t x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      // a byte for each of two tokens: an even coordinate and the next
      const uint32_t own = words[k] >> (4 * odd) & 0x07070707u;
      x[k] = own | own >> 12;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t both = Permute(x[2 * half], x[2 * half + 1], 0x5140);
      codes[odd].base[half] = both & 0x7777u;
      codes[odd + 2].base[half] = both >> 16;
    }
  }
}

/*! \brief The same of V, of the four tokens that share words: ValueToken(t, 0..3). */
template <int HEAD_DIM, int BITS>
__device__ __forceinline__ void LoadValueCodes(const uint8_t* part, int t, int chunk,
                                               codes_t (&codes)[4]) {
  using ptx::Permute;
  if constexpr (BITS == 3) return LoadThreeBitValues<HEAD_DIM>(part, t, chunk, codes);
  constexpr int kBase = PlaneBits(BITS), kRun = ValueRun(HEAD_DIM, BITS);
  static_assert(BITS == 3 || kBase <= kRun || kBase == 2 * kRun,
                "a chunk has whole runs, or is part of one");
  uint32_t words[kBase];
#pragma unroll
  for (int i = 0; i < kBase; i += kRun < kBase ? kRun : kBase) {
    const uint8_t* base = part + ValueOffset(2 * t, chunk * kBase + i, kRun, BITS);
    if constexpr (kBase == 2) {
      const uint2 w = *reinterpret_cast<const uint2*>(base);
      words[0] = w.x, words[1] = w.y;
    } else {
      const uint4 w = *reinterpret_cast<const uint4*>(base);
      words[i] = w.x, words[i + 1] = w.y, words[i + 2] = w.z, words[i + 3] = w.w;
    }
  }
  uint32_t high = 0;
  if constexpr (HasHighBit(BITS)) {
    high = *reinterpret_cast<const uint32_t*>(
        part + kTokensPerTile * HEAD_DIM * kBase / 8 +
        ValueOffset(2 * t, chunk, ValueHighRun(HEAD_DIM, BITS), BITS));
  }
  // bytes of a token are bytes of equal place in neighbouring words
#pragma unroll
  for (int i = 0; i < kBase; i += 4) {
    if constexpr (kBase == 2) {
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) {
        codes[lane].base[0] = Permute(words[0], words[1], lane | (4 + lane) << 4);
      }
    } else {
      const uint32_t low0 = Permute(words[i], words[i + 1], 0x5140);
      const uint32_t low1 = Permute(words[i + 2], words[i + 3], 0x5140);
      const uint32_t top0 = Permute(words[i], words[i + 1], 0x7362);
      const uint32_t top1 = Permute(words[i + 2], words[i + 3], 0x7362);
      codes[0].base[i / 4] = Permute(low0, low1, 0x5410);
      codes[1].base[i / 4] = Permute(low0, low1, 0x7632);
      codes[2].base[i / 4] = Permute(top0, top1, 0x5410);
      codes[3].base[i / 4] = Permute(top0, top1, 0x7632);
    }
  }
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) codes[lane].high = high >> (8 * lane) & 0xffu;
}

}  // namespace flashinfer_detail
}  // namespace turbokv

#endif  // TURBOKV_FLASHINFER_EXPAND_HALF_CUH_
