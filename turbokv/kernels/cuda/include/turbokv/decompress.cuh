// SPDX-License-Identifier: Apache-2.0
// Reading codes back: levels, and whole vectors plainly (FORMAT.md, section 3).
#ifndef TURBOKV_DECOMPRESS_CUH_
#define TURBOKV_DECOMPRESS_CUH_

#include "turbokv/hadamard.cuh"
#include "turbokv/types.cuh"
#include "turbokv/vector_format.cuh"

namespace turbokv {

/*! \brief Level of a code in lattice units. Code 0 of 8 bits is never written and reads as -127. */
TURBOKV_HOST_DEVICE constexpr int LevelOf(const codebook_t& book, uint32_t code) {
  const int c = static_cast<int>(code), half = 1 << (book.bits - 1);
  if (book.bits == 8) return c > 0 ? c - half : 1 - half;
  return c >= half ? book.magnitudes[c - half] : -book.magnitudes[half - 1 - c];
}

/*! \brief Scale of a stored vector: the sign bit is a mark, not a sign. */
TURBOKV_HOST_DEVICE float ScaleOf(uint16_t stored) { return HalfBitsToFloat(stored & 0x7fff); }

/*! \brief Whether readers must not add the offset of a centred key. */
TURBOKV_HOST_DEVICE constexpr bool IsUncentred(uint16_t stored) { return (stored & 0x8000) != 0; }

/*! \brief What follows the transform of coordinate `j` on the way to the original space. */
TURBOKV_HOST_DEVICE float UnrotateFactor(const vector_format_t& format, int j) {
  return IsNegated(format, j) ? -format.inverse_root : format.inverse_root;
}

/*! \brief Decompress one vector on the host, in rotated space [PADDED_DIM]. */
template <int PADDED_DIM>
inline void DecompressRotated(const uint8_t* codes, uint16_t stored, const vector_format_t& format,
                              float* out) {
  const float scale = ScaleOf(stored);
  for (int j = 0; j < PADDED_DIM; ++j) {
    out[j] = Mul(static_cast<float>(LevelOf(format.codebook, codes[j])) * format.level_unit, scale);
  }
}

/*! \brief Decompress one vector on the host, in original space [head_dim]. */
template <int PADDED_DIM>
inline void DecompressVector(const uint8_t* codes, uint16_t stored, const vector_format_t& format,
                             float* out) {
  float y[PADDED_DIM];
  DecompressRotated<PADDED_DIM>(codes, stored, format, y);
  Hadamard(y);
  for (int j = 0; j < format.head_dim; ++j) out[j] = Mul(y[j], UnrotateFactor(format, j));
}

}  // namespace turbokv

#endif  // TURBOKV_DECOMPRESS_CUH_
