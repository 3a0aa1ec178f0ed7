// SPDX-License-Identifier: Apache-2.0
// Decompress for one head size, all widths; build.py compiles this file once for each.
#include "standalone_kernels/registry.h"
#include "turbokv/decompress_pages.cuh"

TURBOKV_DESCRIBE(turbokv::kDecompressKernel, &turbokv::DecompressPages<TURBOKV_PADDED_DIM>)
