// SPDX-License-Identifier: Apache-2.0
// Store for one head size, all widths; build.py compiles this file once for each.
#include "standalone_kernels/registry.h"
#include "turbokv/store.cuh"

TURBOKV_DESCRIBE(turbokv::kStoreKernel, &turbokv::Store<TURBOKV_PADDED_DIM>)
