// SPDX-License-Identifier: Apache-2.0
// Everything that fixes the bytes of one role (K or V), as a kernel parameter.
#ifndef TURBOKV_VECTOR_FORMAT_CUH_
#define TURBOKV_VECTOR_FORMAT_CUH_

#include "turbokv/codebook.cuh"
#include "turbokv/hadamard.cuh"
#include "turbokv/types.cuh"

namespace turbokv {

/*! \brief How the stored scale is computed (FORMAT.md, section 5). */
enum class scale_rule_t : int32_t {
  kPlain = 0,          // keeps nothing
  kNormCorrected = 1,  // keeps the length
  kLeastSquares = 2,   // least squared error; the default of V
  kUnbiased = 3,       // keeps the product with the original; the default of K
};

/*! \brief Codebook, signs and constants of one role. */
struct vector_format_t {
  codebook_t codebook;
  uint32_t signs[kMaxPaddedDim / 32];  // bit j % 32 of word j / 32: coordinate j is negated
  int32_t head_dim;
  scale_rule_t rule;
  float normaliser;    // sqrt(padded_dim) / step: turns y / |y| into lattice units
  float scale_factor;  // 2^frac_bits / sqrt(padded_dim): turns y / level into a stored scale
  float plain_factor;  // step * 2^frac_bits / padded_dim: stored scale per |y|, rule kPlain
  float inverse_root;  // 1 / sqrt(padded_dim)
  float level_unit;    // 2^-frac_bits
};

/*! \brief Whether the rotation negates coordinate `j`. */
TURBOKV_HOST_DEVICE bool IsNegated(const vector_format_t& format, int j) {
  return (format.signs[j / 32] >> (j % 32) & 1) != 0;
}

/*! \brief Constants of a codebook and head size; signs are left clear.
 *
 *  Every constant is computed in fp64 and rounded once, as FORMAT.md says.
 */
inline vector_format_t MakeVectorFormat(const codebook_t& codebook, int head_dim,
                                        scale_rule_t rule) {
  vector_format_t format = {};
  const double dim = PaddedDim(head_dim), root = std::sqrt(dim);
  const double unit = std::ldexp(1.0, codebook.frac_bits);
  format.codebook = codebook;
  format.head_dim = head_dim;
  format.rule = rule;
  format.normaliser = static_cast<float>(root / codebook.step);
  format.scale_factor = static_cast<float>(unit / root);
  format.plain_factor = static_cast<float>(codebook.step * unit / dim);
  format.inverse_root = static_cast<float>(1.0 / root);
  format.level_unit = static_cast<float>(1.0 / unit);
  return format;
}

/*! \brief The same with the signs of a role and seed. */
inline vector_format_t MakeVectorFormat(role_t role, const codebook_t& codebook, int head_dim,
                                        scale_rule_t rule, uint32_t seed = kDefaultSeed) {
  vector_format_t format = MakeVectorFormat(codebook, head_dim, rule);
  for (int j = 0; j < PaddedDim(head_dim); ++j) {
    if (IsNegated(role, seed, j)) format.signs[j / 32] |= 1u << (j % 32);
  }
  return format;
}

/*! \brief The data-free format of a role and width. */
inline vector_format_t DefaultFormat(role_t role, int bits, int head_dim,
                                     uint32_t seed = kDefaultSeed) {
  const scale_rule_t rule =
      role == role_t::kKey ? scale_rule_t::kUnbiased : scale_rule_t::kLeastSquares;
  return MakeVectorFormat(role, GaussianCodebook(bits), head_dim, rule, seed);
}

}  // namespace turbokv

#endif  // TURBOKV_VECTOR_FORMAT_CUH_
