// SPDX-License-Identifier: Apache-2.0
// Coroutines, warps and barriers of simt.h.
#include "simt.h"

#include <sys/mman.h>

#include <vector>

#if !defined(__x86_64__)
#error "the emulation switches stacks in x86-64 assembly"
#endif

namespace simt {

thread_local int current = 0;
thread_local dim_t block_index = {}, grid_size = {};
thread_local unsigned char* dynamic_shared = nullptr;

namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct cta_t {
  void* stack_pointers[kMaxThreads];
  bool done[kMaxThreads];
  warp_t warps[kMaxThreads / 32];
  int threads, running;
  int arrived = 0;
  unsigned generation = 0;
  bool any = false, result = false;
  void* scheduler = nullptr;
  const std::function<void()>* body = nullptr;
  long progress = 0;  // operations that ended
};

thread_local cta_t* cta = nullptr;
thread_local unsigned char* stacks = nullptr;

extern "C" void turbokv_switch_stack(void** save, void* to);
asm(R"(
.globl turbokv_switch_stack
.hidden turbokv_switch_stack
turbokv_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void Begin() {
  (*cta->body)();
  cta->done[current] = true;
  --cta->running, ++cta->progress;
  void* unused;
  turbokv_switch_stack(&unused, cta->scheduler);
  std::abort();
}

void Run() {
  long before = -1;
  while (cta->running > 0) {
    if (cta->progress == before) Fail("no thread can go on");
    before = cta->progress;
    for (int i = 0; i < cta->threads; ++i) {
      if (cta->done[i]) continue;
      current = i;
      turbokv_switch_stack(&cta->scheduler, cta->stack_pointers[i]);
    }
  }
}

}  // namespace

void Yield() { turbokv_switch_stack(&cta->stack_pointers[current], cta->scheduler); }

void Progress() { ++cta->progress; }

void Meet(int kind, const void* in, int in_bytes, void* out, int out_bytes, operation_t operation) {
  warp_t& warp = cta->warps[current / 32];
  const int lane = current % 32;
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) Fail("lanes of a warp are in different operations");
  std::memcpy(warp.in[lane].bytes, in, in_bytes);
  const unsigned generation = warp.generation;
  if (++warp.arrived == 32) {
    operation(warp.in, warp.out);
    warp.arrived = 0, ++warp.generation, ++cta->progress;
  } else {
    while (warp.generation == generation) Yield();
  }
  std::memcpy(out, warp.out[lane].bytes, out_bytes);
}

bool MeetAll(bool flag) {
  const unsigned generation = cta->generation;
  cta->any |= flag;
  if (++cta->arrived == cta->threads) {
    cta->result = cta->any, cta->any = false;
    cta->arrived = 0, ++cta->generation, ++cta->progress;
  } else {
    while (cta->generation == generation) Yield();
  }
  return cta->result;
}

void Launch(int grid, int threads, int shared_bytes, const std::function<void()>& body) {
  if (threads > kMaxThreads || threads % 32) Fail("threads of a CTA");
  if (stacks == nullptr) {
    void* memory = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) Fail("no memory for stacks");
    stacks = static_cast<unsigned char*>(memory);
  }
  std::vector<unsigned char> memory(shared_bytes + 256);
  grid_size = {static_cast<unsigned>(grid), 1, 1};
  for (int block = 0; block < grid; ++block) {
    block_index = {static_cast<unsigned>(block), 0, 0};
    std::memset(memory.data(), 0xFF, memory.size());  // what a CTA finds is anything
    dynamic_shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
    cta_t state;
    state.threads = state.running = threads;
    state.body = &body;
    for (int i = 0; i < threads; ++i) {
      void** top = reinterpret_cast<void**>(stacks + kStackBytes * (i + 1)) - 2;
      top[0] = reinterpret_cast<void*>(&Begin), top[1] = nullptr;
      state.stack_pointers[i] = top - 6;
      state.done[i] = false;
    }
    cta = &state;
    Run();
    for (int i = 0; i < 256; ++i) {
      const unsigned char* end = dynamic_shared + shared_bytes;
      if (end + i >= memory.data() + memory.size()) break;
      if (end[i] != 0xFF) Fail("a write past the end of shared memory");
    }
  }
  cta = nullptr;
}

}  // namespace simt
