// SPDX-License-Identifier: Apache-2.0
// Forward to turbokv, where the code lives.
#ifndef FLASHINFER_TURBOKV_PREFILL_VARIANT_CUH_
#define FLASHINFER_TURBOKV_PREFILL_VARIANT_CUH_

#include <turbokv/flashinfer/prefill_variant.cuh>

#endif  // FLASHINFER_TURBOKV_PREFILL_VARIANT_CUH_
