// SPDX-License-Identifier: Apache-2.0
// Forward to turbokv, where the code lives.
#ifndef FLASHINFER_TURBOKV_DECODE_CUH_
#define FLASHINFER_TURBOKV_DECODE_CUH_

#include <turbokv/decode.cuh>

#endif  // FLASHINFER_TURBOKV_DECODE_CUH_
