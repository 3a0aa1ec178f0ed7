// SPDX-License-Identifier: Apache-2.0
// The functions of the real ptx.cuh on the host. Asynchronous copies happen as late as they may.
#ifndef TURBOKV_PTX_CUH_
#define TURBOKV_PTX_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <deque>
#include <vector>

namespace simt {
void Progress();
}

namespace turbokv {
namespace ptx {

// --- addresses ---

inline uint8_t* DynamicShared() { return simt::dynamic_shared; }
inline uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - simt::dynamic_shared);
}
inline uint8_t* FromShared(uint32_t address) { return simt::dynamic_shared + address; }

inline uint32_t LoadShared(uint32_t address) {
  uint32_t x;
  std::memcpy(&x, FromShared(address), 4);
  return x;
}
template <typename T>
void Touch(const T* p) {
  (void)*reinterpret_cast<const volatile char*>(p);
}
inline void AndGlobal(uint32_t* word, uint32_t mask) { *word &= mask; }
inline void OrGlobal(uint32_t* word, uint32_t bits) { *word |= bits; }

// --- arithmetic ---

inline uint32_t Permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (s & 7))) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * i);
  }
  return r;
}

inline float Exp2(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;  // ftz
}

inline float MaxNan(float x, float y) { return x > y || std::isnan(x) ? x : y; }

struct mma_in_t {
  uint32_t a[4], b[2], c[4];
};
struct mma_out_t {
  uint32_t c[4];
};

/*! \brief One mma: K numbers along k, PER to a register, read from the bits of one by A and B. */
template <class Number, int K, int PER, class A, class B>
inline void Multiply(const mma_in_t* in, mma_out_t* out) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      const int owner = row % 8 * 4 + column / 2, e = row / 8 * 2 + column % 2;
      Number sum = BitCast<Number>(in[owner].c[e]);
      for (int k = 0; k < K; ++k) {
        const int half = k / (K / 2), within = k % (K / 2), t = within / PER, byte = within % PER;
        const uint32_t a = in[row % 8 * 4 + t].a[half * 2 + row / 8];
        const uint32_t b = in[column * 4 + t].b[half];
        sum += static_cast<Number>(A()(a, byte)) * static_cast<Number>(B()(b, byte));
      }
      out[owner].c[e] = BitCast<uint32_t>(sum);
    }
  }
}

struct signed_byte_t {
  int operator()(uint32_t x, int i) const { return static_cast<int8_t>(x >> (8 * i)); }
};
struct unsigned_byte_t {
  int operator()(uint32_t x, int i) const { return static_cast<uint8_t>(x >> (8 * i)); }
};
struct half_of_t {
  float operator()(uint32_t x, int i) const {
    return __half2float({static_cast<uint16_t>(x >> (16 * i))});
  }
};
struct tf32_t {
  float operator()(uint32_t x, int) const { return BitCast<float>(x & 0xffffe000u); }
};

template <class Number, int K, int PER, class A, class B>
inline void Mma(Number (&c)[4], const Number (&from)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                uint32_t a3, uint32_t b0, uint32_t b1) {
  mma_in_t in = {{a0, a1, a2, a3}, {b0, b1}, {}};
  for (int e = 0; e < 4; ++e) in.c[e] = BitCast<uint32_t>(from[e]);
  const mma_out_t out = simt::Together<mma_in_t, mma_out_t>(
      kMma + K, in,
      [](const mma_in_t* ins, mma_out_t* outs) { Multiply<Number, K, PER, A, B>(ins, outs); });
  for (int e = 0; e < 4; ++e) c[e] = BitCast<Number>(out.c[e]);
}

inline void MmaS8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                  uint32_t b1) {
  Mma<int, 32, 4, signed_byte_t, signed_byte_t>(c, c, a0, a1, a2, a3, b0, b1);
}
inline void MmaS8U8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1) {
  Mma<int, 32, 4, signed_byte_t, unsigned_byte_t>(c, c, a0, a1, a2, a3, b0, b1);
}
inline void MmaU8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                  uint32_t b1) {
  Mma<int, 32, 4, unsigned_byte_t, unsigned_byte_t>(c, c, a0, a1, a2, a3, b0, b1);
}
inline void MmaS8First(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                       uint32_t b1, int from = 0) {
  const int all[4] = {from, from, from, from};
  Mma<int, 32, 4, signed_byte_t, signed_byte_t>(c, all, a0, a1, a2, a3, b0, b1);
}
inline void MmaS8From(int (&c)[4], const int (&from)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                      uint32_t a3, uint32_t b0, uint32_t b1) {
  Mma<int, 32, 4, signed_byte_t, signed_byte_t>(c, from, a0, a1, a2, a3, b0, b1);
}
inline void MmaF16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                   uint32_t b1) {
  Mma<float, 16, 2, half_of_t, half_of_t>(c, c, a0, a1, a2, a3, b0, b1);
}
inline void MmaTf32(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  Mma<float, 8, 1, tf32_t, tf32_t>(c, c, __float_as_uint(a0), __float_as_uint(a1),
                                   __float_as_uint(a2), __float_as_uint(a3), __float_as_uint(b0),
                                   __float_as_uint(b1));
}

inline uint32_t Transpose8x8(uint32_t x) {
  return simt::Together<uint32_t, uint32_t>(kMma, x, [](const uint32_t* in, uint32_t* out) {
    auto at = [&](int row, int column) {
      return in[row * 4 + column / 2] >> (column % 2 * 16) & 0xffff;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      out[lane] = at(column, row) | at(column + 1, row) << 16;
    }
  });
}

// --- mbarriers and bulk copies ---

struct barrier_t {
  uint32_t phase : 1, pending : 15;
  int32_t bytes : 32;
};
static_assert(sizeof(barrier_t) == 8, "an mbarrier");
struct bulk_t {
  uint32_t to;
  const void* from;
  int bytes;
  uint32_t barrier;
};
inline std::deque<bulk_t>& BulkCopies() {
  static thread_local std::deque<bulk_t> copies;
  return copies;
}
inline barrier_t* BarrierAt(uint32_t address) {
  return reinterpret_cast<barrier_t*>(FromShared(address));
}
inline void BarrierInit(uint32_t barrier, int) { *BarrierAt(barrier) = {0, 1, 0}; }
inline void BarrierInitFence() {}
inline void BarrierSettle(barrier_t* barrier) {
  if (barrier->pending == 0 && barrier->bytes == 0) barrier->phase ^= 1, barrier->pending = 1;
}
inline void BarrierArrive(uint32_t barrier) {
  BarrierAt(barrier)->pending = 0;
  BarrierSettle(BarrierAt(barrier));
}
inline void BarrierArriveExpect(uint32_t barrier, int bytes) {
  if (BarrierAt(barrier)->pending != 1) simt::Fail("a stage is filled that was not awaited");
  BarrierAt(barrier)->bytes += bytes;
  BarrierArrive(barrier);
}
inline void BulkCopy(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) {
    simt::Fail("a bulk copy that is not aligned");
  }
  std::memset(FromShared(to), 0xFF, bytes);
  BulkCopies().push_back({to, from, bytes, barrier});
}
inline void BarrierWait(uint32_t barrier, int parity) {
  while (static_cast<int>(BarrierAt(barrier)->phase) == parity) {
    auto& copies = BulkCopies();
    for (size_t i = 0; i < copies.size(); ++i) {
      if (copies[i].barrier != barrier) continue;
      const bulk_t copy = copies[i];
      std::memcpy(FromShared(copy.to), copy.from, copy.bytes);
      BarrierAt(barrier)->bytes -= copy.bytes;
      BarrierSettle(BarrierAt(barrier));
      copies.erase(copies.begin() + static_cast<long>(i));
      simt::Progress();
      break;
    }
    if (static_cast<int>(BarrierAt(barrier)->phase) == parity) simt::Yield();
  }
}
inline void Opaque(float&) {}
inline bool ElectOne() { return Lane() == 0; }
inline void WaitForPrimary() {}
inline void LaunchDependents() {}
inline void LaunchDependentsIf(bool) {}
inline void BulkPrefetch(const void*, int) {}
inline void Prefetch(const void*) {}

inline uint32_t LoadBitsIf(bool valid, const void* from, bool is_wide) {
  if (!valid) return 0;
  return is_wide ? *static_cast<const uint32_t*>(from) : *static_cast<const uint16_t*>(from);
}
inline int LoadIf(bool valid, const int32_t* from, int otherwise) {
  return valid ? *from : otherwise;
}

inline float LoadCachedIf(bool valid, const float* from, float otherwise) {
  return valid ? *from : otherwise;
}
inline float4 LoadCachedIf(bool valid, const float4* from) {
  return valid ? *from : make_float4(0, 0, 0, 0);
}

// --- asynchronous copies, in groups of each thread ---

struct async_t {
  uint32_t to;
  const void* from;
  int bytes;
};
struct groups_t {
  std::vector<async_t> open;
  std::deque<std::vector<async_t>> committed;
};
inline groups_t& Groups() {
  static thread_local groups_t groups[simt::kMaxThreads];
  return groups[simt::current];
}
inline void AsyncCopy(uint32_t to, const void* from, int bytes) {
  if (to % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    simt::Fail("an asynchronous copy that is not aligned");
  }
  std::memset(FromShared(to), 0xFF, bytes);
  Groups().open.push_back({to, from, bytes});
}
inline void AsyncCopy16(uint32_t to, const void* from) { AsyncCopy(to, from, 16); }
inline void AsyncCopy4(uint32_t to, const void* from) { AsyncCopy(to, from, 4); }
inline void AsyncCommit() {
  Groups().committed.push_back(std::move(Groups().open));
  Groups().open.clear();
}
template <int PENDING>
inline void AsyncWait() {
  auto& committed = Groups().committed;
  while (committed.size() > PENDING) {
    for (const async_t& copy : committed.front()) {
      std::memcpy(FromShared(copy.to), copy.from, copy.bytes);
    }
    committed.pop_front();
  }
}

}  // namespace ptx
}  // namespace turbokv

#endif  // TURBOKV_PTX_CUH_
