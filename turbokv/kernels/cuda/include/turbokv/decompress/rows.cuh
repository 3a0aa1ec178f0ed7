// SPDX-License-Identifier: Apache-2.0
// Rows of decompress's outputs: where a lane's coordinates go, in which type, with which offset.
#ifndef TURBOKV_DECOMPRESS_ROWS_CUH_
#define TURBOKV_DECOMPRESS_ROWS_CUH_

#include "turbokv/decompress.cuh"
#include "turbokv/decompress/params.cuh"
#include "turbokv/decompress/schedule.cuh"
#include "turbokv/types.cuh"
#include "turbokv/vector_format.cuh"

namespace turbokv {
namespace decompress_detail {

/*! \brief Writes pieces of eight coordinates: lane 4 * g + t has tokens g and g + 8 (rows 0 and 1)
 *  and coordinates 8 * t to 8 * t + 7 of every block of 32.
 */
template <int PADDED_DIM, bool ROTATED, role_t ROLE>
struct row_writer_t {
  static constexpr bool kKey = ROLE == role_t::kKey;
  const decompress_params_t& params;
  const vector_format_t& format;
  int lane;
  bool wide;         // whether outputs are written in 16 bytes
  bool wide_offset;  // whether offsets are read in 8

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
  TURBOKV_DEVICE void Write(const tile_span_t& span, int head, int row, int block,
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

  /*! \brief Offset of a head's keys for a row, or null if none is to be added. */
  TURBOKV_DEVICE const float* Offset(const tile_span_t& span, int head, int row,
                                     uint16_t scale) const {
    const int token = lane / 4 + 8 * row;
    // tokens that are not written may belong to a segment that does not exist
    if (IsUncentred(scale) || token < span.begin || token >= span.end) return nullptr;
    return params.k_offset +
           (static_cast<int64_t>(span.segment) * params.kv.num_kv_heads + head) * Dim();
  }
};

}  // namespace decompress_detail
}  // namespace turbokv

#endif  // TURBOKV_DECOMPRESS_ROWS_CUH_
