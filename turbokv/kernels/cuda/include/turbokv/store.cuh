// SPDX-License-Identifier: Apache-2.0
// Compress new keys and values and write them to their slots: one launch.
#ifndef TURBOKV_STORE_CUH_
#define TURBOKV_STORE_CUH_

#include "turbokv/compress.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/types.cuh"
#include "turbokv/vector_format.cuh"

namespace turbokv {

/*! \brief Arguments of Store. Strides are in elements; the last dimension is contiguous. */
struct store_params_t {
  paged_kv_t kv;  // pages, strides, page_size, num_kv_heads, head_dim; tile_slots and window if any
  vector_format_t k_format, v_format;
  const void* k;  // [nnz, num_kv_heads, head_dim]
  const void* v;  // [nnz, num_kv_heads, head_dim]
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  dtype_t dtype;                // of k and v
  int32_t nnz;                  //
  const int64_t* slot_mapping;  // [nnz]: page * page_size + token, or -1 to skip; slots differ
  const int64_t* positions;     // [nnz], logical; read with k_offset
  const float* k_offset;        // [num_segments, num_kv_heads, head_dim], original space; or null
  void* k_rotated;              // [nnz, num_kv_heads, padded_dim], not centred; or null
  void* v_rotated;              // as k_rotated
  int64_t k_rotated_token_stride, k_rotated_head_stride;
  int64_t v_rotated_token_stride, v_rotated_head_stride;
  dtype_t rotated_dtype;  // kFloat16 or kBFloat16
};

#if defined(__CUDACC__)

namespace store_detail {

constexpr int kMaxExtra = 64;  // runs of heads that a CTA may leave for its end

/*! \brief How vectors lie in warps.
 *
 *  \tparam PER_LANE  Consecutive coordinates that a lane holds, 16 or 32: fewer make the chain of
 *                    instructions shorter, more make their number smaller.
 */
template <int PADDED_DIM, int PER_LANE>
struct config_t {
  static constexpr int kSignStride = PER_LANE + 4;  // floats; lanes then read from different banks
  static constexpr int kLanes = PADDED_DIM / PER_LANE;         // lanes of a vector
  static constexpr int kVectors = 32 / kLanes;                 // vectors a warp holds at a time
  static constexpr int kTokens = kVectors < 4 ? 4 : kVectors;  // of a unit, at least a word of V
  static constexpr int kRounds = kTokens / kVectors;
  static constexpr int kUnits = kTokensPerTile / kTokens;  // units of 16 rows
  static constexpr int kWarps = PADDED_DIM <= 256 ? 8 : 4;
  static constexpr int kStaging = kTokens * PADDED_DIM;  // bytes a warp, enough for 8 bits
};

/*! \brief The table that turns cells into magnitudes and codes has a column for every lane, so that
 *  lookups never meet in a bank. An entry is the magnitude in fp32, whose low 16 bits are free, and
 *  in its lowest byte the page code of the positive sign, repeated to fill the byte.
 */
template <int THREADS>
TURBOKV_DEVICE void FillTable(const codebook_t& book, uint32_t* table, int thread) {
  const bool uniform = book.bits == 8;  // magnitudes 0, 1, 2, ... 127
  TURBOKV_UNROLL
  for (int first = 0; first < 256; first += THREADS) {
    const int cell = first + thread;
    int index = cell < 254 ? cell >> 1 : 127, magnitude = index;
    uint32_t code = index;
    if (!uniform) {
      // as CellIndex, but without a loop, whose loads would wait for one another
      index = 0, magnitude = book.magnitudes[0];
      TURBOKV_UNROLL
      for (int i = 0; i < 15; ++i) {
        if (i + 1 < NumMagnitudes(book) && cell > TwiceBoundary(book, i)) {
          ++index;
          magnitude = book.magnitudes[i + 1];
        }
      }
      code = CodeBase(book.bits, NumMagnitudes(book) + index) * (book.bits <= 3 ? 0x55 : 0x11);
    }
    const uint32_t entry = __float_as_uint(static_cast<float>(magnitude)) | code;
    const uint4 entries = make_uint4(entry, entry, entry, entry);
    TURBOKV_UNROLL
    for (int i = 0; i < 8; ++i) {
      // staggered: cells are 128 bytes apart
      reinterpret_cast<uint4*>(table)[cell * 8 + ((i + cell) & 7)] = entries;
    }
    if (cell == 255) {
      TURBOKV_UNROLL
      for (int i = 0; i < 8; ++i) reinterpret_cast<uint4*>(table)[256 * 8 + i] = entries;
    }
  }
}

/*! \brief Have the line of `p` brought to the first-level cache; nobody waits for it. */
template <typename T>
TURBOKV_DEVICE void Touch(const T* p) {
  uint16_t unused;
  asm volatile("ld.global.ca.u16 %0, [%1];" : "=h"(unused) : "l"(p));
}

TURBOKV_DEVICE uint32_t LoadShared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

/*! \brief Lowest bytes of four words. */
TURBOKV_DEVICE uint32_t LowBytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

/*! \brief A byte of ones for each of four numbers whose sign bit is set. */
TURBOKV_DEVICE uint32_t SignBytes(float a, float b, float c, float d) {
  // bit 3 of a selector replicates the byte's top bit; PRMT in PTX, as __byte_perm masks that bit
  uint32_t ab, cd;
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(ab) : "r"(__float_as_uint(a)), "r"(__float_as_uint(b)));
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(cd) : "r"(__float_as_uint(c)), "r"(__float_as_uint(d)));
  return __byte_perm(ab, cd, 0x5410);
}

/*! \brief Bits of `a` where the mask is set, else of `b`. */
TURBOKV_DEVICE uint32_t Select(uint32_t a, uint32_t b, uint32_t mask) {
  return (a & mask) | (b & ~mask);
}

/*! \brief What a lane contributes to a compressed vector. */
template <int BITS, int PER_LANE>
struct encoded_t {
  uint32_t base[PlaneBits(BITS) * PER_LANE / 32];  // base plane
  uint32_t high;                                   // high plane, in its order
  float product, energy;  // sums over the lane: |y| * magnitude and magnitude^2
};

/*! \brief Quantise a lane's coordinates.
 *
 *  \param column  Shared-memory address of this lane's column in the table, less the bits of a
 *                 cell 0.
 */
template <int BITS, int PER_LANE>
TURBOKV_DEVICE void Encode(const float (&y)[PER_LANE], float factor, uint32_t column, role_t role,
                           encoded_t<BITS, PER_LANE>& out) {
  constexpr int kGroup = BITS <= 3 ? 16 : 8;  // coordinates packed at a time
  float sums[PER_LANE / kGroup];
  out.energy = 0.0f;
  TURBOKV_UNROLL
  for (int first = 0; first < PER_LANE; first += kGroup) {
    uint32_t w[kGroup];
    float terms[kGroup];
    TURBOKV_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      w[i] = LoadShared(CellBits(y[first + i], factor) * 128 + column);
      const float magnitude = __uint_as_float(w[i] & 0xffff0000);
      terms[i] = Mul(fabsf(y[first + i]), magnitude);
      out.energy = __fmaf_rn(magnitude, magnitude, out.energy);
    }
    sums[first / kGroup] = TreeSum(terms);
    const float* const z = y + first;
    if constexpr (BITS == 8) {
      TURBOKV_UNROLL
      for (int i = 0; i < kGroup; i += 4) {
        const uint32_t index = LowBytes(w[i], w[i + 1], w[i + 2], w[i + 3]);
        const uint32_t negative = SignBytes(z[i], z[i + 1], z[i + 2], z[i + 3]);
        // bytes 128 + index and 128 - index; no byte carries into the next
        out.base[(first + i) / 4] = Select(0x80808080 - index, 0x80808080 | index, negative);
      }
    } else if constexpr (BITS >= 4) {
      uint32_t word =
          Select(LowBytes(w[0], w[2], w[4], w[6]), LowBytes(w[1], w[3], w[5], w[7]), 0x0f0f0f0f);
      if constexpr (BITS == 4) {
        word ^= Select(SignBytes(z[0], z[2], z[4], z[6]), SignBytes(z[1], z[3], z[5], z[7]),
                       0x0f0f0f0f);
      }
      out.base[first / 8] = word;
    } else {
      uint32_t codes[4], negative[4];
      TURBOKV_UNROLL
      for (int i = 0; i < 4; ++i) {
        codes[i] = LowBytes(w[i], w[i + 4], w[i + 8], w[i + 12]);
        negative[i] = SignBytes(z[i], z[i + 4], z[i + 8], z[i + 12]);
      }
      const uint32_t word = Select(Select(codes[0], codes[1], 0x33333333),
                                   Select(codes[2], codes[3], 0x33333333), 0x0f0f0f0f);
      const uint32_t flip = Select(Select(negative[0], negative[1], 0x33333333),
                                   Select(negative[2], negative[3], 0x33333333), 0x0f0f0f0f);
      out.base[first / 16] = word ^ flip;
    }
  }
  out.product = TreeSum(sums);
  out.high = 0;
  if constexpr (HasHighBit(BITS)) {
    uint32_t negative = 0;
    TURBOKV_UNROLL
    for (int i = PER_LANE - 1; i >= 0; --i) {
      negative = __funnelshift_l(__float_as_uint(y[i]), negative, 1);
    }
    out.high = OrderHighBits(role, BITS, ~negative);
  }
}

/*! \brief Read a lane's coordinates, of which `live` exist; the others become zero. */
template <typename DTypeIn, int PER_LANE>
TURBOKV_DEVICE void Load(const DTypeIn* x, int live, bool wide, float (&y)[PER_LANE]) {
  constexpr int kChunk = 16 / sizeof(DTypeIn), kChunks = PER_LANE / kChunk;
  uint4 data[kChunks];
  if (wide) {
    TURBOKV_UNROLL
    for (int i = 0; i < kChunks; ++i) {
      data[i] = make_uint4(0, 0, 0, 0);
      if (i * kChunk < live) data[i] = __ldg(reinterpret_cast<const uint4*>(x) + i);
    }
  } else {
    TURBOKV_UNROLL
    for (int i = 0; i < kChunks; ++i) {
      DTypeIn elements[kChunk] = {};
      TURBOKV_UNROLL
      for (int j = 0; j < kChunk; ++j) {
        if (i * kChunk + j < live) elements[j] = x[i * kChunk + j];
      }
      memcpy(&data[i], elements, 16);
    }
  }
  TURBOKV_UNROLL
  for (int first = 0; first < PER_LANE; first += kChunk) {
    const uint4 chunk = data[first / kChunk];
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    TURBOKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(DTypeIn) == 4) {
        y[first + i] = __uint_as_float(words[i]);
      } else if constexpr (std::is_same<DTypeIn, half_t>::value) {
        __half2 pair;
        memcpy(&pair, &words[i], 4);
        const float2 wide_pair = __half22float2(pair);
        y[first + 2 * i] = wide_pair.x;
        y[first + 2 * i + 1] = wide_pair.y;
      } else {
        y[first + 2 * i] = __uint_as_float(words[i] << 16);
        y[first + 2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
      }
    }
  }
}

/*! \brief Subtract a lane's part of an offset. */
template <int PER_LANE>
TURBOKV_DEVICE void Centre(const float* offset, int live, bool wide, float (&y)[PER_LANE]) {
  TURBOKV_UNROLL
  for (int first = 0; first < PER_LANE; first += 4) {
    float4 mu = make_float4(0, 0, 0, 0);
    if (wide) {
      if (first < live) mu = __ldg(reinterpret_cast<const float4*>(offset + first));
    } else {
      if (first < live) mu.x = offset[first];
      if (first + 1 < live) mu.y = offset[first + 1];
      if (first + 2 < live) mu.z = offset[first + 2];
      if (first + 3 < live) mu.w = offset[first + 3];
    }
    y[first] = Sub(y[first], mu.x);
    y[first + 1] = Sub(y[first + 1], mu.y);
    y[first + 2] = Sub(y[first + 2], mu.z);
    y[first + 3] = Sub(y[first + 3], mu.w);
  }
}

/*! \brief Signs and transform. `signs` are the lane's, as +-1. */
template <int LANES, int PER_LANE>
TURBOKV_DEVICE void Rotate(const float* signs, int lane, float (&y)[PER_LANE]) {
  TURBOKV_UNROLL
  for (int i = 0; i < PER_LANE; i += 4) {
    const float4 s = *reinterpret_cast<const float4*>(signs + i);
    // stride 1 with the signs folded in: products with +-1 are exact. The added zero makes -0 into
    // +0, and from then on no sum or difference is -0, which would count as negative.
    const float a = __fmaf_rn(y[i], s.x, 0.0f), b = __fmaf_rn(y[i + 2], s.z, 0.0f);
    const float c = y[i + 1], d = y[i + 3];
    y[i] = __fmaf_rn(c, s.y, a);
    y[i + 1] = __fmaf_rn(c, -s.y, a);
    y[i + 2] = __fmaf_rn(d, s.w, b);
    y[i + 3] = __fmaf_rn(d, -s.w, b);
  }
  Hadamard<PER_LANE, 2>(y);
  HadamardAcrossLanes<PER_LANE, LANES>(y, lane);
}

/*! \brief Write a lane's coordinates times `factor` in 16 bits, 16-byte aligned. */
template <int PER_LANE>
TURBOKV_DEVICE void StoreRotated(uint16_t* out, dtype_t dtype, const float (&y)[PER_LANE],
                                 float factor) {
  TURBOKV_UNROLL
  for (int first = 0; first < PER_LANE; first += 8) {
    uint32_t words[4];
    TURBOKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float a = Mul(y[first + 2 * i], factor), b = Mul(y[first + 2 * i + 1], factor);
      if (dtype == dtype_t::kFloat16) {
        const __half2 pair = __floats2half2_rn(a, b);
        memcpy(&words[i], &pair, 4);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
        memcpy(&words[i], &pair, 4);
      }
    }
    *reinterpret_cast<uint4*>(out + first) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

/*! \brief Write consecutive words, as widely as their number allows. */
template <int N>
TURBOKV_DEVICE void StoreWords(uint8_t* out, const uint32_t (&words)[N]) {
  if constexpr (N == 1) {
    *reinterpret_cast<uint32_t*>(out) = words[0];
  } else if constexpr (N == 2) {
    *reinterpret_cast<uint2*>(out) = make_uint2(words[0], words[1]);
  } else {
    TURBOKV_UNROLL
    for (int i = 0; i < N; i += 4) {
      *reinterpret_cast<uint4*>(out + 4 * i) =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  }
}

/*! \brief Write the 16 or 32 high bits of a lane. */
template <int PER_LANE>
TURBOKV_DEVICE void StoreHigh(uint8_t* out, uint32_t high) {
  if constexpr (PER_LANE == 16) {
    *reinterpret_cast<uint16_t*>(out) = static_cast<uint16_t>(high);
  } else {
    *reinterpret_cast<uint32_t*>(out) = high;
  }
}

/*! \brief Write bytes of V of single tokens from shared memory: other tokens own the bytes between.
 *
 *  A warp writes one token at a time, so that its bytes are in few sectors.
 */
template <int PADDED_DIM, int PER_LANE, int BITS, int WIDTH, int RUN>
TURBOKV_DEVICE void ScatterValue(const uint8_t* rows, uint8_t* plane, int token, int lane) {
  using C = config_t<PADDED_DIM, PER_LANE>;
  constexpr int kBytes = PADDED_DIM * WIDTH / 8;
#pragma unroll 2
  for (int v = 0; v < C::kVectors; ++v) {
    const int of = __shfl_sync(~0u, token, v * C::kLanes);
    const uint64_t address = __shfl_sync(~0u, reinterpret_cast<uint64_t>(plane), v * C::kLanes);
    if (of < 0) continue;
    uint8_t* const to = reinterpret_cast<uint8_t*>(address);
    TURBOKV_UNROLL
    for (int first = 0; first < kBytes; first += 32) {
      const int beta = first + lane;
      if (kBytes % 32 != 0 && beta >= kBytes) break;
      to[ValueOffset(of, beta, RUN, BITS)] = rows[v * kBytes + beta];
    }
  }
}

/*! \brief Interleave a plane of V of whole groups of four tokens from shared memory into a tile.
 *
 *  Staging holds the tokens of a unit, kWidth bits a coordinate, in the order group, k, e (see
 *  ValueLane). A lane turns four bytes of four tokens into four words.
 */
template <int PADDED_DIM, int TOKENS, int BITS, int WIDTH, int RUN>
TURBOKV_DEVICE void InterleaveValue(const uint8_t* staging, uint8_t* plane, int first_group,
                                    int lane) {
  constexpr int kGroups = TOKENS / 4;
  constexpr int kBytes = PADDED_DIM * WIDTH / 8;
  for (int i = lane; i < kGroups * (kBytes / 4); i += 32) {
    const int group = i % kGroups, beta = i / kGroups * 4;
    const uint8_t* from = staging + group * 4 * kBytes + beta;
    uint32_t in[4], out[4];
    TURBOKV_UNROLL
    for (int q = 0; q < 4; ++q) {
      in[BITS == 2 ? (q >> 1) + (q & 1) * 2 : q] =
          *reinterpret_cast<const uint32_t*>(from + q * kBytes);
    }
    const uint32_t low01 = __byte_perm(in[0], in[1], 0x5140),
                   low23 = __byte_perm(in[2], in[3], 0x5140);
    const uint32_t top01 = __byte_perm(in[0], in[1], 0x7362),
                   top23 = __byte_perm(in[2], in[3], 0x7362);
    out[0] = __byte_perm(low01, low23, 0x5410);
    out[1] = __byte_perm(low01, low23, 0x7632);
    out[2] = __byte_perm(top01, top23, 0x5410);
    out[3] = __byte_perm(top01, top23, 0x7632);
    uint8_t* to = plane + beta * 16 + (first_group + group) * 4 * RUN;
    if constexpr (RUN == 4) {
      *reinterpret_cast<uint4*>(to) = make_uint4(out[0], out[1], out[2], out[3]);
    } else if constexpr (RUN == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(out[0], out[1]);
      *reinterpret_cast<uint2*>(to + 32) = make_uint2(out[2], out[3]);
    } else {
      TURBOKV_UNROLL
      for (int b = 0; b < 4; ++b) *reinterpret_cast<uint32_t*>(to + b * 16) = out[b];
    }
  }
}

/*! \brief Which rows of a block of 16 belong to whole tiles.
 *
 *  A tile is whole if 16 consecutive rows fill it in order. The block where it starts writes it;
 * rows of other tiles are written by their own block, one by one.
 */
struct rows_t {
  int tile_start;   // row of the block where a whole tile starts, or -1
  uint32_t single;  // rows of the block that belong to no whole tile
};

TURBOKV_DEVICE rows_t FindRows(const int64_t* slot_mapping, int block_start, int nnz, int lane) {
  // rows block_start - 16 .. block_start + 31; what is absent differs from every slot
  const int early = block_start - 16 + lane, late = early + 32;
  const int64_t first = early >= 0 && early < nnz ? slot_mapping[early] : -1;
  const int64_t second = lane < 16 && late < nnz ? slot_mapping[late] : -1;
  const int64_t next_first = __shfl_sync(~0u, lane == 0 ? second : first, (lane + 1) & 31);
  const int64_t next_second = __shfl_down_sync(~0u, second, 1);
  const uint32_t low = __ballot_sync(~0u, first >= 0 && next_first == first + 1);
  const uint32_t top = __ballot_sync(~0u, second >= 0 && next_second == second + 1);
  const uint32_t chain = __funnelshift_r(low, top, lane);
  const bool starts = first >= 0 && first % kTokensPerTile == 0 && (chain & 0x7fff) == 0x7fff;
  const uint32_t all = __ballot_sync(~0u, starts);
  const uint32_t own = all >> 16, before = all & 0xfffe;
  const int rows = min(16, nnz - block_start);
  rows_t found;
  found.tile_start = own ? __ffs(own) - 1 : -1;
  found.single = (1u << rows) - 1;
  if (own) found.single &= (own & (0u - own)) - 1;
  // a tile that started i rows into the block before covers our first i rows
  if (before) found.single &= ~0u << (31 - __clz(before));
  return found;
}

/*! \brief Where a vector comes from and goes to, in head 0. */
template <typename DTypeIn>
struct place_t {
  const DTypeIn* x;  // this lane's coordinates
  uint8_t* tile;
  int row;    // of the inputs, or -1: the lanes only take part in exchanges
  int live;   // how many of the lane's coordinates exist, if positive
  int token;  // of the tile, or -1: nothing is stored
  int copy;   // slot of the tile's 16-bit copy, or -1
};

template <int PADDED_DIM, int PER_LANE, typename DTypeIn>
struct worker_t {
  using C = config_t<PADDED_DIM, PER_LANE>;
  const store_params_t& params;
  const vector_format_t& format;
  role_t role;
  const float* signs;  // shared, this lane's
  uint8_t* staging;    // shared, this warp's
  uint32_t column;     // see Encode
  int lane;            // of the warp
  bool wide, wide_offset;

  TURBOKV_DEVICE tile_layout_t Layout() const {
    return TileLayout(PADDED_DIM, params.k_format.codebook.bits, params.v_format.codebook.bits);
  }

  TURBOKV_DEVICE place_t<DTypeIn> Locate(int row) const {
    const bool key = role == role_t::kKey;
    const int at = lane % C::kLanes * PER_LANE;
    // absent vectors have the addresses of others, never used: a null would make them generic
    const int any = max(row, 0);
    const int64_t slot = row >= 0 ? params.slot_mapping[row] : -1;
    place_t<DTypeIn> place;
    place.row = row;
    place.live = row >= 0 ? format.head_dim - at : 0;
    place.x = static_cast<const DTypeIn*>(key ? params.k : params.v) + at +
              any * (key ? params.k_token_stride : params.v_token_stride);
    const uint32_t tile_number = static_cast<uint32_t>(max(slot, int64_t{0}) >> 4);  // below 2^32
    const uint32_t tiles_per_page = params.kv.page_size / kTokensPerTile;
    const uint32_t page = tile_number / tiles_per_page, tile = tile_number % tiles_per_page;
    place.tile = TileAddress(params.kv, page, 0, tile, Layout().bytes);
    place.token = slot >= 0 ? static_cast<int>(slot) & 15 : -1;
    place.copy = slot >= 0 ? TileSlot(params.kv, page, tile) : -1;
    return place;
  }

  /*! \brief Offset of centred keys for this lane, or null. */
  TURBOKV_DEVICE const float* Offset(const place_t<DTypeIn>& place, int head) const {
    if (place.token < 0) return nullptr;  // positions of skipped rows mean nothing
    const int64_t position = params.positions[place.row];
    const int64_t segment = position > 0 ? position / kTokensPerSegment : 0;
    return params.k_offset + (segment * params.kv.num_kv_heads + head) * format.head_dim +
           lane % C::kLanes * PER_LANE;
  }

  /*! \brief Write the 16-bit forms of a rotated vector that are asked for. */
  TURBOKV_DEVICE void Copies(const place_t<DTypeIn>& place, int head,
                             const float (&y)[PER_LANE]) const {
    const bool key = role == role_t::kKey;
    const int at = lane % C::kLanes * PER_LANE;
    uint16_t* rotated = static_cast<uint16_t*>(key ? params.k_rotated : params.v_rotated);
    if (rotated != nullptr && place.row >= 0) {
      rotated += place.row * (key ? params.k_rotated_token_stride : params.v_rotated_token_stride) +
                 head * (key ? params.k_rotated_head_stride : params.v_rotated_head_stride) + at;
      StoreRotated(rotated, params.rotated_dtype, y, format.inverse_root);
    }
    if (place.copy >= 0) {
      half_t* window = WindowAddress(params.kv, place.copy, head, role, place.token, PADDED_DIM);
      StoreRotated(reinterpret_cast<uint16_t*>(window) + at, dtype_t::kFloat16, y,
                   format.inverse_root);
    }
  }

  /*! \brief Compress one vector a group of kLanes lanes and write it.
   *
   *  \param whole  Whether the vectors' tile is being written as a whole; the same in a warp.
   *  \param round  Which kVectors of the unit's tokens these are.
   */
  TURBOKV_DEVICE void Vector(const place_t<DTypeIn>& place, int head, bool whole, int round) const {
    const bool key = role == role_t::kKey;
    const bool centring = key && params.k_offset != nullptr;
    const DTypeIn* x = place.x + head * (key ? params.k_head_stride : params.v_head_stride);
    // 16-bit forms are not centred, so centred keys that have one are rotated twice
    const bool copies =
        (key ? params.k_rotated : params.v_rotated) != nullptr || params.kv.window != nullptr;
    float y[PER_LANE], squares = 0.0f;
    bool uncentred = false;
#pragma unroll 1
    for (int pass = centring && copies ? 0 : 1; pass < 2; ++pass) {
      bool clamp = false;
#pragma unroll 1
      while (true) {
        Load(x, place.live, wide, y);
        if (pass == 1 && centring) {
          const float* offset = Offset(place, head);
          const float full = TreeSumAcrossLanes<C::kLanes>(TreeSumSquares(y));
          if (offset != nullptr) Centre(offset, place.live, wide_offset, y);
          const float centred = TreeSumAcrossLanes<C::kLanes>(TreeSumSquares(y));
          uncentred = full < centred;
          if (uncentred) Load(x, place.live, wide, y);
        }
        if (clamp) {
          TURBOKV_UNROLL
          for (int i = 0; i < PER_LANE; ++i) y[i] = Clamp(y[i], kInputLimit);
        }
        Rotate<C::kLanes>(signs, lane, y);
        squares = TreeSumAcrossLanes<C::kLanes>(TreeSumSquares(y));
        // No coordinate can have been beyond the limit unless the sum is: it is rare that clamping
        // does anything, so it is not done before that is known.
        if (clamp || __all_sync(~0u, squares < kInputLimit * kInputLimit)) break;
        clamp = true;
      }
      if (copies && (pass == 0 || !centring)) Copies(place, head, y);
    }

    switch (format.codebook.bits) {
      case 2:
        return Finish<2>(y, squares, uncentred, place, head, whole, round);
      case 3:
        return Finish<3>(y, squares, uncentred, place, head, whole, round);
      case 4:
        return Finish<4>(y, squares, uncentred, place, head, whole, round);
      case 5:
        return Finish<5>(y, squares, uncentred, place, head, whole, round);
      default:
        return Finish<8>(y, squares, uncentred, place, head, whole, round);
    }
  }

  /*! \brief Quantise a rotated vector and write codes and scale. */
  template <int BITS>
  TURBOKV_DEVICE void Finish(const float (&y)[PER_LANE], float squares, bool uncentred,
                             const place_t<DTypeIn>& place, int head, bool whole, int round) const {
    constexpr int kWidth = PlaneBits(BITS), kRowBytes = PADDED_DIM * kWidth / 8;
    constexpr int kBytes = PER_LANE * kWidth / 8, kHighBytes = PER_LANE / 8;  // of a lane
    constexpr bool kHigh = HasHighBit(BITS);
    constexpr int kRun = ValueRun(PADDED_DIM, BITS);
    constexpr int kHighRun = kHigh ? ValueHighRun(PADDED_DIM, BITS) : 1;
    const int part = lane % C::kLanes;
    const tile_layout_t layout = Layout();
    uint8_t* const tile = place.tile + head * params.kv.head_stride;
    int token = place.token;
    // the compiler would compute all offsets that depend on it once for all heads, and spill them
    asm volatile("" : "+r"(token));
    const float root = Sqrt(squares);
    encoded_t<BITS, PER_LANE> encoded;
    Encode(y, CellFactor(format, squares, root), column, role, encoded);
    const float product = TreeSumAcrossLanes<C::kLanes>(encoded.product);
    const float energy = TreeSumAcrossLanes<C::kLanes>(encoded.energy);
    if (token >= 0 && part == 0) {
      const uint16_t scale = StoredScale(format, squares, root, product, energy);
      *reinterpret_cast<uint16_t*>(tile + ScaleOffset(layout, role, token)) =
          static_cast<uint16_t>(scale | (uncentred ? 0x8000 : 0));
    }
    if (role == role_t::kKey) {
      if (token >= 0) {
        StoreWords(tile + layout.k_base + KeyOffset(token, part * kBytes, kRowBytes), encoded.base);
        if (kHigh) {
          StoreHigh<PER_LANE>(
              tile + layout.k_high + KeyOffset(token, part * kHighBytes, PADDED_DIM / 8),
              encoded.high);
        }
      }
    } else {
      // single tokens leave after every round, whole tiles when all tokens of the unit are there
      const int index = (whole ? round * C::kVectors : 0) + lane / C::kLanes;
      uint8_t* const high_staging = staging + C::kTokens * kRowBytes;
      uint8_t* const base_plane = tile + layout.v_base;
      uint8_t* const high_plane = tile + layout.v_high;
      StoreWords(staging + index * kRowBytes + part * kBytes, encoded.base);
      if (kHigh) {
        StoreHigh<PER_LANE>(high_staging + index * (PADDED_DIM / 8) + part * kHighBytes,
                            encoded.high);
      }
      __syncwarp();
      if (!whole) {
        ScatterValue<PADDED_DIM, PER_LANE, BITS, kWidth, kRun>(staging, base_plane, token, lane);
        if constexpr (kHigh) {
          ScatterValue<PADDED_DIM, PER_LANE, BITS, 1, kHighRun>(high_staging, high_plane, token,
                                                                lane);
        }
      } else if (round + 1 == C::kRounds) {
        const int first_group = __shfl_sync(~0u, token >> 1 & 3, 0);
        InterleaveValue<PADDED_DIM, C::kTokens, BITS, kWidth, kRun>(staging, base_plane,
                                                                    first_group, lane);
        if constexpr (kHigh) {
          InterleaveValue<PADDED_DIM, C::kTokens, BITS, 1, kHighRun>(high_staging, high_plane,
                                                                     first_group, lane);
        }
      }
      __syncwarp();
    }
  }
};

/*! \brief One row of the grid compresses K, the other V.
 *
 *  A warp takes units of kTokens rows of 16 and one head. kLanes = PADDED_DIM / 32 neighbouring
 * lanes hold a vector, 32 consecutive coordinates each: five stages of the transform stay in
 * registers, and a lane's codes are whole words. K's words go straight to their place. Four tokens
 * of V share words, so units of a tile that is written as a whole interleave their tokens in shared
 * memory; other tokens write their bytes one by one.
 */
template <int PADDED_DIM, int PER_LANE, typename DTypeIn>
__global__ void __launch_bounds__(config_t<PADDED_DIM, PER_LANE>::kWarps * 32,
                                  PER_LANE == 32 ? 3 : 4)
    StoreKernel(const __grid_constant__ store_params_t params) {
  using C = config_t<PADDED_DIM, PER_LANE>;
  __shared__ alignas(16) uint32_t table[kNumCells * 32];
  __shared__ alignas(16) float signs[C::kLanes * C::kSignStride];
  __shared__ alignas(16) uint8_t staging[C::kWarps * C::kStaging];
  __shared__ uint2 extra[kMaxExtra];
  __shared__ int num_extra;
  TouchConstants(params);
  const role_t role = blockIdx.y == 0 ? role_t::kKey : role_t::kValue;
  const vector_format_t& format = blockIdx.y == 0 ? params.k_format : params.v_format;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // Every warp has a run of units, as many as the others or one more. Heads come first, so that
  // rows are looked up once for a run of heads; CTAs come before warps, so that a small batch meets
  // many multiprocessors.
  const bool key = role == role_t::kKey;
  const uint32_t heads = params.kv.num_kv_heads, nnz = params.nnz;
  const uint32_t num_units = (nnz + 15) / 16 * heads * C::kUnits;
  const uint32_t num_warps = gridDim.x * C::kWarps, own = warp * gridDim.x + blockIdx.x;
  const uint32_t run = num_units / num_warps, longer = num_units % num_warps;
  uint32_t unit = own * run + min(own, longer);
  const uint32_t end = unit + run + (own < longer ? 1 : 0);
  if (unit < end) {
    // bring the first rows nearer while the table is filled
    const uint32_t rows_unit = unit / heads, first_row = rows_unit / C::kUnits * 16;
    const uint32_t row = first_row + rows_unit % C::kUnits * C::kTokens + lane / C::kLanes;
    Touch(params.slot_mapping + min(first_row + lane, nnz - 1));
    Touch(static_cast<const DTypeIn*>(key ? params.k : params.v) +
          min(row, nnz - 1) * (key ? params.k_token_stride : params.v_token_stride) +
          unit % heads * (key ? params.k_head_stride : params.v_head_stride) +
          min(lane % C::kLanes * PER_LANE, format.head_dim - 1));
  }
  if (threadIdx.x == 0) num_extra = 0;
  FillTable<C::kWarps * 32>(format.codebook, table, threadIdx.x);
  for (int j = threadIdx.x; j < PADDED_DIM; j += C::kWarps * 32) {
    signs[j / PER_LANE * C::kSignStride + j % PER_LANE] = IsNegated(format, j) ? -1.0f : 1.0f;
  }
  __syncthreads();

  const int64_t strides = key ? params.k_token_stride | params.k_head_stride
                              : params.v_token_stride | params.v_head_stride;
  const uintptr_t address = reinterpret_cast<uintptr_t>(key ? params.k : params.v);
  constexpr int kChunk = 16 / sizeof(DTypeIn);
  const uint32_t table_address = static_cast<uint32_t>(__cvta_generic_to_shared(table));
  const worker_t<PADDED_DIM, PER_LANE, DTypeIn> worker = {
      params,
      format,
      role,
      signs + lane % C::kLanes * C::kSignStride,
      staging + warp * C::kStaging,
      table_address + lane * 4 - kCellOrigin * 128,
      lane,
      address % 16 == 0 && (strides | format.head_dim) % kChunk == 0,
      reinterpret_cast<uintptr_t>(params.k_offset) % 16 == 0 && format.head_dim % 4 == 0,
  };

  const bool keep_skipped = (key ? params.k_rotated : params.v_rotated) != nullptr;
  // A unit in whose rows a whole tile and single ones meet is double work. Left to one warp, all
  // would wait for it: its single rows are done last, by all warps of the CTA.
  bool own_done = false;
  uint32_t turn = warp, item = 0;  // the queued heads that are this warp's
  while (true) {
    uint32_t rows_unit;
    int head_begin, head_end;
    const bool is_own = unit < end;
    if (is_own) {
      rows_unit = unit / heads;
      head_begin = unit % heads;
      head_end = min(heads, head_begin + end - unit);
      unit += head_end - head_begin;
    } else {
      if (!own_done) __syncthreads();
      own_done = true;
      const uint32_t items = min(num_extra, kMaxExtra);
      while (item < items && turn >= (extra[item].y >> 16)) turn -= extra[item++].y >> 16;
      if (item == items) break;
      rows_unit = extra[item].x;
      head_begin = (extra[item].y & 0xffff) + turn;
      head_end = head_begin + 1;
      turn += C::kWarps;
    }
    const int part = rows_unit % C::kUnits, first_row = rows_unit / C::kUnits * 16;
    const rows_t rows = FindRows(params.slot_mapping, first_row, nnz, lane);
    const uint32_t single = rows.single >> (part * C::kTokens) & ((1u << C::kTokens) - 1);
    // the row of a vector in a pass: first a whole tile, then single rows
    const auto row_of = [&](bool whole, int round) {
      const int index = round * C::kVectors + lane / C::kLanes;
      if (whole) {
        // tokens 2t, 2t + 1, 2t + 8 and 2t + 9 in turn
        const int group = part * (C::kTokens / 4) + index / 4;
        return first_row + rows.tile_start + 2 * group + (index & 1) + (index & 2) * 4;
      }
      const int row = first_row + part * C::kTokens + index;
      if ((single >> index & 1) == 0) return -1;
      return keep_skipped || params.slot_mapping[row] >= 0 ? row : -1;
    };
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      const bool whole = pass == 0;
      if (whole ? rows.tile_start < 0 || !is_own : single == 0) continue;
      if (!whole && is_own && rows.tile_start >= 0) {
        int place = 0;
        if (lane == 0) place = atomicAdd(&num_extra, 1);
        place = __shfl_sync(~0u, place, 0);
        if (place < kMaxExtra) {
          extra[place] = make_uint2(rows_unit, head_begin | (head_end - head_begin) << 16);
          continue;
        }
      }
      if constexpr (C::kRounds == 1) {
        const place_t<DTypeIn> place = worker.Locate(row_of(whole, 0));
        if (!__any_sync(~0u, place.row >= 0)) continue;
#pragma unroll 1
        for (int head = head_begin; head < head_end; ++head) worker.Vector(place, head, whole, 0);
      } else {
#pragma unroll 1
        for (int i = head_begin * C::kRounds; i < head_end * C::kRounds; ++i) {
          const int round = i % C::kRounds;
          const place_t<DTypeIn> place = worker.Locate(row_of(whole, round));
          if (!__any_sync(~0u, place.row >= 0)) continue;
          worker.Vector(place, i / C::kRounds, whole, round);
        }
      }
    }
  }
}

template <int PADDED_DIM, int PER_LANE, typename DTypeIn>
inline cudaError_t Launch(const store_params_t& params, int multiprocessors, cudaStream_t stream) {
  using C = config_t<PADDED_DIM, PER_LANE>;
  const auto kernel = StoreKernel<PADDED_DIM, PER_LANE, DTypeIn>;
  int resident = 0;
  const cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, C::kWarps * 32, 0);
  if (error != cudaSuccess) return error;
  const int64_t units =
      (static_cast<int64_t>(params.nnz) + 15) / 16 * params.kv.num_kv_heads * C::kUnits;
  if (units > 1 << 30) return cudaErrorInvalidValue;
  const int64_t most = (static_cast<int64_t>(multiprocessors) * resident + 1) / 2;
  const dim3 grid(static_cast<unsigned>(units < most ? units : most), 2);
  kernel<<<grid, C::kWarps * 32, 0, stream>>>(params);
  return cudaGetLastError();
}

/*! \brief Choose how many coordinates a lane holds, and launch. */
template <int PADDED_DIM, typename DTypeIn>
inline cudaError_t Launch(const store_params_t& params, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
#ifdef TK_EXP
  extern int g_per_lane;
  if (g_per_lane == 32) return Launch<PADDED_DIM, 32, DTypeIn>(params, multiprocessors, stream);
  if (g_per_lane == 16) return Launch<PADDED_DIM, 16, DTypeIn>(params, multiprocessors, stream);
#endif
  const int64_t lanes = static_cast<int64_t>(params.nnz) * params.kv.num_kv_heads * PADDED_DIM / 16;
  if (lanes < multiprocessors * 512) {
    return Launch<PADDED_DIM, 16, DTypeIn>(params, multiprocessors, stream);
  }
  return Launch<PADDED_DIM, 32, DTypeIn>(params, multiprocessors, stream);
}

/*! \brief Check the arguments, choose the type of the inputs and launch. */
template <int PADDED_DIM>
inline cudaError_t Check(const store_params_t& params, cudaStream_t stream) {
  const int64_t rotated_strides = params.k_rotated_token_stride | params.k_rotated_head_stride |
                                  params.v_rotated_token_stride | params.v_rotated_head_stride;
  const bool rotated = params.k_rotated != nullptr || params.v_rotated != nullptr;
  const uintptr_t rotated_address =
      reinterpret_cast<uintptr_t>(params.k_rotated) | reinterpret_cast<uintptr_t>(params.v_rotated);
  if (!IsValid(params.kv, params.k_format.codebook.bits, params.v_format.codebook.bits) ||
      !IsValid(params.k_format.codebook) || !IsValid(params.v_format.codebook) ||
      PaddedDim(params.kv.head_dim) != PADDED_DIM ||
      params.k_format.head_dim != params.kv.head_dim ||
      params.v_format.head_dim != params.kv.head_dim ||
      (params.k_offset != nullptr && params.positions == nullptr) ||
      (rotated && (rotated_strides % 8 != 0 || rotated_address % 16 != 0 ||
                   params.rotated_dtype == dtype_t::kFloat32))) {
    return cudaErrorInvalidValue;
  }
  if (params.nnz <= 0) return params.nnz == 0 ? cudaSuccess : cudaErrorInvalidValue;
  switch (params.dtype) {
    case dtype_t::kFloat32:
      return Launch<PADDED_DIM, float>(params, stream);
    case dtype_t::kFloat16:
      return Launch<PADDED_DIM, half_t>(params, stream);
    case dtype_t::kBFloat16:
      return Launch<PADDED_DIM, bfloat16_t>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace store_detail

/*! \brief Compress keys and values and write them to their slots: one launch.
 *
 *  Neither allocates nor synchronises; a CUDA graph may capture it. Widths, scale rules and
 * optional outputs are chosen at run time.
 *
 *  \tparam PADDED_DIM  Coordinates stored per vector: 64, 128, 256 or 512; 0 to choose at run time.
 *  \return cudaErrorInvalidValue for what the format does not know or is not aligned.
 */
template <int PADDED_DIM = 0>
inline cudaError_t Store(const store_params_t& params, cudaStream_t stream) {
  if constexpr (PADDED_DIM == 0) {
    switch (PaddedDim(params.kv.head_dim)) {
      case 64:
        return Store<64>(params, stream);
      case 128:
        return Store<128>(params, stream);
      case 256:
        return Store<256>(params, stream);
      case 512:
        return Store<512>(params, stream);
    }
    return cudaErrorInvalidValue;
  } else {
    static_assert(PADDED_DIM == 64 || PADDED_DIM == 128 || PADDED_DIM == 256 || PADDED_DIM == 512,
                  "pages hold 64, 128, 256 or 512 coordinates");
    return store_detail::Check<PADDED_DIM>(params, stream);
  }
}

#endif  // __CUDACC__

}  // namespace turbokv

#endif  // TURBOKV_STORE_CUH_
