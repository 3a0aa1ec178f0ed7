// SPDX-License-Identifier: Apache-2.0
// From a call's arguments to a variant of the kernel, and its launch.
#ifndef TURBOKV_DECODE_LAUNCH_CUH_
#define TURBOKV_DECODE_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/decode/kernel.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/plan.cuh"
#include "turbokv/decode/shared.cuh"
#include "turbokv/decode/tile_copy.cuh"
#include "turbokv/decode/traits.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief Sizes of the current device. */
inline cudaError_t DeviceSizes(device_sizes_t& sizes) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto read = [&](int& to, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&to, attribute, device);
  };
  read(sizes.major, cudaDevAttrComputeCapabilityMajor);
  read(sizes.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(sizes.shared_of_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(sizes.shared_of_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return error;
}

/*! \brief A call on its way to a variant: every step fixes one more template parameter. */
struct launcher_t {
  const decode_params_t& p;
  const decode_options_t& options;
  const device_sizes_t& device;
  cudaStream_t stream;

  template <class C>
  cudaError_t Launch() const {
    const launch_plan_t plan = PlanLaunch<C>(p, options, device);
    if (!plan.fits) return cudaErrorInvalidConfiguration;
    if (plan.grid > kMaxCtas || p.workspace_bytes < WorkspaceBytes<C>(p, plan.grid)) {
      return cudaErrorInvalidValue;
    }
    const cudaError_t error = cudaFuncSetAttribute(
        DecodeKernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = plan.grid, config.blockDim = plan.threads;
    config.dynamicSmemBytes = plan.shared_bytes, config.stream = stream;
    config.attrs = &overlap, config.numAttrs = C::copy_t::kOverlapsLaunches ? 1 : 0;
    return cudaLaunchKernelEx(&config, DecodeKernel<C>, p, plan.launch);
  }

  template <int HEAD_DIM, int K_BITS, int V_BITS, bool UNIFORM2, int COLUMNS, class COPY, int CTAS>
  cudaError_t ChooseFeatures() const {
    if constexpr (COPY::kOverlapsLaunches && COLUMNS <= 8) {
      if (Features(p) == features_t::kPlain) {
        return Launch<decode_traits_t<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, COLUMNS, COPY, CTAS,
                                      features_t::kPlain>>();
      }
    }
    return Launch<decode_traits_t<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, COLUMNS, COPY, CTAS,
                                  features_t::kAll>>();
  }

  template <int HEAD_DIM, int K_BITS, int V_BITS, bool UNIFORM2, int COLUMNS, class COPY>
  cudaError_t ChooseCtas() const {
    if constexpr (COPY::kOverlapsLaunches && HEAD_DIM <= 128 && COLUMNS <= 8) {
      const int ctas = CtasPerSm(p, COLUMNS, device.multiprocessors);
      if (ctas == 4) {
        return ChooseFeatures<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, COLUMNS, COPY, 4>();
      }
      if (ctas == 2) {
        return ChooseFeatures<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, COLUMNS, COPY, 2>();
      }
    }
    return ChooseFeatures<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, COLUMNS, COPY, 1>();
  }

  template <int HEAD_DIM, int K_BITS, int V_BITS, bool UNIFORM2, class COPY>
  cudaError_t ChooseColumns() const {
    const int columns = Columns(HEAD_DIM, p.max_q_len * (p.num_qo_heads / p.num_kv_heads));
    if constexpr (MaxColumns(HEAD_DIM) >= 16) {
      if (columns == 16) return ChooseCtas<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, 16, COPY>();
    }
    if constexpr (MaxColumns(HEAD_DIM) >= 8) {
      if (columns == 8) return ChooseCtas<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, 8, COPY>();
    }
    return ChooseCtas<HEAD_DIM, K_BITS, V_BITS, UNIFORM2, 4, COPY>();
  }
};

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_LAUNCH_CUH_
