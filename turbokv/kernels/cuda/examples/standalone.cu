// SPDX-License-Identifier: Apache-2.0
// The headers without PyTorch: compress random keys and values into pages, read them back, attend
// to them in place, and compare both with fp64.
//
//   nvcc -std=c++17 -O2 -gencode arch=compute_90a,code=sm_90a -I include examples/standalone.cu
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <numeric>
#include <random>
#include <vector>

#include "turbokv/turbokv.cuh"

namespace {

using namespace turbokv;  // NOLINT: an example

constexpr int kHeadDim = 128, kKeyBits = 5, kValueBits = 3;
constexpr int kNumTokens = 1000, kNumHeads = 4, kPageSize = 32;
constexpr int kNumPages = (kNumTokens + kPageSize - 1) / kPageSize;
constexpr int kElements = kNumTokens * kNumHeads * kHeadDim;
constexpr int kQueriesPerHead = 4, kNumQueryHeads = kNumHeads * kQueriesPerHead;
constexpr int kBatch = 2, kLengths[kBatch] = {kNumTokens, 333};  // both see the same pages

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

/*! \brief Device memory that a vector was copied to. */
template <typename T>
T* Upload(const std::vector<T>& host) {
  T* device = nullptr;
  Check(cudaMalloc(&device, host.size() * sizeof(T)), "cudaMalloc");
  Check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  return device;
}

template <typename T>
std::vector<T> Download(const T* device, size_t size) {
  std::vector<T> host(size);
  Check(cudaMemcpy(host.data(), device, size * sizeof(T), cudaMemcpyDeviceToHost), "download");
  return host;
}

/*! \brief Compress and decompress one vector in fp64, from the text of FORMAT.md; only the scale is
 *  rounded, to the fp16 that is stored.
 *
 *  A coordinate so near a boundary that fp32 may see it on the other side gives either neighbour:
 *  such vectors are reported by returning false.
 */
bool RoundTrip(const std::vector<float>& x, role_t role, const vector_format_t& format,
               std::vector<double>* out) {
  std::vector<double> y(kHeadDim);
  for (int j = 0; j < kHeadDim; ++j) y[j] = IsNegated(role, kDefaultSeed, j) ? -x[j] : x[j];
  const auto transform = [](std::vector<double>* values) {
    for (int stride = 1; stride < kHeadDim; stride *= 2) {
      for (int i = 0; i < kHeadDim; ++i) {
        if (i & stride) continue;
        const double a = (*values)[i], b = (*values)[i + stride];
        (*values)[i] = a + b;
        (*values)[i + stride] = a - b;
      }
    }
  };
  transform(&y);
  double squares = 0;
  for (double value : y) squares += value * value;
  const codebook_t& book = format.codebook;
  const double unit = std::sqrt(kHeadDim / squares) / book.step;
  std::vector<double> level(kHeadDim);
  double product = 0, energy = 0;
  bool clear = true;
  for (int j = 0; j < kHeadDim; ++j) {
    const double u = std::fabs(y[j]) * unit;
    int index = 0;
    for (int i = 0; i + 1 < NumMagnitudes(book); ++i) {
      const double boundary = 0.5 * TwiceBoundary(book, i);
      index += u > boundary;
      clear = clear && std::fabs(u - boundary) > 1e-4;
    }
    level[j] = std::copysign(static_cast<double>(book.magnitudes[index]), y[j]);
    product += y[j] * level[j];
    energy += level[j] * level[j];
  }
  double scale = format.rule == scale_rule_t::kUnbiased ? squares / product : product / energy;
  const double unit_of_scale = std::ldexp(1.0, book.frac_bits) / std::sqrt(kHeadDim);
  scale =
      HalfBitsToFloat(FloatToHalfBits(static_cast<float>(scale * unit_of_scale))) / unit_of_scale;
  transform(&level);
  out->resize(kHeadDim);
  for (int j = 0; j < kHeadDim; ++j) {
    const double sign = IsNegated(role, kDefaultSeed, j) ? -1 : 1;
    (*out)[j] = sign * scale * level[j] / kHeadDim;
  }
  return clear;
}

/*! \brief Attention of one query to `length` tokens in fp64. */
std::vector<double> Attend(const float* q, const std::vector<double>& k,
                           const std::vector<double>& v, int head, int length) {
  std::vector<double> out(kHeadDim), weight(length);
  double most = -1e300, sum = 0;
  for (int i = 0; i < length; ++i) {
    const double* const key = k.data() + (size_t{1} * i * kNumHeads + head) * kHeadDim;
    for (int j = 0; j < kHeadDim; ++j) weight[i] += q[j] * key[j] / std::sqrt(kHeadDim);
    most = std::max(most, weight[i]);
  }
  for (double& w : weight) sum += w = std::exp(w - most);
  for (int i = 0; i < length; ++i) {
    const double* const value = v.data() + (size_t{1} * i * kNumHeads + head) * kHeadDim;
    for (int j = 0; j < kHeadDim; ++j) out[j] += weight[i] / sum * value[j];
  }
  return out;
}

}  // namespace

int main() {
  // --- what is cached: keys and values of a sequence, and where its tokens go ---
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> k(kElements), v(kElements);
  for (float& value : k) value = normal(random);
  for (float& value : v) value = normal(random);
  std::vector<int32_t> page_table(kNumPages);
  std::iota(page_table.begin(), page_table.end(), 0);
  std::shuffle(page_table.begin(), page_table.end(), random);
  std::vector<int64_t> slots(kNumTokens);
  for (int i = 0; i < kNumTokens; ++i) {
    slots[i] = static_cast<int64_t>(page_table[i / kPageSize]) * kPageSize + i % kPageSize;
  }

  // --- the cache ---
  constexpr int kHeadBytes = PageHeadBytes(kHeadDim, kKeyBits, kValueBits, kPageSize);
  paged_kv_t kv = {};
  kv.pages = Upload(std::vector<uint8_t>(size_t{kNumPages} * kNumHeads * kHeadBytes));
  kv.head_stride = kHeadBytes;
  kv.page_stride = kNumHeads * kHeadBytes;
  kv.page_size = kPageSize;
  kv.num_kv_heads = kNumHeads;
  kv.head_dim = kHeadDim;
  std::vector<int32_t> tables;  // a row for each request
  for (int b = 0; b < kBatch; ++b) {
    tables.insert(tables.end(), page_table.begin(), page_table.end());
  }
  kv.page_table = Upload(tables);
  kv.table_stride = kNumPages;
  kv.kv_lens = Upload(std::vector<int32_t>(kLengths, kLengths + kBatch));

  // --- store ---
  store_params_t store = {};
  store.kv = kv;
  store.k_format = DefaultFormat(role_t::kKey, kKeyBits, kHeadDim);
  store.v_format = DefaultFormat(role_t::kValue, kValueBits, kHeadDim);
  store.k = Upload(k);
  store.v = Upload(v);
  store.k_token_stride = store.v_token_stride = kNumHeads * kHeadDim;
  store.k_head_stride = store.v_head_stride = kHeadDim;
  store.dtype = dtype_t::kFloat32;
  store.nnz = kNumTokens;
  store.slot_mapping = Upload(slots);
  Check(Store<kHeadDim>(store, nullptr), "Store");

  // --- decompress ---
  decompress_params_t decompress = {};
  decompress.kv = kv;
  decompress.k_format = store.k_format;
  decompress.v_format = store.v_format;
  decompress.batch_size = 1;
  decompress.num_rows = kNumTokens;
  uint16_t* const out_k = Upload(std::vector<uint16_t>(kElements));
  uint16_t* const out_v = Upload(std::vector<uint16_t>(kElements));
  decompress.out_k = out_k;
  decompress.out_v = out_v;
  decompress.k_token_stride = decompress.v_token_stride = kNumHeads * kHeadDim;
  decompress.k_head_stride = decompress.v_head_stride = kHeadDim;
  decompress.dtype = dtype_t::kFloat16;
  Check(DecompressPages<kHeadDim>(decompress, nullptr), "DecompressPages");

  // --- decode: a query of each request, each query head to the pages of its KV head ---
  std::vector<float> q(kBatch * kNumQueryHeads * kHeadDim);
  for (float& value : q) value = normal(random);
  int device = 0, multiprocessors = 0;
  Check(cudaGetDevice(&device), "cudaGetDevice");
  Check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  decode_params_t decode = {};
  decode.kv = kv;
  decode.q = Upload(q);
  decode.q_dtype = dtype_t::kFloat32;
  float* const attended = Upload(std::vector<float>(q.size()));
  decode.out = attended;
  decode.out_dtype = dtype_t::kFloat32;
  decode.q_stride_n = decode.out_stride_n = kNumQueryHeads * kHeadDim;
  decode.q_stride_h = decode.out_stride_h = kHeadDim;
  decode.batch_size = kBatch;
  decode.num_qo_heads = kNumQueryHeads;
  decode.num_kv_heads = kNumHeads;
  decode.head_dim = kHeadDim;
  decode.max_q_len = 1;
  decode.sm_scale = 1 / std::sqrt(static_cast<float>(kHeadDim));
  decode.window_left = -1;
  std::copy(std::begin(store.k_format.signs), std::end(store.k_format.signs), decode.k_signs);
  std::copy(std::begin(store.v_format.signs), std::end(store.v_format.signs), decode.v_signs);
  decode.k_codebook = store.k_format.codebook;
  decode.v_codebook = store.v_format.codebook;
  decode.workspace_bytes = DecodeWorkspaceBytes(kBatch, kNumQueryHeads, kNumHeads, kHeadDim, 1,
                                                DecodeMaxCtas(0, multiprocessors));
  decode.workspace = Upload(std::vector<uint8_t>(decode.workspace_bytes));  // zeros
  Check(Decode<kHeadDim, kKeyBits, kValueBits>(decode, {}, nullptr), "Decode");
  Check(cudaDeviceSynchronize(), "kernels");

  // --- compare what was read back ---
  double worst = 0, noise = 0, power = 0;
  int compared = 0;
  std::vector<double> cached[2];  // what the pages hold
  for (int role = 0; role < 2; ++role) {
    const vector_format_t& format = role == 0 ? store.k_format : store.v_format;
    const std::vector<uint16_t> got = Download(role == 0 ? out_k : out_v, kElements);
    std::vector<double> want;
    for (int i = 0; i < kNumTokens * kNumHeads; ++i) {
      const float* first = (role == 0 ? k : v).data() + i * kHeadDim;
      const std::vector<float> x(first, first + kHeadDim);
      const bool clear = RoundTrip(x, static_cast<role_t>(role), format, &want);
      for (int j = 0; j < kHeadDim; ++j) {
        const double value = HalfBitsToFloat(got[i * kHeadDim + j]);
        cached[role].push_back(clear ? want[j] : value);
        if (!clear) continue;
        worst = std::max(worst, std::fabs(value - want[j]));
        noise += (value - x[j]) * (value - x[j]);
        power += static_cast<double>(x[j]) * x[j];
      }
      compared += clear;
    }
  }
  std::printf("store and decompress: %d vectors compared, largest error %.2e, noise %.4f\n",
              compared, worst, noise / power);
  // fp16 rounds the results, of at most 5 or so; a scale may be on the other side of a tie
  if (compared < kNumTokens * kNumHeads || worst > 5e-3) return 1;

  // --- compare attention ---
  const std::vector<float> got = Download(attended, q.size());
  double largest = 0;
  bool wrong = false;
  worst = 0;
  for (int b = 0; b < kBatch; ++b) {
    for (int h = 0; h < kNumQueryHeads; ++h) {
      const int at = (b * kNumQueryHeads + h) * kHeadDim;
      const std::vector<double> want =
          Attend(q.data() + at, cached[0], cached[1], h / kQueriesPerHead, kLengths[b]);
      for (int j = 0; j < kHeadDim; ++j) {
        const double error = std::fabs(got[at + j] - want[j]);
        if (!(error <= 1e-3)) wrong = true;  // a NaN too
        worst = std::max(worst, error);
        largest = std::max(largest, std::fabs(want[j]));
      }
    }
  }
  std::printf("decode: %d outputs, largest %.3f, largest error %.2e\n",
              static_cast<int>(got.size()), largest, worst);
  // the query keeps 14 bits and probabilities 11
  if (wrong || worst > 1e-3 * largest) return 1;

  std::printf("ok\n");
  return 0;
}
