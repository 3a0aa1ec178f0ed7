// SPDX-License-Identifier: Apache-2.0
// FlashInfer's default attention over compressed pages: causal or not, with a sliding window and,
// if asked, a soft cap on logits. The query is in K's rotated space, the output in V's.
#ifndef TURBOKV_FLASHINFER_PREFILL_VARIANT_CUH_
#define TURBOKV_FLASHINFER_PREFILL_VARIANT_CUH_

#include <flashinfer/attention/variants.cuh>

#include "turbokv/flashinfer/kv_tile_loader.cuh"

namespace turbokv {

/*! \brief A window costs nothing where there is none: its mask is only read where tiles need one.
 */
template <int HEAD_DIM, int K_BITS, int V_BITS, bool USE_LOGITS_SOFT_CAP, typename Params>
struct PrefillVariant
    : flashinfer::DefaultAttention</*use_custom_mask=*/false, /*use_sliding_window=*/true,
                                   USE_LOGITS_SOFT_CAP, /*use_alibi=*/false> {
  using Base = flashinfer::DefaultAttention<false, true, USE_LOGITS_SOFT_CAP, false>;
  using Base::Base;
  using KVTileLoader = turbokv::KVTileLoader<HEAD_DIM, K_BITS, V_BITS, Params>;
};

}  // namespace turbokv

#endif  // TURBOKV_FLASHINFER_PREFILL_VARIANT_CUH_
