// SPDX-License-Identifier: Apache-2.0
// The headers' host functions behind a C interface, for tests/test_headers.py. Compiled without
// CUDA.
#include <cstring>
#include <type_traits>

#include "turbokv/turbokv.cuh"

namespace {

using namespace turbokv;  // NOLINT: a test

/*! \brief Call `function` with the padded size as a constant. */
template <typename Function>
void Dispatch(int head_dim, Function function) {
  switch (PaddedDim(head_dim)) {
    case 64:
      return function(std::integral_constant<int, 64>());
    case 128:
      return function(std::integral_constant<int, 128>());
    case 256:
      return function(std::integral_constant<int, 256>());
    case 512:
      return function(std::integral_constant<int, 512>());
  }
}

role_t Role(int value) { return value ? role_t::kValue : role_t::kKey; }

vector_format_t Format(int role, int bits, int head_dim, int rule) {
  return MakeVectorFormat(Role(role), GaussianCodebook(bits), head_dim,
                          static_cast<scale_rule_t>(rule));
}

}  // namespace

extern "C" {

int FormatVersion() { return kFormatVersion; }

void Codebook(int bits, int8_t* magnitudes, double* step, int* frac_bits) {
  const codebook_t book = GaussianCodebook(bits);
  std::memcpy(magnitudes, book.magnitudes, NumMagnitudes(book));
  *step = book.step;
  *frac_bits = book.frac_bits;
}

int AcceptsCodebook(int bits, const int8_t* magnitudes, double step) {
  codebook_t book = {bits, 0, step, {}};
  if (bits >= 1 && bits <= 8) std::memcpy(book.magnitudes, magnitudes, NumMagnitudes(book));
  return IsValid(book);
}

void Signs(int role, uint32_t seed, int dim, float* signs) {
  for (int j = 0; j < dim; ++j) signs[j] = IsNegated(Role(role), seed, j) ? -1.0f : 1.0f;
}

void Constants(int role, int bits, int head_dim, float* constants) {
  const vector_format_t format = Format(role, bits, head_dim, 0);
  constants[0] = format.normaliser;
  constants[1] = format.scale_factor;
  constants[2] = format.plain_factor;
  constants[3] = format.inverse_root;
}

void Transform(int dim, float* x) {
  Dispatch(dim, [&](auto constant) {
    constexpr int kDim = decltype(constant)::value;
    float y[kDim];
    std::memcpy(y, x, sizeof(y));
    Hadamard(y);
    std::memcpy(x, y, sizeof(y));
  });
}

/* Index of the magnitude that each value in lattice units takes. */
void Cells(int bits, int count, const float* lattice, uint8_t* index) {
  const codebook_t book = GaussianCodebook(bits);
  for (int i = 0; i < count; ++i) {
    const uint32_t cell = CellBits(lattice[i], 0x1p-7f) - kCellOrigin;
    index[i] = static_cast<uint8_t>(CellIndex(book, static_cast<int>(cell)));
  }
}

/* Compress [count, head_dim] of a dtype to codes [count, padded_dim] and scales; offset may be
 * null. */
void Compress(int role, int bits, int head_dim, int rule, int dtype, int count, const void* x,
              const float* offset, uint8_t* codes, uint16_t* scales) {
  const vector_format_t format = Format(role, bits, head_dim, rule);
  Dispatch(head_dim, [&](auto constant) {
    constexpr int kDim = decltype(constant)::value;
    for (int i = 0; i < count; ++i) {
      float vector[kDim];
      for (int j = 0; j < head_dim; ++j) {
        vector[j] =
            LoadElement(x, static_cast<int64_t>(i) * head_dim + j, static_cast<dtype_t>(dtype));
      }
      uint8_t* const out = codes + static_cast<int64_t>(i) * kDim;
      scales[i] = offset == nullptr ? CompressVector<kDim>(vector, format, out)
                                    : CompressCentred<kDim>(vector, offset, format, out);
    }
  });
}

void Decompress(int role, int bits, int head_dim, int rotated, int count, const uint8_t* codes,
                const uint16_t* scales, float* out) {
  const vector_format_t format = Format(role, bits, head_dim, 0);
  Dispatch(head_dim, [&](auto constant) {
    constexpr int kDim = decltype(constant)::value;
    for (int64_t i = 0; i < count; ++i) {
      if (rotated) {
        DecompressRotated<kDim>(codes + i * kDim, scales[i], format, out + i * kDim);
      } else {
        DecompressVector<kDim>(codes + i * kDim, scales[i], format, out + i * head_dim);
      }
    }
  });
}

int TileBytesOf(int dim, int k_bits, int v_bits) { return TileLayout(dim, k_bits, v_bits).bytes; }

/* Put codes [16, dim] and scales [16] of one role into a tile. */
void PackTile(int role, int dim, int k_bits, int v_bits, const uint8_t* codes,
              const uint16_t* scales, uint8_t* tile) {
  const tile_layout_t layout = TileLayout(dim, k_bits, v_bits);
  for (int token = 0; token < kTokensPerTile; ++token) {
    PackToken(tile, Role(role), token, dim, k_bits, v_bits, codes + token * dim);
    std::memcpy(tile + ScaleOffset(layout, Role(role), token), scales + token, 2);
  }
}

void UnpackTile(int role, int dim, int k_bits, int v_bits, const uint8_t* tile, uint8_t* codes) {
  for (int token = 0; token < kTokensPerTile; ++token) {
    UnpackToken(tile, Role(role), token, dim, k_bits, v_bits, codes + token * dim);
  }
}

/* 32 high bits by the kernels' word-wise form: equal to HighPosition of every bit. */
uint32_t OrderHigh(int role, uint32_t x) { return OrderHighBits(Role(role), x); }

uint32_t NaturalHigh(int role, uint32_t x) { return NaturalHighBits(Role(role), x); }

int HighPositionOf(int role, int j) { return HighPosition(Role(role), j); }

int HighCoordinateOf(int role, int position) { return HighCoordinate(Role(role), position); }

uint16_t ToHalf(float x) { return FloatToHalfBits(x); }

float FromHalf(uint16_t bits) { return HalfBitsToFloat(bits); }

uint16_t ToBFloat16(float x) { return FloatToBFloat16Bits(x); }

int CountPagesOf(int length, int page_size, int max_pages) {
  return CountPages(length, page_size, max_pages);
}

int64_t PageOffset(int64_t page_stride, int64_t head_stride, int64_t page, int head, int tile,
                   int tile_bytes) {
  paged_kv_t kv = {};
  kv.page_stride = page_stride;
  kv.head_stride = head_stride;
  return reinterpret_cast<intptr_t>(TileAddress(kv, page, head, tile, tile_bytes));
}
}
