// SPDX-License-Identifier: Apache-2.0
// Which variant of the kernel a call runs, and on what grid: plain functions of sizes, without CUDA
// calls.
#ifndef TURBOKV_DECODE_PLAN_CUH_
#define TURBOKV_DECODE_PLAN_CUH_

#include <cstdint>

#include "turbokv/codebook.cuh"
#include "turbokv/decode/params.cuh"
#include "turbokv/decode/shared.cuh"
#include "turbokv/decode/tables.cuh"
#include "turbokv/decode/traits.cuh"

namespace turbokv {
namespace decode_detail {

/*! \brief What decode has to know of a device. */
struct device_sizes_t {
  int major;  // of its compute capability
  int multiprocessors;
  int shared_of_cta;  // bytes, the most a launch can ask for
  int shared_of_sm;   // bytes
};

struct launch_plan_t {
  int grid, threads, shared_bytes;
  launch_params_t launch;
  bool fits;  // whether there is a ring of two stages
};

/*! \brief Query rows an item takes at once: more would not fit the registers. */
constexpr int MaxColumns(int head_dim) { return head_dim <= 128 ? 16 : head_dim == 256 ? 8 : 4; }

inline int Columns(int head_dim, int rows) {
  const int most = MaxColumns(head_dim);
  return rows <= 4 || most == 4 ? 4 : rows <= 8 || most == 8 ? 8 : 16;
}

inline bool IsUniform2(const codebook_t& codebook) {
  return codebook.magnitudes[1] == 3 * codebook.magnitudes[0];
}

inline features_t Features(const decode_params_t& p) {
  const bool plain =
      p.kv.tile_slots == nullptr && p.k_offset_rotated == nullptr && !(p.logits_soft_cap > 0);
  return plain ? features_t::kPlain : features_t::kAll;
}

/*! \brief CTAs of a multiprocessor. Measured: more gain where every multiprocessor has nearly as
 * many items or more, and lose where items have several CTAs. */
inline int CtasPerSm(const decode_params_t& p, int columns, int multiprocessors) {
  const int64_t rows = static_cast<int64_t>(p.max_q_len) * (p.num_qo_heads / p.num_kv_heads);
  const int64_t items = (rows + columns - 1) / columns * p.batch_size * p.num_kv_heads;
  return items * 4 >= 14 * multiprocessors ? 4 : items * 4 >= 7 * multiprocessors ? 2 : 1;
}

/*! \brief Blocks of query rows that a request has at most. */
inline int64_t MaxBlocks(const decode_params_t& p, int columns) {
  const int64_t rows = static_cast<int64_t>(p.max_q_len) * (p.num_qo_heads / p.num_kv_heads);
  return (rows + columns - 1) / columns;
}

/*! \brief Bytes of workspace that a launch uses. */
template <class C>
int64_t WorkspaceBytes(const decode_params_t& p, int grid) {
  const int64_t items = MaxBlocks(p, C::kColumns) * p.batch_size * p.num_kv_heads;
  const int64_t counters = (items + 63) / 64 * 64;
  return (counters + static_cast<int64_t>(2) * grid * C::kPartial) * 4;
}

/*! \brief Plan the launch of a variant: as many CTAs as run at a time, and as many stages as shared
 * memory has room for.
 *
 *  A large batch or 256 segments of offsets may leave too little for all of C::kCtas; thousands of
 *  requests are then read from global memory where they are needed.
 */
template <class C>
launch_plan_t PlanLaunch(const decode_params_t& p, const decode_options_t& options,
                         const device_sizes_t& device) {
  constexpr int kReserved = 1024;  // bytes of shared memory for each CTA
  launch_plan_t plan = {};
  plan.threads = C::kThreads;
  plan.launch.cached = true;
  plan.launch.early = options.early && C::copy_t::kOverlapsLaunches;
  plan.launch.k_table = MakeTable<C::kKBits, C::kKeyBytes>(p.k_codebook);
  plan.launch.v_table = MakeTable<C::kVBits, C::kValueBytes>(p.v_codebook);
  if (C::kVBits == 5) plan.launch.v_negative = MakeNegativeTable5(p.v_codebook);
  plan.launch.k_unit = C::k_t::Unit(p.k_codebook);
  plan.launch.v_unit = C::v_t::Unit(p.v_codebook);
  int ctas = C::kCtas, stages = 0;
  for (;; --ctas) {
    const int share = device.shared_of_sm / ctas - kReserved;
    const int room = share < device.shared_of_cta ? share : device.shared_of_cta;
    auto stages_in_room = [&](bool cached) {
      return (room - shared_plan_t<C>(p, 0, cached).bytes) / (C::kWarps * C::kStepBytes);
    };
    stages = stages_in_room(true);
    if (stages >= 2) break;
    if (ctas == 1) {
      plan.launch.cached = false;
      stages = stages_in_room(false);
      break;
    }
  }
  const int most =
      kMaxStages < C::copy_t::kMaxStagesInFlight ? kMaxStages : C::copy_t::kMaxStagesInFlight;
  plan.launch.num_stages = stages < most ? stages : most;
  plan.fits = plan.launch.num_stages >= 2;
  plan.shared_bytes = shared_plan_t<C>(p, plan.launch.num_stages, plan.launch.cached).bytes;
  plan.grid = options.num_ctas > 0 ? options.num_ctas : ctas * device.multiprocessors;
  const int64_t items = MaxBlocks(p, C::kColumns) * p.batch_size * p.num_kv_heads;
  const bool rehearses =
      C::kRehearses && options.num_ctas == 0 && 2 * items <= plan.grid - kRehearsals;
  plan.launch.num_workers = plan.grid - (rehearses ? kRehearsals : 0);
  return plan;
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_PLAN_CUH_
