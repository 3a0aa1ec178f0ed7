// SPDX-License-Identifier: Apache-2.0
// C entry points of the CPU codec: the choice of the instruction set, tables, and threads.
#include "codec.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <system_error>
#include <thread>
#include <vector>

#define TURBOKV_EXPORT extern "C" __attribute__((visibility("default")))

namespace turbokv_cpu {
namespace {

constexpr int64_t kElementsPerChunk = 1 << 15;   // a fraction of a millisecond
constexpr int64_t kElementsPerThread = 1 << 17;  // starting a thread costs less than this many

/*! \brief Kernels that this processor runs, the fastest last. */
std::vector<const kernels_t*> Supported() {
  std::vector<const kernels_t*> found = {&kernels_baseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found.push_back(&kernels_avx2);
#endif
  return found;
}

const std::vector<const kernels_t*>& Kernels() {
  static const std::vector<const kernels_t*> kernels = Supported();
  return kernels;
}

void FillTables(const format_t& format, tables_t* tables) {
  const int count = (1 << (format.bits - 1)) - 1;
  std::copy_n(format.boundaries, count, tables->boundaries);
  tables->boundaries[count] = INFINITY;
  std::copy_n(format.magnitudes, count + 1, tables->magnitudes);
  bool uniform = format.bits == 8;
  for (int i = 0; i <= count; ++i) uniform = uniform && format.magnitudes[i] == i;
  tables->kind = uniform                                 ? quantiser_t::kUniform
                 : format.is_lattice && format.bits <= 5 ? quantiser_t::kCompare
                                                         : quantiser_t::kTable;
  if (tables->kind != quantiser_t::kTable) return;
  // The largest boundary comes to lie in the last bucket but one. Should that overflow, all lie in
  // the first, which is slow and right.
  const float scale = (kNumBuckets - 2) / tables->boundaries[count - 1];
  tables->bucket_scale = std::isfinite(scale) ? scale : 0.0f;
  tables->max_in_bucket = 0;
  for (int bucket = 0, below = 0; bucket < kNumBuckets; ++bucket) {
    tables->buckets[bucket] = static_cast<uint8_t>(below);
    int inside = 0;
    while (below < count && BucketOf(tables->boundaries[below], tables->bucket_scale) <= bucket) {
      ++below, ++inside;
    }
    tables->max_in_bucket = std::max(tables->max_in_bucket, inside);
  }
}

/*! \brief Run `kernel` on all vectors, on up to `num_threads` threads. */
void Run(const job_t& job, void (*kernel)(const job_t&, int64_t, int64_t), int num_threads) {
  const int64_t dim = job.format.padded_dim;
  // whole blocks of every instruction set
  const int64_t chunk = std::max<int64_t>(16, kElementsPerChunk / dim);
  std::atomic<int64_t> next{0};
  // Chunks are taken as threads come to them: cores may be shared, and a fixed split would wait for
  // the slower half.
  const auto work = [&] {
    std::fenv_t environment;
    std::fegetenv(&environment);
    std::fesetenv(FE_DFL_ENV);  // subnormals count: FORMAT.md, section 1
    for (;;) {
      const int64_t first = next.fetch_add(chunk, std::memory_order_relaxed);
      if (first >= job.count) break;
      kernel(job, first, std::min(first + chunk, job.count));
    }
    std::fesetenv(&environment);
  };
  const int64_t useful = std::min<int64_t>(num_threads, job.count * dim / kElementsPerThread);
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < useful; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // no more threads to be had: those that run do the work
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace
}  // namespace turbokv_cpu

using turbokv_cpu::format_t;
using turbokv_cpu::job_t;
using turbokv_cpu::matrix_t;

/*! \brief Digest of the sources, so that a stale library is noticed. */
TURBOKV_EXPORT const char* turbokv_cpu_sources() { return TURBOKV_CPU_SOURCES; }

/*! \brief Name of the `i`th instruction set that runs here, the fastest last; null at the end. */
TURBOKV_EXPORT const char* turbokv_cpu_instruction_set(int i) {
  const auto& kernels = turbokv_cpu::Kernels();
  return i >= 0 && i < static_cast<int>(kernels.size()) ? kernels[i]->name : nullptr;
}

/*! \brief Compress `count` vectors; strides count elements.
 *
 *  \param instruction_set  As turbokv_cpu_instruction_set numbers them.
 */
TURBOKV_EXPORT void turbokv_cpu_compress(const format_t* format, int64_t count, const matrix_t* x,
                                         uint8_t* packed, int64_t packed_row_stride,
                                         int64_t packed_column_stride, void* norms,
                                         int64_t norms_stride, int instruction_set,
                                         int num_threads) {
  job_t job = {*format, {},           count, *x, packed, packed_row_stride, packed_column_stride,
               norms,   norms_stride, false};
  turbokv_cpu::FillTables(*format, &job.tables);
  turbokv_cpu::Run(job, turbokv_cpu::Kernels()[instruction_set]->compress, num_threads);
}

/*! \brief Decompress `count` vectors, in rotated or original space. */
TURBOKV_EXPORT void turbokv_cpu_decompress(const format_t* format, int64_t count,
                                           const matrix_t* out, const uint8_t* packed,
                                           int64_t packed_row_stride, int64_t packed_column_stride,
                                           const void* norms, int64_t norms_stride, int rotated,
                                           int instruction_set, int num_threads) {
  const job_t job = {*format,
                     {},
                     count,
                     *out,
                     const_cast<uint8_t*>(packed),
                     packed_row_stride,
                     packed_column_stride,
                     const_cast<void*>(norms),
                     norms_stride,
                     rotated != 0};
  turbokv_cpu::Run(job, turbokv_cpu::Kernels()[instruction_set]->decompress, num_threads);
}
