// SPDX-License-Identifier: Apache-2.0
// The PTX instructions that decode uses, one function each; nothing here knows what they are used
// for.
#ifndef TURBOKV_PTX_CUH_
#define TURBOKV_PTX_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace turbokv {
namespace ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/*! \brief The CTA's dynamic shared memory. */
__device__ __forceinline__ uint8_t* DynamicShared() {
  extern __shared__ __align__(128) uint8_t turbokv_dynamic_shared[];
  return turbokv_dynamic_shared;
}

/*! \brief Four bytes of the eight in (a, b), picked by the low four nibbles of `selector`. Bit 3 of
 * a nibble replicates the picked byte's top bit instead. */
__device__ __forceinline__ uint32_t Permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

/*! \brief c[16x8] += a[16x32] * b[32x8], signed bytes. */
__device__ __forceinline__ void MmaS8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                      uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/*! \brief The same from one number: c[16x8] = from + a[16x32] * b[32x8]. */
__device__ __forceinline__ void MmaS8First(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                           uint32_t a3, uint32_t b0, uint32_t b1, int from = 0) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%10,%10,%10};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(from));
}

/*! \brief The same from other accumulators. */
__device__ __forceinline__ void MmaS8From(int (&c)[4], const int (&from)[4], uint32_t a0,
                                          uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                          uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(from[0]), "r"(from[1]),
        "r"(from[2]), "r"(from[3]));
}

/*! \brief c[16x8] += a[16x32] * b[32x8], of signed a and unsigned b. */
__device__ __forceinline__ void MmaS8U8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                        uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/*! \brief The same of unsigned bytes. */
__device__ __forceinline__ void MmaU8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                      uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/*! \brief c[16x8] += a[16x16] * b[16x8], fp16 with fp32 accumulators. */
__device__ __forceinline__ void MmaF16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                       uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/*! \brief c[16x8] += a[16x8] * b[8x8], of whose fp32 numbers only the first 11 bits of a mantissa
 * count. */
__device__ __forceinline__ void MmaTf32(float (&c)[4], float a0, float a1, float a2, float a3,
                                        float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

/*! \brief Transpose an 8x8 matrix of 16-bit elements held two a lane. */
__device__ __forceinline__ uint32_t Transpose8x8(uint32_t x) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}

__device__ __forceinline__ float Exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/*! \brief The larger, or NaN if either is. */
__device__ __forceinline__ float MaxNan(float x, float y) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
  return r;
}

// --- mbarriers and bulk copies: sm_90 and up
// ------------------------------------------------------

__device__ __forceinline__ void BarrierInit(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void BarrierInitFence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void BarrierArriveExpect(uint32_t barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void BarrierWait(uint32_t barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE_%=;\n"
      "bra WAIT_%=;\n"
      "DONE_%=:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

/*! \brief True in one lane of the warp. Unlike a comparison it tells the compiler that the branch
 * has one thread, so that a bulk copy in it needs no loop over lanes. */
__device__ __forceinline__ bool ElectOne() {
  uint32_t elected = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
#endif
  return elected != 0;
}

/*! \brief Start a copy of `bytes` (a multiple of 16) that completes on `barrier`. */
__device__ __forceinline__ void BulkCopy(uint32_t shared, const void* global, int bytes,
                                         uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

/*! \brief Wait until the kernel before in the stream is done, where launches may overlap. */
__device__ __forceinline__ void WaitForPrimary() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/*! \brief Let the next kernel start where there is room, up to its own WaitForPrimary. */
__device__ __forceinline__ void LaunchDependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/*! \brief The same if `launches`: without a branch. */
__device__ __forceinline__ void LaunchDependentsIf(bool launches) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred launches;\n"
      "setp.ne.s32 launches, %0, 0;\n"
      "@launches griddepcontrol.launch_dependents;\n"
      "}" ::"r"(static_cast<int>(launches))
      : "memory");
#endif
}

/*! \brief Bring `bytes` (a multiple of 16) to L2. */
__device__ __forceinline__ void BulkPrefetch(const void* global, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

/*! \brief Have the line at `global` brought to L2; nobody waits for it. */
__device__ __forceinline__ void Prefetch(const void* global) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#endif
}

/*! \brief The 16 bits at `from`, or 32 if `is_wide`, if `valid`, else 0: without a branch. */
__device__ __forceinline__ uint32_t LoadBitsIf(bool valid, const void* from, bool is_wide) {
  uint32_t x = 0;
#ifdef __CUDA_ARCH__
  asm volatile(
      "{\n"
      ".reg .pred valid, wide, narrow;\n"
      "setp.ne.s32 valid, %2, 0;\n"
      "setp.ne.and.s32 wide|narrow, %3, 0, valid;\n"
      "@wide ld.global.nc.b32 %0, [%1];\n"
      "@narrow ld.global.nc.u16 %0, [%1];\n"
      "}"
      : "+r"(x)
      : "l"(from), "r"(static_cast<int>(valid)), "r"(static_cast<int>(is_wide)));
#endif
  return x;
}

/*! \brief The integer at `from` if `valid`, else `otherwise`: without a branch, behind which the
 * value would be copied and so waited for. */
__device__ __forceinline__ int LoadIf(bool valid, const int32_t* from, int otherwise) {
  int x = otherwise;
#ifdef __CUDA_ARCH__
  asm volatile(
      "{\n"
      ".reg .pred valid;\n"
      "setp.ne.s32 valid, %2, 0;\n"
      "@valid ld.global.nc.b32 %0, [%1];\n"
      "}"
      : "+r"(x)
      : "l"(from), "r"(static_cast<int>(valid)));
#endif
  return x;
}

/*! \brief What is at `from` if `valid`, else `otherwise` or zeros; from L2, without a branch. */
__device__ __forceinline__ float LoadCachedIf(bool valid, const float* from, float otherwise) {
  float x = otherwise;
#ifdef __CUDA_ARCH__
  asm volatile(
      "{\n"
      ".reg .pred valid;\n"
      "setp.ne.s32 valid, %2, 0;\n"
      "@valid ld.global.cg.f32 %0, [%1];\n"
      "}"
      : "+f"(x)
      : "l"(from), "r"(static_cast<int>(valid))
      : "memory");
#endif
  return x;
}

__device__ __forceinline__ float4 LoadCachedIf(bool valid, const float4* from) {
  float4 x = make_float4(0, 0, 0, 0);
#ifdef __CUDA_ARCH__
  asm volatile(
      "{\n"
      ".reg .pred valid;\n"
      "setp.ne.s32 valid, %5, 0;\n"
      "@valid ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+f"(x.x), "+f"(x.y), "+f"(x.z), "+f"(x.w)
      : "l"(from), "r"(static_cast<int>(valid))
      : "memory");
#endif
  return x;
}

// --- 16-byte asynchronous copies: sm_80 and up
// ----------------------------------------------------

__device__ __forceinline__ void AsyncCopy16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void AsyncCopy4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void AsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void AsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- words of memory ---

/*! \brief Have the compiler know nothing of `x`. */
__device__ __forceinline__ void Opaque(float& x) { asm volatile("" : "+f"(x)); }

__device__ __forceinline__ uint32_t LoadShared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

/*! \brief Have the line of `p` brought to the first-level cache; nobody waits for it. */
template <typename T>
__device__ __forceinline__ void Touch(const T* p) {
  uint16_t unused;
  asm volatile("ld.global.ca.u16 %0, [%1];" : "=h"(unused) : "l"(p));
}

/*! \brief Clear the bits of a word that `mask` has clear, whoever else changes others of it. */
__device__ __forceinline__ void AndGlobal(uint32_t* word, uint32_t mask) {
  asm volatile("red.relaxed.gpu.global.and.b32 [%0], %1;" ::"l"(word), "r"(mask) : "memory");
}

/*! \brief Set the bits of a word that `bits` has set. */
__device__ __forceinline__ void OrGlobal(uint32_t* word, uint32_t bits) {
  asm volatile("red.relaxed.gpu.global.or.b32 [%0], %1;" ::"l"(word), "r"(bits) : "memory");
}

}  // namespace ptx
}  // namespace turbokv

#endif  // TURBOKV_PTX_CUH_
