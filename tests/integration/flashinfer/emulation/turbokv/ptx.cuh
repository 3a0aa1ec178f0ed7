// SPDX-License-Identifier: Apache-2.0
// prmt.b32 as the PTX manual defines it, in place of the header of the same name.
#ifndef TURBOKV_PTX_CUH_
#define TURBOKV_PTX_CUH_

#include <cuda_fp16.h>

#include <cstdint>

namespace turbokv {
namespace ptx {

inline uint32_t Permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i) & 15;
    uint32_t byte = bytes >> (8 * (pick & 7)) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

}  // namespace ptx
}  // namespace turbokv

#endif  // TURBOKV_PTX_CUH_
