// SPDX-License-Identifier: Apache-2.0
// Which tiles of which requests a warp of decompress takes.
#ifndef TURBOKV_DECOMPRESS_SCHEDULE_CUH_
#define TURBOKV_DECOMPRESS_SCHEDULE_CUH_

#include "turbokv/decompress/params.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace decompress_detail {

constexpr int kWarps = 4;
/*! \brief Tokens of a tile that are wanted, and where they go. */
struct tile_span_t {
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
struct tile_schedule_t {
  uint32_t unit, end;

  TURBOKV_DEVICE tile_schedule_t(const decompress_params_t& params, int warp) {
    const uint32_t num_units = static_cast<uint32_t>(NumTiles(params)) * params.kv.num_kv_heads;
    const uint32_t num_warps = gridDim.x * kWarps, own = warp * gridDim.x + blockIdx.x;
    const uint32_t run = num_units / num_warps, longer = num_units % num_warps;
    unit = own * run + min(own, longer);
    end = unit + run + (own < longer ? 1 : 0);
  }

  /*! \brief Find the next tile and its run of heads; false when there is none. */
  TURBOKV_DEVICE bool Next(const decompress_params_t& params, tile_span_t& span) {
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

}  // namespace decompress_detail
}  // namespace turbokv

#endif  // TURBOKV_DECOMPRESS_SCHEDULE_CUH_
