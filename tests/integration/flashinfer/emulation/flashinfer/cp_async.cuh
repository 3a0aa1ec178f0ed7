// SPDX-License-Identifier: Apache-2.0
// FlashInfer's asynchronous copies: a copy is done when its thread waits for the group that it was
// committed in, so that who reads too early reads what was there before.
#ifndef TURBOKV_TESTS_EMULATION_CP_ASYNC_CUH_
#define TURBOKV_TESTS_EMULATION_CP_ASYNC_CUH_

#include <cstring>
#include <deque>
#include <functional>
#include <vector>

namespace flashinfer {
namespace cp_async {

enum class PrefetchMode { kNoPrefetch, kPrefetch };
enum class SharedMemFillMode { kFillZero, kNoFill };

using copies_t = std::vector<std::function<void()>>;
inline thread_local copies_t started;
inline thread_local std::deque<copies_t> committed;

inline void commit_group() {
  committed.push_back(std::move(started));
  started.clear();
}

template <size_t PENDING>
void wait_group() {
  while (committed.size() > PENDING) {
    for (const auto& copy : committed.front()) copy();
    committed.pop_front();
  }
}

template <PrefetchMode PREFETCH, typename T>
void load_128b(T* to, const T* from) {
  started.push_back([=] { std::memcpy(to, from, 16); });
}

template <PrefetchMode PREFETCH, SharedMemFillMode FILL, typename T>
void pred_load_128b(T* to, const T* from, bool predicate) {
  if (predicate) {
    load_128b<PREFETCH>(to, from);
  } else if (FILL == SharedMemFillMode::kFillZero) {
    started.push_back([=] { std::memset(to, 0, 16); });
  }
}

}  // namespace cp_async
}  // namespace flashinfer

#endif  // TURBOKV_TESTS_EMULATION_CP_ASYNC_CUH_
