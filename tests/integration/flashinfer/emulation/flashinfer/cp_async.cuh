// SPDX-License-Identifier: Apache-2.0
// FlashInfer's asynchronous copies, which here have arrived at once.
#ifndef TURBOKV_TESTS_EMULATION_CP_ASYNC_CUH_
#define TURBOKV_TESTS_EMULATION_CP_ASYNC_CUH_

#include <cstring>

namespace flashinfer {
namespace cp_async {

enum class PrefetchMode { kNoPrefetch, kPrefetch };
enum class SharedMemFillMode { kFillZero, kNoFill };

template <PrefetchMode PREFETCH, typename T>
void load_128b(T* to, const T* from) {
  std::memcpy(to, from, 16);
}

template <PrefetchMode PREFETCH, SharedMemFillMode FILL, typename T>
void pred_load_128b(T* to, const T* from, bool predicate) {
  if (predicate) {
    std::memcpy(to, from, 16);
  } else if (FILL == SharedMemFillMode::kFillZero) {
    std::memset(to, 0, 16);
  }
}

}  // namespace cp_async
}  // namespace flashinfer

#endif  // TURBOKV_TESTS_EMULATION_CP_ASYNC_CUH_
