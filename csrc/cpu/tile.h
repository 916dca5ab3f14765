// Tiles of tokens, one token per SIMD lane: how rows become one and come back. Part of the loops that include it.
#pragma once

#include "cpu/rows.h"
#include "cpu/simd.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

template <typename T, bool kAll>
inline void load_tile_from(const T* rows, int64_t row_stride, int64_t tokens, int64_t features, Vector* tile,
                           int64_t stride) {
  int64_t j = 0;
  for (; j + kLanes <= features; j += kLanes) {
    Vector block[kLanes];
#pragma GCC unroll 16
    for (int64_t t = 0; t < kLanes; ++t)
      block[t] = kAll || t < tokens ? load_vector(rows + t * row_stride + j) : Vector{};
    transpose(block);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) tile[(j + i) * stride] = block[i];
  }
  for (; j < features; ++j) {
    Vector values = {};
    for (int64_t t = 0; t < (kAll ? kLanes : tokens); ++t) values[t] = to_float(rows[t * row_stride + j]);
    tile[j * stride] = values;
  }
}

// tile[j * stride] = feature j of the first kLanes tokens, zeros for those that are missing.
template <typename T>
inline void load_tile(Rows x, int64_t tokens, int64_t features, Vector* tile, int64_t stride) {
  const T* rows = static_cast<const T*>(x.data);
  if (tokens >= kLanes) {
    load_tile_from<T, true>(rows, x.stride, tokens, features, tile, stride);
  } else {
    load_tile_from<T, false>(rows, x.stride, tokens, features, tile, stride);
  }
}

// y = tile, or y += tile, for the first kLanes tokens.
template <typename T, bool kAdd>
inline void store_tile(const Vector* tile, int64_t stride, int64_t tokens, int64_t features, MutableRows y) {
  T* rows = static_cast<T*>(y.data);
  const int64_t count = tokens < kLanes ? tokens : kLanes;
  int64_t j = 0;
  for (; j + kLanes <= features; j += kLanes) {
    Vector block[kLanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) block[i] = tile[(j + i) * stride];
    transpose(block);
    for (int64_t t = 0; t < count; ++t) {
      T* to = rows + t * y.stride + j;
      store_vector(to, kAdd ? load_vector(to) + block[t] : block[t]);
    }
  }
  for (; j < features; ++j) {
    for (int64_t t = 0; t < count; ++t) {
      T* to = rows + t * y.stride + j;
      const float value = tile[j * stride][t];
      *to = from_float<T>(kAdd ? to_float(*to) + value : value);
    }
  }
}

}  // namespace
}  // namespace fastpeft::FASTPEFT_ISA
