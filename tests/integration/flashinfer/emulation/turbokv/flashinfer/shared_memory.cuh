// SPDX-License-Identifier: Apache-2.0
// What the loader has in inline PTX, in place of the header of the same name.
#ifndef TURBOKV_FLASHINFER_SHARED_MEMORY_CUH_
#define TURBOKV_FLASHINFER_SHARED_MEMORY_CUH_

#include <cuda_fp16.h>

#include <cstdint>
#include <flashinfer/cp_async.cuh>

namespace turbokv {
namespace flashinfer_detail {

inline void CopyWord(int32_t* shared, const int32_t* global) {
  flashinfer::cp_async::started.push_back([=] { *shared = *global; });
}

inline void StoreUnless(uint4* shared, uint32_t condition, const uint4& x) {
  if (condition == 0) *shared = x;
}

}  // namespace flashinfer_detail
}  // namespace turbokv

#endif  // TURBOKV_FLASHINFER_SHARED_MEMORY_CUH_
