// SPDX-License-Identifier: Apache-2.0
// One vector in the lanes of a warp: read, centred, rotated, quantised. Store's arithmetic; nothing
// here knows of pages.
#ifndef TURBOKV_STORE_VECTOR_CUH_
#define TURBOKV_STORE_VECTOR_CUH_

#include "turbokv/compress.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/types.cuh"
#include "turbokv/vector_format.cuh"

namespace turbokv {
namespace store_detail {

/*! \brief How vectors lie in warps.
 *
 *  \tparam PER_LANE  Consecutive coordinates that a lane holds, 8, 16 or 32: fewer make the chain
 * of instructions shorter, more make their number smaller. With 8 every token is written by itself,
 * whole tiles too.
 */
template <int PADDED_DIM, int PER_LANE>
struct config_t {
  static constexpr int kSignStride = PER_LANE + 4;  // floats; lanes then read from different banks
  static constexpr int kLanes = PADDED_DIM / PER_LANE;  // lanes of a vector
  static constexpr int kVectors = 32 / kLanes;          // vectors a warp holds at a time
  static constexpr bool kSingle = PER_LANE == 8;
  // of a unit, at least a word of V if it may be a part of a whole tile
  static constexpr int kTokens = kVectors < 4 && !kSingle ? 4 : kVectors;
  static constexpr int kRounds = kTokens / kVectors;
  static constexpr int kUnits = kTokensPerTile / kTokens;  // units of 16 rows
  static constexpr int kWarps = PADDED_DIM <= 256 ? 8 : 4;
  static constexpr int kStaging = kTokens * PADDED_DIM;  // bytes a warp, enough for 8 bits
};

/*! \brief The table that turns cells into magnitudes and codes has a column for every lane, so that
 *  lookups never meet in a bank. An entry is the magnitude in fp32, whose low 16 bits are free, and
 *  in its lowest byte the page code of the positive sign, repeated to fill the byte.
 */
template <int THREADS>
TURBOKV_DEVICE void FillTable(const codebook_t& book, uint32_t* table, int thread) {
  const bool uniform = book.bits == 8;  // magnitudes 0, 1, 2, ... 127
  TURBOKV_UNROLL
  for (int first = 0; first < 256; first += THREADS) {
    const int cell = first + thread;
    if (256 % THREADS != 0 && cell >= 256) break;
    int index = cell < 254 ? cell >> 1 : 127, magnitude = index;
    uint32_t code = index;
    if (!uniform) {
      // as CellIndex, but without a loop, whose loads would wait for one another
      index = 0, magnitude = book.magnitudes[0];
      TURBOKV_UNROLL
      for (int i = 0; i < 15; ++i) {
        if (i + 1 < NumMagnitudes(book) && cell > TwiceBoundary(book, i)) {
          ++index;
          magnitude = book.magnitudes[i + 1];
        }
      }
      code = CodeBase(book.bits, NumMagnitudes(book) + index) * (book.bits <= 3 ? 0x55 : 0x11);
    }
    const uint32_t entry = __float_as_uint(static_cast<float>(magnitude)) | code;
    const uint4 entries = make_uint4(entry, entry, entry, entry);
    TURBOKV_UNROLL
    for (int i = 0; i < 8; ++i) {
      // staggered: cells are 128 bytes apart
      reinterpret_cast<uint4*>(table)[cell * 8 + ((i + cell) & 7)] = entries;
    }
    if (cell == 255) {
      TURBOKV_UNROLL
      for (int i = 0; i < 8; ++i) reinterpret_cast<uint4*>(table)[256 * 8 + i] = entries;
    }
  }
}

/*! \brief Have the line of `p` brought to the first-level cache; nobody waits for it. */
template <typename T>
TURBOKV_DEVICE void Touch(const T* p) {
  uint16_t unused;
  asm volatile("ld.global.ca.u16 %0, [%1];" : "=h"(unused) : "l"(p));
}

TURBOKV_DEVICE uint32_t LoadShared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

/*! \brief Lowest bytes of four words. */
TURBOKV_DEVICE uint32_t LowBytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

/*! \brief A byte of ones for each of four numbers whose sign bit is set. */
TURBOKV_DEVICE uint32_t SignBytes(float a, float b, float c, float d) {
  // bit 3 of a selector replicates the byte's top bit; PRMT in PTX, as __byte_perm masks that bit
  uint32_t ab, cd;
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(ab) : "r"(__float_as_uint(a)), "r"(__float_as_uint(b)));
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(cd) : "r"(__float_as_uint(c)), "r"(__float_as_uint(d)));
  return __byte_perm(ab, cd, 0x5410);
}

/*! \brief Bits of `a` where the mask is set, else of `b`. */
TURBOKV_DEVICE uint32_t Select(uint32_t a, uint32_t b, uint32_t mask) {
  return (a & mask) | (b & ~mask);
}

/*! \brief What a lane contributes to a compressed vector. */
template <int BITS, int PER_LANE>
struct encoded_t {
  // base plane; where a lane has but two bytes of it, in the low half of a word
  uint32_t base[PlaneBits(BITS) * PER_LANE < 32 ? 1 : PlaneBits(BITS) * PER_LANE / 32];
  uint32_t high;          // high plane, in its order
  float product, energy;  // sums over the lane: |y| * magnitude and magnitude^2
};

/*! \brief Quantise a lane's coordinates.
 *
 *  \param column  Shared-memory address of this lane's column in the table, less the bits of a
 *                 cell 0.
 */
template <int BITS, int PER_LANE>
TURBOKV_DEVICE void Encode(const float (&y)[PER_LANE], float factor, uint32_t column, role_t role,
                           encoded_t<BITS, PER_LANE>& out) {
  constexpr int kGroup = BITS <= 3 && PER_LANE >= 16 ? 16 : 8;  // coordinates packed at a time
  float sums[PER_LANE / kGroup];
  out.energy = 0.0f;
  TURBOKV_UNROLL
  for (int first = 0; first < PER_LANE; first += kGroup) {
    uint32_t w[kGroup];
    float terms[kGroup];
    TURBOKV_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      w[i] = LoadShared(CellBits(y[first + i], factor) * 128 + column);
      const float magnitude = __uint_as_float(w[i] & 0xffff0000);
      terms[i] = Mul(fabsf(y[first + i]), magnitude);
      out.energy = __fmaf_rn(magnitude, magnitude, out.energy);
    }
    sums[first / kGroup] = TreeSum(terms);
    const float* const z = y + first;
    if constexpr (BITS == 8) {
      TURBOKV_UNROLL
      for (int i = 0; i < kGroup; i += 4) {
        const uint32_t index = LowBytes(w[i], w[i + 1], w[i + 2], w[i + 3]);
        const uint32_t negative = SignBytes(z[i], z[i + 1], z[i + 2], z[i + 3]);
        // bytes 128 + index and 128 - index; no byte carries into the next
        out.base[(first + i) / 4] = Select(0x80808080 - index, 0x80808080 | index, negative);
      }
    } else if constexpr (BITS >= 4) {
      uint32_t word =
          Select(LowBytes(w[0], w[2], w[4], w[6]), LowBytes(w[1], w[3], w[5], w[7]), 0x0f0f0f0f);
      if constexpr (BITS == 4) {
        word ^= Select(SignBytes(z[0], z[2], z[4], z[6]), SignBytes(z[1], z[3], z[5], z[7]),
                       0x0f0f0f0f);
      }
      out.base[first / 8] = word;
    } else {
      uint32_t codes[4], negative[4];
      TURBOKV_UNROLL
      for (int i = 0; i < 4; ++i) {
        constexpr int kThird = kGroup == 16 ? 8 : 0, kFourth = kGroup == 16 ? 12 : 4;
        codes[i] = LowBytes(w[i], w[i + 4], w[i + kThird], w[i + kFourth]);
        negative[i] = SignBytes(z[i], z[i + 4], z[i + kThird], z[i + kFourth]);
      }
      const uint32_t word = Select(Select(codes[0], codes[1], 0x33333333),
                                   Select(codes[2], codes[3], 0x33333333), 0x0f0f0f0f);
      const uint32_t flip = Select(Select(negative[0], negative[1], 0x33333333),
                                   Select(negative[2], negative[3], 0x33333333), 0x0f0f0f0f);
      out.base[first / kGroup] = word ^ flip;
    }
  }
  out.product = TreeSum(sums);
  out.high = 0;
  if constexpr (HasHighBit(BITS)) {
    uint32_t negative = 0;
    TURBOKV_UNROLL
    for (int i = PER_LANE - 1; i >= 0; --i) {
      negative = __funnelshift_l(__float_as_uint(y[i]), negative, 1);
    }
    if constexpr (PER_LANE == 8) {
      // a plane orders the bits of 16 coordinates: neighbouring lanes each make one byte of it
      const uint32_t own = ~negative & 0xff, other = __shfl_xor_sync(~0u, own, 1);
      const bool odd = threadIdx.x & 1;
      const uint32_t both = OrderHighBits(role, BITS, odd ? other | own << 8 : own | other << 8);
      out.high = odd ? both >> 8 : both;
    } else {
      out.high = OrderHighBits(role, BITS, ~negative);
    }
  }
}

/*! \brief Read a lane's coordinates, of which `live` exist; the others become zero. */
template <typename DTypeIn, int PER_LANE>
TURBOKV_DEVICE void Load(const DTypeIn* x, int live, bool wide, float (&y)[PER_LANE]) {
  constexpr int kChunk = 16 / sizeof(DTypeIn), kChunks = PER_LANE / kChunk;
  uint4 data[kChunks];
  if (wide) {
    TURBOKV_UNROLL
    for (int i = 0; i < kChunks; ++i) {
      data[i] = make_uint4(0, 0, 0, 0);
      if (i * kChunk < live) data[i] = __ldg(reinterpret_cast<const uint4*>(x) + i);
    }
  } else {
    TURBOKV_UNROLL
    for (int i = 0; i < kChunks; ++i) {
      DTypeIn elements[kChunk] = {};
      TURBOKV_UNROLL
      for (int j = 0; j < kChunk; ++j) {
        if (i * kChunk + j < live) elements[j] = x[i * kChunk + j];
      }
      memcpy(&data[i], elements, 16);
    }
  }
  TURBOKV_UNROLL
  for (int first = 0; first < PER_LANE; first += kChunk) {
    const uint4 chunk = data[first / kChunk];
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    TURBOKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(DTypeIn) == 4) {
        y[first + i] = __uint_as_float(words[i]);
      } else if constexpr (std::is_same<DTypeIn, half_t>::value) {
        __half2 pair;
        memcpy(&pair, &words[i], 4);
        const float2 wide_pair = __half22float2(pair);
        y[first + 2 * i] = wide_pair.x;
        y[first + 2 * i + 1] = wide_pair.y;
      } else {
        y[first + 2 * i] = __uint_as_float(words[i] << 16);
        y[first + 2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
      }
    }
  }
}

/*! \brief Subtract a lane's part of an offset. */
template <int PER_LANE>
TURBOKV_DEVICE void Centre(const float* offset, int live, bool wide, float (&y)[PER_LANE]) {
  TURBOKV_UNROLL
  for (int first = 0; first < PER_LANE; first += 4) {
    float4 mu = make_float4(0, 0, 0, 0);
    if (wide) {
      if (first < live) mu = __ldg(reinterpret_cast<const float4*>(offset + first));
    } else {
      if (first < live) mu.x = offset[first];
      if (first + 1 < live) mu.y = offset[first + 1];
      if (first + 2 < live) mu.z = offset[first + 2];
      if (first + 3 < live) mu.w = offset[first + 3];
    }
    y[first] = Sub(y[first], mu.x);
    y[first + 1] = Sub(y[first + 1], mu.y);
    y[first + 2] = Sub(y[first + 2], mu.z);
    y[first + 3] = Sub(y[first + 3], mu.w);
  }
}

/*! \brief Signs and transform. `signs` are the lane's, as +-1. */
template <int LANES, int PER_LANE>
TURBOKV_DEVICE void Rotate(const float* signs, int lane, float (&y)[PER_LANE]) {
  TURBOKV_UNROLL
  for (int i = 0; i < PER_LANE; i += 4) {
    const float4 s = *reinterpret_cast<const float4*>(signs + i);
    // stride 1 with the signs folded in: products with +-1 are exact. The added zero makes -0 into
    // +0, and from then on no sum or difference is -0, which would count as negative.
    const float a = __fmaf_rn(y[i], s.x, 0.0f), b = __fmaf_rn(y[i + 2], s.z, 0.0f);
    const float c = y[i + 1], d = y[i + 3];
    y[i] = __fmaf_rn(c, s.y, a);
    y[i + 1] = __fmaf_rn(c, -s.y, a);
    y[i + 2] = __fmaf_rn(d, s.w, b);
    y[i + 3] = __fmaf_rn(d, -s.w, b);
  }
  Hadamard<PER_LANE, 2>(y);
  HadamardAcrossLanes<PER_LANE, LANES>(y, lane);
}

/*! \brief Write a lane's coordinates times `factor` in 16 bits, 16-byte aligned. */
template <int PER_LANE>
TURBOKV_DEVICE void StoreRotated(uint16_t* out, dtype_t dtype, const float (&y)[PER_LANE],
                                 float factor) {
  TURBOKV_UNROLL
  for (int first = 0; first < PER_LANE; first += 8) {
    uint32_t words[4];
    TURBOKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float a = Mul(y[first + 2 * i], factor), b = Mul(y[first + 2 * i + 1], factor);
      if (dtype == dtype_t::kFloat16) {
        const __half2 pair = __floats2half2_rn(a, b);
        memcpy(&words[i], &pair, 4);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
        memcpy(&words[i], &pair, 4);
      }
    }
    *reinterpret_cast<uint4*>(out + first) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

/*! \brief Write consecutive words, as widely as their number allows; or the low half of one. */
template <int BYTES, int N>
TURBOKV_DEVICE void StoreWords(uint8_t* out, const uint32_t (&words)[N]) {
  if constexpr (BYTES == 2) {
    *reinterpret_cast<uint16_t*>(out) = static_cast<uint16_t>(words[0]);
  } else if constexpr (N == 1) {
    *reinterpret_cast<uint32_t*>(out) = words[0];
  } else if constexpr (N == 2) {
    *reinterpret_cast<uint2*>(out) = make_uint2(words[0], words[1]);
  } else {
    TURBOKV_UNROLL
    for (int i = 0; i < N; i += 4) {
      *reinterpret_cast<uint4*>(out + 4 * i) =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  }
}

/*! \brief Write the 8, 16 or 32 high bits of a lane. */
template <int PER_LANE>
TURBOKV_DEVICE void StoreHigh(uint8_t* out, uint32_t high) {
  if constexpr (PER_LANE == 8) {
    *out = static_cast<uint8_t>(high);
  } else if constexpr (PER_LANE == 16) {
    *reinterpret_cast<uint16_t*>(out) = static_cast<uint16_t>(high);
  } else {
    *reinterpret_cast<uint32_t*>(out) = high;
  }
}

}  // namespace store_detail
}  // namespace turbokv

#endif  // TURBOKV_STORE_VECTOR_CUH_
