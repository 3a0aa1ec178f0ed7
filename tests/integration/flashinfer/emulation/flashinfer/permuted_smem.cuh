// SPDX-License-Identifier: Apache-2.0
// The order of 16-byte columns in FlashInfer's shared memory.
#ifndef TURBOKV_TESTS_EMULATION_PERMUTED_SMEM_CUH_
#define TURBOKV_TESTS_EMULATION_PERMUTED_SMEM_CUH_

#include <cstdint>

namespace flashinfer {

enum class SwizzleMode { k64B, k128B };

template <SwizzleMode MODE, uint32_t STRIDE>
uint32_t get_permuted_offset(uint32_t row, uint32_t column) {
  static_assert(MODE == SwizzleMode::k128B, "16-bit rows");
  return row * STRIDE + (column ^ (row % 8));
}

}  // namespace flashinfer

#endif  // TURBOKV_TESTS_EMULATION_PERMUTED_SMEM_CUH_
