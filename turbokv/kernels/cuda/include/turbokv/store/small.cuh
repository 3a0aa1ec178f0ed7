// SPDX-License-Identifier: Apache-2.0
// Store of a small batch: a warp a vector, four coordinates a lane at head sizes up to 128.
//
// What one token costs among the kernels of a server's step is the chain of a few hundred
// instructions, which no cache has, and of two loads. So warps share nothing and look nothing up in
// tables, what a call does not use is compiled out, and divisions are the host's.
#ifndef TURBOKV_STORE_SMALL_CUH_
#define TURBOKV_STORE_SMALL_CUH_

#include "turbokv/compress.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/store/params.cuh"
#include "turbokv/store/quads.cuh"
#include "turbokv/store/small_params.cuh"
#include "turbokv/store/vector.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace store_detail {

/*! \brief Four coordinates as they are in memory. */
template <typename DTypeIn>
struct raw_quad_t {
  uint32_t words[sizeof(DTypeIn)];
};

template <typename DTypeIn>
TURBOKV_DEVICE raw_quad_t<DTypeIn> LoadQuad(const DTypeIn* x) {
  raw_quad_t<DTypeIn> raw;
  if constexpr (sizeof(DTypeIn) == 4) {
    const uint4 data = __ldg(reinterpret_cast<const uint4*>(x));
    raw.words[0] = data.x, raw.words[1] = data.y, raw.words[2] = data.z, raw.words[3] = data.w;
  } else {
    const uint2 data = __ldg(reinterpret_cast<const uint2*>(x));
    raw.words[0] = data.x, raw.words[1] = data.y;
  }
  return raw;
}

/*! \brief The same of which `live` exist, from anywhere. */
template <typename DTypeIn>
TURBOKV_DEVICE raw_quad_t<DTypeIn> LoadQuad(const DTypeIn* x, int live, bool wide) {
  raw_quad_t<DTypeIn> raw = {};
  if (wide) {
    if (live > 0) raw = LoadQuad(x);
    return raw;
  }
  DTypeIn elements[4] = {};
  TURBOKV_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < live) elements[i] = x[i];
  }
  memcpy(raw.words, elements, sizeof(elements));
  return raw;
}

template <typename DTypeIn>
TURBOKV_DEVICE void WidenQuad(const raw_quad_t<DTypeIn>& raw, float* y) {
  if constexpr (sizeof(DTypeIn) == 4) {
    TURBOKV_UNROLL
    for (int i = 0; i < 4; ++i) y[i] = __uint_as_float(raw.words[i]);
  } else {
    Widen<DTypeIn>(raw.words[0], y[0], y[1]);
    Widen<DTypeIn>(raw.words[1], y[2], y[3]);
  }
}

/*! \brief Sum over the lanes of a vector, neighbours first; every lane gets it. */
template <class C>
TURBOKV_DEVICE float SumOverLanes(float x) {
  TURBOKV_UNROLL
  for (int stride = 1; stride < C::kLanes; stride *= 2) {
    x = __fadd_rn(x, __shfl_xor_sync(~0u, x, stride));
  }
  return x;
}

/*! \brief Negate, then transform; see Rotate and HadamardAcrossLanes.
 *
 *  \param flips  A bit for each of the lane's coordinates.
 */
template <class C>
TURBOKV_DEVICE void RotateQuads(uint32_t flips, int lane, float (&y)[C::kPerLane]) {
  TURBOKV_UNROLL
  for (int i = 0; i < C::kPerLane; ++i) {
    y[i] = __uint_as_float(__float_as_uint(y[i]) ^ (flips << (31 - i) & 0x80000000));
  }
  TURBOKV_UNROLL
  for (int i = 0; i < C::kPerLane; i += 2) y[i] = __fadd_rn(y[i], 0.0f);  // no -0 from here on
  Hadamard<C::kPerLane>(y);
  TURBOKV_UNROLL
  for (int stride = 1; stride < C::kLanes; stride *= 2) {
    const float sign = (lane & stride) ? -1.0f : 1.0f;
    TURBOKV_UNROLL
    for (int i = 0; i < C::kPerLane; ++i) {
      y[i] = __fmaf_rn(y[i], sign, __shfl_xor_sync(~0u, y[i], stride));
    }
  }
}

/*! \brief The stored scale as StoredScale computes it, with one division for all rules. */
TURBOKV_DEVICE uint16_t OneScale(scale_rule_t rule, float factor, float squares, float root,
                                 float product, float energy) {
  float over = product, under = energy;
  if (rule == scale_rule_t::kUnbiased) over = squares, under = product;
  if (rule == scale_rule_t::kNormCorrected) over = root, under = Sqrt(energy);
  if (rule == scale_rule_t::kPlain) over = root, under = 1.0f;
  float scale = Mul(Div(over, under), factor);
  if (squares <= kSquaresFloor) scale = 0.0f;
  return FloatToHalfBits(Clamp(scale, kLargestHalf));
}

/*! \brief A vector on its way through a warp. */
template <class C, typename DTypeIn>
struct small_vector_t {
  raw_quad_t<DTypeIn> raw[C::kQuads];
  uint32_t flips;
  float y[C::kPerLane];
  float squares;
  bool uncentred = false;

  /*! \brief Rotate what was read. \param mu  What to subtract if `centring`. */
  TURBOKV_DEVICE void Rotated(int lane, bool centring, const float (&mu)[C::kPerLane]) {
#pragma unroll 1
    for (bool clamp = false;; clamp = true) {
      TURBOKV_UNROLL
      for (int q = 0; q < C::kQuads; ++q) WidenQuad<DTypeIn>(raw[q], y + 4 * q);
      if (centring) Centre(mu);
      if (__builtin_expect(clamp, 0)) {
        TURBOKV_UNROLL
        for (int i = 0; i < C::kPerLane; ++i) {
          ptx::Opaque(y[i]);  // or it is done before the loop
          y[i] = Clamp(y[i], kInputLimit);
        }
      }
      RotateQuads<C>(flips, lane, y);
      squares = SumOverLanes<C>(TreeSumSquares(y));
      // see store_worker_t::ReadRotated
      if (clamp || __all_sync(~0u, squares < kInputLimit * kInputLimit)) return;
    }
  }

  /*! \brief Subtract, unless that lengthens the vector. */
  TURBOKV_DEVICE void Centre(const float (&mu)[C::kPerLane]) {
    const float full = SumOverLanes<C>(TreeSumSquares(y));
    float centred[C::kPerLane];
    TURBOKV_UNROLL
    for (int i = 0; i < C::kPerLane; ++i) centred[i] = Sub(y[i], mu[i]);
    uncentred = full < SumOverLanes<C>(TreeSumSquares(centred));
    TURBOKV_UNROLL
    for (int i = 0; i < C::kPerLane; ++i) y[i] = uncentred ? y[i] : centred[i];
  }
};

/*! \brief Write a lane's coordinates times `factor` in 16 bits, 8-byte aligned. */
template <int N>
TURBOKV_DEVICE void StoreQuads(uint16_t* out, dtype_t dtype, const float (&y)[N], float factor) {
  TURBOKV_UNROLL
  for (int first = 0; first < N; first += 4) {
    uint32_t words[2];
    TURBOKV_UNROLL
    for (int i = 0; i < 2; ++i) {
      words[i] = Narrow(dtype, Mul(y[first + 2 * i], factor), Mul(y[first + 2 * i + 1], factor));
    }
    *reinterpret_cast<uint2*>(out + first) = make_uint2(words[0], words[1]);
  }
}

/*! \brief Write the 16-bit forms of a rotated vector that are asked for.
 *
 *  \param copy  Slot of the tile's 16-bit copy, or -1.
 */
template <class C>
TURBOKV_DEVICE void WriteSmallCopies(const store_params_t& call, role_t role, int row, int head,
                                     int at, int copy, int token, const float (&y)[C::kPerLane]) {
  const bool key = role == role_t::kKey;
  const float factor = key ? call.k_format.inverse_root : call.v_format.inverse_root;
  uint16_t* rotated = static_cast<uint16_t*>(key ? call.k_rotated : call.v_rotated);
  if (rotated != nullptr && row >= 0) {
    rotated += row * (key ? call.k_rotated_token_stride : call.v_rotated_token_stride) +
               head * (key ? call.k_rotated_head_stride : call.v_rotated_head_stride) + at;
    StoreQuads(rotated, call.rotated_dtype, y, factor);
  }
  if (copy >= 0) {
    half_t* window = WindowAddress(call.kv, copy, head, role, token, C::kPaddedDim);
    StoreQuads(reinterpret_cast<uint16_t*>(window) + at, dtype_t::kFloat16, y, factor);
  }
}

/*! \brief Write codes; `bits` is BITS unless that is 0. */
template <class C, int BITS, role_t ROLE>
TURBOKV_DEVICE void WriteQuads(int bits, uint8_t* base, uint8_t* high, int token, bool stored,
                               int first, const uint32_t (&w)[C::kPerLane],
                               const float (&y)[C::kPerLane]) {
  constexpr int kDim = C::kPaddedDim, kQuads = C::kQuads;
  if constexpr (BITS == 0) {
    switch (bits) {
      case 2:
        return WriteQuads<C, 2, ROLE>(bits, base, high, token, stored, first, w, y);
      case 3:
        return WriteQuads<C, 3, ROLE>(bits, base, high, token, stored, first, w, y);
      case 4:
        return WriteQuads<C, 4, ROLE>(bits, base, high, token, stored, first, w, y);
      case 5:
        return WriteQuads<C, 5, ROLE>(bits, base, high, token, stored, first, w, y);
      default:
        return WriteQuads<C, 8, ROLE>(bits, base, high, token, stored, first, w, y);
    }
  } else if constexpr (ROLE == role_t::kKey) {
    WriteKeyQuads<BITS, kDim, kQuads>(base, high, token, stored, first, w, y);
  } else {
    WriteValueQuads<BITS, kDim, kQuads>(base, high, token, stored, first, w, y);
  }
}

/*! \brief Read a lane's part of the offset of a key, zeros where there is none. */
template <class C>
TURBOKV_DEVICE void ReadOffset(const store_params_t& call, int64_t position, int head, int at,
                               bool wide, float (&mu)[C::kPerLane]) {
  const int64_t segment = position > 0 ? position / kTokensPerSegment : 0;
  const float* const from =
      call.k_offset + (segment * call.kv.num_kv_heads + head) * call.kv.head_dim + at;
  const int live = call.kv.head_dim - at;
  TURBOKV_UNROLL
  for (int i = 0; i < C::kPerLane; i += 4) {
    if (wide) {
      if (i < live) {
        const float4 part = __ldg(reinterpret_cast<const float4*>(from + i));
        mu[i] = part.x, mu[i + 1] = part.y, mu[i + 2] = part.z, mu[i + 3] = part.w;
      }
    } else {
      TURBOKV_UNROLL
      for (int j = i; j < i + 4; ++j) mu[j] = j < live ? from[j] : 0.0f;
    }
  }
}

/*! \brief Rotate, and write 16-bit forms and centre as the call wants; for calls that are not
 * plain.
 *
 *  \param copy  See WriteSmallCopies.
 */
template <class C, typename DTypeIn, role_t ROLE>
TURBOKV_DEVICE void RotateAndCopy(const store_params_t& call, small_vector_t<C, DTypeIn>& vector,
                                  int lane, int row, int head, int at, int copy, int token,
                                  bool centring, const float (&mu)[C::kPerLane]) {
  const bool copies = (ROLE == role_t::kKey ? call.k_rotated : call.v_rotated) != nullptr ||
                      call.kv.window != nullptr;
  // 16-bit forms are not centred, so centred keys that have one are rotated twice
#pragma unroll 1
  for (int pass = centring && copies ? 0 : 1; pass < 2; ++pass) {
    vector.Rotated(lane, pass == 1 && centring, mu);
    if (copies && (pass == 0 || !centring)) {
      WriteSmallCopies<C>(call, ROLE, row, head, at, copy, token, vector.y);
    }
  }
}

/*! \brief Compress a warp's rows of one role. \tparam BITS  0: read from the parameters. */
template <class C, typename DTypeIn, int BITS, role_t ROLE, class Params>
TURBOKV_DEVICE void StoreSmall(const Params& params) {
  constexpr bool kPlain = std::is_same<Params, small_params_t<C::kPaddedDim>>::value;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int part = lane % C::kLanes, at = part * C::kPerLane, head = blockIdx.x;
  const small_role_t<C::kPaddedDim>& role = params.roles[static_cast<int>(ROLE)];
  const int bits = BITS > 0 ? BITS : role.bits;
  const int first_row = (blockIdx.y * params.warps + warp) * C::kVectors;
  if (first_row >= params.nnz) return;
  const int own_row = first_row + lane / C::kLanes;
  const int row = own_row < params.nnz ? own_row : -1;
  const DTypeIn* const x = static_cast<const DTypeIn*>(role.x) + at +
                           max(row, 0) * role.token_stride + head * role.head_stride;
  const int64_t* const slot_at = params.slot_mapping + max(row, 0);
  const lane_codebook_t book = {role.entries[lane & 15], role.boundaries[lane & 15]};
  small_vector_t<C, DTypeIn> vector = {};
  vector.flips = role.signs[at / 32] >> (at % 32);
  int64_t slot = -1, position = 0;
  bool centring = false;
  if constexpr (!kPlain) centring = ROLE == role_t::kKey && params.call.k_offset != nullptr;
  ptx::WaitForPrimary();
  ptx::LaunchDependentsIf(params.launch_dependents);
  if (row >= 0) {
    TURBOKV_UNROLL
    for (int q = 0; q < C::kQuads; ++q) {
      if constexpr (kPlain) {
        vector.raw[q] = LoadQuad(x + 4 * q);
      } else {
        vector.raw[q] = LoadQuad(x + 4 * q, params.call.kv.head_dim - at - 4 * q, params.wide);
      }
    }
    slot = *slot_at;
    if constexpr (!kPlain) {
      if (centring) position = params.call.positions[row];
    }
  }
  const bool stored = slot >= 0;
  const uint32_t tile_number = static_cast<uint32_t>(max(slot, int64_t{0}) >> 4);  // below 2^32
  const int shift = params.shift & 31, token = static_cast<int>(slot) & 15;
  uint32_t page = tile_number >> shift, tile_index = tile_number - (page << shift);
  if constexpr (!kPlain) {
    if (params.shift < 0) {
      const uint32_t tiles = params.call.kv.page_size / kTokensPerTile;
      page = tile_number / tiles, tile_index = tile_number % tiles;
    }
  }
  uint8_t* const tile = params.pages + page * params.page_stride + head * params.head_stride +
                        static_cast<int64_t>(tile_index) * params.tile_bytes;
  float mu[C::kPerLane] = {};
  if constexpr (kPlain) {
    vector.Rotated(lane, false, mu);
  } else {
    // positions of skipped rows mean nothing
    if (centring && stored) ReadOffset<C>(params.call, position, head, at, params.wide_offset, mu);
    const int copy = stored ? TileSlot(params.call.kv, page, tile_index) : -1;
    RotateAndCopy<C, DTypeIn, ROLE>(params.call, vector, lane, row, head, at, copy, token, centring,
                                    mu);
  }
  const float root = Sqrt(vector.squares);
  const float factor =
      vector.squares <= kSquaresFloor ? 0.0f : Div(role.normaliser, root) * 0x1p-7f;
  uint32_t w[C::kPerLane];
  LookUp<BITS>(vector.y, factor, bits, book, w);
  float terms[C::kPerLane], energy = 0.0f;
  TURBOKV_UNROLL
  for (int i = 0; i < C::kPerLane; ++i) {
    const float magnitude = __uint_as_float(w[i] & 0xffff0000);
    terms[i] = Mul(fabsf(vector.y[i]), magnitude);
    energy = __fmaf_rn(magnitude, magnitude, energy);
  }
  WriteQuads<C, BITS, ROLE>(bits, tile + role.base, tile + role.high, token, stored,
                            part * C::kQuads, w, vector.y);
  float product = TreeSum(terms);
  TURBOKV_UNROLL
  for (int stride = 1; stride < C::kLanes; stride *= 2) {
    product = __fadd_rn(product, __shfl_xor_sync(~0u, product, stride));
    energy = __fadd_rn(energy, __shfl_xor_sync(~0u, energy, stride));
  }
  const uint16_t scale =
      OneScale(role.rule, role.scale_factor, vector.squares, root, product, energy);
  if (stored && part == 0) {
    *reinterpret_cast<uint16_t*>(tile + role.scale + 4 * token) =
        static_cast<uint16_t>(scale | (vector.uncentred ? 0x8000 : 0));
  }
}

/*! \brief Compress the rows of a CTA in one head: grid [heads, rows / (warps * vectors), 2 roles].
 *
 *  \tparam K_BITS, V_BITS  Widths; both 0: those of the parameters.
 *  \tparam Params          small_params_t: a plain call; small_call_t: any.
 */
template <class C, typename DTypeIn, int K_BITS, int V_BITS, class Params>
__global__ void __launch_bounds__(C::kMaxWarps * 32)
    SmallStoreKernel(const __grid_constant__ Params params) {
  // two bodies, so that constants are operands and nothing is chosen by role
  if (blockIdx.z == 0) {
    StoreSmall<C, DTypeIn, K_BITS, role_t::kKey>(params);
  } else {
    StoreSmall<C, DTypeIn, V_BITS, role_t::kValue>(params);
  }
}

/*! \brief Call `launch(kernel, parameters)` with the kernel that a call of a small batch wants: one
 *  of its own for widths that presets have and 16-bit inputs.
 */
template <class C, typename DTypeIn, class Launch>
inline auto VisitSmall(const store_params_t& call, int warps, const Launch& launch) {
  using plain_t = small_params_t<C::kPaddedDim>;
  using any_t = small_call_t<C::kPaddedDim>;
  any_t any = {};
  plain_t& plain = any;
  FillSmall(call, warps, plain);
  const bool is_plain = IsPlain<C::kPaddedDim, DTypeIn>(call);
  any.call = call, any.wide = HasAlignedPieces<DTypeIn, 4>(call);
  any.wide_offset =
      reinterpret_cast<uintptr_t>(call.k_offset) % 16 == 0 && call.kv.head_dim % 4 == 0;
  if constexpr (sizeof(DTypeIn) == 2) {
    switch (call.k_format.codebook.bits * 10 + call.v_format.codebook.bits) {
      case 44:
        return is_plain ? launch(SmallStoreKernel<C, DTypeIn, 4, 4, plain_t>, plain)
                        : launch(SmallStoreKernel<C, DTypeIn, 4, 4, any_t>, any);
      case 53:
        return is_plain ? launch(SmallStoreKernel<C, DTypeIn, 5, 3, plain_t>, plain)
                        : launch(SmallStoreKernel<C, DTypeIn, 5, 3, any_t>, any);
      case 33:
        return is_plain ? launch(SmallStoreKernel<C, DTypeIn, 3, 3, plain_t>, plain)
                        : launch(SmallStoreKernel<C, DTypeIn, 3, 3, any_t>, any);
      case 22:
        return is_plain ? launch(SmallStoreKernel<C, DTypeIn, 2, 2, plain_t>, plain)
                        : launch(SmallStoreKernel<C, DTypeIn, 2, 2, any_t>, any);
    }
  }
  return launch(SmallStoreKernel<C, DTypeIn, 0, 0, any_t>, any);
}

}  // namespace store_detail
}  // namespace turbokv

#endif  // TURBOKV_STORE_SMALL_CUH_
