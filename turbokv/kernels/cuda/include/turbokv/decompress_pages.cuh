// SPDX-License-Identifier: Apache-2.0
// Expand tokens of compressed pages to 16 bits: one launch for ranges of one or several requests.
//
// The way back to original space is a matrix product on tensor cores. The Hadamard matrix of 2^n
// rows is that of 32 in every block of 32 coordinates (int8 products with +-1), then that of 2^n /
// 32 across blocks (additions). Levels are int8, so all of it is exact in integers; only then comes
// the scale. A result is rounded twice, in fp32 and to 16 bits, whatever head_dim is.
#ifndef TURBOKV_DECOMPRESS_PAGES_CUH_
#define TURBOKV_DECOMPRESS_PAGES_CUH_

#include "turbokv/decompress.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/types.cuh"
#include "turbokv/vector_format.cuh"
#if defined(__CUDACC__)
#include "turbokv/launch.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/tile_rows.cuh"
#endif

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

constexpr int kWarps = 4;
constexpr int kMagicBits = 0x4b400000;  // of 1.5 * 2^23: plus an integer they are a float's bits
constexpr float kMagic = 0x1.8p23f;     // and that number
constexpr uint32_t kNegateBytes = 0xfefefefe;  // turns bytes of 1 into -1 and back

/*! \brief Tokens of a tile that are wanted, and where they go. */
struct span_t {
  int begin, end;     // tokens of the tile
  int64_t first_row;  // of the outputs, for token 0
  int segment;        // of the tile's positions
  int64_t page;       //
  int tile, copy;     // of the page; slot of its 16-bit copy or -1
  int head_begin, head_end;
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

/*! \brief The tiles and heads of a warp: as many as of the others or one more. Heads come first, so
 *  that requests and pages are looked up once for a run of heads.
 */
struct schedule_t {
  uint32_t unit, end;

  TURBOKV_DEVICE schedule_t(const decompress_params_t& params, int warp) {
    const uint32_t num_units = static_cast<uint32_t>(NumTiles(params)) * params.kv.num_kv_heads;
    const uint32_t num_warps = gridDim.x * kWarps, own = warp * gridDim.x + blockIdx.x;
    const uint32_t run = num_units / num_warps, longer = num_units % num_warps;
    unit = own * run + min(own, longer);
    end = unit + run + (own < longer ? 1 : 0);
  }

  /*! \brief Find the next tile and its run of heads; false when there is none. */
  TURBOKV_DEVICE bool Next(const decompress_params_t& params, span_t& span) {
    const uint32_t heads = params.kv.num_kv_heads;
    const uint32_t tiles_per_page = params.kv.page_size / kTokensPerTile;
    while (unit < end) {
      const int number = unit / heads;
      span.head_begin = unit % heads;
      span.head_end = min(heads, span.head_begin + end - unit);
      unit += span.head_end - span.head_begin;
      const int b = FindRequest(params, number);
      int row_begin = 0, row_end = params.num_rows;
      if (params.out_indptr != nullptr) {
        row_begin = __ldg(params.out_indptr + b);
        row_end = __ldg(params.out_indptr + b + 1);
      }
      const int first =
          params.token_begin != nullptr ? __ldg(params.token_begin + b) : params.first_token;
      const int last = first + row_end - row_begin;
      const int tile = first / kTokensPerTile + number - (row_begin / kTokensPerTile + 2 * b);
      const int start = tile * kTokensPerTile;  // token of the request where the tile starts
      if (start >= last || start + kTokensPerTile <= first || row_end <= row_begin) continue;
      span.begin = first - start;
      span.end = last - start;
      span.first_row = static_cast<int64_t>(row_begin) + start - first;
      span.segment = start / kTokensPerSegment;
      span.page = __ldg(params.kv.page_table +
                        TableEntry(params.kv, b, static_cast<uint32_t>(tile) / tiles_per_page));
      span.tile = static_cast<uint32_t>(tile) % tiles_per_page;
      span.copy = TileSlot(params.kv, span.page, span.tile);
      return true;
    }
    return false;
  }
};

/*! \brief Signs of Hadamard coefficients for the eight coordinates of a piece, one byte each.
 *
 *  \param low    Lowest three bits of the output's coordinate.
 *  \param which  Register of the operand: see tile_rows_t::kEvenOdd.
 */
TURBOKV_HOST_DEVICE constexpr uint32_t SignBytes(bool even_odd, int which, int low) {
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const int j = (even_odd ? 2 * i + which : 4 * which + i) & low;
    bytes |= ((j ^ j >> 1 ^ j >> 2) & 1 ? 0xffu : 0x01u) << (8 * i);
  }
  return bytes;
}

/*! \brief The same for two coordinates, as the sign bits of a pair of 16-bit numbers. */
TURBOKV_HOST_DEVICE constexpr uint32_t SignHalves(int first, int low) {
  uint32_t halves = 0;
  for (int i = 0; i < 2; ++i) {
    const int j = (first + i) & low;
    halves |= ((j ^ j >> 1 ^ j >> 2) & 1 ? 0x8000u : 0u) << (16 * i);
  }
  return halves;
}

/*! \brief The transform across 2 or 4 blocks. With `magic`, inputs have kMagic added: it leaves
 *  without rounding.
 */
template <int N>
TURBOKV_DEVICE void AcrossBlocks(float (&x)[N], bool magic) {
  static_assert(N == 2 || N == 4, "of 32 coordinates");
  TURBOKV_UNROLL
  for (int i = 0; i < N; i += 2) {
    const float a = x[i], b = x[i + 1];
    x[i] = Add(magic ? Sub(a, 2 * kMagic) : a, b);
    x[i + 1] = Sub(a, b);
  }
  if constexpr (N == 4) {
    TURBOKV_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float a = x[i], b = x[i + 2];
      x[i] = Add(a, b);
      x[i + 2] = Sub(a, b);
    }
  }
}

/*! \brief What a warp does with tiles of one role.
 *
 *  Lane 4 * g + t has tokens g and g + 8, as rows 0 and 1, and pieces of eight coordinates:
 *  8 * t to 8 * t + 7 of every block of 32.
 */
template <int PADDED_DIM, bool ROTATED, role_t ROLE>
struct worker_t {
  static constexpr bool kKey = ROLE == role_t::kKey;
  static constexpr int kBlocks = PADDED_DIM / 32;
  static constexpr int kTogether = kBlocks < 4 ? kBlocks : 4;  // blocks whose sums are held at once
  static constexpr int kPasses = kBlocks / kTogether;
  const decompress_params_t& params;
  const vector_format_t& format;
  const uint4* negate;  // shared: sign bits of every piece, to flip
  int lane;
  bool wide;         // whether outputs are written in 16 bytes
  bool wide_offset;  // whether offsets are read in 8

  TURBOKV_DEVICE tile_layout_t Layout() const {
    return TileLayout(PADDED_DIM, params.k_format.codebook.bits, params.v_format.codebook.bits);
  }
  TURBOKV_DEVICE int Dim() const { return ROTATED ? PADDED_DIM : format.head_dim; }
  TURBOKV_DEVICE int Piece(int block) const { return block * 4 + lane % 4; }

  /*! \brief Round two numbers to the type of the outputs. */
  TURBOKV_DEVICE uint32_t Round(float a, float b) const {
    const __half2 half = __floats2half2_rn(a, b);
    const __nv_bfloat162 bfloat = __floats2bfloat162_rn(a, b);
    uint32_t words[2];
    memcpy(&words[0], &half, 4);
    memcpy(&words[1], &bfloat, 4);
    return params.dtype == dtype_t::kFloat16 ? words[0] : words[1];
  }

  /*! \brief Offset of two coordinates; beyond head_dim there is none. */
  TURBOKV_DEVICE float2 OffsetAt(const float* offset, int coordinate) const {
    if (wide_offset) {
      if (coordinate < Dim()) return __ldg(reinterpret_cast<const float2*>(offset + coordinate));
      return make_float2(0, 0);
    }
    return make_float2(coordinate < Dim() ? __ldg(offset + coordinate) : 0.0f,
                       coordinate + 1 < Dim() ? __ldg(offset + coordinate + 1) : 0.0f);
  }

  /*! \brief Write the eight coordinates of a piece. */
  TURBOKV_DEVICE void Write(const span_t& span, int head, int row, int block,
                            const uint32_t (&words)[4]) const {
    const int token = lane / 4 + 8 * row, first = Piece(block) * 8;
    if (token < span.begin || token >= span.end) return;
    uint16_t* const to =
        static_cast<uint16_t*>(kKey ? params.out_k : params.out_v) +
        head * (kKey ? params.k_head_stride : params.v_head_stride) +
        (span.first_row + token) * (kKey ? params.k_token_stride : params.v_token_stride) + first;
    if (wide) {
      if (first < Dim()) {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    } else {
      TURBOKV_UNROLL
      for (int e = 0; e < 8; ++e) {
        if (first + e < Dim()) to[e] = static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16));
      }
    }
  }

  /*! \brief Finish and write what the products of kTogether blocks gave, and add offsets.
   *
   *  \param product  product(n, b, c): sets c[0], c[1] to coordinates 2 * n and 2 * n + 1 of the
   *                  lane's piece of row 0, c[2], c[3] to those of row 1; c from block b.
   *  \param factor   Of each row.
   *  \param offset   Of the head, or null for a row without one.
   */
  template <bool OFFSET, typename Product>
  TURBOKV_DEVICE void Transform(const span_t& span, int head, int pass, bool magic,
                                const float (&factor)[2], const float* const (&offset)[2],
                                const Product& product) const {
    uint32_t out[2][kTogether][4];
    TURBOKV_UNROLL
    for (int n = 0; n < 4; ++n) {
      float sums[4][kTogether];
      TURBOKV_UNROLL
      for (int b = 0; b < kTogether; ++b) {
        float c[4];
        product(n, b, c);
        TURBOKV_UNROLL
        for (int i = 0; i < 4; ++i) sums[i][b] = c[i];
      }
      TURBOKV_UNROLL
      for (int i = 0; i < 4; ++i) AcrossBlocks(sums[i], magic);
      TURBOKV_UNROLL
      for (int b = 0; b < kTogether; ++b) {
        const int block = pass * kTogether + b;
        const uint32_t flip = reinterpret_cast<const uint32_t*>(negate + Piece(block))[n];
        TURBOKV_UNROLL
        for (int r = 0; r < 2; ++r) {
          float x = Mul(sums[2 * r][b], factor[r]), y = Mul(sums[2 * r + 1][b], factor[r]);
          if constexpr (OFFSET) {
            if (offset[r] != nullptr) {
              const float2 mu = OffsetAt(offset[r], Piece(block) * 8 + 2 * n);
              x = Add(__uint_as_float(__float_as_uint(x) ^ (flip << 16 & 0x80000000)), mu.x);
              y = Add(__uint_as_float(__float_as_uint(y) ^ (flip & 0x80000000)), mu.y);
              out[r][b][n] = Round(x, y);
              continue;
            }
          }
          out[r][b][n] = Round(x, y) ^ flip;
        }
      }
    }
    TURBOKV_UNROLL
    for (int b = 0; b < kTogether; ++b) {
      TURBOKV_UNROLL
      for (int r = 0; r < 2; ++r) Write(span, head, r, pass * kTogether + b, out[r][b]);
    }
  }

  /*! \brief Offset of a head's keys for a row, or null if none is to be added. */
  TURBOKV_DEVICE const float* Offset(const span_t& span, int head, int row, uint16_t scale) const {
    const int token = lane / 4 + 8 * row;
    // tokens that are not written may belong to a segment that does not exist
    if (IsUncentred(scale) || token < span.begin || token >= span.end) return nullptr;
    return params.k_offset +
           (static_cast<int64_t>(span.segment) * params.kv.num_kv_heads + head) * Dim();
  }

  /*! \brief Expand compressed tiles of a run of heads. */
  template <int BITS, bool OFFSET>
  TURBOKV_DEVICE void Expand(const span_t& span, const table_t& table) const {
    using R = tile_rows_t<PADDED_DIM, BITS, ROLE>;
    const tile_layout_t layout = Layout();
    const uint8_t* tile =
        TileAddress(params.kv, span.page, span.head_begin, span.tile, layout.bytes);
    uint32_t signs[4][2];  // B operands of the four n
    if constexpr (!ROTATED) {
      const bool odd = (lane >> 2 & 1) != 0;
      const uint32_t negative = __popc(lane & 3 & lane >> 3) & 1 ? kNegateBytes : 0;
      TURBOKV_UNROLL
      for (int n = 0; n < 4; ++n) {
        TURBOKV_UNROLL
        for (int k = 0; k < 2; ++k) {
          signs[n][k] = negative ^ (odd ? SignBytes(R::kEvenOdd, k, 2 * n + 1)
                                        : SignBytes(R::kEvenOdd, k, 2 * n));
        }
      }
    }
#pragma unroll 1
    for (int head = span.head_begin; head < span.head_end; ++head, tile += params.kv.head_stride) {
      typename R::raw_t raw;
      R::Load(tile + (kKey ? layout.k_base : layout.v_base),
              tile + (kKey ? layout.k_high : layout.v_high), lane, raw);
      uint16_t scale[2];
      float factor[2];
      const float* offset[2] = {nullptr, nullptr};
      TURBOKV_UNROLL
      for (int r = 0; r < 2; ++r) {
        scale[r] = __ldg(
            reinterpret_cast<const uint16_t*>(tile + ScaleOffset(layout, ROLE, lane / 4 + 8 * r)));
        // a power of two times the scale is exact, so levels need not be multiplied by it
        factor[r] = ScaleOf(scale[r]) * format.level_unit;
        if (OFFSET) offset[r] = Offset(span, head, r, scale[r]);
      }
      uint32_t a[kBlocks][4];
      TURBOKV_UNROLL
      for (int b = 0; b < kBlocks; ++b) R::Expand(raw, b, lane, table, a[b]);
      if constexpr (ROTATED) {
        TURBOKV_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
          TURBOKV_UNROLL
          for (int r = 0; r < 2; ++r) {
            uint32_t words[4];
            TURBOKV_UNROLL
            for (int i = 0; i < 8; i += 2) {
              float x = Mul(R::LevelOf(a[b], r, i), factor[r]);
              float y = Mul(R::LevelOf(a[b], r, i + 1), factor[r]);
              if (OFFSET && offset[r] != nullptr) {
                const float2 mu = OffsetAt(offset[r], Piece(b) * 8 + i);
                x = Add(x, mu.x), y = Add(y, mu.y);
              }
              words[i / 2] = Round(x, y);
            }
            Write(span, head, r, b, words);
          }
        }
      } else {
        TURBOKV_UNROLL
        for (int r = 0; r < 2; ++r) factor[r] = Mul(factor[r], format.inverse_root);
        TURBOKV_UNROLL
        for (int pass = 0; pass < kPasses; ++pass) {
          const auto product = [&](int n, int b, float(&c)[4]) {
            int sum[4];
            TURBOKV_UNROLL
            for (int top = 0; top < kPasses; ++top) {
              const uint32_t(&x)[4] = a[top * kTogether + b];
              const int both = top & pass;
              const uint32_t flip = (both ^ both >> 1) & 1 ? kNegateBytes : 0;
              const uint32_t low = signs[n][0] ^ flip, high = signs[n][1] ^ flip;
              if (top == 0) {
                ptx::MmaS8First(sum, x[0], x[1], x[2], x[3], low, high, kMagicBits);
              } else {
                ptx::MmaS8(sum, x[0], x[1], x[2], x[3], low, high);
              }
            }
            TURBOKV_UNROLL
            for (int i = 0; i < 4; ++i) c[i] = __int_as_float(sum[i]);
          };
          Transform<OFFSET>(span, head, pass, true, factor, offset, product);
        }
      }
    }
  }

  /*! \brief Take tiles of a run of heads from their 16-bit copies, which lack no offset.
   *
   *  Products with +-1 are exact; their sums are fp32.
   */
  TURBOKV_DEVICE void Copy(const span_t& span) const {
    const uint32_t negative = __popc(lane & 3 & lane >> 3) & 1 ? 0xbc00bc00u : 0x3c003c00u;  // +-1
    const bool odd = (lane >> 2 & 1) != 0;
#pragma unroll 1
    for (int head = span.head_begin; head < span.head_end; ++head) {
      const half_t* const copy =
          WindowAddress(params.kv, span.copy, head, ROLE, lane / 4, PADDED_DIM);
      const auto read = [&](int block, int row) {
        return __ldg(reinterpret_cast<const uint4*>(copy + row * 8 * PADDED_DIM) + Piece(block));
      };
      if constexpr (ROTATED) {
#pragma unroll 1
        for (int b = 0; b < kBlocks; ++b) {
          TURBOKV_UNROLL
          for (int r = 0; r < 2; ++r) {
            const uint4 x = read(b, r);
            uint32_t words[4] = {x.x, x.y, x.z, x.w};
            TURBOKV_UNROLL
            for (int i = 0; i < 4; ++i) {
              __half2 pair;
              memcpy(&pair, &words[i], 4);
              const float2 both = __half22float2(pair);
              words[i] = Round(both.x, both.y);
            }
            Write(span, head, r, b, words);
          }
        }
      } else {
        const float factor[2] = {format.inverse_root, format.inverse_root};
        const float* const offset[2] = {nullptr, nullptr};
#pragma unroll 1
        for (int pass = 0; pass < kPasses; ++pass) {
          const auto product = [&](int n, int b, float(&c)[4]) {
            TURBOKV_UNROLL
            for (int i = 0; i < 4; ++i) c[i] = 0.0f;
            TURBOKV_UNROLL
            for (int top = 0; top < kPasses; ++top) {
              const uint4 x = read(top * kTogether + b, 0), y = read(top * kTogether + b, 1);
              const uint32_t rows[2][4] = {{x.x, x.y, x.z, x.w}, {y.x, y.y, y.z, y.w}};
              const uint32_t flip = __popc(top & pass) & 1 ? 0x80008000u : 0;
              TURBOKV_UNROLL
              for (int k = 0; k < 2; ++k) {
                uint32_t signs[2];
                TURBOKV_UNROLL
                for (int i = 0; i < 2; ++i) {
                  const int first = 4 * k + 2 * i;
                  signs[i] = negative ^ flip ^
                             (odd ? SignHalves(first, 2 * n + 1) : SignHalves(first, 2 * n));
                }
                ptx::MmaF16(c, rows[0][2 * k], rows[1][2 * k], rows[0][2 * k + 1],
                            rows[1][2 * k + 1], signs[0], signs[1]);
              }
            }
          };
          Transform<false>(span, head, pass, false, factor, offset, product);
        }
      }
    }
  }

  /*! \brief Expand all that the schedule gives this warp. */
  template <int BITS>
  TURBOKV_DEVICE void Run(schedule_t& schedule) const {
    const table_t table =
        BITS == 8 ? table_t{} : MakeTable<BITS, bytes_t::kSigned>(format.codebook);
    const bool offset = kKey && params.k_offset != nullptr;
    span_t span;
    while (schedule.Next(params, span)) {
      if (span.copy >= 0) {
        Copy(span);
      } else if (offset) {
        if constexpr (kKey) Expand<BITS, true>(span, table);
      } else {
        Expand<BITS, false>(span, table);
      }
    }
  }
};

/*! \brief Set up the warps of a role, and choose the width. */
template <int PADDED_DIM, bool ROTATED, role_t ROLE>
TURBOKV_DEVICE void RunRole(const decompress_params_t& params, uint4* negate) {
  constexpr bool kKey = ROLE == role_t::kKey;
  if ((kKey ? params.out_k : params.out_v) == nullptr) {
    ptx::WaitForPrimary();  // else this kernel might seem done before the one before it
    return;
  }
  const vector_format_t& format = kKey ? params.k_format : params.v_format;
  if constexpr (!ROTATED) {
    for (int i = threadIdx.x; i < PADDED_DIM / 2; i += kWarps * 32) {
      const uint32_t bits = format.signs[i / 16] >> (i % 16 * 2);
      reinterpret_cast<uint32_t*>(negate)[i] = (bits & 1) << 15 | (bits & 2) << 30;
    }
    __syncthreads();
  }
  // All before this may overlap the end of the kernel before.
  ptx::WaitForPrimary();
  ptx::LaunchDependents();
  const int64_t strides = kKey ? params.k_token_stride | params.k_head_stride
                               : params.v_token_stride | params.v_head_stride;
  const int dim = ROTATED ? PADDED_DIM : format.head_dim;
  const worker_t<PADDED_DIM, ROTATED, ROLE> worker = {
      params,
      format,
      negate,
      static_cast<int>(threadIdx.x % 32),
      ((strides | dim) & 7) == 0 &&
          reinterpret_cast<uintptr_t>(kKey ? params.out_k : params.out_v) % 16 == 0,
      dim % 2 == 0 && reinterpret_cast<uintptr_t>(params.k_offset) % 8 == 0,
  };
  schedule_t schedule(params, threadIdx.x / 32);
  switch (format.codebook.bits) {
    case 2:
      return worker.template Run<2>(schedule);
    case 3:
      return worker.template Run<3>(schedule);
    case 4:
      return worker.template Run<4>(schedule);
    case 5:
      return worker.template Run<5>(schedule);
    default:
      return worker.template Run<8>(schedule);
  }
}

/*! \brief One row of the grid expands K, the other V. A warp takes tiles, one head at a time. */
template <int PADDED_DIM, bool ROTATED>
__global__ void __launch_bounds__(kWarps * 32, PADDED_DIM <= 128   ? 4
                                               : PADDED_DIM == 256 ? 3
                                                                   : 2)
    DecompressPagesKernel(const __grid_constant__ decompress_params_t params) {
  __shared__ uint4 negate[ROTATED ? 1 : PADDED_DIM / 8];
  TouchConstants(params);
  if (blockIdx.y == 0) {
    RunRole<PADDED_DIM, ROTATED, role_t::kKey>(params, negate);
  } else {
    RunRole<PADDED_DIM, ROTATED, role_t::kValue>(params, negate);
  }
}

/*! \brief Check the arguments and launch. */
template <int PADDED_DIM>
inline cudaError_t Launch(const decompress_params_t& params, cudaStream_t stream) {
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
  const int64_t units = NumTiles(params) * params.kv.num_kv_heads;
  if (units > 1 << 30) return cudaErrorInvalidValue;
  return LaunchTwoRows(params.rotated ? DecompressPagesKernel<PADDED_DIM, true>
                                      : DecompressPagesKernel<PADDED_DIM, false>,
                       params, kWarps * 32, units, stream);
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
