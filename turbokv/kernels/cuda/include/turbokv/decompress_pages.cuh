// SPDX-License-Identifier: Apache-2.0
// Expand tokens of compressed pages to 16 bits: one launch for ranges of one or several requests.
#ifndef TURBOKV_DECOMPRESS_PAGES_CUH_
#define TURBOKV_DECOMPRESS_PAGES_CUH_

#include "turbokv/decompress.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/types.cuh"
#include "turbokv/vector_format.cuh"

namespace turbokv {

/*! \brief Arguments of DecompressPages. Strides are in elements; the last dimension is contiguous.
 *
 *  Request b contributes the tokens from token_begin[b] on that rows out_indptr[b] to
 *  out_indptr[b + 1] - 1 of the outputs have room for. Without `out_indptr` there is one request,
 *  and it fills all rows.
 */
struct decompress_params_t {
  paged_kv_t kv;  // pages and page_table or kv_indptr; lengths are not read
  vector_format_t k_format, v_format;
  const int32_t* token_begin;  // [batch_size], or null: first_token for every request
  const int32_t* out_indptr;   // [batch_size + 1], ascending from 0 to num_rows; or null
  int32_t first_token, batch_size;
  int32_t num_rows;  // of the outputs
  void* out_k;       // [num_rows, num_kv_heads, padded_dim if rotated else head_dim], or null
  void* out_v;       // as out_k
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  dtype_t dtype;          // kFloat16 or kBFloat16
  bool rotated;           // stay in rotated space
  const float* k_offset;  // [num_segments, num_kv_heads, as out_k], in the space of out_k; or null
};

#if defined(__CUDACC__)

namespace decompress_detail {

constexpr int kPerLane = 32;  // consecutive coordinates that a lane holds

template <int PADDED_DIM>
struct config_t {
  static constexpr int kLanes = PADDED_DIM / kPerLane;         // lanes of a vector
  static constexpr int kVectors = 32 / kLanes;                 // vectors a warp holds at a time
  static constexpr int kTokens = kVectors < 4 ? 4 : kVectors;  // of a unit, at least a word of V
  static constexpr int kRounds = kTokens / kVectors;
  static constexpr int kUnits = kTokensPerTile / kTokens;  // units of a tile
  static constexpr int kWarps = 4;
  static constexpr int kStaging = 64 * 32;           // bytes a warp: its coordinates in 16 bits
  static constexpr int kRawWords = 8 * kRounds + 1;  // that a lane reads of a vector, at most
};

TURBOKV_DEVICE uint32_t LoadShared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

/*! \brief Read consecutive words, as widely as their number allows. */
template <int N>
TURBOKV_DEVICE void LoadWords(const uint8_t* from, uint32_t* words) {
  if constexpr (N == 1) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (N == 2) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    words[0] = x.x, words[1] = x.y;
  } else {
    TURBOKV_UNROLL
    for (int i = 0; i < N; i += 4) {
      const uint4 x = *reinterpret_cast<const uint4*>(from + 4 * i);
      words[i] = x.x, words[i + 1] = x.y, words[i + 2] = x.z, words[i + 3] = x.w;
    }
  }
}

/*! \brief A unit's plane of V in the registers of a warp: 16 bytes of four tokens a lane and step.
 */
template <int PADDED_DIM, int BITS, int WIDTH, int RUN>
struct value_plane_t {
  static constexpr int kGroups = config_t<PADDED_DIM>::kTokens / 4;
  static constexpr int kBytes = PADDED_DIM * WIDTH / 8;  // of a token
  static constexpr int kPieces = kGroups * kBytes / 4;   // of 16 bytes
  static constexpr int kSteps = kPieces < 32 ? 1 : kPieces / 32;
  static constexpr int kWords = 4 * kSteps;

  /*! \brief Read words[0] to words[kWords - 1] of lanes that have a piece. */
  static TURBOKV_DEVICE void Fetch(const uint8_t* plane, int first_group, int lane,
                                   uint32_t* words) {
    TURBOKV_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int i = step * 32 + lane, group = i % kGroups, beta = i / kGroups * 4;
      if (kPieces < 32 && i >= kPieces) return;
      const uint8_t* from = plane + beta * 16 + (first_group + group) * 4 * RUN;
      uint32_t* const in = words + 4 * step;
      if constexpr (RUN == 4) {
        const uint4 x = __ldg(reinterpret_cast<const uint4*>(from));
        in[0] = x.x, in[1] = x.y, in[2] = x.z, in[3] = x.w;
      } else if constexpr (RUN == 2) {
        const uint2 x = __ldg(reinterpret_cast<const uint2*>(from));
        const uint2 y = __ldg(reinterpret_cast<const uint2*>(from + 32));
        in[0] = x.x, in[1] = x.y, in[2] = y.x, in[3] = y.y;
      } else {
        TURBOKV_UNROLL
        for (int b = 0; b < 4; ++b) in[b] = __ldg(reinterpret_cast<const uint32_t*>(from + b * 16));
      }
    }
  }

  /*! \brief Write the tokens apart into shared memory, in the order group, k, e (see ValueLane). */
  static TURBOKV_DEVICE void Separate(const uint32_t* words, uint8_t* rows, int lane) {
    TURBOKV_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int i = step * 32 + lane, group = i % kGroups, beta = i / kGroups * 4;
      if (kPieces < 32 && i >= kPieces) return;
      const uint32_t* const in = words + 4 * step;
      const uint32_t low01 = __byte_perm(in[0], in[1], 0x5140);
      const uint32_t low23 = __byte_perm(in[2], in[3], 0x5140);
      const uint32_t top01 = __byte_perm(in[0], in[1], 0x7362);
      const uint32_t top23 = __byte_perm(in[2], in[3], 0x7362);
      const uint32_t out[4] = {__byte_perm(low01, low23, 0x5410), __byte_perm(low01, low23, 0x7632),
                               __byte_perm(top01, top23, 0x5410),
                               __byte_perm(top01, top23, 0x7632)};
      uint8_t* to = rows + group * 4 * kBytes + beta;
      TURBOKV_UNROLL
      for (int q = 0; q < 4; ++q) {
        *reinterpret_cast<uint32_t*>(to + q * kBytes) = out[BITS == 2 ? (q >> 1) + (q & 1) * 2 : q];
      }
    }
  }
};

/*! \brief Turn a lane's codes into levels (in lattice units) times `scale`.
 *
 *  \param column  Shared-memory address of this lane's column of the table of levels: entry `base`,
 *                 or `base + high * 2^width`, is 128 bytes further.
 */
template <int BITS>
TURBOKV_DEVICE void Decode(const uint32_t (&base)[PlaneBits(BITS)], uint32_t high, float scale,
                           uint32_t column, float (&y)[kPerLane]) {
  constexpr int kWidth = PlaneBits(BITS), kPerWord = 32 / kWidth;
  TURBOKV_UNROLL
  for (int j = 0; j < kPerLane; ++j) {
    const uint32_t word = base[j / kPerWord];
    const int shift = j % kPerWord * kWidth;
    float level;
    if constexpr (BITS == 8) {
      // 2^23 + code is a float's bits; code 0 reads as 1
      const float code = __uint_as_float(__byte_perm(word, 0x4b000000, 0x7650 + j % 4)) - 0x1p23f;
      level = fmaxf(code, 1.0f) - 128.0f;
    } else {
      uint32_t row =
          (shift >= 7 ? word >> (shift - 7) : word << (7 - shift)) & (((1u << kWidth) - 1) << 7);
      if constexpr (HasHighBit(BITS)) {
        const int up = 7 + kWidth;
        row |= (j >= up ? high >> (j - up) : high << (up - j)) & (1u << up);
      }
      level = __uint_as_float(LoadShared(column + row));
    }
    y[j] = Mul(level, scale);
  }
}

/*! \brief Tokens of a tile that are wanted, and where they go. */
struct span_t {
  int begin, end;      // tokens of the tile
  int64_t first_row;   // of the outputs, for token 0
  int first_position;  // of the request, for token 0
  int64_t page;        //
  int tile, copy;      // of the page; slot of its 16-bit copy or -1
  int head_begin, head_end;
};

/*! \brief Token of the vector `index` of a unit: 2t, 2t + 1, 2t + 8 and 2t + 9 in turn. */
TURBOKV_DEVICE int TokenOf(int first_group, int index) {
  return (first_group + index / 4) * 2 + (index & 1) + (index & 2) * 4;
}

template <int PADDED_DIM, bool ROTATED>
struct worker_t {
  using C = config_t<PADDED_DIM>;
  const decompress_params_t& params;
  const vector_format_t& format;
  role_t role;
  const float* signs;  // shared, this lane's: what follows the transform
  uint8_t* staging;    // shared, this warp's
  uint32_t column;     // see Decode
  int lane;            // of the warp
  bool wide;           // whether outputs are written in 16 bytes

  /*! \brief A vector as it is read: K's own words, V's share of the unit. */
  struct raw_t {
    uint32_t words[C::kRawWords];
    uint16_t scale;
  };

  template <int BITS>
  using value_base_t = value_plane_t<PADDED_DIM, BITS, PlaneBits(BITS), ValueRun(PADDED_DIM, BITS)>;
  template <int BITS>
  using value_high_t =
      value_plane_t<PADDED_DIM, BITS, 1, HasHighBit(BITS) ? ValueHighRun(PADDED_DIM, BITS) : 1>;

  template <int BITS>
  TURBOKV_DEVICE void FetchBits(const uint8_t* tile, int first_group, int token, raw_t& raw) const {
    constexpr int kWords = PlaneBits(BITS), kRowBytes = PADDED_DIM * kWords / 8;
    const tile_layout_t layout = Layout();
    if (role == role_t::kKey) {
      const int at = lane % C::kLanes;
      LoadWords<kWords>(tile + layout.k_base + KeyOffset(token, at * 4 * kWords, kRowBytes),
                        raw.words);
      if constexpr (HasHighBit(BITS)) {
        LoadWords<1>(tile + layout.k_high + KeyOffset(token, at * 4, PADDED_DIM / 8),
                     raw.words + kWords);
      }
    } else {
      value_base_t<BITS>::Fetch(tile + layout.v_base, first_group, lane, raw.words);
      if constexpr (HasHighBit(BITS)) {
        value_high_t<BITS>::Fetch(tile + layout.v_high, first_group, lane,
                                  raw.words + value_base_t<BITS>::kWords);
      }
    }
  }

  TURBOKV_DEVICE void Fetch(const uint8_t* tile, int first_group, int round, raw_t& raw) const {
    const int token = TokenOf(first_group, round * C::kVectors + lane / C::kLanes);
    raw.scale = __ldg(reinterpret_cast<const uint16_t*>(tile + ScaleOffset(Layout(), role, token)));
    switch (format.codebook.bits) {
      case 2:
        return FetchBits<2>(tile, first_group, token, raw);
      case 3:
        return FetchBits<3>(tile, first_group, token, raw);
      case 4:
        return FetchBits<4>(tile, first_group, token, raw);
      case 5:
        return FetchBits<5>(tile, first_group, token, raw);
      default:
        return FetchBits<8>(tile, first_group, token, raw);
    }
  }

  template <int BITS>
  TURBOKV_DEVICE void ExpandBits(const raw_t& raw, int round, float (&y)[kPerLane]) const {
    constexpr int kWords = PlaneBits(BITS), kRowBytes = PADDED_DIM * kWords / 8;
    uint32_t base[kWords], high[1] = {0};
    if (role == role_t::kKey) {
      TURBOKV_UNROLL
      for (int i = 0; i < kWords; ++i) base[i] = raw.words[i];
      if (HasHighBit(BITS)) high[0] = raw.words[kWords];
    } else {
      uint8_t* const high_rows = staging + C::kTokens * kRowBytes;
      const int index = round * C::kVectors + lane / C::kLanes, at = lane % C::kLanes;
      value_base_t<BITS>::Separate(raw.words, staging, lane);
      if constexpr (HasHighBit(BITS)) {
        value_high_t<BITS>::Separate(raw.words + value_base_t<BITS>::kWords, high_rows, lane);
      }
      __syncwarp();
      LoadWords<kWords>(staging + index * kRowBytes + at * 4 * kWords, base);
      if (HasHighBit(BITS)) LoadWords<1>(high_rows + index * (PADDED_DIM / 8) + at * 4, high);
      __syncwarp();
    }
    if (HasHighBit(BITS)) high[0] = NaturalHighBits(role, BITS, high[0]);
    // a power of two times the scale is exact, so levels need not be multiplied by it
    Decode<BITS>(base, high[0], ScaleOf(raw.scale) * format.level_unit, column, y);
  }

  TURBOKV_DEVICE void Expand(const raw_t& raw, int round, float (&y)[kPerLane]) const {
    switch (format.codebook.bits) {
      case 2:
        return ExpandBits<2>(raw, round, y);
      case 3:
        return ExpandBits<3>(raw, round, y);
      case 4:
        return ExpandBits<4>(raw, round, y);
      case 5:
        return ExpandBits<5>(raw, round, y);
      default:
        return ExpandBits<8>(raw, round, y);
    }
  }

  /*! \brief Read 32 coordinates of a 16-bit copy. */
  TURBOKV_DEVICE void ReadCopy(const span_t& span, int head, int token,
                               float (&y)[kPerLane]) const {
    const half_t* from = WindowAddress(params.kv, span.copy, head, role, token, PADDED_DIM) +
                         lane % C::kLanes * kPerLane;
    TURBOKV_UNROLL
    for (int j = 0; j < kPerLane; j += 8) {
      uint32_t words[4];
      LoadWords<4>(reinterpret_cast<const uint8_t*>(from + j), words);
      TURBOKV_UNROLL
      for (int w = 0; w < 4; ++w) {
        __half2 pair;
        memcpy(&pair, &words[w], 4);
        const float2 both = __half22float2(pair);
        y[j + 2 * w] = both.x;
        y[j + 2 * w + 1] = both.y;
      }
    }
  }

  TURBOKV_DEVICE tile_layout_t Layout() const {
    return TileLayout(PADDED_DIM, params.k_format.codebook.bits, params.v_format.codebook.bits);
  }

  /*! \brief Expand a unit in a run of heads; codes of the next head are on their way meanwhile. */
  TURBOKV_DEVICE void Unit(const span_t& span, int first_group) const {
    const uint8_t* tile =
        TileAddress(params.kv, span.page, span.head_begin, span.tile, Layout().bytes);
    const bool copied = span.copy >= 0;
    const int end = span.head_end * C::kRounds;
    raw_t next = {};
    if (!copied) Fetch(tile, first_group, 0, next);
#pragma unroll 1
    for (int i = span.head_begin * C::kRounds; i < end; ++i) {
      const int head = i / C::kRounds, round = i % C::kRounds;
      const raw_t raw = next;
      // the compiler would keep all offsets that depend on it for all heads, and spill them
      asm volatile("" : "+r"(first_group));
      if (round + 1 == C::kRounds) tile += params.kv.head_stride;
      if (!copied && i + 1 < end) Fetch(tile, first_group, (i + 1) % C::kRounds, next);
      float y[kPerLane];
      if (copied) {
        ReadCopy(span, head, TokenOf(first_group, round * C::kVectors + lane / C::kLanes), y);
      } else {
        Expand(raw, round, y);
      }
      Finish(span, head, first_group, round, !copied && !IsUncentred(raw.scale), y);
    }
  }

  /*! \brief Leave rotated space and add offsets where asked, round and write. */
  TURBOKV_DEVICE void Finish(const span_t& span, int head, int first_group, int round, bool centred,
                             float (&y)[kPerLane]) const {
    const int dim = ROTATED ? PADDED_DIM : format.head_dim;
    if constexpr (!ROTATED) {
      Hadamard(y);
      HadamardAcrossLanes<kPerLane, C::kLanes>(y, lane);
      TURBOKV_UNROLL
      for (int i = 0; i < kPerLane; i += 4) {
        const float4 s = *reinterpret_cast<const float4*>(signs + i);
        y[i] = Mul(y[i], s.x);
        y[i + 1] = Mul(y[i + 1], s.y);
        y[i + 2] = Mul(y[i + 2], s.z);
        y[i + 3] = Mul(y[i + 3], s.w);
      }
    }
    if (centred && role == role_t::kKey && params.k_offset != nullptr) {
      const int token = TokenOf(first_group, round * C::kVectors + lane / C::kLanes);
      const int64_t segment = (span.first_position + token) / kTokensPerSegment;
      const int at = lane % C::kLanes * kPerLane;
      // tokens that are not written may belong to a segment that does not exist
      if (token >= span.begin && token < span.end) {
        AddOffset(params.k_offset + (segment * params.kv.num_kv_heads + head) * dim + at, dim - at,
                  y);
      }
    }
    if (params.dtype == dtype_t::kFloat16) {
      TURBOKV_UNROLL
      for (int chunk = 0; chunk < 4; ++chunk) {
        uint32_t words[4];
        TURBOKV_UNROLL
        for (int i = 0; i < 4; ++i) {
          const __half2 pair = __floats2half2_rn(y[chunk * 8 + 2 * i], y[chunk * 8 + 2 * i + 1]);
          memcpy(&words[i], &pair, 4);
        }
        Stage(chunk, words);
      }
    } else {
      TURBOKV_UNROLL
      for (int chunk = 0; chunk < 4; ++chunk) {
        uint32_t words[4];
        TURBOKV_UNROLL
        for (int i = 0; i < 4; ++i) {
          const __nv_bfloat162 pair =
              __floats2bfloat162_rn(y[chunk * 8 + 2 * i], y[chunk * 8 + 2 * i + 1]);
          memcpy(&words[i], &pair, 4);
        }
        Stage(chunk, words);
      }
    }
    __syncwarp();
    Write(span, head, first_group + round * C::kVectors / 4, round * C::kVectors % 4, dim);
    __syncwarp();
  }

  TURBOKV_DEVICE void AddOffset(const float* offset, int live, float (&y)[kPerLane]) const {
    const bool wide_offset = reinterpret_cast<uintptr_t>(offset) % 16 == 0 && live % 4 == 0;
    TURBOKV_UNROLL
    for (int i = 0; i < kPerLane; i += 4) {
      float4 mu = make_float4(0, 0, 0, 0);
      if (wide_offset) {
        if (i < live) mu = __ldg(reinterpret_cast<const float4*>(offset + i));
      } else {
        if (i < live) mu.x = __ldg(offset + i);
        if (i + 1 < live) mu.y = __ldg(offset + i + 1);
        if (i + 2 < live) mu.z = __ldg(offset + i + 2);
        if (i + 3 < live) mu.w = __ldg(offset + i + 3);
      }
      y[i] = Add(y[i], mu.x);
      y[i + 1] = Add(y[i + 1], mu.y);
      y[i + 2] = Add(y[i + 2], mu.z);
      y[i + 3] = Add(y[i + 3], mu.w);
    }
  }

  /*! \brief Put 16 bytes of a lane where Write finds them. */
  TURBOKV_DEVICE void Stage(int chunk, const uint32_t (&words)[4]) const {
    // lanes are 64 bytes apart: the exclusive or keeps eight of them in different banks
    reinterpret_cast<uint4*>(staging)[lane * 4 + (chunk ^ (lane >> 1 & 3))] =
        make_uint4(words[0], words[1], words[2], words[3]);
  }

  /*! \brief Write a round's vectors so that neighbouring lanes write neighbouring 16 bytes. */
  TURBOKV_DEVICE void Write(const span_t& span, int head, int first_group, int first_index,
                            int dim) const {
    const bool key = role == role_t::kKey;
    const int64_t token_stride = key ? params.k_token_stride : params.v_token_stride;
    uint16_t* const out = static_cast<uint16_t*>(key ? params.out_k : params.out_v) +
                          head * (key ? params.k_head_stride : params.v_head_stride) +
                          span.first_row * token_stride;
    constexpr int kChunks = PADDED_DIM / 8;  // of 16 bytes in a vector
    // bits of the index that lanes and steps decide are different ones, and so are those of tokens
    const int lane_token = TokenOf(first_group, first_index + (kChunks < 32 ? lane / kChunks : 0));
    uint16_t* const lane_out = out + lane_token * token_stride;
    TURBOKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int at = i * 32 + lane, first = at % kChunks * 8;
      const int step_token = TokenOf(0, i * 32 / kChunks), token = lane_token + step_token;
      // lane at / 4 held it
      const uint4 x = reinterpret_cast<const uint4*>(staging)[at ^ (at >> 3 & 3)];
      if (token < span.begin || token >= span.end) continue;
      uint16_t* const to = lane_out + step_token * token_stride + first;
      if (wide) {
        if (first < dim) *reinterpret_cast<uint4*>(to) = x;
      } else {
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
        TURBOKV_UNROLL
        for (int e = 0; e < 8; ++e) {
          if (first + e < dim) to[e] = static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16));
        }
      }
    }
  }
};

/*! \brief Which request and tile a number stands for.
 *
 *  Request b has the numbers from out_indptr[b] / 16 + 2 * b on: n tokens touch at most n / 16 + 2
 *  tiles wherever they begin, so numbers never collide and no sum over requests is needed.
 */
TURBOKV_HOST_DEVICE int64_t NumTiles(const decompress_params_t& params) {
  return static_cast<int64_t>(params.num_rows) / kTokensPerTile + 2 * params.batch_size;
}

/*! \brief The request of a number. */
TURBOKV_DEVICE int FindRequest(const decompress_params_t& params, int number) {
  if (params.out_indptr == nullptr) return 0;
  int low = 0, high = params.batch_size - 1;  // the last request that starts at or before `number`
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (__ldg(params.out_indptr + middle) / kTokensPerTile + 2 * middle <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

/*! \brief One row of the grid expands K, the other V.
 *
 *  A warp takes units: kTokens tokens of a tile and one head. kLanes = PADDED_DIM / 32 neighbouring
 *  lanes hold a vector, 32 consecutive coordinates each, as in StoreKernel.
 */
template <int PADDED_DIM, bool ROTATED>
__global__ void __launch_bounds__(config_t<PADDED_DIM>::kWarps * 32, ROTATED ? 6 : 5)
    DecompressPagesKernel(const __grid_constant__ decompress_params_t params) {
  using C = config_t<PADDED_DIM>;
  __shared__ alignas(16) uint32_t table[32 * 32];  // a column a lane: lookups never meet in a bank
  __shared__ alignas(16) float signs[C::kLanes * (kPerLane + 4)];
  __shared__ alignas(16) uint8_t staging[C::kWarps * C::kStaging];
  TouchConstants(params);
  const role_t role = blockIdx.y == 0 ? role_t::kKey : role_t::kValue;
  const bool key = role == role_t::kKey;
  if ((key ? params.out_k : params.out_v) == nullptr) return;
  const vector_format_t& format = key ? params.k_format : params.v_format;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, bits = format.codebook.bits;
  if (bits < 8) {
    for (int i = threadIdx.x; i < 32 << bits; i += C::kWarps * 32) {
      const uint32_t page_code = i / 32, base = page_code & ((1u << PlaneBits(bits)) - 1);
      const uint32_t code = CodeFromPage(bits, base, page_code >> PlaneBits(bits));
      table[i] = __float_as_uint(static_cast<float>(LevelOf(format.codebook, code)));
    }
  }
  for (int j = threadIdx.x; j < PADDED_DIM; j += C::kWarps * 32) {
    signs[j / kPerLane * (kPerLane + 4) + j % kPerLane] = UnrotateFactor(format, j);
  }
  __syncthreads();

  const int64_t strides = key ? params.k_token_stride | params.k_head_stride
                              : params.v_token_stride | params.v_head_stride;
  const worker_t<PADDED_DIM, ROTATED> worker = {
      params,
      format,
      role,
      signs + lane % C::kLanes * (kPerLane + 4),
      staging + warp * C::kStaging,
      static_cast<uint32_t>(__cvta_generic_to_shared(table)) + lane * 4,
      lane,
      ((strides | (ROTATED ? PADDED_DIM : format.head_dim)) & 7) == 0 &&
          reinterpret_cast<uintptr_t>(key ? params.out_k : params.out_v) % 16 == 0,
  };
  // Every warp has a run of units, as many as the others or one more. Heads come first, so that
  // requests and pages are looked up once for a run of heads.
  const uint32_t heads = params.kv.num_kv_heads;
  const uint32_t tiles_per_page = params.kv.page_size / kTokensPerTile;
  const uint32_t num_units = static_cast<uint32_t>(NumTiles(params)) * heads * C::kUnits;
  const uint32_t num_warps = gridDim.x * C::kWarps, own = warp * gridDim.x + blockIdx.x;
  const uint32_t run = num_units / num_warps, longer = num_units % num_warps;
  uint32_t unit = own * run + min(own, longer);
  const uint32_t unit_end = unit + run + (own < longer ? 1 : 0);
  while (unit < unit_end) {
    const uint32_t tile_unit = unit / heads;
    const int head_begin = unit % heads, head_end = min(heads, head_begin + unit_end - unit);
    unit += head_end - head_begin;
    const int part = tile_unit % C::kUnits, number = tile_unit / C::kUnits;
    const int b = FindRequest(params, number);
    int row_begin = 0, row_end = params.num_rows;
    if (params.out_indptr != nullptr) {
      row_begin = __ldg(params.out_indptr + b);
      row_end = __ldg(params.out_indptr + b + 1);
    }
    const int begin =
        params.token_begin != nullptr ? __ldg(params.token_begin + b) : params.first_token;
    const int end = begin + row_end - row_begin;
    const int tile = begin / kTokensPerTile + number - (row_begin / kTokensPerTile + 2 * b);
    const int first = tile * kTokensPerTile;  // token of the request where the tile starts
    const int first_group = part * (C::kTokens / 4);
    if (first >= end || first + kTokensPerTile <= begin || row_end <= row_begin) continue;
    span_t span;
    span.begin = begin - first;
    span.end = end - first;
    span.first_row = static_cast<int64_t>(row_begin) + first - begin;
    span.first_position = first;
    span.page = __ldg(params.kv.page_table +
                      TableEntry(params.kv, b, static_cast<uint32_t>(tile) / tiles_per_page));
    span.tile = static_cast<uint32_t>(tile) % tiles_per_page;
    span.copy = TileSlot(params.kv, span.page, span.tile);
    span.head_begin = head_begin;
    span.head_end = head_end;
    worker.Unit(span, first_group);
  }
}

/*! \brief Check the arguments and launch. */
template <int PADDED_DIM>
inline cudaError_t Launch(const decompress_params_t& params, cudaStream_t stream) {
  using C = config_t<PADDED_DIM>;
  if (!IsValid(params.kv, params.k_format.codebook.bits, params.v_format.codebook.bits) ||
      !IsValid(params.k_format.codebook) || !IsValid(params.v_format.codebook) ||
      PaddedDim(params.kv.head_dim) != PADDED_DIM ||
      params.k_format.head_dim != params.kv.head_dim ||
      params.v_format.head_dim != params.kv.head_dim || params.kv.page_table == nullptr ||
      params.dtype == dtype_t::kFloat32 || params.num_rows < 0 || params.batch_size < 1 ||
      (params.batch_size > 1 && params.out_indptr == nullptr) || params.first_token < 0) {
    return cudaErrorInvalidValue;
  }
  if (params.num_rows == 0) return cudaSuccess;
  int device = 0, multiprocessors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const auto kernel = params.rotated ? DecompressPagesKernel<PADDED_DIM, true>
                                     : DecompressPagesKernel<PADDED_DIM, false>;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, C::kWarps * 32, 0);
  if (error != cudaSuccess) return error;
  const int64_t units = NumTiles(params) * params.kv.num_kv_heads * C::kUnits;
  if (units > 1 << 30) return cudaErrorInvalidValue;
  const int64_t most = (static_cast<int64_t>(multiprocessors) * resident + 1) / 2;
  const dim3 grid(static_cast<unsigned>(units < most ? units : most), 2);
  kernel<<<grid, C::kWarps * 32, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace decompress_detail

/*! \brief Expand tokens of compressed pages to fp16 or bf16: one launch.
 *
 *  Neither allocates nor synchronises; a CUDA graph may capture it. Tiles that have a 16-bit
 *  copy are read from it. Offsets of keys are added, but not to tokens marked uncentred and not to
 *  16-bit copies.
 *
 *  \tparam PADDED_DIM  Coordinates stored per vector: 64, 128, 256 or 512; 0 to choose at run time.
 *  \return cudaErrorInvalidValue for what the format does not know or is not aligned.
 */
template <int PADDED_DIM = 0>
inline cudaError_t DecompressPages(const decompress_params_t& params, cudaStream_t stream) {
  if constexpr (PADDED_DIM == 0) {
    switch (PaddedDim(params.kv.head_dim)) {
      case 64:
        return DecompressPages<64>(params, stream);
      case 128:
        return DecompressPages<128>(params, stream);
      case 256:
        return DecompressPages<256>(params, stream);
      case 512:
        return DecompressPages<512>(params, stream);
    }
    return cudaErrorInvalidValue;
  } else {
    static_assert(PADDED_DIM == 64 || PADDED_DIM == 128 || PADDED_DIM == 256 || PADDED_DIM == 512,
                  "pages hold 64, 128, 256 or 512 coordinates");
    return decompress_detail::Launch<PADDED_DIM>(params, stream);
  }
}

#endif  // __CUDACC__

}  // namespace turbokv

#endif  // TURBOKV_DECOMPRESS_PAGES_CUH_
