// SPDX-License-Identifier: Apache-2.0
// PyTorch's view of the kernels: custom operators against its stable C interface, so that one
// library serves every PyTorch from 2.11 on and every Python. The only C++ here that sees PyTorch.
//
// Operators write to tensors that their schemas mark and return nothing. Python checks arguments
// and words the errors (ops.py); checks here keep a kernel from reading out of bounds.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>

#include "standalone_kernels/registry.h"
#include "turbokv/decode.cuh"
#include "turbokv/decompress_pages.cuh"
#include "turbokv/page_metadata.cuh"
#include "turbokv/store.cuh"
#include "turbokv/vector_format.cuh"

namespace turbokv {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using optional_tensor_t = std::optional<Tensor>;

// --- variants
// -------------------------------------------------------------------------------------

// From the headers, so that a launcher whose parameters change does not link by mistake.
using store_launcher_t = decltype(&Store<64>);
using decompress_launcher_t = decltype(&DecompressPages<64>);
using decode_launcher_t = decltype(&Decode<64, 4, 4>);

using variant_key_t = std::tuple<int, int, int, int, int>;

/*! \brief Launch functions by variant. Filled when the library is loaded, and by turbokv_register.
 */
class Registry {
 public:
  static Registry& Get() {
    static Registry registry;
    return registry;
  }

  void Add(const kernel_entry_t& e) {
    const std::lock_guard<std::mutex> lock(mutex_);
    launchers_[{e.kind, e.padded_dim, e.k_bits, e.v_bits, e.lookup2}] = e.launcher;
  }

  template <class Launcher>
  Launcher Find(kernel_kind_t kind, const char* name, int padded_dim, int k_bits, int v_bits,
                bool lookup2) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = launchers_.find({kind, padded_dim, k_bits, v_bits, lookup2});
    STD_TORCH_CHECK(found != launchers_.end(), name, ": no variant for padded_dim ", padded_dim,
                    ", k_bits ", k_bits, ", v_bits ", v_bits, ", lookup2 ", lookup2,
                    " (0: any); turbokv.kernels.cuda.prepare compiles it");
    return reinterpret_cast<Launcher>(found->second);
  }

 private:
  Registry() {
    for (auto entry = turbokv_table; *entry != nullptr; ++entry) Add(**entry);
  }

  std::mutex mutex_;
  std::map<variant_key_t, void*> launchers_;
};

// --- formats
// --------------------------------------------------------------------------------------

/*! \brief Read a format from its line of text (library.py writes it). */
vector_format_t ParseFormat(const std::string& text) {
  std::istringstream in(text);
  int head_dim = 0, rule = 0;
  codebook_t codebook = {};
  std::string step, magnitudes, signs;
  in >> head_dim >> codebook.bits >> rule >> codebook.frac_bits >> step >> magnitudes >> signs;
  STD_TORCH_CHECK(!in.fail(), "format: wanted seven fields, got '", text, "'");
  codebook.step = std::strtod(step.c_str(), nullptr);  // hexadecimal, so exact
  const char* next = magnitudes.c_str();
  for (int i = 0; i < 128 && *next != '\0'; ++i) {
    char* end;
    codebook.magnitudes[i] = static_cast<int8_t>(std::strtol(next, &end, 10));
    next = *end == ',' ? end + 1 : end;
  }
  STD_TORCH_CHECK(head_dim > 32 && head_dim <= kMaxPaddedDim && IsValid(codebook) && rule >= 0 &&
                      rule <= static_cast<int>(scale_rule_t::kUnbiased),
                  "format: wanted one that pages can hold, got '", text, "'");
  vector_format_t format = MakeVectorFormat(codebook, head_dim, static_cast<scale_rule_t>(rule));
  next = signs.c_str();
  for (int i = 0; i < kMaxPaddedDim / 32 && *next != '\0'; ++i) {
    char* end;
    format.signs[i] = static_cast<uint32_t>(std::strtoul(next, &end, 16));
    next = *end == ',' ? end + 1 : end;
  }
  return format;
}

/*! \brief The format that a text describes: parsed once, and kept. */
const vector_format_t& Format(const std::string& text) {
  static std::mutex mutex;
  static std::map<std::string, vector_format_t> formats;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = formats.find(text);
  if (found == formats.end()) found = formats.emplace(text, ParseFormat(text)).first;
  return found->second;
}

// --- tensors
// --------------------------------------------------------------------------------------

/*! \brief Raise unless `x` is such a tensor, whose last dimension is contiguous (-1: any extent).
 */
void Check(const Tensor& x, const char* name, std::initializer_list<ScalarType> dtypes,
           std::initializer_list<int64_t> shape, int device, bool contiguous = false) {
  STD_TORCH_CHECK(x.is_cuda(), name, ": wanted a CUDA tensor, got one on another kind of device");
  STD_TORCH_CHECK(device < 0 || x.get_device_index() == device, name,
                  ": wanted device cuda:", device, ", got cuda:", x.get_device_index());
  STD_TORCH_CHECK(std::find(dtypes.begin(), dtypes.end(), x.scalar_type()) != dtypes.end(), name,
                  ": wanted another dtype than ", torch::headeronly::toString(x.scalar_type()));
  const auto sizes = x.sizes();
  bool fits = sizes.size() == shape.size();
  if (fits) {
    size_t i = 0;
    for (const int64_t want : shape) fits &= want < 0 || sizes[i] == want, ++i;
  }
  std::ostringstream got;
  if (!fits) {
    for (const int64_t size : sizes) got << ' ' << size;
  }
  STD_TORCH_CHECK(fits, name, ": wanted another shape than [", got.str(), " ]");
  const size_t last = sizes.size() - 1;
  STD_TORCH_CHECK(sizes[last] <= 1 || x.stride(last) == 1, name,
                  ": wanted a contiguous last dimension");
  STD_TORCH_CHECK(!contiguous || x.is_contiguous(), name, ": wanted a contiguous tensor");
}

void CheckPacked(const optional_tensor_t& x, const char* name, ScalarType dtype,
                 std::initializer_list<int64_t> shape, int device) {
  if (x.has_value()) Check(*x, name, {dtype}, shape, device, true);
}

constexpr std::initializer_list<ScalarType> kFloats = {ScalarType::Float, ScalarType::Half,
                                                       ScalarType::BFloat16};

dtype_t DType(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::Float  ? dtype_t::kFloat32
         : type == ScalarType::Half ? dtype_t::kFloat16
                                    : dtype_t::kBFloat16;
}

template <class T>
const T* Data(const optional_tensor_t& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

template <class T>
T* MutableData(const optional_tensor_t& x) {
  return x.has_value() ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
}

/*! \brief A view of `pages` and the 16-bit copies, without tables. */
paged_kv_t PagedKv(const Tensor& pages, const vector_format_t& k_format,
                   const vector_format_t& v_format, int64_t page_size,
                   const optional_tensor_t& tile_slots, const optional_tensor_t& window) {
  STD_TORCH_CHECK(k_format.head_dim == v_format.head_dim, "v_format: wanted head_dim ",
                  k_format.head_dim, ", got ", v_format.head_dim);
  STD_TORCH_CHECK(page_size > 0 && page_size % kTokensPerTile == 0 && page_size <= INT32_MAX,
                  "page_size: wanted a multiple of 16, got ", page_size);
  const int k_bits = k_format.codebook.bits, v_bits = v_format.codebook.bits;
  const int padded_dim = PaddedDim(k_format.head_dim);
  const int64_t token_bytes = padded_dim * k_bits / 8 + padded_dim * v_bits / 8 + 4;
  const int device = pages.get_device_index();
  Check(pages, "pages", {ScalarType::Byte}, {-1, -1, page_size * token_bytes}, device);
  const int64_t num_kv_heads = pages.size(1);
  STD_TORCH_CHECK(num_kv_heads > 0 && num_kv_heads <= INT32_MAX, "pages: wanted KV heads, got ",
                  num_kv_heads);
  CheckPacked(tile_slots, "tile_slots", ScalarType::Int,
              {pages.size(0), page_size / kTokensPerTile}, device);
  CheckPacked(window, "window", ScalarType::Half, {-1, num_kv_heads, 2, kTokensPerTile, padded_dim},
              device);
  paged_kv_t kv = {};
  kv.pages = static_cast<uint8_t*>(pages.mutable_data_ptr());
  // where a dimension has one entry its stride is never used, and may be anything
  kv.page_stride = pages.size(0) > 1 ? pages.stride(0) : 0;
  kv.head_stride = num_kv_heads > 1 ? pages.stride(1) : 0;
  kv.page_size = static_cast<int32_t>(page_size);
  kv.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  kv.head_dim = k_format.head_dim;
  kv.tile_slots = Data<int32_t>(tile_slots);
  kv.window = MutableData<half_t>(window);
  STD_TORCH_CHECK(pages.numel() == 0 || IsValid(kv, k_bits, v_bits),
                  "pages: wanted 16-byte alignment, and tile_slots with window or neither");
  return kv;
}

/*! \brief Check the pages' owners, put them into `kv`, and return the number of requests. */
int64_t CheckTable(const Tensor& kv_indices, const optional_tensor_t& kv_indptr, int device,
                   paged_kv_t& kv) {
  kv.page_table = static_cast<const int32_t*>(kv_indices.const_data_ptr());
  kv.kv_indptr = Data<int32_t>(kv_indptr);
  int64_t batch_size;
  if (kv_indptr.has_value()) {
    Check(kv_indices, "kv_indices", {ScalarType::Int}, {-1}, device);
    CheckPacked(kv_indptr, "kv_indptr", ScalarType::Int, {-1}, device);
    batch_size = kv_indptr->size(0) - 1;
    STD_TORCH_CHECK(batch_size >= 0, "kv_indptr: wanted at least one element");
  } else {
    Check(kv_indices, "kv_indices", {ScalarType::Int}, {-1, -1}, device);
    batch_size = kv_indices.size(0);
    kv.table_stride = kv_indices.stride(0);
  }
  STD_TORCH_CHECK(batch_size < INT32_MAX, "kv_indices: wanted fewer requests, got ", batch_size);
  return batch_size;
}

// --- launching
// ------------------------------------------------------------------------------------

/*! \brief PyTorch's current stream. CPU builds of PyTorch lack the function, so it is looked up. */
cudaStream_t CurrentStream(int device) {
  using getter_t = AOTITorchError (*)(int32_t, void**);
  static const getter_t getter = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library != nullptr ? dlsym(library, name) : dlsym(RTLD_DEFAULT, name);
    return reinterpret_cast<getter_t>(symbol);
  }();
  STD_TORCH_CHECK(getter != nullptr, "turbokv: this PyTorch is built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "turbokv: PyTorch has no stream for cuda:", device);
  return static_cast<cudaStream_t>(stream);
}

void CheckLaunch(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorName(error), ": ",
                  cudaGetErrorString(error));
}

// --- operators
// ------------------------------------------------------------------------------------

void StoreOperator(Tensor k, Tensor v, Tensor slot_mapping, Tensor pages, std::string k_text,
                   std::string v_text, int64_t page_size, optional_tensor_t positions,
                   optional_tensor_t k_offset, optional_tensor_t k_rotated,
                   optional_tensor_t v_rotated, optional_tensor_t tile_slots,
                   optional_tensor_t window, bool launch_dependents) {
  const vector_format_t &k_format = Format(k_text), &v_format = Format(v_text);
  const int head_dim = k_format.head_dim, padded_dim = PaddedDim(head_dim);
  Check(k, "k", kFloats, {-1, -1, head_dim}, -1);
  const int device = k.get_device_index();
  const int64_t nnz = k.size(0), num_kv_heads = k.size(1);
  STD_TORCH_CHECK(nnz <= INT32_MAX, "k: wanted at most 2^31 - 1 tokens, got ", nnz);
  Check(v, "v", {k.scalar_type()}, {nnz, num_kv_heads, head_dim}, device);
  Check(pages, "pages", {ScalarType::Byte}, {-1, num_kv_heads, -1}, device);
  CheckPacked(slot_mapping, "slot_mapping", ScalarType::Long, {-1}, device);
  STD_TORCH_CHECK(slot_mapping.numel() >= nnz, "slot_mapping: wanted at least ", nnz,
                  " elements, got ", slot_mapping.numel());
  CheckPacked(positions, "positions", ScalarType::Long, {-1}, device);
  STD_TORCH_CHECK(!k_offset.has_value() || (positions.has_value() && positions->numel() >= nnz),
                  "positions: wanted at least ", nnz, " elements with k_offset");
  CheckPacked(k_offset, "k_offset", ScalarType::Float, {-1, num_kv_heads, head_dim}, device);

  store_params_t p = {};
  p.kv = PagedKv(pages, k_format, v_format, page_size, tile_slots, window);
  p.k_format = k_format;
  p.v_format = v_format;
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.k_token_stride = k.stride(0);
  p.k_head_stride = k.stride(1);
  p.v_token_stride = v.stride(0);
  p.v_head_stride = v.stride(1);
  p.dtype = DType(k);
  p.nnz = static_cast<int32_t>(nnz);
  p.slot_mapping = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  p.positions = Data<int64_t>(positions);
  p.k_offset = Data<float>(k_offset);
  p.launch_dependents = launch_dependents;
  p.rotated_dtype = dtype_t::kFloat16;
  const auto rotated = [&](const optional_tensor_t& x, const char* name, void*& data,
                           int64_t& token_stride, int64_t& head_stride) {
    if (!x.has_value()) return;
    Check(*x, name, {ScalarType::Half, ScalarType::BFloat16}, {nnz, num_kv_heads, padded_dim},
          device);
    data = x->mutable_data_ptr();
    token_stride = nnz > 1 ? x->stride(0) : 0;
    head_stride = num_kv_heads > 1 ? x->stride(1) : 0;
    p.rotated_dtype = DType(*x);
  };
  rotated(k_rotated, "k_rotated", p.k_rotated, p.k_rotated_token_stride, p.k_rotated_head_stride);
  rotated(v_rotated, "v_rotated", p.v_rotated, p.v_rotated_token_stride, p.v_rotated_head_stride);
  STD_TORCH_CHECK(!k_rotated.has_value() || !v_rotated.has_value() ||
                      k_rotated->scalar_type() == v_rotated->scalar_type(),
                  "v_rotated: wanted the dtype of k_rotated");
  const auto launch =
      Registry::Get().Find<store_launcher_t>(kStoreKernel, "store", padded_dim, 0, 0, false);
  if (nnz == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  CheckLaunch(launch(p, CurrentStream(device)), "store");
}

void DecompressOperator(Tensor pages, std::string k_text, std::string v_text, int64_t page_size,
                        Tensor kv_indices, optional_tensor_t out_k, optional_tensor_t out_v,
                        int64_t first_token, optional_tensor_t token_begin,
                        optional_tensor_t out_indptr, optional_tensor_t kv_indptr, bool rotated,
                        optional_tensor_t k_offset, optional_tensor_t tile_slots,
                        optional_tensor_t window) {
  const vector_format_t &k_format = Format(k_text), &v_format = Format(v_text);
  const int head_dim = k_format.head_dim, padded_dim = PaddedDim(head_dim);
  const int dim = rotated ? padded_dim : head_dim;
  const int device = pages.get_device_index();
  decompress_params_t p = {};
  p.kv = PagedKv(pages, k_format, v_format, page_size, tile_slots, window);
  if (!kv_indptr.has_value() && kv_indices.dim() == 1) {  // one request
    Check(kv_indices, "kv_indices", {ScalarType::Int}, {-1}, device);
    p.kv.page_table = static_cast<const int32_t*>(kv_indices.const_data_ptr());
    p.batch_size = 1;
  } else {
    p.batch_size = static_cast<int32_t>(CheckTable(kv_indices, kv_indptr, device, p.kv));
  }
  p.k_format = k_format;
  p.v_format = v_format;
  CheckPacked(token_begin, "token_begin", ScalarType::Int, {p.batch_size}, device);
  CheckPacked(out_indptr, "out_indptr", ScalarType::Int, {p.batch_size + 1}, device);
  STD_TORCH_CHECK(out_indptr.has_value() || p.batch_size == 1,
                  "out_indptr: wanted a tensor for more than one request");
  STD_TORCH_CHECK(first_token >= 0 && first_token <= INT32_MAX,
                  "first_token: wanted 0 or more, got ", first_token);
  p.token_begin = Data<int32_t>(token_begin);
  p.out_indptr = Data<int32_t>(out_indptr);
  p.first_token = static_cast<int32_t>(first_token);
  p.rotated = rotated;
  CheckPacked(k_offset, "k_offset", ScalarType::Float, {-1, p.kv.num_kv_heads, dim}, device);
  p.k_offset = Data<float>(k_offset);

  STD_TORCH_CHECK(out_k.has_value() || out_v.has_value(), "out_k: wanted a tensor, or out_v");
  const Tensor& some = out_k.has_value() ? *out_k : *out_v;
  const int64_t num_rows = some.size(0);
  STD_TORCH_CHECK(num_rows <= INT32_MAX, "out_k: wanted at most 2^31 - 1 tokens, got ", num_rows);
  p.num_rows = static_cast<int32_t>(num_rows);
  p.dtype = DType(some);
  const auto output = [&](const optional_tensor_t& x, const char* name, void*& data,
                          int64_t& token_stride, int64_t& head_stride) {
    if (!x.has_value()) return;
    STD_TORCH_CHECK(x->scalar_type() == some.scalar_type(), name, ": wanted the dtype of out_k");
    Check(*x, name, {ScalarType::Half, ScalarType::BFloat16}, {num_rows, p.kv.num_kv_heads, dim},
          device);
    data = x->mutable_data_ptr();
    token_stride = x->stride(0);
    head_stride = x->stride(1);
  };
  output(out_k, "out_k", p.out_k, p.k_token_stride, p.k_head_stride);
  output(out_v, "out_v", p.out_v, p.v_token_stride, p.v_head_stride);
  const auto launch = Registry::Get().Find<decompress_launcher_t>(kDecompressKernel, "decompress",
                                                                  padded_dim, 0, 0, false);
  if (num_rows == 0 || p.batch_size == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  CheckLaunch(launch(p, CurrentStream(device)), "decompress");
}

void PageMetadataOperator(Tensor seq_lens, Tensor block_table, int64_t page_size, Tensor kv_indptr,
                          Tensor kv_indices, Tensor kv_last_page_len) {
  Check(seq_lens, "seq_lens", {ScalarType::Int}, {-1}, -1, true);
  const int device = seq_lens.get_device_index();
  const int64_t batch_size = seq_lens.size(0);
  Check(block_table, "block_table", {ScalarType::Int}, {batch_size, -1}, device);
  const int64_t max_pages = block_table.size(1);
  STD_TORCH_CHECK(page_size > 0 && page_size <= INT32_MAX, "page_size: wanted 1 or more, got ",
                  page_size);
  Check(kv_indptr, "kv_indptr", {ScalarType::Int}, {batch_size + 1}, device, true);
  Check(kv_indices, "kv_indices", {ScalarType::Int}, {-1}, device, true);
  Check(kv_last_page_len, "kv_last_page_len", {ScalarType::Int}, {batch_size}, device, true);
  STD_TORCH_CHECK(batch_size * max_pages <= std::min<int64_t>(kv_indices.numel(), INT32_MAX),
                  "kv_indices: wanted at least ", batch_size * max_pages, " elements, got ",
                  kv_indices.numel());
  page_metadata_params_t p = {};
  p.seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
  p.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  p.block_table_stride = block_table.stride(0);
  p.batch_size = static_cast<int32_t>(batch_size);
  p.max_pages = static_cast<int32_t>(max_pages);
  p.page_size = static_cast<int32_t>(page_size);
  p.kv_indptr = static_cast<int32_t*>(kv_indptr.mutable_data_ptr());
  p.kv_indices = static_cast<int32_t*>(kv_indices.mutable_data_ptr());
  p.kv_last_page_len = static_cast<int32_t*>(kv_last_page_len.mutable_data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(device);
  CheckLaunch(PageMetadata(p, CurrentStream(device)), "page_metadata");
}

void DecodeOperator(Tensor q, Tensor pages, std::string k_text, std::string v_text,
                    int64_t page_size, Tensor kv_indices, optional_tensor_t kv_lens,
                    optional_tensor_t kv_indptr, optional_tensor_t kv_last_page_len,
                    optional_tensor_t qo_indptr, int64_t max_q_len, bool causal, double sm_scale,
                    int64_t window_left, double logits_soft_cap, optional_tensor_t sinks,
                    Tensor out, optional_tensor_t lse, bool rotated_output, bool rotated_query,
                    optional_tensor_t tile_slots, optional_tensor_t window,
                    optional_tensor_t k_offset, optional_tensor_t workspace, std::string body,
                    int64_t num_ctas, bool early_loads) {
  const vector_format_t &k_format = Format(k_text), &v_format = Format(v_text);
  const int head_dim = k_format.head_dim, padded_dim = PaddedDim(head_dim);
  Check(q, "q", kFloats, {-1, -1, rotated_query ? padded_dim : head_dim}, -1);
  const int device = q.get_device_index();
  const int64_t nnz = q.size(0), num_qo_heads = q.size(1);
  Check(pages, "pages", {ScalarType::Byte}, {-1, -1, -1}, device);
  decode_params_t p = {};
  p.kv = PagedKv(pages, k_format, v_format, page_size, tile_slots, window);
  const int64_t num_kv_heads = p.kv.num_kv_heads;
  STD_TORCH_CHECK(num_qo_heads > 0 && num_qo_heads % num_kv_heads == 0, "q: wanted a multiple of ",
                  num_kv_heads, " heads, got ", num_qo_heads);

  const int64_t batch_size = CheckTable(kv_indices, kv_indptr, device, p.kv);
  STD_TORCH_CHECK(kv_lens.has_value() || (kv_indptr.has_value() && kv_last_page_len.has_value()),
                  "kv_lens: wanted a tensor");
  CheckPacked(kv_lens, "kv_lens", ScalarType::Int, {batch_size}, device);
  CheckPacked(kv_last_page_len, "kv_last_page_len", ScalarType::Int, {batch_size}, device);
  p.kv.kv_lens = Data<int32_t>(kv_lens);
  p.kv.kv_last_page_len = Data<int32_t>(kv_last_page_len);

  STD_TORCH_CHECK(max_q_len > 0 && max_q_len <= INT32_MAX, "max_q_len: wanted 1 or more, got ",
                  max_q_len);
  CheckPacked(qo_indptr, "qo_indptr", ScalarType::Int, {batch_size + 1}, device);
  STD_TORCH_CHECK(qo_indptr.has_value() || nnz == batch_size * max_q_len, "q: wanted ",
                  batch_size * max_q_len, " tokens, got ", nnz);
  Check(out, "out", kFloats, {nnz, num_qo_heads, rotated_output ? padded_dim : head_dim}, device);
  if (lse.has_value()) Check(*lse, "lse", {ScalarType::Float}, {nnz, num_qo_heads}, device);
  CheckPacked(sinks, "sinks", ScalarType::Float, {num_qo_heads}, device);
  CheckPacked(k_offset, "k_offset", ScalarType::Float, {-1, num_kv_heads, padded_dim}, device);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(Data<float>(k_offset)) % 16 == 0,
                  "k_offset: wanted 16-byte alignment");

  p.q = q.const_data_ptr();
  p.q_stride_n = q.stride(0);
  p.q_stride_h = q.stride(1);
  p.q_dtype = DType(q);
  p.out = out.mutable_data_ptr();
  p.out_stride_n = out.stride(0);
  p.out_stride_h = out.stride(1);
  p.out_dtype = DType(out);
  p.lse = MutableData<float>(lse);
  p.lse_stride_n = lse.has_value() ? lse->stride(0) : 0;
  p.qo_indptr = Data<int32_t>(qo_indptr);
  p.batch_size = static_cast<int32_t>(batch_size);
  p.num_qo_heads = static_cast<int32_t>(num_qo_heads);
  p.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  p.head_dim = head_dim;
  p.max_q_len = static_cast<int32_t>(max_q_len);
  p.sm_scale = static_cast<float>(sm_scale);
  p.logits_soft_cap = static_cast<float>(logits_soft_cap);
  p.window_left = static_cast<int32_t>(window_left);
  p.causal = causal;
  p.sinks = Data<float>(sinks);
  p.k_offset_rotated = Data<float>(k_offset);
  p.num_segments = k_offset.has_value() ? static_cast<int32_t>(k_offset->size(0)) : 0;
  std::memcpy(p.k_signs, k_format.signs, sizeof(p.k_signs));
  std::memcpy(p.v_signs, v_format.signs, sizeof(p.v_signs));
  p.k_codebook = k_format.codebook;
  p.v_codebook = v_format.codebook;
  p.rotated_query = rotated_query;
  p.rotated_output = rotated_output;

  decode_options_t options;
  STD_TORCH_CHECK(body == "auto" || body == "bulk" || body == "cp_async",
                  "body: wanted auto, bulk or cp_async, got ", body);
  options.body = body == "auto"   ? decode_body_t::kAuto
                 : body == "bulk" ? decode_body_t::kBulk
                                  : decode_body_t::kAsync;
  options.early = early_loads;
  STD_TORCH_CHECK(num_ctas >= 0 && num_ctas <= INT32_MAX, "num_ctas: wanted 0 or more, got ",
                  num_ctas);
  const auto uniform2 = [](const vector_format_t& format) {
    return format.codebook.bits != 2 || decode_detail::IsUniform2(format.codebook);
  };
  const auto launch = Registry::Get().Find<decode_launcher_t>(
      kDecodeKernel, "decode", padded_dim, k_format.codebook.bits, v_format.codebook.bits,
      !uniform2(k_format) || !uniform2(v_format));
  if (batch_size == 0 || nnz == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = CurrentStream(device);
  int multiprocessors = 0;
  CheckLaunch(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
              "decode");
  options.num_ctas = static_cast<int>(num_ctas);
  const int64_t needed =
      DecodeWorkspaceBytes(p.batch_size, p.num_qo_heads, p.num_kv_heads, padded_dim, p.max_q_len,
                           DecodeMaxCtas(options.num_ctas, multiprocessors));
  if (workspace.has_value()) {
    CheckPacked(workspace, "workspace", ScalarType::Byte, {-1}, device);
    STD_TORCH_CHECK(workspace->numel() >= needed, "workspace: wanted at least ", needed,
                    " bytes, got ", workspace->numel());
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(workspace->mutable_data_ptr()) % 16 == 0,
                    "workspace: wanted an address that is a multiple of 16 bytes");
  } else {
    workspace = torch::stable::new_empty(q, {needed}, ScalarType::Byte);
    CheckLaunch(cudaMemsetAsync(workspace->mutable_data_ptr(), 0, needed, stream), "decode");
  }
  p.workspace = workspace->mutable_data_ptr();
  p.workspace_bytes = workspace->numel();
  CheckLaunch(launch(p, options, stream), "decode");
}

}  // namespace
}  // namespace turbokv

extern "C" {

void turbokv_register(const turbokv::kernel_entry_t* entry) {
  turbokv::Registry::Get().Add(*entry);
}

int turbokv_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int turbokv_runtime_version() { return CUDART_VERSION; }

long turbokv_decode_workspace_bytes(int batch_size, int num_qo_heads, int num_kv_heads,
                                    int padded_dim, int max_q_len, int num_ctas,
                                    int multiprocessors) {
  return turbokv::DecodeWorkspaceBytes(batch_size, num_qo_heads, num_kv_heads, padded_dim,
                                       max_q_len,
                                       turbokv::DecodeMaxCtas(num_ctas, multiprocessors));
}
}

STABLE_TORCH_LIBRARY(turbokv, m) {
  m.def(
      "store(Tensor k, Tensor v, Tensor slot_mapping, Tensor(a!) pages, str k_format, str "
      "v_format, "
      "SymInt page_size, Tensor? positions, Tensor? k_offset, Tensor(b!)? k_rotated, "
      "Tensor(c!)? v_rotated, Tensor? tile_slots, Tensor(d!)? window, "
      "bool launch_dependents=False) -> ()");
  m.def(
      "decompress(Tensor pages, str k_format, str v_format, SymInt page_size, Tensor kv_indices, "
      "Tensor(a!)? out_k, Tensor(b!)? out_v, SymInt first_token, Tensor? token_begin, "
      "Tensor? out_indptr, Tensor? kv_indptr, bool rotated, Tensor? k_offset, Tensor? tile_slots, "
      "Tensor? window) -> ()");
  m.def(
      "page_metadata(Tensor seq_lens, Tensor block_table, SymInt page_size, Tensor(a!) kv_indptr, "
      "Tensor(b!) kv_indices, Tensor(c!) kv_last_page_len) -> ()");
  m.def(
      "decode(Tensor q, Tensor pages, str k_format, str v_format, SymInt page_size, "
      "Tensor kv_indices, Tensor? kv_lens, Tensor? kv_indptr, Tensor? kv_last_page_len, "
      "Tensor? qo_indptr, SymInt max_q_len, bool causal, float sm_scale, SymInt window_left, "
      "float logits_soft_cap, Tensor? sinks, Tensor(a!) out, Tensor(b!)? lse, bool rotated_output, "
      "bool rotated_query, Tensor? tile_slots, Tensor? window, Tensor? k_offset, "
      "Tensor(c!)? workspace, str body, SymInt num_ctas, bool early_loads=False) -> ()");
}

// Tensors on the CPU reach the same functions, which say what is wrong.
STABLE_TORCH_LIBRARY_IMPL(turbokv, CUDA, m) {
  m.impl("store", TORCH_BOX(&turbokv::StoreOperator));
  m.impl("decompress", TORCH_BOX(&turbokv::DecompressOperator));
  m.impl("page_metadata", TORCH_BOX(&turbokv::PageMetadataOperator));
  m.impl("decode", TORCH_BOX(&turbokv::DecodeOperator));
}

STABLE_TORCH_LIBRARY_IMPL(turbokv, CPU, m) {
  m.impl("store", TORCH_BOX(&turbokv::StoreOperator));
  m.impl("decompress", TORCH_BOX(&turbokv::DecompressOperator));
  m.impl("page_metadata", TORCH_BOX(&turbokv::PageMetadataOperator));
  m.impl("decode", TORCH_BOX(&turbokv::DecodeOperator));
}
