// SPDX-License-Identifier: Apache-2.0
// What a warp of decompress does: expand a tile, or take its 16-bit copy, and transform it.
#ifndef TURBOKV_DECOMPRESS_WORKER_CUH_
#define TURBOKV_DECOMPRESS_WORKER_CUH_

#include "turbokv/decompress.cuh"
#include "turbokv/decompress/hadamard_mma.cuh"
#include "turbokv/decompress/params.cuh"
#include "turbokv/decompress/rows.cuh"
#include "turbokv/decompress/schedule.cuh"
#include "turbokv/pack.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/tile_rows.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace decompress_detail {

/*! \brief What a warp does with tiles of one role.
 *
 *  Lane 4 * g + t has tokens g and g + 8, as rows 0 and 1, and pieces of eight coordinates:
 *  8 * t to 8 * t + 7 of every block of 32.
 */
template <int PADDED_DIM, bool ROTATED, role_t ROLE>
struct decompress_worker_t : row_writer_t<PADDED_DIM, ROTATED, ROLE> {
  using W = row_writer_t<PADDED_DIM, ROTATED, ROLE>;
  using W::format;
  using W::kKey;
  using W::lane;
  using W::params;
  static constexpr int kBlocks = PADDED_DIM / 32;
  static constexpr int kTogether = kBlocks < 4 ? kBlocks : 4;  // blocks whose sums are held at once
  static constexpr int kPasses = kBlocks / kTogether;
  const uint4* negate;  // shared: sign bits of every piece, to flip

  TURBOKV_DEVICE tile_layout_t Layout() const {
    return TileLayout(PADDED_DIM, params.k_format.codebook.bits, params.v_format.codebook.bits);
  }

  /*! \brief Finish and write what the products of kTogether blocks gave, and add offsets.
   *
   *  \param product  product(n, b, c): sets c[0], c[1] to coordinates 2 * n and 2 * n + 1 of the
   *                  lane's piece of row 0, c[2], c[3] to those of row 1; c from block b.
   *  \param factor   Of each row.
   *  \param offset   Of the head, or null for a row without one.
   */
  template <bool OFFSET, typename Product>
  TURBOKV_DEVICE void Transform(const tile_span_t& span, int head, int pass, bool magic,
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
        const uint32_t flip = reinterpret_cast<const uint32_t*>(negate + W::Piece(block))[n];
        TURBOKV_UNROLL
        for (int r = 0; r < 2; ++r) {
          float x = Mul(sums[2 * r][b], factor[r]), y = Mul(sums[2 * r + 1][b], factor[r]);
          if constexpr (OFFSET) {
            if (offset[r] != nullptr) {
              const float2 mu = W::OffsetAt(offset[r], W::Piece(block) * 8 + 2 * n);
              x = Add(__uint_as_float(__float_as_uint(x) ^ (flip << 16 & 0x80000000)), mu.x);
              y = Add(__uint_as_float(__float_as_uint(y) ^ (flip & 0x80000000)), mu.y);
              out[r][b][n] = W::Round(x, y);
              continue;
            }
          }
          out[r][b][n] = W::Round(x, y) ^ flip;
        }
      }
    }
    TURBOKV_UNROLL
    for (int b = 0; b < kTogether; ++b) {
      TURBOKV_UNROLL
      for (int r = 0; r < 2; ++r) W::Write(span, head, r, pass * kTogether + b, out[r][b]);
    }
  }

  /*! \brief Expand compressed tiles of a run of heads. */
  template <int BITS, bool OFFSET>
  TURBOKV_DEVICE void Expand(const tile_span_t& span, const table_t& table) const {
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
        if (OFFSET) offset[r] = W::Offset(span, head, r, scale[r]);
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
                const float2 mu = W::OffsetAt(offset[r], W::Piece(b) * 8 + i);
                x = Add(x, mu.x), y = Add(y, mu.y);
              }
              words[i / 2] = W::Round(x, y);
            }
            W::Write(span, head, r, b, words);
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
  TURBOKV_DEVICE void Copy(const tile_span_t& span) const {
    const uint32_t negative = __popc(lane & 3 & lane >> 3) & 1 ? 0xbc00bc00u : 0x3c003c00u;  // +-1
    const bool odd = (lane >> 2 & 1) != 0;
#pragma unroll 1
    for (int head = span.head_begin; head < span.head_end; ++head) {
      const half_t* const copy =
          WindowAddress(params.kv, span.copy, head, ROLE, lane / 4, PADDED_DIM);
      const auto read = [&](int block, int row) {
        return __ldg(reinterpret_cast<const uint4*>(copy + row * 8 * PADDED_DIM) + W::Piece(block));
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
              words[i] = W::Round(both.x, both.y);
            }
            W::Write(span, head, r, b, words);
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
  TURBOKV_DEVICE void Run(tile_schedule_t& schedule) const {
    const table_t table =
        BITS == 8 ? table_t{} : MakeTable<BITS, bytes_t::kSigned>(format.codebook);
    const bool offset = kKey && params.k_offset != nullptr;
    tile_span_t span;
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

}  // namespace decompress_detail
}  // namespace turbokv

#endif  // TURBOKV_DECOMPRESS_WORKER_CUH_
