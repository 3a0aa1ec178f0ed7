// SPDX-License-Identifier: Apache-2.0
// Store and decompress on the host, for one head size.
#define __CUDACC__ 1

#include "turbokv/decompress/kernel.cuh"
#include "turbokv/store/kernel.cuh"
#include "turbokv/store/small.cuh"

using namespace turbokv;

/*! \brief What a test asks for; the same fields as in pages.py. */
struct call_t {
  int32_t small;  // store: whether by the kernel of small batches
  int32_t ctas;   // of a row of the grid; with `small` warps of a CTA
  int32_t dtype, rotated;
  int32_t page_size, num_heads, head_dim, k_bits, v_bits, rows, first;
  int64_t page_stride, head_stride;
  uint8_t* pages;
  void *k, *v;  // [rows, num_heads, head_dim (rotated: padded_dim)]
  const int64_t *slots, *positions;
  const int32_t *table, *tile_slots;
  half_t* window;
  const float* k_offset;
  void *k_rotated, *v_rotated;  // as k and v, of fp16
};

namespace {

paged_kv_t Cache(const call_t& call) {
  paged_kv_t kv = {};
  kv.pages = call.pages, kv.page_stride = call.page_stride, kv.head_stride = call.head_stride;
  kv.page_size = call.page_size, kv.num_kv_heads = call.num_heads, kv.head_dim = call.head_dim;
  kv.page_table = call.table, kv.tile_slots = call.tile_slots, kv.window = call.window;
  return kv;
}

/*! \brief Run a kernel whose grid has a row for K and one for V. */
template <class F>
void LaunchRows(int ctas, int threads, int shared_bytes, const F& kernel) {
  const unsigned width = ctas;
  simt::Launch(2 * ctas, threads, shared_bytes, [&] {
    if (simt::block_index.x >= width) simt::block_index.x -= width, simt::block_index.y = 1;
    simt::grid_size = {width, 2, 1};
    kernel();
  });
}

/*! \brief The kernel of small batches, with so many warps a CTA. */
template <class DTypeIn>
void RunSmall(const store_params_t& p, int warps) {
  using namespace store_detail;
  using C = small_traits_t<EMULATED_HEAD_DIM>;
  const unsigned heads = p.kv.num_kv_heads, rows = warps * C::kVectors;
  const unsigned blocks = (p.nnz + rows - 1) / rows;
  VisitSmall<C, DTypeIn>(p, warps, [&](auto kernel, const auto& all) {
    simt::Launch(heads * blocks * 2, warps * 32, 16, [&] {
      if (simt::current == 0) {  // runs first, for all threads of the CTA
        const unsigned i = simt::block_index.x;
        simt::block_index = {i % heads, i / heads % blocks, i / heads / blocks};
        simt::grid_size = {heads, blocks, 2};
      }
      kernel(all);
    });
    return 0;
  });
}

template <class DTypeIn>
void RunStore(const store_params_t& p, bool small, int size) {
  using namespace store_detail;
  if (small) return RunSmall<DTypeIn>(p, size);
  using C = store_traits_t<EMULATED_HEAD_DIM>;
  LaunchRows(size, C::kThreads, sizeof(store_shared_t<C>), [&] { StoreKernel<C, DTypeIn>(p); });
}

}  // namespace

extern "C" int turbokv_emulated_call_bytes() { return sizeof(call_t); }

extern "C" void turbokv_emulate_store(const call_t* call) {
  store_params_t p = {};
  p.kv = Cache(*call);
  p.k_format = DefaultFormat(role_t::kKey, call->k_bits, call->head_dim);
  p.v_format = DefaultFormat(role_t::kValue, call->v_bits, call->head_dim);
  p.k = call->k, p.v = call->v, p.nnz = call->rows, p.dtype = static_cast<dtype_t>(call->dtype);
  p.k_token_stride = p.v_token_stride = call->num_heads * call->head_dim;
  p.k_head_stride = p.v_head_stride = call->head_dim;
  p.k_rotated = call->k_rotated, p.v_rotated = call->v_rotated;
  p.rotated_dtype = dtype_t::kFloat16;
  p.k_rotated_head_stride = p.v_rotated_head_stride = EMULATED_HEAD_DIM;
  p.k_rotated_token_stride = p.v_rotated_token_stride = call->num_heads * EMULATED_HEAD_DIM;
  p.slot_mapping = call->slots, p.positions = call->positions, p.k_offset = call->k_offset;
  if (p.dtype == dtype_t::kFloat32) return RunStore<float>(p, call->small, call->ctas);
  if (p.dtype == dtype_t::kFloat16) return RunStore<half_t>(p, call->small, call->ctas);
  RunStore<bfloat16_t>(p, call->small, call->ctas);
}

extern "C" void turbokv_emulate_decompress(const call_t* call) {
  using namespace decompress_detail;
  constexpr int kDim = EMULATED_HEAD_DIM;
  decompress_params_t p = {};
  p.kv = Cache(*call);
  p.k_format = DefaultFormat(role_t::kKey, call->k_bits, call->head_dim);
  p.v_format = DefaultFormat(role_t::kValue, call->v_bits, call->head_dim);
  p.first_token = call->first, p.batch_size = 1, p.num_rows = call->rows;
  p.out_k = call->k, p.out_v = call->v, p.dtype = static_cast<dtype_t>(call->dtype);
  p.rotated = call->rotated, p.k_offset = call->k_offset;
  p.k_head_stride = p.v_head_stride = p.rotated ? kDim : call->head_dim;
  p.k_token_stride = p.v_token_stride = call->num_heads * p.k_head_stride;
  LaunchRows(call->ctas, kWarps * 32, 16, [&] {
    if (p.rotated) {
      DecompressPagesKernel<kDim, true>(p);
    } else {
      DecompressPagesKernel<kDim, false>(p);
    }
  });
}
