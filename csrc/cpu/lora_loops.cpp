// LoRA (Hu et al. 2021, arXiv 2106.09685): its products between activations and matrices with a short side r.
//
// Each is 2 T d r operations and one pass over the activation; forward needs two of them, training four more, beside
// the base's 2 T d1 d2 each way. So the floor of the adapter's share is r (d1 + d2) / (d1 d2) of the base product.
// Tiles of accumulators stay in registers while they add up: a vector multiply-add for every load or broadcast.
#include "cpu/lora_loops.h"

#include "cpu/simd.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

// Sums over more tokens than this are made of partial sums, which lose fewer digits.
constexpr int64_t kPartialTokens = 64;

template <typename T>
inline const T* row_of(Rows x, int64_t t) {
  return static_cast<const T*>(x.data) + t * x.stride;
}

template <typename T>
inline T* row_of(MutableRows y, int64_t t) {
  return static_cast<T*>(y.data) + t * y.stride;
}

// kTokens x kRanks dot products along the features.
template <typename T, int kTokens, int kRanks>
inline void project_tile(Rows x, int64_t t, const Shards& m, int64_t r, float scale, float* h) {
  Vector sums[kTokens][kRanks] = {};
  for (int64_t k = 0; k < m.per_row; ++k) {
    const T* rows[kTokens];
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) rows[i] = row_of<T>(x, t + i) + k * m.width;
    const float* weights[kRanks];
#pragma GCC unroll 8
    for (int i = 0; i < kRanks; ++i) weights[i] = m.shards[(r + i) * m.per_row + k];
    const auto add = [&](int64_t j, auto load) {
      Vector values[kTokens];
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; ++i) values[i] = load(rows[i] + j);
#pragma GCC unroll 8
      for (int n = 0; n < kRanks; ++n) {
        const Vector weight = load(weights[n] + j);
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; ++i) sums[i][n] += values[i] * weight;
      }
    };
    int64_t j = 0;
    for (; j + kLanes <= m.width; j += kLanes) add(j, [](const auto* from) { return load_vector(from); });
    if (const int64_t rest = m.width - j; rest > 0) add(j, [rest](const auto* from) { return load_some(from, rest); });
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < kRanks; ++n) h[(t + i) * m.rank + r + n] = scale * sum_of(sums[i][n]);
  }
}

template <typename T, int kTokens, int kRanks>
inline void project_ranks(Rows x, int64_t t, const Shards& m, float scale, float* h) {
  int64_t r = 0;
  for (; r + kRanks <= m.rank; r += kRanks) project_tile<T, kTokens, kRanks>(x, t, m, r, scale, h);
  for (; r < m.rank; ++r) project_tile<T, kTokens, 1>(x, t, m, r, scale, h);
}

// kTokens rows of y, kVectors vectors wide, in registers over all ranks; from column j of shard k on.
template <typename T, int kTokens, int kVectors, typename Load, typename Store>
inline void expand_tile(const float* h, const Shards& m, MutableRows y, int64_t t, int64_t k, int64_t j, Load load,
                        Store store) {
  Vector sums[kTokens][kVectors] = {};
  for (int64_t r = 0; r < m.rank; ++r) {
    const float* shard = m.shards[r * m.per_row + k] + j;
    Vector weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = load(shard + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] += weights[v] * h[(t + i) * m.rank + r];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = row_of<T>(y, t + i) + k * m.width + j + v * kLanes;
      store(to, load(to) + sums[i][v]);
    }
  }
}

template <typename T, int kTokens>
inline void expand_columns(const float* h, const Shards& m, MutableRows y, int64_t t) {
  constexpr int kVectors = kLanes == 16 ? 4 : 2;  // as many sums as the registers hold
  const auto load = [](const auto* from) { return load_vector(from); };
  const auto store = [](T* to, Vector value) { store_vector(to, value); };
  for (int64_t k = 0; k < m.per_row; ++k) {
    int64_t j = 0;
    for (; j + kVectors * kLanes <= m.width; j += kVectors * kLanes) {
      expand_tile<T, kTokens, kVectors>(h, m, y, t, k, j, load, store);
    }
    for (; j + kLanes <= m.width; j += kLanes) expand_tile<T, kTokens, 1>(h, m, y, t, k, j, load, store);
    if (const int64_t rest = m.width - j; rest > 0) {
      expand_tile<T, kTokens, 1>(
          h, m, y, t, k, j, [rest](const auto* from) { return load_some(from, rest); },
          [rest](T* to, Vector value) { store_some(to, value, rest); });
    }
  }
}

// One vector of columns, kRanks rows of the result in registers over all tokens.
template <typename T, int kRanks, typename Load, typename Store>
inline void correlate_tile(const float* h, Rows x, int64_t tokens, float scale, const Shards& m, int64_t r, int64_t k,
                           int64_t j, bool add, Load load, Store store) {
  Vector totals[kRanks] = {};
  for (int64_t first = 0; first < tokens; first += kPartialTokens) {
    const int64_t last = first + kPartialTokens < tokens ? first + kPartialTokens : tokens;
    Vector sums[kRanks] = {};
    for (int64_t t = first; t < last; ++t) {
      const Vector values = load(row_of<T>(x, t) + k * m.width + j);
#pragma GCC unroll 16
      for (int n = 0; n < kRanks; ++n) sums[n] += values * h[t * m.rank + r + n];
    }
#pragma GCC unroll 16
    for (int n = 0; n < kRanks; ++n) totals[n] += sums[n];
  }
#pragma GCC unroll 16
  for (int n = 0; n < kRanks; ++n) {
    float* to = const_cast<float*>(m.shards[(r + n) * m.per_row + k]) + j;
    store(to, add ? load(to) + scale * totals[n] : scale * totals[n]);
  }
}

template <typename T, typename Load, typename Store>
inline void correlate_ranks(const float* h, Rows x, int64_t tokens, float scale, const Shards& m, int64_t k, int64_t j,
                            bool add, Load load, Store store) {
  int64_t r = 0;
  if constexpr (kLanes == 16) {  // 32 registers hold the sums of 16 ranks
    for (; r + 16 <= m.rank; r += 16) correlate_tile<T, 16>(h, x, tokens, scale, m, r, k, j, add, load, store);
  }
  for (; r + 8 <= m.rank; r += 8) correlate_tile<T, 8>(h, x, tokens, scale, m, r, k, j, add, load, store);
  for (; r + 2 <= m.rank; r += 2) correlate_tile<T, 2>(h, x, tokens, scale, m, r, k, j, add, load, store);
  for (; r < m.rank; ++r) correlate_tile<T, 1>(h, x, tokens, scale, m, r, k, j, add, load, store);
}

void project(Scalar scalar, Rows x, const Shards& m, int64_t tokens, float scale, float* h) {
  with_scalar(scalar, [&]<typename T>(T) {
    constexpr int kRanks = kLanes == 16 ? 4 : 2;  // as many sums as the registers hold
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) project_ranks<T, 4, kRanks>(x, t, m, scale, h);
    for (; t < tokens; ++t) project_ranks<T, 1, 8>(x, t, m, scale, h);
  });
}

void expand(Scalar scalar, const float* h, const Shards& m, int64_t tokens, MutableRows y) {
  with_scalar(scalar, [&]<typename T>(T) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) expand_columns<T, 4>(h, m, y, t);
    for (; t < tokens; ++t) expand_columns<T, 1>(h, m, y, t);
  });
}

void correlate(Scalar scalar, const float* h, Rows x, int64_t tokens, float scale, const Shards& m, int64_t first,
               int64_t last, bool add) {
  with_scalar(scalar, [&]<typename T>(T) {
    for (int64_t k = 0; k < m.per_row; ++k) {
      int64_t j = first;
      for (; j + kLanes <= last; j += kLanes) {
        correlate_ranks<T>(
            h, x, tokens, scale, m, k, j, add, [](const auto* from) { return load_vector(from); },
            [](float* to, Vector value) { store_vector(to, value); });
      }
      if (const int64_t rest = last - j; rest > 0) {
        correlate_ranks<T>(
            h, x, tokens, scale, m, k, j, add, [rest](const auto* from) { return load_some(from, rest); },
            [rest](float* to, Vector value) { store_some(to, value, rest); });
      }
    }
  });
}

void transpose_matrix(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out,
                      int64_t out_stride) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t height = rows - i < kLanes ? rows - i : kLanes;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t width = columns - j < kLanes ? columns - j : kLanes;
      Vector block[kLanes];
      if (height == kLanes && width == kLanes) {
#pragma GCC unroll 16
        for (int64_t k = 0; k < kLanes; ++k) block[k] = load_vector(in + (i + k) * in_stride + j);
        transpose(block);
#pragma GCC unroll 16
        for (int64_t k = 0; k < kLanes; ++k) store_vector(out + (j + k) * out_stride + i, block[k]);
        continue;
      }
      for (int64_t k = 0; k < kLanes; ++k)
        block[k] = k < height ? load_some(in + (i + k) * in_stride + j, width) : Vector{};
      transpose(block);
      for (int64_t k = 0; k < width; ++k) store_some(out + (j + k) * out_stride + i, block[k], height);
    }
  }
}

}  // namespace

const LoraLoops lora = {project, expand, correlate, transpose_matrix};

}  // namespace fastpeft::FASTPEFT_ISA
