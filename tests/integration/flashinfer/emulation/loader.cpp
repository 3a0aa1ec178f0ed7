// SPDX-License-Identifier: Apache-2.0
// The tile loader run by g++, a thread of the host for a thread of the block: the calls that the
// patched prefill kernel makes for one chunk of KV, its barriers, and its groups of copies. For
// tests/integration/flashinfer.
#include <cuda_fp16.h>
#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "turbokv/flashinfer/kv_tile_loader.cuh"

static pthread_barrier_t barrier;
void __syncthreads() { pthread_barrier_wait(&barrier); }

namespace {

using namespace turbokv;  // NOLINT: a test

struct page_size_t {
  uint32_t size;
  operator uint32_t() const { return size; }
  void divmod(uint32_t n, uint32_t& q, uint32_t& r) const { q = n / size, r = n % size; }
};
struct params_t {
  struct {
    page_size_t page_size;
    uint32_t num_heads;
    const int32_t* indices;
    const int32_t* indptr;
  } paged_kv;
  kv_tiles_params_t tiles;
};

template <int TILE_KV>
struct traits_t {
  static constexpr uint32_t CTA_TILE_KV = TILE_KV, NUM_THREADS = 128;
  static constexpr auto SWIZZLE_MODE_KV = flashinfer::SwizzleMode::k128B;
};

// Two blocks of 128 queries and 64 tokens share an H100's multiprocessor: 228 KiB, of which the
// system takes 1 KiB a block. FlashInfer's own storage is 64 KiB and 80 bytes.
template <int K_BITS, int V_BITS>
constexpr bool kFitsTwice =
    64 * 1024 + 80 + 64 * KVTileLoader<128, K_BITS, V_BITS, params_t>::kSmemBytesPerRow <=
    113 * 1024;
static_assert(kFitsTwice<4, 4> && kFitsTwice<5, 3> && kFitsTwice<3, 3> && kFitsTwice<2, 2>);

template <int HEAD_DIM, int TILE_KV>
struct alignas(16) storage_t {
  uint16_t k_smem[TILE_KV * HEAD_DIM];
  uint16_t v_smem[TILE_KV * HEAD_DIM];
};

struct smem_t {
  uint16_t* base;
  explicit smem_t(uint8_t* place) : base(reinterpret_cast<uint16_t*>(place)) {}
};

template <int HEAD_DIM>
void Dump(const uint16_t* smem, int rows, uint16_t* out) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < HEAD_DIM / 8; ++column) {
      const uint32_t at =
          flashinfer::get_permuted_offset<flashinfer::SwizzleMode::k128B, HEAD_DIM / 8>(row,
                                                                                        column);
      std::memcpy(out + row * HEAD_DIM + column * 8, smem + at * 8, 16);
    }
  }
}

template <int HEAD_DIM, int K_BITS, int V_BITS, int TILE_KV,
          int STEPS = HEAD_DIM / 16 * TILE_KV / 16>
void Run(const params_t& params, int head, int start, int end, uint16_t* k, uint16_t* v) {
  using Loader = KVTileLoader<HEAD_DIM, K_BITS, V_BITS, params_t>;
  using Traits = traits_t<TILE_KV>;
  using Storage = storage_t<HEAD_DIM, TILE_KV>;
  constexpr size_t kBytes = sizeof(Storage) + TILE_KV * Loader::kSmemBytesPerRow;
  std::vector<uint4> memory(kBytes / 16 + 1);
  std::memset(memory.data(), 0xff, memory.size() * 16);  // NaN, wherever nothing is written
  Storage& storage = *reinterpret_cast<Storage*>(memory.data());
  auto thread = [&](uint32_t tid) {
    Loader loader(params, storage, 0, head, start, end, tid);
    namespace cp = flashinfer::cp_async;
    loader.template begin<Traits>();
    for (int iter = 0; start + iter * TILE_KV < end; ++iter) {
      cp::wait_group<1>();
      __syncthreads();
      smem_t k_smem(nullptr), v_smem(nullptr);
      loader.template next<Traits>(iter, k_smem, v_smem);
      if (tid == 0) {
        Dump<HEAD_DIM>(k_smem.base, TILE_KV, k + iter * TILE_KV * HEAD_DIM);
        Dump<HEAD_DIM>(v_smem.base, TILE_KV, v + iter * TILE_KV * HEAD_DIM);
      }
      auto filler = loader.template filler<Traits>(iter + 1);
      cp::commit_group();
      for (int i = 0; i < STEPS; ++i) filler.step(i, STEPS);
      cp::commit_group();
    }
    cp::wait_group<0>();
  };
  pthread_barrier_init(&barrier, nullptr, Traits::NUM_THREADS);
  std::vector<std::thread> block;
  for (uint32_t tid = 0; tid < Traits::NUM_THREADS; ++tid) block.emplace_back(thread, tid);
  for (std::thread& member : block) member.join();
  pthread_barrier_destroy(&barrier);
  // nothing may have been written past the memory that was asked for
  for (size_t i = kBytes; i < memory.size() * 16; ++i) {
    if (reinterpret_cast<const uint8_t*>(memory.data())[i] != 0xff) std::abort();
  }
}

codebook_t Codebook(int bits, int frac_bits, const int8_t* magnitudes) {
  codebook_t book = {bits, frac_bits, 1.0, {}};
  std::memcpy(book.magnitudes, magnitudes, 1 << (bits - 1));
  return book;
}

}  // namespace

extern "C" int Emulate(int head_dim, int k_bits, int v_bits, int tile_kv, const uint8_t* pages,
                       int64_t page_stride, int64_t head_stride, int page_size, int num_heads,
                       int head, const int32_t* indices, int start, int end,
                       const int32_t* tile_slots, const uint16_t* window, const float* k_offset,
                       int k_frac_bits, const int8_t* k_magnitudes, int v_frac_bits,
                       const int8_t* v_magnitudes, uint16_t* k, uint16_t* v) {
  static const int32_t kNoOffset = 0;
  params_t params = {
      {{static_cast<uint32_t>(page_size)}, static_cast<uint32_t>(num_heads), indices, &kNoOffset},
      {pages, static_cast<uint32_t>(page_stride / 16), static_cast<uint32_t>(head_stride / 16),
       tile_slots, reinterpret_cast<const __half*>(window), k_offset}};
  const codebook_t k_book = Codebook(k_bits, k_frac_bits, k_magnitudes);
  const codebook_t v_book = Codebook(v_bits, v_frac_bits, v_magnitudes);
#define TURBOKV_CASE(DIM, K, V)                                                        \
  if (head_dim == DIM && k_bits == K && v_bits == V) {                                 \
    params.tiles.k_levels = flashinfer_detail::MakeLevels<K>(k_book);                  \
    params.tiles.v_levels = flashinfer_detail::MakeLevels<V>(v_book);                  \
    if (tile_kv == 32) return Run<DIM, K, V, 32>(params, head, start, end, k, v), 0;   \
    if (tile_kv == 128) return Run<DIM, K, V, 128>(params, head, start, end, k, v), 0; \
  }
#define TURBOKV_CASES(DIM) \
  TURBOKV_CASE(DIM, 2, 2)  \
  TURBOKV_CASE(DIM, 3, 3)  \
  TURBOKV_CASE(DIM, 4, 4)  \
  TURBOKV_CASE(DIM, 5, 5)  \
  TURBOKV_CASE(DIM, 8, 8)  \
  TURBOKV_CASE(DIM, 5, 3)  \
  TURBOKV_CASE(DIM, 3, 4)
  TURBOKV_CASES(64)
  TURBOKV_CASES(128)
  TURBOKV_CASES(256)
  return 1;
}
