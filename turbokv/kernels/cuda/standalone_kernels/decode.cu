// SPDX-License-Identifier: Apache-2.0
// Decode for one head size and pair of widths; build.py compiles this file once for each.
#include "standalone_kernels/registry.h"
#include "turbokv/decode.cuh"

TURBOKV_DESCRIBE(
    turbokv::kDecodeKernel,
    (&turbokv::Decode<TURBOKV_PADDED_DIM, TURBOKV_K_BITS, TURBOKV_V_BITS, !TURBOKV_LOOKUP2>))
