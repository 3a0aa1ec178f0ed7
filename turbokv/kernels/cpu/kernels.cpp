// SPDX-License-Identifier: Apache-2.0
// The flat codec (FORMAT.md, sections 2 to 5) on vectors of floats. Compiled once per instruction
// set, with TURBOKV_KERNELS naming the result; no operation depends on the width, so the bytes do
// not either.
//
// A block is W vectors, one a lane: `y[coordinate]` holds that coordinate of all of them. Every
// step is then elementwise, and butterflies, tree sums and bit strings run over whole registers.
#include <cmath>
#include <cstring>

#include "codec.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define TURBOKV_INLINE inline __attribute__((always_inline))

namespace turbokv_cpu {
namespace {

#if defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * W)));
typedef int32_t vint __attribute__((vector_size(4 * W)));
typedef uint32_t vuint __attribute__((vector_size(4 * W)));

constexpr float kInputLimit = 0x1p48f;
constexpr float kSquaresFloor = 0x1p-120f;
alignas(64) const float kZeros[kMaxDim] = {};

/*! \brief `x` in every lane. Subtracting zero changes no number, and so costs nothing. */
TURBOKV_INLINE vfloat Broadcast(float x) { return x - vfloat{}; }

TURBOKV_INLINE vfloat Abs(vfloat x) { return (vfloat)((vint)x & 0x7fffffff); }

// --- 16 bits ---

TURBOKV_INLINE uint32_t FloatBits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

TURBOKV_INLINE float BitsFloat(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// No branches, so that loops over these become vector code.

TURBOKV_INLINE float HalfToFloat(uint16_t half) {
  const uint32_t magnitude = half & 0x7fff, sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t shifted = magnitude << 13;
  // a subnormal's bits below those of 2^-14, which is then taken off: exact
  const float subnormal = BitsFloat(shifted + (113u << 23)) - 0x1p-14f;
  uint32_t bits = shifted + (112u << 23);
  bits = magnitude >= 0x7c00 ? shifted + (224u << 23) : bits;
  bits = magnitude < 0x400 ? FloatBits(subnormal) : bits;
  return BitsFloat(bits | sign);
}

TURBOKV_INLINE uint16_t FloatToHalf(float x) {
  const uint32_t bits = FloatBits(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  // adding 0.5 rounds to its unit in the last place, 2^-24: that of subnormal halves
  const uint32_t subnormal = FloatBits(BitsFloat(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  half = magnitude < (113u << 23) ? subnormal : half;
  half = magnitude >= 0x477ff000 ? 0x7c00u : half;  // 65520 and up
  half = magnitude > 0x7f800000 ? 0x7e00u : half;
  return static_cast<uint16_t>(half | sign);
}

TURBOKV_INLINE float BFloat16ToFloat(uint16_t bits) {
  return BitsFloat(static_cast<uint32_t>(bits) << 16);
}

TURBOKV_INLINE uint16_t FloatToBFloat16(float x) {
  const uint32_t bits = FloatBits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
}

/*! \brief Read `dim` numbers as fp32. */
void ReadRow(const matrix_t& matrix, int64_t row, int dim, float* out) {
  const int64_t first = row * matrix.row_stride, step = matrix.column_stride;
  if (matrix.dtype == dtype_t::kFloat32) {
    const float* in = static_cast<const float*>(matrix.data) + first;
    if (step == 1) {
      std::memcpy(out, in, sizeof(float) * static_cast<size_t>(dim));
    } else {
      for (int j = 0; j < dim; ++j) out[j] = in[j * step];
    }
    return;
  }
  const uint16_t* in = static_cast<const uint16_t*>(matrix.data) + first;
  alignas(64) uint16_t dense[kMaxDim];
  if (step != 1) {
    for (int j = 0; j < dim; ++j) dense[j] = in[j * step];
    in = dense;
  }
  if (matrix.dtype == dtype_t::kFloat16) {
    for (int j = 0; j < dim; ++j) out[j] = HalfToFloat(in[j]);
  } else {
    for (int j = 0; j < dim; ++j) out[j] = BFloat16ToFloat(in[j]);
  }
}

/*! \brief Round `dim` fp32 numbers to a row. */
void WriteRow(const float* in, int dim, const matrix_t& matrix, int64_t row) {
  const int64_t first = row * matrix.row_stride, step = matrix.column_stride;
  if (matrix.dtype == dtype_t::kFloat32) {
    float* out = static_cast<float*>(matrix.data) + first;
    if (step == 1) {
      std::memcpy(out, in, sizeof(float) * static_cast<size_t>(dim));
    } else {
      for (int j = 0; j < dim; ++j) out[j * step] = in[j];
    }
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(matrix.data) + first;
  alignas(64) uint16_t dense[kMaxDim];
  uint16_t* target = step == 1 ? out : dense;
  if (matrix.dtype == dtype_t::kFloat16) {
    for (int j = 0; j < dim; ++j) target[j] = FloatToHalf(in[j]);
  } else {
    for (int j = 0; j < dim; ++j) target[j] = FloatToBFloat16(in[j]);
  }
  if (step != 1) {
    for (int j = 0; j < dim; ++j) out[j * step] = dense[j];
  }
}

// --- transposition ---

/*! \brief Transpose every 4 x 4 part of four registers. */
TURBOKV_INLINE void Transpose4(vfloat (&x)[4]) {
#if defined(__AVX2__)
  const __m256 a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpackhi_ps(x[0], x[1]);
  const __m256 c = _mm256_unpacklo_ps(x[2], x[3]), d = _mm256_unpackhi_ps(x[2], x[3]);
  x[0] = _mm256_shuffle_ps(a, c, 0x44), x[1] = _mm256_shuffle_ps(a, c, 0xee);
  x[2] = _mm256_shuffle_ps(b, d, 0x44), x[3] = _mm256_shuffle_ps(b, d, 0xee);
#elif defined(__x86_64__)
  const __m128 a = _mm_unpacklo_ps(x[0], x[1]), b = _mm_unpackhi_ps(x[0], x[1]);
  const __m128 c = _mm_unpacklo_ps(x[2], x[3]), d = _mm_unpackhi_ps(x[2], x[3]);
  x[0] = _mm_movelh_ps(a, c), x[1] = _mm_movehl_ps(c, a);
  x[2] = _mm_movelh_ps(b, d), x[3] = _mm_movehl_ps(d, b);
#else
  const vfloat a = x[0], b = x[1], c = x[2], d = x[3];
  for (int i = 0; i < 4; ++i) x[i] = vfloat{a[i], b[i], c[i], d[i]};
#endif
}

/*! \brief Coordinates j to j + 3 of W rows, a row in each lane. */
TURBOKV_INLINE void LoadColumns(const float* const (&rows)[W], int j, vfloat (&x)[4]) {
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX2__)
    const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(rows[i] + j));
    x[i] = _mm256_insertf128_ps(low, _mm_loadu_ps(rows[i + 4] + j), 1);
#else
    std::memcpy(&x[i], rows[i] + j, 16);
#endif
  }
  Transpose4(x);
}

/*! \brief Undo LoadColumns. */
TURBOKV_INLINE void StoreColumns(vfloat (&x)[4], float* const (&rows)[W], int j) {
  Transpose4(x);
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX2__)
    _mm_storeu_ps(rows[i] + j, _mm256_castps256_ps128(x[i]));
    _mm_storeu_ps(rows[i + 4] + j, _mm256_extractf128_ps(x[i], 1));
#else
    std::memcpy(rows[i] + j, &x[i], 16);
#endif
  }
}

// --- butterflies and sums ---

template <int N, int STRIDE>
TURBOKV_INLINE void Stage(vfloat (&x)[N]) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    if (i & STRIDE) continue;
    const vfloat a = x[i], b = x[i + STRIDE];
    x[i] = a + b;
    x[i + STRIDE] = a - b;
  }
}

/*! \brief Stages of stride 1 to N / 2 over registers. */
template <int N>
TURBOKV_INLINE void Butterflies(vfloat (&x)[N]) {
  Stage<N, 1>(x);
  if constexpr (N > 2) Stage<N, 2>(x);
  if constexpr (N > 4) Stage<N, 4>(x);
}

/*! \brief log2(N) stages from `stride` on, in one pass over memory. */
template <int N>
TURBOKV_INLINE void Pass(vfloat* y, int dim, int stride) {
  for (int start = 0; start < dim; start += N * stride) {
    for (int j = start; j < start + stride; ++j) {
      vfloat x[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) x[i] = y[j + i * stride];
      Butterflies(x);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) y[j + i * stride] = x[i];
    }
  }
}

/*! \brief The transform from stride 8 on; the first three stages happen where `y` is filled. */
TURBOKV_INLINE void Hadamard(vfloat* y, int dim) {
  for (int stride = 8; stride < dim;) {
    const int left = dim / stride;
    // two passes for 16, of four rows each, are as many as three stages and one, on fewer registers
    if (left >= 32 || left == 8) {
      Pass<8>(y, dim, stride);
      stride *= 8;
    } else if (left >= 4) {
      Pass<4>(y, dim, stride);
      stride *= 4;
    } else {
      Pass<2>(y, dim, stride);
      stride *= 2;
    }
  }
}

TURBOKV_INLINE vfloat TreeSum8(const vfloat (&x)[8]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

/*! \brief Sum of `n` terms, neighbours first; they are overwritten. */
TURBOKV_INLINE vfloat TreeSum(vfloat* terms, int n) {
  for (; n > 1; n /= 2) {
    for (int i = 0; i < n / 2; ++i) terms[i] = terms[2 * i] + terms[2 * i + 1];
  }
  return terms[0];
}

// --- quantising ---

/*! \brief A codebook's constants in every lane. */
struct lanes_t {
  vfloat boundaries[15];
  // Index in the low byte, magnitude above: one sum counts both.
  vint start, steps[15];
  vint mid_tread;  // all ones if zero is a level
};

template <int BITS, quantiser_t KIND>
TURBOKV_INLINE void FillLanes(const job_t& job, lanes_t* lanes) {
  lanes->mid_tread = vint{} - (job.format.is_mid_tread ? 1 : 0);
  if constexpr (KIND == quantiser_t::kCompare) {
    const float* m = job.tables.magnitudes;
    lanes->start = vint{} + (static_cast<int>(m[0]) << 8);
    for (int i = 0; i < (1 << (BITS - 1)) - 1; ++i) {
      lanes->boundaries[i] = Broadcast(job.tables.boundaries[i]);
      lanes->steps[i] = vint{} + ((static_cast<int>(m[i + 1] - m[i]) << 8) + 1);
    }
  }
}

/*! \brief Index (low byte) and magnitude of four registers of `u >= 0` in lattice units. */
template <int BITS, quantiser_t KIND>
TURBOKV_INLINE void Quantise4(const lanes_t& lanes, const tables_t& tables, const vfloat (&u)[4],
                              vint (&index)[4], vfloat (&magnitude)[4]) {
  constexpr int kBoundaries = (1 << (BITS - 1)) - 1;
  if constexpr (KIND == quantiser_t::kCompare) {
    for (int k = 0; k < 4; ++k) index[k] = lanes.start;
#pragma GCC unroll 16
    for (int i = 0; i < kBoundaries; ++i) {
      for (int k = 0; k < 4; ++k) index[k] += (u[k] > lanes.boundaries[i]) & lanes.steps[i];
    }
    for (int k = 0; k < 4; ++k) magnitude[k] = __builtin_convertvector(index[k] >> 8, vfloat);
  } else if constexpr (KIND == quantiser_t::kUniform) {
    // Boundaries 1/2, 3/2, ...: half the ceiling of 2 u, which is at most 2^bits - 2 (NaN too)
    const vfloat limit = Broadcast(2.0f * kBoundaries);
    for (int k = 0; k < 4; ++k) {
      const vfloat twice = u[k] + u[k];
      const vint below = twice < limit;
      const vfloat clamped = (vfloat)(((vint)twice & below) | ((vint)limit & ~below));
      const vint whole = __builtin_convertvector(clamped, vint);
      const vint rest = __builtin_convertvector(whole, vfloat) < clamped;  // -1 if true
      index[k] = (whole - rest) >> 1;
      magnitude[k] = __builtin_convertvector(index[k], vfloat);
    }
  } else {
    alignas(64) float in[4 * W], out[4 * W];
    alignas(64) int32_t found[4 * W];
    std::memcpy(in, u, sizeof(in));
    for (int l = 0; l < 4 * W; ++l) {
      int i = tables.buckets[BucketOf(in[l], tables.bucket_scale)];
      i += in[l] > tables.boundaries[i] ? 1 : 0;
      found[l] = i;
    }
    for (int more = 1; more < tables.max_in_bucket; ++more) {
      for (int l = 0; l < 4 * W; ++l) found[l] += in[l] > tables.boundaries[found[l]] ? 1 : 0;
    }
    for (int l = 0; l < 4 * W; ++l) out[l] = tables.magnitudes[found[l]];
    std::memcpy(index, found, sizeof(found));
    std::memcpy(magnitude, out, sizeof(out));
  }
}

/*! \brief What a group of eight coordinates comes to. */
struct group_t {
  vuint low, high;  // bit string of its codes
  vfloat product, energy;
};

template <int BITS, quantiser_t KIND>
TURBOKV_INLINE group_t QuantiseGroup(const lanes_t& lanes, const tables_t& tables, const vfloat* y,
                                     vfloat inverse) {
  constexpr int kFull = (1 << BITS) - 1;
  group_t group = {};
  vfloat products[8], energies[8];
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {
    vfloat u[4], magnitude[4];
    vint index[4];
    for (int k = 0; k < 4; ++k) u[k] = Abs(y[half + k]) * inverse;
    Quantise4<BITS, KIND>(lanes, tables, u, index, magnitude);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const vfloat value = y[half + k];
      products[half + k] = Abs(value) * magnitude[k];
      energies[half + k] = magnitude[k] * magnitude[k];
      // index, or its complement; -index if zero is a level. Half the range is added below.
      const vint negative = value < Broadcast(0.0f);  // -0 is not
      const vint signed_index = (index[k] ^ negative) - (negative & lanes.mid_tread);
      const vuint code = (vuint)(signed_index & kFull);
      const int shift = BITS * (half + k);
      if (shift < 32) group.low |= code << shift;
      if (shift >= 32) {
        group.high |= code << (shift - 32);
      } else if (shift + BITS > 32) {
        group.high |= code >> (32 - shift);
      }
    }
  }
  // Adding half the range modulo the whole flips the top bit of each code.
  uint64_t flips = 0;
  for (int k = 0; k < 8; ++k) flips |= uint64_t{1} << (BITS * k + BITS - 1);
  group.low ^= static_cast<uint32_t>(flips);
  group.high ^= static_cast<uint32_t>(flips >> 32);
  group.product = TreeSum8(products);
  group.energy = TreeSum8(energies);
  return group;
}

float StoredScale(const format_t& format, float squares, float root, float product, float energy) {
  if (squares <= kSquaresFloor) return 0.0f;
  switch (format.rule) {
    case scale_rule_t::kPlain:
      return root * format.plain_factor;
    case scale_rule_t::kNormCorrected:
      return root / std::sqrt(energy) * format.scale_factor;
    case scale_rule_t::kLeastSquares:
      return product / energy * format.scale_factor;
    default:
      return squares / product * format.scale_factor;
  }
}

void StoreScale(float scale, dtype_t dtype, void* norms, int64_t i) {
  const float limit = dtype == dtype_t::kFloat16    ? 65504.0f
                      : dtype == dtype_t::kBFloat16 ? 0x1.fep127f
                                                    : FLT_MAX;
  scale = scale > limit ? limit : scale < -limit ? -limit : scale;
  if (dtype == dtype_t::kFloat32) {
    static_cast<float*>(norms)[i] = scale;
  } else {
    static_cast<uint16_t*>(norms)[i] =
        dtype == dtype_t::kFloat16 ? FloatToHalf(scale) : FloatToBFloat16(scale);
  }
}

float LoadScale(const void* norms, dtype_t dtype, int64_t i) {
  if (dtype == dtype_t::kFloat32) return std::fabs(static_cast<const float*>(norms)[i]);
  const uint16_t bits = static_cast<const uint16_t*>(norms)[i];
  return std::fabs(dtype == dtype_t::kFloat16 ? HalfToFloat(bits) : BFloat16ToFloat(bits));
}

// --- whole vectors ---

/*! \brief Whether kernels may work on rows in place: fp32, dense, whole groups of eight. */
bool IsDirect(const matrix_t& matrix, int dim) {
  return matrix.dtype == dtype_t::kFloat32 && matrix.column_stride == 1 && dim % 8 == 0;
}

template <int BITS, quantiser_t KIND>
void Compress(const job_t& job, int64_t first, int64_t last) {
  const format_t& format = job.format;
  const int dim = format.padded_dim, head_dim = format.head_dim, groups = dim / 8;
  const bool direct = IsDirect(job.vectors, head_dim);
  lanes_t lanes;
  FillLanes<BITS, KIND>(job, &lanes);
  vfloat y[kMaxDim], squares[kMaxDim / 8], products[kMaxDim / 8], energies[kMaxDim / 8];
  vuint low[kMaxDim / 8], high[kMaxDim / 8];
  alignas(64) float buffer[W][kMaxDim];
  const float* rows[W];
  // the last group of a size that is no multiple of eight ends with zeros
  if (!direct) std::memset(buffer, 0, sizeof(buffer));
  for (int64_t block = first; block < last; block += W) {
    const int count = static_cast<int>(last - block < W ? last - block : W);
    for (int l = 0; l < W; ++l) {
      if (l >= count) {
        rows[l] = kZeros;
      } else if (direct) {
        rows[l] =
            static_cast<const float*>(job.vectors.data) + (block + l) * job.vectors.row_stride;
      } else {
        ReadRow(job.vectors, block + l, head_dim, buffer[l]);
        rows[l] = buffer[l];
      }
    }
    // rotate
    for (int j = 0; j < dim; j += 8) {
      vfloat x[8] = {};
      if (j < head_dim) {
        vfloat parts[2][4];
        LoadColumns(rows, j, parts[0]);
        LoadColumns(rows, j + 4, parts[1]);
        const vfloat limit = Broadcast(kInputLimit);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          vfloat value = parts[i / 4][i % 4];
          value = value > limit ? limit : value;  // NaN stays
          value = value < -limit ? -limit : value;
          x[i] = value * Broadcast(format.signs[j + i]);
        }
        Butterflies(x);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) y[j + i] = x[i];
    }
    Hadamard(y, dim);
    // lengths
    for (int g = 0; g < groups; ++g) {
      vfloat x[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) x[i] = y[8 * g + i] * y[8 * g + i];
      squares[g] = TreeSum8(x);
    }
    const vfloat length = TreeSum(squares, groups);
    vfloat root, inverse;
    for (int l = 0; l < W; ++l) root[l] = std::sqrt(length[l]);
    inverse = format.normaliser / root;
    inverse = length > Broadcast(kSquaresFloor) ? inverse : vfloat{};
    // codes
    for (int g = 0; g < groups; ++g) {
      const group_t group = QuantiseGroup<BITS, KIND>(lanes, job.tables, y + 8 * g, inverse);
      low[g] = group.low;
      high[g] = group.high;
      products[g] = group.product;
      energies[g] = group.energy;
    }
    const vfloat product = TreeSum(products, groups), energy = TreeSum(energies, groups);
    for (int l = 0; l < count; ++l) {
      uint8_t bytes[kMaxDim + 8];
      for (int g = 0; g < groups; ++g) {
        // what is written past a group's bytes belongs to the next, which comes later
        const uint64_t codes = low[g][l] | static_cast<uint64_t>(BITS > 4 ? high[g][l] : 0) << 32;
        std::memcpy(bytes + g * BITS, &codes, BITS > 4 ? 8 : 4);
      }
      uint8_t* out = job.packed + (block + l) * job.packed_row_stride;
      if (job.packed_column_stride == 1) {
        std::memcpy(out, bytes, static_cast<size_t>(groups * BITS));
      } else {
        for (int i = 0; i < groups * BITS; ++i) out[i * job.packed_column_stride] = bytes[i];
      }
      const float scale = StoredScale(format, length[l], root[l], product[l], energy[l]);
      StoreScale(scale, format.norm_dtype, job.norms, (block + l) * job.norms_stride);
    }
  }
}

/*! \brief Levels of every pair of codes, or of every code where pairs are too many. */
template <int BITS>
struct levels_t {
  static constexpr int kCodes = BITS <= 4 ? 2 : 1;
  float values[1 << (kCodes * BITS)][kCodes];

  explicit levels_t(const float* levels) {
    for (int i = 0; i < 1 << (kCodes * BITS); ++i) {
      for (int k = 0; k < kCodes; ++k) {
        values[i][k] = levels[i >> (k * BITS) & ((1 << BITS) - 1)];
      }
    }
  }
};

template <int BITS>
TURBOKV_INLINE void ReadLevels(const levels_t<BITS>& levels, const job_t& job, int64_t vector,
                               float* out) {
  constexpr int kCodes = levels_t<BITS>::kCodes, kWidth = kCodes * BITS;
  const int dim = job.format.padded_dim;
  const uint8_t* in = job.packed + vector * job.packed_row_stride;
  uint8_t bytes[kMaxDim + 8];  // groups are read as words
  if (job.packed_column_stride == 1) {
    std::memcpy(bytes, in, static_cast<size_t>(dim * BITS / 8));
  } else {
    for (int i = 0; i < dim * BITS / 8; ++i) bytes[i] = in[i * job.packed_column_stride];
  }
  for (int j = 0; j < dim; j += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + j / 8 * BITS, 8);
#pragma GCC unroll 8
    for (int k = 0; k < 8; k += kCodes) {
      const uint64_t code = word >> (k * BITS) & ((1u << kWidth) - 1);
      std::memcpy(out + j + k, levels.values[code], sizeof(float) * kCodes);
    }
  }
}

template <int BITS>
void Decompress(const job_t& job, int64_t first, int64_t last) {
  const format_t& format = job.format;
  const int dim = format.padded_dim, head_dim = format.head_dim;
  const bool direct = IsDirect(job.vectors, job.rotated ? dim : head_dim);
  const levels_t<BITS> levels(format.levels);
  alignas(64) float buffer[W][kMaxDim];
  if (job.rotated) {
    for (int64_t i = first; i < last; ++i) {
      ReadLevels(levels, job, i, buffer[0]);
      const float scale = LoadScale(job.norms, format.norm_dtype, i * job.norms_stride);
      float* out =
          direct ? static_cast<float*>(job.vectors.data) + i * job.vectors.row_stride : buffer[0];
      for (int j = 0; j < dim; ++j) out[j] = buffer[0][j] * scale;
      if (!direct) WriteRow(buffer[0], dim, job.vectors, i);
    }
    return;
  }
  vfloat y[kMaxDim];
  const float* rows[W];
  float* targets[W];
  for (int64_t block = first; block < last; block += W) {
    const int count = static_cast<int>(last - block < W ? last - block : W);
    vfloat scale = {};
    for (int l = 0; l < W; ++l) {
      rows[l] = l < count ? buffer[l] : kZeros;
      targets[l] = direct && l < count ? static_cast<float*>(job.vectors.data) +
                                             (block + l) * job.vectors.row_stride
                                       : buffer[l];
      if (l < count) {
        ReadLevels(levels, job, block + l, buffer[l]);
        scale[l] = LoadScale(job.norms, format.norm_dtype, (block + l) * job.norms_stride);
      }
    }
    for (int j = 0; j < dim; j += 8) {
      vfloat parts[2][4], x[8];
      LoadColumns(rows, j, parts[0]);
      LoadColumns(rows, j + 4, parts[1]);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) x[i] = parts[i / 4][i % 4] * scale;
      Butterflies(x);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) y[j + i] = x[i];
    }
    Hadamard(y, dim);
    for (int j = 0; j < head_dim; j += 4) {
      vfloat x[4];
      for (int i = 0; i < 4; ++i) {
        x[i] = y[j + i] * Broadcast(format.signs[j + i] * format.inverse_root);
      }
      StoreColumns(x, targets, j);
    }
    if (!direct) {
      for (int l = 0; l < count; ++l) WriteRow(buffer[l], head_dim, job.vectors, block + l);
    }
  }
}

// --- choice by width ---

template <int BITS>
void CompressOfWidth(const job_t& job, int64_t first, int64_t last) {
  if constexpr (BITS == 8) {
    if (job.tables.kind == quantiser_t::kUniform) {
      return Compress<BITS, quantiser_t::kUniform>(job, first, last);
    }
  } else if constexpr (BITS <= 5) {
    if (job.tables.kind == quantiser_t::kCompare) {
      return Compress<BITS, quantiser_t::kCompare>(job, first, last);
    }
  }
  Compress<BITS, quantiser_t::kTable>(job, first, last);
}

void CompressAny(const job_t& job, int64_t first, int64_t last) {
  switch (job.format.bits) {
    case 2:
      return CompressOfWidth<2>(job, first, last);
    case 3:
      return CompressOfWidth<3>(job, first, last);
    case 4:
      return CompressOfWidth<4>(job, first, last);
    case 5:
      return CompressOfWidth<5>(job, first, last);
    case 6:
      return CompressOfWidth<6>(job, first, last);
    case 7:
      return CompressOfWidth<7>(job, first, last);
    default:
      return CompressOfWidth<8>(job, first, last);
  }
}

void DecompressAny(const job_t& job, int64_t first, int64_t last) {
  switch (job.format.bits) {
    case 2:
      return Decompress<2>(job, first, last);
    case 3:
      return Decompress<3>(job, first, last);
    case 4:
      return Decompress<4>(job, first, last);
    case 5:
      return Decompress<5>(job, first, last);
    case 6:
      return Decompress<6>(job, first, last);
    case 7:
      return Decompress<7>(job, first, last);
    default:
      return Decompress<8>(job, first, last);
  }
}

}  // namespace

#define TURBOKV_NAME_OF(x) #x
#define TURBOKV_NAME(x) TURBOKV_NAME_OF(x)
#define TURBOKV_JOIN_OF(a, b) a##b
#define TURBOKV_JOIN(a, b) TURBOKV_JOIN_OF(a, b)

extern const kernels_t TURBOKV_JOIN(kernels_, TURBOKV_KERNELS);
const kernels_t TURBOKV_JOIN(kernels_, TURBOKV_KERNELS) = {TURBOKV_NAME(TURBOKV_KERNELS),
                                                           &CompressAny, &DecompressAny};

}  // namespace turbokv_cpu
