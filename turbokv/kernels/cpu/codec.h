// SPDX-License-Identifier: Apache-2.0
// What the entry points (codec.cpp) and the kernels of one instruction set (kernels.cpp) share.
//
// kernels.cpp is compiled once per instruction set. Everything here has internal linkage or none,
// so that the linker cannot choose one compilation's function for all.
#ifndef TURBOKV_CPU_CODEC_H_
#define TURBOKV_CPU_CODEC_H_

#include <cfloat>
#include <cstdint>

static_assert(FLT_EVAL_METHOD == 0, "FORMAT.md wants fp32 with one rounding an operation");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "FORMAT.md is little-endian");

namespace turbokv_cpu {

constexpr int kMaxDim = 512;
constexpr int kMaxBoundaries = 127;
constexpr int kNumBuckets = 512;

enum class dtype_t : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum class scale_rule_t : int32_t {
  kPlain = 0,
  kNormCorrected = 1,
  kLeastSquares = 2,
  kUnbiased = 3
};

/*! \brief How the index of a magnitude is found. */
enum class quantiser_t : int32_t {
  kCompare,  // few boundaries between integers: count those that are smaller
  kUniform,  // 8 bits, magnitudes 0, 1, 2, ...: round
  kTable,    // anything: a bucket says where to start counting
};

/*! \brief Everything that fixes the bytes of one role; VectorFormat of core.py. */
struct format_t {
  int32_t head_dim, padded_dim, bits;
  scale_rule_t rule;
  dtype_t norm_dtype;
  int32_t is_lattice, is_mid_tread;
  float normaliser, scale_factor, plain_factor, inverse_root;
  const float* signs;       // [padded_dim]
  const float* magnitudes;  // [2^(bits - 1)]
  const float* boundaries;  // [2^(bits - 1) - 1]
  const float* levels;      // [2^bits]
};

/*! \brief A matrix of `dtype`, strides in elements. */
struct matrix_t {
  void* data;
  int64_t row_stride, column_stride;
  dtype_t dtype;
};

/*! \brief Tables of a codebook. */
struct tables_t {
  quantiser_t kind;
  float bucket_scale;
  int max_in_bucket;                     // boundaries
  uint8_t buckets[kNumBuckets];          // how many boundaries lie in lower buckets
  float boundaries[kMaxBoundaries + 1];  // the last is infinite
  float magnitudes[kMaxBoundaries + 1];
};

/*! \brief Bucket of a coordinate in lattice units. Never falls where `u` grows; NaN is the last. */
static inline int BucketOf(float u, float scale) {
  const float bucket = u * scale;
  return static_cast<int>(bucket < kNumBuckets - 1 ? bucket : kNumBuckets - 1);
}

/*! \brief Arguments of both operations. */
struct job_t {
  format_t format;
  tables_t tables;  // compress only
  int64_t count;
  matrix_t vectors;  // input of compress, output of decompress
  uint8_t* packed;
  int64_t packed_row_stride, packed_column_stride;
  void* norms;
  int64_t norms_stride;
  bool rotated;  // decompress only
};

/*! \brief Kernels of one instruction set; both work on the vectors `first` to `last - 1`. */
struct kernels_t {
  const char* name;
  void (*compress)(const job_t& job, int64_t first, int64_t last);
  void (*decompress)(const job_t& job, int64_t first, int64_t last);
};

extern const kernels_t kernels_baseline;
#if defined(__x86_64__)
extern const kernels_t kernels_avx2;
#endif

}  // namespace turbokv_cpu

#endif  // TURBOKV_CPU_CODEC_H_
