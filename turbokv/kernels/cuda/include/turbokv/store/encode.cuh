// SPDX-License-Identifier: Apache-2.0
// From rotated coordinates in lanes to the bytes of their planes: the table of cells, codes, and
// the sums that the stored scale is made of.
#ifndef TURBOKV_STORE_ENCODE_CUH_
#define TURBOKV_STORE_ENCODE_CUH_

#include "turbokv/compress.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/types.cuh"
#include "turbokv/vector_format.cuh"

namespace turbokv {
namespace store_detail {

/*! \brief An entry of the table of cells: the magnitude in fp32, whose low 16 bits are free, and in
 *  its lowest byte the page code of the positive sign, repeated to fill the byte.
 */
TURBOKV_DEVICE uint32_t CellEntry(const codebook_t& book, int cell) {
  if (book.bits == 8) {  // magnitudes 0, 1, 2, ... 127
    const int index = cell < 254 ? cell >> 1 : 127;
    return __float_as_uint(static_cast<float>(index)) | index;
  }
  // CellIndex by bisection
  int index = 0;
#pragma unroll 1
  for (int step = NumMagnitudes(book) / 2; step > 0; step /= 2) {
    if (cell > TwiceBoundary(book, index + step - 1)) index += step;
  }
  const uint32_t code =
      CodeBase(book.bits, NumMagnitudes(book) + index) * (book.bits == 2 ? 0x55 : 0x11);
  return __float_as_uint(static_cast<float>(book.magnitudes[index])) | code;
}

/*! \brief Fill the table: an entry a cell, in COLUMNS copies side by side. */
template <int THREADS, int COLUMNS>
TURBOKV_DEVICE void FillTable(const codebook_t& book, uint32_t* table, int thread) {
#pragma unroll 1
  for (int cell = thread; cell < 256; cell += THREADS) {
    const uint32_t entry = CellEntry(book, cell);
    const uint4 entries = make_uint4(entry, entry, entry, entry);
    constexpr int kQuads = COLUMNS / 4;
    TURBOKV_UNROLL
    for (int i = 0; i < kQuads; ++i) {
      // staggered: cells are a whole row of banks apart
      reinterpret_cast<uint4*>(table)[cell * kQuads + (i + cell) % kQuads] = entries;
    }
    if (cell == 255) {
      TURBOKV_UNROLL
      for (int i = 0; i < kQuads; ++i) reinterpret_cast<uint4*>(table)[256 * kQuads + i] = entries;
    }
  }
}

/*! \brief Lowest bytes of four words. */
TURBOKV_DEVICE uint32_t LowBytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return ptx::Permute(ptx::Permute(a, b, 0x0040), ptx::Permute(c, d, 0x0040), 0x5410);
}

/*! \brief A byte of ones for each of four numbers whose sign bit is set. */
TURBOKV_DEVICE uint32_t SignBytes(float a, float b, float c, float d) {
  // bit 3 of a selector replicates the byte's top bit
  const uint32_t ab = ptx::Permute(__float_as_uint(a), __float_as_uint(b), 0x00fb);
  const uint32_t cd = ptx::Permute(__float_as_uint(c), __float_as_uint(d), 0x00fb);
  return ptx::Permute(ab, cd, 0x5410);
}

/*! \brief Bits of `a` where the mask is set, else of `b`. */
TURBOKV_DEVICE uint32_t Select(uint32_t a, uint32_t b, uint32_t mask) {
  return (a & mask) | (b & ~mask);
}

/*! \brief What a lane contributes to a compressed vector. */
template <int BITS, int PER_LANE>
struct encoded_t {
  static constexpr int kBytes = PER_LANE * PlaneBits(BITS) / 8;  // of the lane's base plane
  /*! \brief Bytes of the base plane. At 3 bits instead the codes themselves, a nibble each, which
   * ThreeBitKey and ThreeBitValue arrange. */
  uint32_t base[BITS == 3 ? PER_LANE / 8 : (kBytes + 3) / 4];
  uint32_t high;          // bits of the high plane, in its order
  float product, energy;  // sums over the lane: |y| * magnitude and magnitude^2
};

/*! \brief Codes of eight coordinates, a nibble each, from the table's entries and the signs. */
template <int BITS>
TURBOKV_DEVICE uint32_t NibblesOf(const uint32_t* w, const float* y) {
  const uint32_t codes =
      Select(LowBytes(w[0], w[2], w[4], w[6]), LowBytes(w[1], w[3], w[5], w[7]), 0x0f0f0f0f);
  if constexpr (BITS == 5) return codes;
  const uint32_t negative =
      Select(SignBytes(y[0], y[2], y[4], y[6]), SignBytes(y[1], y[3], y[5], y[7]), 0x0f0f0f0f);
  return codes ^ (BITS == 3 ? negative & 0x77777777 : negative);
}

/*! \brief Codes of 2 bits of 16 coordinates. */
TURBOKV_DEVICE uint32_t PairsOf(const uint32_t* w, const float* y) {
  uint32_t codes[4], negative[4];
  TURBOKV_UNROLL
  for (int i = 0; i < 4; ++i) {
    codes[i] = LowBytes(w[i], w[i + 4], w[i + 8], w[i + 12]);
    negative[i] = SignBytes(y[i], y[i + 4], y[i + 8], y[i + 12]);
  }
  const uint32_t word = Select(Select(codes[0], codes[1], 0x33333333),
                               Select(codes[2], codes[3], 0x33333333), 0x0f0f0f0f);
  return word ^ Select(Select(negative[0], negative[1], 0x33333333),
                       Select(negative[2], negative[3], 0x33333333), 0x0f0f0f0f);
}

/*! \brief High bits of a lane's 32 coordinates, in the order of their plane. */
TURBOKV_DEVICE uint32_t HighBits(const float (&y)[32], role_t role) {
  uint32_t negative = 0;
  TURBOKV_UNROLL
  for (int i = 31; i >= 0; --i) {
    negative = __funnelshift_l(__float_as_uint(y[i]), negative, 1);
  }
  return OrderHighBits(role, ~negative);
}

/*! \brief Quantise a lane's coordinates.
 *
 *  \param column  Shared-memory address of the table's column for this lane, less the bits of cell
 *                 0; STRIDE bytes apart are the cells.
 */
template <int BITS, int STRIDE, int PER_LANE>
TURBOKV_DEVICE void Encode(const float (&y)[PER_LANE], float factor, uint32_t column, role_t role,
                           encoded_t<BITS, PER_LANE>& out) {
  constexpr int kGroup = BITS == 2 ? 16 : 8;  // coordinates packed at a time
  float sums[PER_LANE / kGroup];
  out.energy = 0.0f;
  TURBOKV_UNROLL
  for (int first = 0; first < PER_LANE; first += kGroup) {
    uint32_t w[kGroup];
    float terms[kGroup];
    TURBOKV_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      w[i] = ptx::LoadShared(CellBits(y[first + i], factor) * STRIDE + column);
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
    } else if constexpr (BITS == 2) {
      out.base[first / kGroup] = PairsOf(w, z);
    } else {
      out.base[first / 8] = NibblesOf<BITS>(w, z);
    }
  }
  out.product = TreeSum(sums);
  out.high = 0;
  if constexpr (HasHighBit(BITS)) out.high = HighBits(y, role);
}

/*! \brief Nibbles of a unit of K: the half-words of 16 codes, from the codes of eight and eight. */
TURBOKV_DEVICE void ThreeBitKey(uint32_t low, uint32_t top, uint32_t& first_two, uint32_t& third) {
  first_two = low | (top >> 13 & 0x8888) | (top << 2 & 0x88880000);
  third = (top & 0x7777) | (top >> 15 & 0x8888);
}

/*! \brief Nibbles of a unit of V: three bytes, from the codes of its eight coordinates. */
TURBOKV_DEVICE uint32_t ThreeBitValue(uint32_t codes) {
  const uint32_t last = ptx::Permute(codes, 0, 0x4333);  // codes 6 and 7, three times
  const uint32_t bits =
      (last << 3 & 0x00000088) | (last << 2 & 0x00008800) | (last << 1 & 0x00880000);
  return (codes & 0x00ffffff) | bits;
}

}  // namespace store_detail
}  // namespace turbokv

#endif  // TURBOKV_STORE_ENCODE_CUH_
