// SPDX-License-Identifier: Apache-2.0
// Everything of the library. Compressed KV caches: see README.md beside the include folder.
#ifndef TURBOKV_TURBOKV_CUH_
#define TURBOKV_TURBOKV_CUH_

#include "turbokv/codebook.cuh"
#include "turbokv/compress.cuh"
#include "turbokv/decompress.cuh"
#include "turbokv/decompress_pages.cuh"
#include "turbokv/hadamard.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/page_metadata.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/store.cuh"
#include "turbokv/types.cuh"
#include "turbokv/vector_format.cuh"

#if defined(__CUDACC__)
#include "turbokv/decode.cuh"
#endif

namespace turbokv {

constexpr int kFormatVersion = 3;  // of FORMAT.md

}  // namespace turbokv

#endif  // TURBOKV_TURBOKV_CUH_
