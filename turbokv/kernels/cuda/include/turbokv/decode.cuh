// SPDX-License-Identifier: Apache-2.0
// Fused decode attention over compressed pages. The kernel is in decode/, see its README.
#ifndef TURBOKV_DECODE_CUH_
#define TURBOKV_DECODE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode/launch.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/plan.cuh"
#include "turbokv/decode/tile_copy.cuh"

namespace turbokv {

/*! \brief CTAs that Decode launches at most; `num_ctas` is that of decode_options_t. */
inline int DecodeMaxCtas(int num_ctas, int multiprocessors) {
  return num_ctas > 0 ? num_ctas : decode_detail::kMaxCtasPerSm * multiprocessors;
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
  using namespace decode_detail;
  static_assert(HEAD_DIM >= 64 && HEAD_DIM <= 512 && (HEAD_DIM & (HEAD_DIM - 1)) == 0,
                "head_dim is padded to 64, 128, 256 or 512");
  device_sizes_t device;
  const cudaError_t error = DeviceSizes(device);
  if (error != cudaSuccess) return error;
  // The sums of two bytes that stand for 4-bit levels need room for one more, see MakeTable.
  if (K_BITS == 4 && p.k_codebook.magnitudes[0] < 2) return cudaErrorInvalidValue;
  // Offsets are loaded four at a time.
  if (reinterpret_cast<uintptr_t>(p.k_offset_rotated) % 16 != 0) return cudaErrorInvalidValue;
  // Heads and tiles of a page share an integer, see tile_stream_t::kTileBits.
  if (p.num_kv_heads >= 1 << 11 || p.kv.page_size / kTokensPerTile >= 1 << 20) {
    return cudaErrorInvalidValue;
  }
  if (p.batch_size == 0 || p.max_q_len == 0) return cudaSuccess;
  if (options.body == decode_body_t::kBulk && device.major < 9) {
    return cudaErrorNoKernelImageForDevice;
  }
  const launcher_t launcher = {p, options, device, stream};
  if (options.body != decode_body_t::kAsync && device.major >= 9) {
    return launcher.ChooseColumns<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, bulk_copy_t>();
  }
  return launcher.ChooseColumns<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, async_copy_t>();
}

}  // namespace turbokv

#endif  // TURBOKV_DECODE_CUH_
