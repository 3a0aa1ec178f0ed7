// SPDX-License-Identifier: Apache-2.0
// One vector in the lanes of a warp: read, centred, rotated, written in 16 bits. Nothing here knows
// of pages.
#ifndef TURBOKV_STORE_VECTOR_CUH_
#define TURBOKV_STORE_VECTOR_CUH_

#include "turbokv/hadamard.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace store_detail {

/*! \brief Two 16-bit numbers of a word as fp32: exact. */
template <typename DTypeIn>
TURBOKV_DEVICE void Widen(uint32_t word, float& first, float& second) {
  if constexpr (std::is_same<DTypeIn, half_t>::value) {
    __half2 pair;
    memcpy(&pair, &word, 4);
    const float2 wide = __half22float2(pair);
    first = wide.x, second = wide.y;
  } else {
    first = __uint_as_float(word << 16), second = __uint_as_float(word & 0xffff0000);
  }
}

/*! \brief Read a lane's coordinates, of which `live` exist; the others become zero.
 *
 *  \param wide  Whether `x` and the number of elements allow loads of 16 bytes.
 */
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
      } else {
        Widen<DTypeIn>(words[i], y[first + 2 * i], y[first + 2 * i + 1]);
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

/*! \brief Two numbers in 16 bits. */
TURBOKV_DEVICE uint32_t Narrow(dtype_t dtype, float a, float b) {
  uint32_t word;
  if (dtype == dtype_t::kFloat16) {
    const __half2 pair = __floats2half2_rn(a, b);
    memcpy(&word, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    memcpy(&word, &pair, 4);
  }
  return word;
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
      words[i] = Narrow(dtype, Mul(y[first + 2 * i], factor), Mul(y[first + 2 * i + 1], factor));
    }
    *reinterpret_cast<uint4*>(out + first) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

/*! \brief Write the first BYTES of `words`: 1, 2, 3, 4, 6, 8, 12 or a multiple of 16.
 *
 *  \param out  As aligned as BYTES is divisible, up to 16.
 */
template <int BYTES, int N>
TURBOKV_DEVICE void StoreBytes(uint8_t* out, const uint32_t (&words)[N]) {
  if constexpr (BYTES % 16 == 0) {
    TURBOKV_UNROLL
    for (int i = 0; i < BYTES / 4; i += 4) {
      *reinterpret_cast<uint4*>(out + 4 * i) =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  } else if constexpr (BYTES % 8 == 0) {
    TURBOKV_UNROLL
    for (int i = 0; i < BYTES / 4; i += 2) {
      *reinterpret_cast<uint2*>(out + 4 * i) = make_uint2(words[i], words[i + 1]);
    }
  } else if constexpr (BYTES % 4 == 0) {
    TURBOKV_UNROLL
    for (int i = 0; i < BYTES / 4; ++i) *reinterpret_cast<uint32_t*>(out + 4 * i) = words[i];
  } else if constexpr (BYTES % 2 == 0) {
    TURBOKV_UNROLL
    for (int i = 0; i < BYTES / 2; ++i) {
      *reinterpret_cast<uint16_t*>(out + 2 * i) =
          static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
  } else {
    TURBOKV_UNROLL
    for (int i = 0; i < BYTES; ++i) out[i] = static_cast<uint8_t>(words[i / 4] >> (i % 4 * 8));
  }
}

}  // namespace store_detail
}  // namespace turbokv

#endif  // TURBOKV_STORE_VECTOR_CUH_
