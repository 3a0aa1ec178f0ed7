// SPDX-License-Identifier: Apache-2.0
// Quantising a rotated vector: cells, codes and the stored scale (FORMAT.md, sections 3 and 5), and
// whole vectors plainly.
#ifndef TURBOKV_COMPRESS_CUH_
#define TURBOKV_COMPRESS_CUH_

#include "turbokv/hadamard.cuh"
#include "turbokv/types.cuh"
#include "turbokv/vector_format.cuh"

namespace turbokv {

constexpr float kInputLimit = 0x1p48f;      // inputs are clamped to +-2^48 before rotation
constexpr float kSquaresFloor = 0x1p-120f;  // below this sum of squares a vector is zero
constexpr float kLargestHalf = 65504.0f;

// --- cells ---
// Boundaries b are half-integers of the lattice, and 2 |u| > 2 b if and only if ceil(2 |u|) > 2 b:
// the integer cell ceil(2 |u|) decides the index. No boundary is beyond 126.5, so cells end at 256.

constexpr int kNumCells = 257;
constexpr uint32_t kCellOrigin = 0x47000000;  // bits of 2^15, whose last place is worth 1 / 256

/*! \brief What |y| is multiplied by to get cells: lattice units over 128, so that 1 is the end.
 *
 *  Zero for a zero vector. Division by a power of two is exact.
 */
TURBOKV_HOST_DEVICE float CellFactor(const vector_format_t& format, float squares, float root) {
  return squares <= kSquaresFloor ? 0.0f : Div(format.normaliser, root) * 0x1p-7f;
}

/*! \brief The cell of a rotated coordinate, plus kCellOrigin. NaN has cell 0. */
TURBOKV_HOST_DEVICE uint32_t CellBits(float y, float factor) {
#if defined(__CUDA_ARCH__)
  float u;
  asm("mul.rn.sat.f32 %0, %1, %2;" : "=f"(u) : "f"(fabsf(y)), "f"(factor));
  return __float_as_uint(__fadd_ru(u, 0x1p15f));
#else
  const float u = Abs(y) * factor;
  return kCellOrigin + (u > 0 ? static_cast<uint32_t>(std::ceil((u < 1 ? u : 1.0f) * 256.0f)) : 0);
#endif
}

/*! \brief Index of the magnitude of a cell: how many boundaries lie below. */
TURBOKV_HOST_DEVICE int CellIndex(const codebook_t& book, int cell) {
  if (book.bits == 8) return cell < 254 ? cell >> 1 : 127;  // boundaries 1, 3, 5, ... 253
  int index = 0;
  for (int i = 0; i + 1 < NumMagnitudes(book); ++i) index += cell > TwiceBoundary(book, i) ? 1 : 0;
  return index;
}

/*! \brief Code of an index and a sign. */
TURBOKV_HOST_DEVICE constexpr uint32_t CodeOf(int bits, int index, bool negative) {
  const int half = 1 << (bits - 1);
  if (bits == 8) return static_cast<uint32_t>(negative ? half - index : half + index);
  return static_cast<uint32_t>(negative ? half - 1 - index : half + index);
}

// --- the scale ---

/*! \brief The scale to store, as bits of an fp16.
 *
 *  \param squares  Tree sum of y * y.
 *  \param root     Its square root.
 *  \param product  Tree sum of |y| * magnitude.
 *  \param energy   Sum of squared magnitudes, exact in any order.
 */
TURBOKV_HOST_DEVICE uint16_t StoredScale(const vector_format_t& format, float squares, float root,
                                         float product, float energy) {
  float scale = 0.0f;
  switch (format.rule) {
    case scale_rule_t::kPlain:
      scale = Mul(root, format.plain_factor);
      break;
    case scale_rule_t::kNormCorrected:
      scale = Mul(Div(root, Sqrt(energy)), format.scale_factor);
      break;
    case scale_rule_t::kLeastSquares:
      scale = Mul(Div(product, energy), format.scale_factor);
      break;
    case scale_rule_t::kUnbiased:
      scale = Mul(Div(squares, product), format.scale_factor);
      break;
  }
  if (squares <= kSquaresFloor) scale = 0.0f;
  return FloatToHalfBits(Clamp(scale, kLargestHalf));
}

// --- one vector, plainly ---

/*! \brief Rotate, not normalised: signs, padding and transform of `x` [head_dim] into `y`. */
template <int PADDED_DIM>
inline void RotateVector(const float* x, const vector_format_t& format, float (&y)[PADDED_DIM]) {
  for (int j = 0; j < PADDED_DIM; ++j) {
    const float value = j < format.head_dim ? Clamp(x[j], kInputLimit) : 0.0f;
    y[j] = Add(IsNegated(format, j) ? -value : value, 0.0f);  // -0 would count as negative
  }
  Hadamard(y);
}

/*! \brief Compress one vector on the host: codes [PADDED_DIM] and the bits of its scale. */
template <int PADDED_DIM>
inline uint16_t CompressVector(const float* x, const vector_format_t& format, uint8_t* codes) {
  float y[PADDED_DIM], magnitudes[PADDED_DIM];
  RotateVector(x, format, y);
  const codebook_t& book = format.codebook;
  const float squares = TreeSumSquares(y), root = Sqrt(squares);
  const float factor = CellFactor(format, squares, root);
  for (int j = 0; j < PADDED_DIM; ++j) {
    const int index = CellIndex(book, static_cast<int>(CellBits(y[j], factor) - kCellOrigin));
    codes[j] = static_cast<uint8_t>(CodeOf(book.bits, index, y[j] < 0.0f));
    magnitudes[j] = book.magnitudes[index];
  }
  const float energy = TreeSumSquares(magnitudes);
  for (int j = 0; j < PADDED_DIM; ++j) magnitudes[j] = Mul(Abs(y[j]), magnitudes[j]);
  return StoredScale(format, squares, root, TreeSum(magnitudes), energy);
}

/*! \brief Compress one key on the host, centred by `offset` [head_dim] unless that lengthens it. */
template <int PADDED_DIM>
inline uint16_t CompressCentred(const float* x, const float* offset, const vector_format_t& format,
                                uint8_t* codes) {
  float full[PADDED_DIM] = {}, centred[PADDED_DIM] = {};
  for (int j = 0; j < format.head_dim; ++j) {
    full[j] = x[j];
    centred[j] = Sub(x[j], offset[j]);
  }
  const bool uncentred = TreeSumSquares(full) < TreeSumSquares(centred);
  const uint16_t scale = CompressVector<PADDED_DIM>(uncentred ? full : centred, format, codes);
  return static_cast<uint16_t>(scale | (uncentred ? 0x8000 : 0));
}

}  // namespace turbokv

#endif  // TURBOKV_COMPRESS_CUH_
