// SPDX-License-Identifier: Apache-2.0
// Launching kernels that bring their own constants while the kernel before them ends.
#ifndef TURBOKV_LAUNCH_CUH_
#define TURBOKV_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace turbokv {

/*! \brief Launch `kernel`, which from compute capability 9.0 on may overlap the end of the kernel
 *  before it in the stream: it must call ptx::WaitForPrimary before it reads or writes anything
 * that others write.
 *
 *  \param major  Of the device's compute capability.
 */
template <typename Params>
inline cudaError_t LaunchOverlapped(void (*kernel)(Params), const Params& params, dim3 grid,
                                    int threads, int shared_bytes, int major, cudaStream_t stream) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

/*! \brief Launch `kernel` on a grid that fills the device at most once, half of it in each of two
 *  rows; see LaunchOverlapped.
 *
 *  \param shared_bytes  Dynamic shared memory of a CTA, at most 48 KB.
 *  \param units         Of work in a row; no CTA is started that would have none.
 */
template <typename Params>
inline cudaError_t LaunchTwoRows(void (*kernel)(Params), const Params& params, int threads,
                                 int shared_bytes, int64_t units, cudaStream_t stream) {
  int device = 0, multiprocessors = 0, major = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared_bytes);
  if (error != cudaSuccess) return error;
  const int64_t most = (static_cast<int64_t>(multiprocessors) * resident + 1) / 2;
  const dim3 grid(static_cast<unsigned>(units < most ? units : most), 2);
  return LaunchOverlapped(kernel, params, grid, threads, shared_bytes, major, stream);
}

}  // namespace turbokv

#endif  // TURBOKV_LAUNCH_CUH_
