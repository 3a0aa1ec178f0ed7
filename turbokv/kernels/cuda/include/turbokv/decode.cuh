// SPDX-License-Identifier: Apache-2.0
// Fused decode attention over compressed pages: which variant of the kernel runs, and its launch.
#ifndef TURBOKV_DECODE_CUH_
#define TURBOKV_DECODE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode_config.cuh"
#include "turbokv/decode_kernel.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief Query rows an item takes at once: more would not fit the registers. */
constexpr int MaxColumns(int head_dim) { return head_dim <= 128 ? 16 : head_dim == 256 ? 8 : 4; }

inline int Columns(int head_dim, int rows) {
  const int most = MaxColumns(head_dim);
  return rows <= 4 || most == 4 ? 4 : rows <= 8 || most == 8 ? 8 : 16;
}

inline bool IsUniform2(const codebook_t& codebook) {
  return codebook.magnitudes[1] == 3 * codebook.magnitudes[0];
}

template <class C>
cudaError_t Launch(const decode_params_t& p, const decode_options_t& options, cudaStream_t stream) {
  int device = 0, limit = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  // 1 KB is reserved for each CTA. A large batch or 256 segments of offsets may leave too little
  // for all of them; thousands of requests are then read from global memory where they are needed.
  int per_sm = 0, stages = 0, ctas = C::kCtas;
  bool cached = true;
  error = cudaDeviceGetAttribute(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error != cudaSuccess) return error;
  for (;; --ctas) {
    const int share = per_sm / ctas - 1024;
    const int room = (share < limit ? share : limit) - C::kStaticBytes;
    stages = (room - C::SharedBytes(0, p, true)) / (C::kWarps * C::kStepBytes);
    if (stages >= 2) break;
    if (ctas == 1) {
      cached = false;
      stages = (room - C::SharedBytes(0, p, false)) / (C::kWarps * C::kStepBytes);
      break;
    }
  }
  stages = stages > kMaxStages ? kMaxStages : stages;
  // asynchronous copies wait for all but one group
  if (!C::kBulk && stages > 2) stages = 2;
  if (stages < 2) return cudaErrorInvalidConfiguration;
  const int bytes = C::SharedBytes(stages, p, cached);
  error = cudaFuncSetAttribute(DecodeKernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int grid = options.num_ctas > 0 ? options.num_ctas : ctas * sms;
  if (grid > kMostCtas) return cudaErrorInvalidValue;
  const int group = p.num_qo_heads / p.num_kv_heads;
  const int64_t blocks = (p.max_q_len * group + C::kColumns - 1) / C::kColumns;
  const int64_t counters = (p.batch_size * p.num_kv_heads * blocks + 63) / 64 * 64;
  if (p.workspace_bytes < (counters + static_cast<int64_t>(2) * grid * C::kPartial) * 4) {
    return cudaErrorInvalidValue;
  }
  if constexpr (C::kBulk) {
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = C::kThreads;
    config.dynamicSmemBytes = bytes, config.stream = stream;
    config.attrs = &overlap, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, DecodeKernel<C>, p, stages, cached);
  } else {
    DecodeKernel<C><<<grid, C::kThreads, bytes, stream>>>(p, stages, cached);
    return cudaGetLastError();
  }
}

template <int HEAD_DIM, int K_BITS, int V_BITS, bool UNIFORM2, int COLUMNS, bool BULK>
cudaError_t LaunchCtas(const decode_params_t& p, const decode_options_t& options,
                       cudaStream_t stream) {
  // Measured: more CTAs gain where every multiprocessor has nearly as many items or more, and lose
  // where items have several CTAs.
  if constexpr (BULK && HEAD_DIM <= 128 && COLUMNS <= 8) {
    int device = 0, sms = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    }
    if (error != cudaSuccess) return error;
    const int64_t rows = static_cast<int64_t>(p.max_q_len) * (p.num_qo_heads / p.num_kv_heads);
    const int64_t items = (rows + COLUMNS - 1) / COLUMNS * p.batch_size * p.num_kv_heads;
    if (items * 4 >= 14 * sms) {
      using four_t = config_t<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, COLUMNS, BULK, kMaxCtas>;
      return Launch<four_t>(p, options, stream);
    }
    if (items * 4 >= 7 * sms) {
      using two_t = config_t<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, COLUMNS, BULK, 2>;
      return Launch<two_t>(p, options, stream);
    }
  }
  using one_t = config_t<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, COLUMNS, BULK, 1>;
  return Launch<one_t>(p, options, stream);
}

template <int HEAD_DIM, int K_BITS, int V_BITS, bool UNIFORM2, bool BULK>
cudaError_t LaunchColumns(const decode_params_t& p, const decode_options_t& options,
                          cudaStream_t stream) {
  const int columns = Columns(HEAD_DIM, p.max_q_len * (p.num_qo_heads / p.num_kv_heads));
  if (columns == 4) {
    return LaunchCtas<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, 4, BULK>(p, options, stream);
  }
  if constexpr (MaxColumns(HEAD_DIM) >= 8) {
    if (columns == 8) {
      return LaunchCtas<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, 8, BULK>(p, options, stream);
    }
  }
  if constexpr (MaxColumns(HEAD_DIM) >= 16) {
    return LaunchCtas<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, 16, BULK>(p, options, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace decode_detail

/*! \brief CTAs that Decode launches at most; `num_ctas` is that of decode_options_t. */
inline int DecodeMaxCtas(int num_ctas, int multiprocessors) {
  return num_ctas > 0 ? num_ctas : decode_detail::kMaxCtas * multiprocessors;
}

/*! \brief Bytes of workspace that Decode needs; zeros before the first call. Enough for every
 * smaller batch_size, head_dim_padded and max_q_len, too, in any order. */
inline int64_t DecodeWorkspaceBytes(int batch_size, int num_qo_heads, int num_kv_heads,
                                    int head_dim_padded, int max_q_len, int num_ctas) {
  const int rows = max_q_len * (num_qo_heads / num_kv_heads);
  const int columns = decode_detail::Columns(head_dim_padded, rows);
  const int64_t blocks = (rows + columns - 1) / columns;
  const int64_t counters =
      (static_cast<int64_t>(batch_size) * num_kv_heads * blocks + 63) / 64 * 64;
  // Smaller heads have more columns, up to 16, with two numbers each.
  const int64_t partial = static_cast<int64_t>(columns) * head_dim_padded + 2 * 16;
  return (counters + 2 * num_ctas * partial) * 4;
}

/*! \brief Attend to compressed pages: one launch, no allocation, no synchronisation; graph-safe.
 *
 *  \tparam HEAD_DIM Coordinates stored: head_dim padded to a power of two, 64 to 512.
 *  \tparam UNIFORM2 Whether 2-bit codebooks are {m, 3 m}; false takes any, by lookup.
 *  \return cudaErrorInvalidValue if the workspace is too small or k_offset_rotated not aligned,
 * cudaErrorInvalidConfiguration if the device has too little shared memory,
 * cudaErrorNoKernelImageForDevice for a body that the device or the build lacks.
 */
template <int HEAD_DIM, int K_BITS, int V_BITS, bool UNIFORM2 = true>
cudaError_t Decode(const decode_params_t& p, const decode_options_t& options, cudaStream_t stream) {
  static_assert(HEAD_DIM >= 64 && HEAD_DIM <= 512 && (HEAD_DIM & (HEAD_DIM - 1)) == 0,
                "head_dim is padded to 64, 128, 256 or 512");
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error != cudaSuccess) return error;
  // The sums of two bytes that stand for 4-bit levels need room for one more, see MakeTable.
  if (K_BITS == 4 && p.k_codebook.magnitudes[0] < 2) return cudaErrorInvalidValue;
  // Offsets are loaded four at a time.
  if (reinterpret_cast<uintptr_t>(p.k_offset_rotated) % 16 != 0) return cudaErrorInvalidValue;
  // Heads and tiles of a page share an integer, see `look` in DecodeKernel.
  if (p.num_kv_heads >= 1 << 11 || p.kv.page_size / kTokensPerTile >= 1 << 20) {
    return cudaErrorInvalidValue;
  }
  if (p.batch_size == 0 || p.max_q_len == 0) return cudaSuccess;
  if (options.body == decode_body_t::kBulk && major < 9) return cudaErrorNoKernelImageForDevice;
  if (options.body != decode_body_t::kAsync && major >= 9) {
    return decode_detail::LaunchColumns<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, true>(p, options,
                                                                                  stream);
  }
  return decode_detail::LaunchColumns<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, false>(p, options,
                                                                                 stream);
}

}  // namespace turbokv

#endif  // TURBOKV_DECODE_CUH_
