// SPDX-License-Identifier: Apache-2.0
// Codes of a token by quads, four neighbouring coordinates each: how a small batch, whose lanes
// hold one quad or a few, finds its codes and writes them to their places without shared memory.
#ifndef TURBOKV_STORE_QUADS_CUH_
#define TURBOKV_STORE_QUADS_CUH_

#include "turbokv/compress.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/store/vector.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace store_detail {

/*! \brief A codebook of up to 16 magnitudes, one a lane. */
struct lane_codebook_t {
  uint32_t entry;     // see CellEntry; the code is not repeated
  uint32_t boundary;  // the last cell of the magnitude, plus kCellOrigin
};

/*! \brief The entries of coordinates: magnitude in fp32, and in the lowest byte the page code of
 * the positive sign. All lanes of a warp call it.
 *
 *  (A search by shuffles, as a table would have to be filled first.)
 *
 *  \tparam BITS  Of the codebook; 0 to read `bits`.
 *  \param book   Held by lanes 0 to NumMagnitudes - 1.
 */
template <int BITS, int N>
TURBOKV_DEVICE void LookUp(const float (&y)[N], float factor, int bits, const lane_codebook_t& book,
                           uint32_t (&w)[N]) {
  uint32_t cells[N];
  TURBOKV_UNROLL
  for (int i = 0; i < N; ++i) cells[i] = CellBits(y[i], factor);
  if (__builtin_expect(bits == 8, 0)) {
    TURBOKV_UNROLL
    for (int i = 0; i < N; ++i) {
      const int cell = cells[i] - kCellOrigin, index = cell < 254 ? cell >> 1 : 127;
      w[i] = __float_as_uint(static_cast<float>(index)) | (index + 128);
    }
    return;
  }
  int index[N] = {};
#pragma unroll(BITS == 0 ? 1 : 4)
  for (int step = 1 << bits >> 2; step > 0; step >>= 1) {
    TURBOKV_UNROLL
    for (int i = 0; i < N; ++i) {
      if (cells[i] > __shfl_sync(~0u, book.boundary, index[i] + step - 1)) index[i] += step;
    }
  }
  TURBOKV_UNROLL
  for (int i = 0; i < N; ++i) w[i] = __shfl_sync(~0u, book.entry, index[i]);
}

/*! \brief Codes of a quad side by side: bytes at 8 bits, pairs of bits at 2, nibbles else; at 5
 * bits without the high bit.
 */
template <int BITS>
TURBOKV_DEVICE uint32_t QuadCodes(const uint32_t* w, const float* y) {
  constexpr int kWidth = BITS == 2 ? 2 : BITS == 8 ? 8 : 4;
  uint32_t codes = 0;
  TURBOKV_UNROLL
  for (int i = 0; i < 4; ++i) {
    uint32_t code = w[i] & 0xff;
    const bool negative = (__float_as_uint(y[i]) >> 31) != 0;
    if (BITS == 8) code = negative ? 256 - code : code;
    if (BITS <= 4) code ^= negative ? (1u << BITS) - 1 : 0;
    codes |= code << (kWidth * i);
  }
  return codes;
}

/*! \brief For every quad of a lane, the bits that COUNT neighbouring quads have together. */
template <int COUNT, int QUADS>
TURBOKV_DEVICE void Unite(uint32_t (&x)[QUADS]) {
  TURBOKV_UNROLL
  for (int distance = 1; distance < COUNT; distance *= 2) {
    uint32_t other[QUADS];
    TURBOKV_UNROLL
    for (int q = 0; q < QUADS; ++q) {
      other[q] = distance < QUADS ? x[q ^ distance] : __shfl_xor_sync(~0u, x[q], distance / QUADS);
    }
    TURBOKV_UNROLL
    for (int q = 0; q < QUADS; ++q) x[q] |= other[q];
  }
}

/*! \brief Bits of four neighbouring coordinates that are not negative. */
TURBOKV_DEVICE uint32_t QuadSigns(const float* y) {
  uint32_t bits = 0;
  TURBOKV_UNROLL
  for (int i = 0; i < 4; ++i) bits |= (~__float_as_uint(y[i]) >> 31) << i;
  return bits;
}

/*! \brief Write a lane's codes of a token of K. All lanes of a warp call it.
 *
 *  \param base, high  Planes of the tile.
 *  \param token       Of the tile.
 *  \param stored      Whether to write.
 *  \param first       The lane's first quad.
 */
template <int BITS, int PADDED_DIM, int QUADS>
TURBOKV_DEVICE void WriteKeyQuads(uint8_t* base, uint8_t* high, int token, bool stored, int first,
                                  const uint32_t (&w)[4 * QUADS], const float (&y)[4 * QUADS]) {
  constexpr int kBytes = PlaneBits(BITS) / 2, kRow = PADDED_DIM / 4 * kBytes;
  uint32_t codes[QUADS], extra[QUADS] = {};
  TURBOKV_UNROLL
  for (int q = 0; q < QUADS; ++q) {
    codes[q] = QuadCodes<BITS>(w + 4 * q, y + 4 * q);
    const int r = (first + q) & 3;
    if constexpr (BITS == 3) extra[q] = r == 3 ? codes[q] : 0;
    if constexpr (BITS == 5) {
      const uint32_t bits = QuadSigns(y + 4 * q);  // see HighPosition
      extra[q] = ((bits & 1) | (bits >> 1 & 2) | (bits << 7 & 0x100) | (bits << 6 & 0x200))
                 << (2 * r);
    }
  }
  if constexpr (BITS == 3 || BITS == 5) Unite<4>(extra);
  TURBOKV_UNROLL
  for (int q = 0; q < QUADS; ++q) {
    const int quad = first + q, r = quad & 3;
    if constexpr (BITS == 3) {
      uint8_t* const to = base + KeyHalfOffset(PADDED_DIM, token, quad >> 2, r);
      const uint32_t half = codes[q] | (extra[q] >> r & 0x1111) << 3;
      if (stored && r != 3) *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(half);
    } else {
      uint8_t* const to = base + KeyOffset(token, kBytes * quad, kRow);
      if (stored) StoreBytes<kBytes>(to, {codes[q]});
    }
    if constexpr (BITS == 5) {
      uint8_t* const to = high + KeyOffset(token, (quad >> 2) * 2, PADDED_DIM / 8);
      if (stored && r == 0) StoreBytes<2>(to, {extra[q]});
    }
  }
}

/*! \brief The same of a token of V: other tokens own the bytes between. */
template <int BITS, int PADDED_DIM, int QUADS>
TURBOKV_DEVICE void WriteValueQuads(uint8_t* base, uint8_t* high, int token, bool stored, int first,
                                    const uint32_t (&w)[4 * QUADS], const float (&y)[4 * QUADS]) {
  uint32_t codes[QUADS], extra[QUADS] = {};
  TURBOKV_UNROLL
  for (int q = 0; q < QUADS; ++q) {
    codes[q] = QuadCodes<BITS>(w + 4 * q, y + 4 * q);
    const bool odd = (first + q) & 1;
    if constexpr (BITS == 3) extra[q] = odd ? codes[q] >> 8 : 0;
    if constexpr (BITS == 5) extra[q] = QuadSigns(y + 4 * q) << (odd ? 4 : 0);
  }
  if constexpr (BITS == 3 || BITS == 5) Unite<2>(extra);
  TURBOKV_UNROLL
  for (int q = 0; q < QUADS; ++q) {
    const int quad = first + q;
    if constexpr (BITS == 3) {
      // nibbles are bits of a word that other tokens may be writing just now
      const int shift = 4 * ((token >> 3) * 2 + (token & 1)), odd = quad & 1;
      TURBOKV_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int k = odd ? 2 : i;
        const uint32_t byte = (codes[q] >> (8 * i) & 0xff) | (extra[q] >> k & 0x11) << 3;
        uint32_t* const word = reinterpret_cast<uint32_t*>(
            base + ValueWordOffset(PADDED_DIM, token >> 1 & 3, quad >> 1, k));
        if (!stored || (odd && i == 1)) continue;
        ptx::AndGlobal(word, ~(0x000f000fu << shift));
        ptx::OrGlobal(word, ((byte & 15) | (byte >> 4) << 16) << shift);
      }
    } else {
      constexpr int kBytes = PlaneBits(BITS) / 2, kRun = ValueRun(PADDED_DIM, BITS);
      TURBOKV_UNROLL
      for (int i = 0; i < kBytes; ++i) {
        uint8_t* const to = base + ValueOffset(token, kBytes * quad + i, kRun, BITS);
        if (stored) *to = static_cast<uint8_t>(codes[q] >> (8 * i));
      }
      if constexpr (BITS == 5) {
        constexpr int kHighRun = ValueHighRun(PADDED_DIM, BITS);
        uint8_t* const to = high + ValueOffset(token, quad >> 1, kHighRun, BITS);
        if (stored && (quad & 1) == 0) *to = static_cast<uint8_t>(extra[q]);
      }
    }
  }
}

}  // namespace store_detail
}  // namespace turbokv

#endif  // TURBOKV_STORE_QUADS_CUH_
