// What follows BOFT's product: y = (y0 - b) s + b with y0 = x R W^T + b, and the way back through it,
//
//     dy0 = g s,    ds = sum over the tokens of g (y0 - b).
//
// y is computed as y0 + (y0 - b)(s - 1), which leaves y0 as it is, to the last bit, where s is one: a fresh adapter
// changes nothing.
//
// A thread has the same few features of several rows, and reads their scale and bias once.
//
// Raw pointers only, no allocation, no synchronisation with the host. tests/cuda_host compiles this file for a CPU.
#pragma once

#include "cuda/boft_launch.cuh"
#include "cuda/element.cuh"

namespace fastpeft {

constexpr int kScaleLanes = 32;  // threads side by side in a row
constexpr int kScaleRows = 8;    // rows of threads
constexpr int kScaleBatch = 4;   // rows of a thread that are on their way at the same time
constexpr int kScaleTileRows = kScaleRows * kScaleBatch;
constexpr int kScaleBwdBlocks = 3;  // thread blocks to a multiprocessor on the way back

// Whether all of `pointers` and all rows of `features` elements behind them begin at 16 bytes. Rows are contiguous.
template <typename... Pointers>
bool scale_is_packed(int64_t features, int element_bytes, Pointers... pointers) {
  return features * element_bytes % 16 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

struct ScalePlan {
  const char* error;  // nullptr, or why there is no plan
  dim3 grid;
  dim3 block;
  int64_t shared_bytes;
  int across;  // tiles side by side; the blocks of the grid go through these first
  int chunk;   // rows of a thread block
  int groups;  // a part of the scale's gradient each
};

// The launch for (tokens, features), either way. A tile is 16 bytes for each lane wide, 512 bytes of a row. Thread
// blocks of the way there have one tile of rows. Those of the way back add up the scale's gradient over all their rows,
// in registers: as many as fill the GPU once, and not more, because each group writes a part, one row of float32. Three
// of them to a multiprocessor, 80 registers a thread, are 37 % of an H100's threads with 96 KiB on their way.
inline ScalePlan plan_scale(int64_t tokens, int64_t features, int element_bytes, int64_t processors, bool packed,
                            bool forward) {
  ScalePlan plan{};
  const int64_t width = packed ? 16 / element_bytes : 1, count = kScaleLanes * width;
  const int64_t across = (features + count - 1) / count, row_tiles = (tokens + kScaleTileRows - 1) / kScaleTileRows;
  const auto [tiles, groups] = split_rows(row_tiles, forward ? row_tiles : kScaleBwdBlocks * processors / across);
  if (groups * across > INT32_MAX || tiles * kScaleTileRows > INT32_MAX) {
    plan.error = "more tiles than a grid can have, or a group";
    return plan;
  }
  plan.grid = dim3(static_cast<unsigned>(groups * across));
  plan.block = dim3(kScaleLanes, kScaleRows);
  plan.shared_bytes = forward ? 0 : kScaleRows * count * static_cast<int64_t>(sizeof(float));
  plan.across = static_cast<int>(across);
  plan.chunk = static_cast<int>(tiles * kScaleTileRows);
  plan.groups = static_cast<int>(groups);
  return plan;
}

// kWidth neighbouring elements, 16 bytes of them or one.
template <typename T, int kWidth>
struct ScaleVector {
  using Raw = decltype([] {
    if constexpr (kWidth == 1) {
      return T{};
    } else {
      return uint4{};
    }
  }());
  static_assert(sizeof(Raw) == kWidth * sizeof(T));

  static __device__ __forceinline__ Raw load(const T* from) { return *reinterpret_cast<const Raw*>(from); }
  static __device__ __forceinline__ void widen(const Raw& raw, float (&to)[kWidth]) {
    T values[kWidth];
    memcpy(values, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = to_float(values[i]);
  }
  static __device__ __forceinline__ void store(T* to, const float (&from)[kWidth]) {
    T values[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = round_to<T>(from[i]);
    Raw raw;
    memcpy(&raw, values, sizeof(raw));
    *reinterpret_cast<Raw*>(to) = raw;
  }
};

// The scale and the bias of a thread's features; no bias is zeros.
template <typename T, int kWidth>
struct ScaleFeatures {
  float scale[kWidth], bias[kWidth] = {};

  __device__ __forceinline__ ScaleFeatures(const float* __restrict__ from, const T* __restrict__ bias_from,
                                           int64_t feature) {
    constexpr int P = kWidth < 4 ? 1 : 4;
    using Vector = decltype(pack(*static_cast<float (*)[P]>(nullptr)));
#pragma unroll
    for (int i = 0; i < kWidth; i += P) {
      float part[P];
      unpack(__ldg(reinterpret_cast<const Vector*>(from + feature + i)), part);
#pragma unroll
      for (int j = 0; j < P; ++j) scale[i + j] = part[j];
    }
    using Rows = ScaleVector<T, kWidth>;
    if (bias_from) Rows::widen(Rows::load(bias_from + feature), bias);
  }
};

template <typename T, int kWidth>
__device__ __forceinline__ void scale_fwd_tile(const T* y0, const T* bias, const float* scale, T* y, int64_t tokens,
                                               int64_t features, int across, int chunk) {
  using Rows = ScaleVector<T, kWidth>;
  const int64_t feature = int64_t{blockIdx.x % across} * (kScaleLanes * kWidth) + threadIdx.x * kWidth;
  if (feature >= features) return;
  const ScaleFeatures<T, kWidth> of(scale, bias, feature);
  const int64_t first = int64_t{blockIdx.x / across} * chunk + threadIdx.y;
  typename Rows::Raw raw[kScaleBatch] = {};
#pragma unroll
  for (int i = 0; i < kScaleBatch; ++i) {
    const int64_t row = first + i * kScaleRows;
    if (row < tokens) raw[i] = Rows::load(y0 + row * features + feature);
  }
#pragma unroll
  for (int i = 0; i < kScaleBatch; ++i) {
    const int64_t row = first + i * kScaleRows;
    if (row >= tokens) break;
    float value[kWidth];
    Rows::widen(raw[i], value);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) value[e] = fmaf(value[e] - of.bias[e], of.scale[e] - 1.0f, value[e]);
    Rows::store(y + row * features + feature, value);
  }
}

// y = (y0 - b) s + b. Floor: y0 and y once, 2 * element size a number; three operations. Four thread blocks to a
// multiprocessor, half of an H100's threads.
template <typename T>
__global__ void __launch_bounds__(kScaleLanes* kScaleRows, 4)
    boft_scale_fwd_kernel(const T* y0,                      // [tokens, features]
                          const T* __restrict__ bias,       // [features], or nullptr
                          const float* __restrict__ scale,  // [features]
                          T* y,                             // [tokens, features], which may be y0
                          int64_t tokens, int64_t features, int across, int chunk, bool packed) {
  if (packed) {
    scale_fwd_tile<T, 16 / sizeof(T)>(y0, bias, scale, y, tokens, features, across, chunk);
  } else {
    scale_fwd_tile<T, 1>(y0, bias, scale, y, tokens, features, across, chunk);
  }
}

// Adds up `sums` over the rows of threads, always in the same order, into part[:features].
template <int kWidth>
__device__ __forceinline__ void scale_add_up(const float (&sums)[kWidth], float* part, int64_t feature,
                                             int64_t features) {
  constexpr int P = kWidth < 4 ? 1 : 4, kVectors = kWidth / P;
  using Vector = decltype(pack(*static_cast<float (*)[P]>(nullptr)));
  extern __shared__ float4 shared_memory[];
  Vector* const shared = reinterpret_cast<Vector*>(shared_memory);  // [kScaleRows, kVectors, kScaleLanes]
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float own[P];
#pragma unroll
    for (int p = 0; p < P; ++p) own[p] = sums[v * P + p];
    shared[(threadIdx.y * kVectors + v) * kScaleLanes + threadIdx.x] = pack(own);
  }
  __syncthreads();
  // One row of threads for each vector of a lane.
  const int v = threadIdx.y;
  if (v >= kVectors || feature >= features) return;
  float total[P] = {};
#pragma unroll
  for (int row = 0; row < kScaleRows; ++row) {
    float of_row[P];
    unpack(shared[(row * kVectors + v) * kScaleLanes + threadIdx.x], of_row);
#pragma unroll
    for (int p = 0; p < P; ++p) total[p] += of_row[p];
  }
  *reinterpret_cast<Vector*>(part + feature + v * P) = pack(total);
}

template <typename T, int kWidth>
__device__ __forceinline__ void scale_bwd_tile(const T* __restrict__ grad, const T* __restrict__ y0,
                                               const T* __restrict__ bias, const float* __restrict__ scale,
                                               T* __restrict__ scaled, float* __restrict__ parts, int64_t tokens,
                                               int64_t features, int across, int chunk) {
  using Rows = ScaleVector<T, kWidth>;
  const int64_t feature = int64_t{blockIdx.x % across} * (kScaleLanes * kWidth) + threadIdx.x * kWidth;
  const int64_t group = blockIdx.x / across, begin = group * chunk;
  const int64_t end = begin + chunk < tokens ? begin + chunk : tokens;
  float sums[kWidth] = {};
  if (feature < features) {
    const ScaleFeatures<T, kWidth> of(scale, bias, feature);
    for (int64_t first = begin + threadIdx.y; first < end; first += kScaleTileRows) {
      typename Rows::Raw g[kScaleBatch] = {}, z[kScaleBatch] = {};
#pragma unroll
      for (int i = 0; i < kScaleBatch; ++i) {
        const int64_t row = first + i * kScaleRows;
        if (row >= end) break;
        g[i] = Rows::load(grad + row * features + feature);
        if (y0) z[i] = Rows::load(y0 + row * features + feature);
      }
#pragma unroll
      for (int i = 0; i < kScaleBatch; ++i) {
        const int64_t row = first + i * kScaleRows;
        if (row >= end) break;
        float value[kWidth], product[kWidth];
        Rows::widen(g[i], value);
        Rows::widen(z[i], product);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          sums[e] = fmaf(value[e], product[e] - of.bias[e], sums[e]);
          value[e] *= of.scale[e];
        }
        if (scaled) Rows::store(scaled + row * features + feature, value);
      }
    }
  }
  if (parts) scale_add_up<kWidth>(sums, parts + group * features, feature, features);
}

// g s, and a part of the scale's gradient for each group of rows. Floor: grad, y0 and g s once, 3 * element size a
// number, and 4 bytes a feature and group; four operations a number.
template <typename T>
__global__ void __launch_bounds__(kScaleLanes* kScaleRows, kScaleBwdBlocks)
    boft_scale_bwd_kernel(const T* __restrict__ grad,       // [tokens, features]
                          const T* __restrict__ y0,         // [tokens, features], or nullptr
                          const T* __restrict__ bias,       // [features], or nullptr
                          const float* __restrict__ scale,  // [features]
                          T* __restrict__ scaled,           // [tokens, features], or nullptr
                          float* __restrict__ parts,        // [groups, features], or nullptr, as y0
                          int64_t tokens, int64_t features, int across, int chunk, bool packed) {
  if (packed) {
    scale_bwd_tile<T, 16 / sizeof(T)>(grad, y0, bias, scale, scaled, parts, tokens, features, across, chunk);
  } else {
    scale_bwd_tile<T, 1>(grad, y0, bias, scale, scaled, parts, tokens, features, across, chunk);
  }
}

}  // namespace fastpeft
