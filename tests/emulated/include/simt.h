// SPDX-License-Identifier: Apache-2.0
// CUDA's threads on the host: the threads of a CTA are coroutines of one thread, so that kernels
// run unchanged, barriers, shuffles and all. Slow, deterministic, and without a GPU.
#ifndef TURBOKV_EMULATED_SIMT_H_
#define TURBOKV_EMULATED_SIMT_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

namespace simt {

constexpr int kMaxThreads = 512;

struct dim_t {
  unsigned x, y, z;
};

/*! \brief A value of up to 48 bytes that a lane brings to an operation of its warp. */
struct operand_t {
  unsigned char bytes[48];
};

using operation_t = void (*)(const operand_t* in, operand_t* out);

struct warp_t {
  int arrived = 0;
  unsigned generation = 0;
  int kind = 0;
  operand_t in[32], out[32];
};

/*! \brief The thread that runs. */
extern thread_local int current;
extern thread_local dim_t block_index, grid_size;
extern thread_local unsigned char* dynamic_shared;

void Yield();
/*! \brief All lanes of a warp meet: the last computes `out` from `in`. `kind` tells operations
 * apart.
 */
void Meet(int kind, const void* in, int in_bytes, void* out, int out_bytes, operation_t operation);
/*! \brief A barrier of the CTA; returns whether any thread came with true. */
bool MeetAll(bool flag);
/*! \brief Run `body` in `threads` threads, one CTA after the other. */
void Launch(int grid, int threads, int shared_bytes, const std::function<void()>& body);

[[noreturn]] inline void Fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (thread %d of CTA %u)\n", what, current, block_index.x);
  std::abort();
}

template <class In, class Out, class F>
Out Together(int kind, const In& in, F) {
  static_assert(sizeof(In) <= sizeof(operand_t) && sizeof(Out) <= sizeof(operand_t), "too large");
  Out out;
  Meet(kind, &in, sizeof(In), &out, sizeof(Out), [](const operand_t* from, operand_t* to) {
    In ins[32];
    Out outs[32];
    for (int i = 0; i < 32; ++i)
      std::memcpy(static_cast<void*>(ins + i), from[i].bytes, sizeof(In));
    F()(ins, outs);
    for (int i = 0; i < 32; ++i) std::memcpy(to[i].bytes, outs + i, sizeof(Out));
  });
  return out;
}

}  // namespace simt

#endif  // TURBOKV_EMULATED_SIMT_H_
