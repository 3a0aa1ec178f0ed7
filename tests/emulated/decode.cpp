// SPDX-License-Identifier: Apache-2.0
// Decode on the host: one variant of the kernel, chosen by macros, behind a C function.
#define __CUDACC__ 1

#include "turbokv/decode/kernel.cuh"
#include "turbokv/decode/plan.cuh"

using namespace turbokv;
using namespace turbokv::decode_detail;

namespace {

template <class C>
int Run(const decode_params_t& p, const decode_options_t& options, const device_sizes_t& device) {
  const launch_plan_t plan = PlanLaunch<C>(p, options, device);
  if (!plan.fits) return cudaErrorInvalidConfiguration;
  if (p.workspace_bytes < WorkspaceBytes<C>(p, plan.grid)) return cudaErrorInvalidValue;
  simt::Launch(plan.grid, plan.threads, plan.shared_bytes,
               [&] { DecodeKernel<C>(p, plan.launch); });
  return 0;
}

using copy_t = EMULATED_COPY;
template <features_t FEATURES>
using traits_t =
    decode_traits_t<EMULATED_HEAD_DIM, EMULATED_K_BITS, EMULATED_V_BITS, EMULATED_UNIFORM2,
                    EMULATED_COLUMNS, EMULATED_COPY, EMULATED_CTAS, FEATURES>;

}  // namespace

/*! \brief Run decode. \param plain Whether the variant without features may run, if none is asked
 * for. */
extern "C" int turbokv_emulate_decode(const decode_params_t* p, const decode_options_t* options,
                                      const device_sizes_t* device, bool plain) {
  if (plain && Features(*p) == features_t::kPlain) {
    return Run<traits_t<features_t::kPlain>>(*p, *options, *device);
  }
  return Run<traits_t<features_t::kAll>>(*p, *options, *device);
}

/*! \brief Bytes of the structures, for who lays them out. */
extern "C" void turbokv_emulated_sizes(int* sizes) {
  sizes[0] = sizeof(decode_params_t);
  sizes[1] = sizeof(decode_options_t);
  sizes[2] = sizeof(device_sizes_t);
}

/*! \brief Plan a launch: grid, threads, bytes of shared memory, stages, cached, early, fits. */
extern "C" void turbokv_plan_decode(const decode_params_t* p, const decode_options_t* options,
                                    const device_sizes_t* device, bool plain, int* to) {
  const bool all = !plain || Features(*p) == features_t::kAll;
  const launch_plan_t plan = all ? PlanLaunch<traits_t<features_t::kAll>>(*p, *options, *device)
                                 : PlanLaunch<traits_t<features_t::kPlain>>(*p, *options, *device);
  to[0] = plan.grid, to[1] = plan.threads, to[2] = plan.shared_bytes;
  to[3] = plan.launch.num_stages, to[4] = plan.launch.cached, to[5] = plan.launch.early;
  to[6] = plan.fits;
}
