// SPDX-License-Identifier: Apache-2.0
// Forward to turbokv, where the code lives.
#ifndef FLASHINFER_TURBOKV_KV_TILE_LOADER_CUH_
#define FLASHINFER_TURBOKV_KV_TILE_LOADER_CUH_

#include <turbokv/flashinfer/kv_tile_loader.cuh>

#endif  // FLASHINFER_TURBOKV_KV_TILE_LOADER_CUH_
