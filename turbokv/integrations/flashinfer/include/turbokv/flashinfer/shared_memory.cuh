// SPDX-License-Identifier: Apache-2.0
// Two instructions of shared memory that neither FlashInfer nor CUDA C++ has.
#ifndef TURBOKV_FLASHINFER_SHARED_MEMORY_CUH_
#define TURBOKV_FLASHINFER_SHARED_MEMORY_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace turbokv {
namespace flashinfer_detail {

/*! \brief Start to copy a word to shared memory, as part of the group that is committed next. */
__device__ __forceinline__ void CopyWord(int32_t* shared, const int32_t* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global));
}

/*! \brief Store 16 bytes to shared memory if `condition` is 0, without a branch: code around it
 *  stays one block, which the compiler can schedule among matrix products. */
__device__ __forceinline__ void StoreUnless(uint4* shared, uint32_t condition, const uint4& x) {
  asm volatile(
      "{\n"
      " .reg .pred p;\n"
      " setp.eq.u32 p, %0, 0;\n"
      " @p st.shared.v4.b32 [%1], {%2, %3, %4, %5};\n"
      "}\n" ::"r"(condition),
      "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(x.x), "r"(x.y), "r"(x.z),
      "r"(x.w));
}

}  // namespace flashinfer_detail
}  // namespace turbokv

#endif  // TURBOKV_FLASHINFER_SHARED_MEMORY_CUH_
