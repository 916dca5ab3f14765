// BOFT's output scale where every row of a batch has its own adapter, a the slot of row t:
//
//     y[t] += (y[t] - bias) (s_a - 1),
//
// which leaves y as it is, to the last bit, where s is one, and a row without an adapter untouched. A thread has 16
// bytes of some rows that are neighbours in the plan: a scale that they share comes from memory once.
//
// Raw pointers only, no allocation, no synchronisation with the host. tests/cuda_host compiles this file for a CPU.
#pragma once

#include "cuda/boft_scale.cuh"

namespace fastpeft::many {

constexpr int kScaleManyThreads = 128;
constexpr int kScaleManyBatch = 4;      // rows of a thread that are on their way at the same time
constexpr int kScaleManyPositions = 8;  // the most in a thread block
constexpr int kScaleManyBlocks = 8;     // to a multiprocessor

struct ScaleManyArguments {
  void* y;  // of T: [tokens, features], rows y_row_stride elements apart
  int64_t y_row_stride;
  const void* bias;    // of T: [features], or nullptr
  const float* arena;  // [arena_rows, features]
  int64_t arena_rows;
  const int* row_scale;     // [slots]
  const int* row_numbers;   // [tokens]
  const int* slot_numbers;  // [tokens]
  int tokens, slots, features;
  int positions, across;
  bool packed;
};

// Whether everything begins at 16 bytes in every row.
inline bool scale_many_is_packed(int64_t features, int element_bytes, const void* y, int64_t y_row_stride,
                                 const void* bias, const void* arena) {
  return scale_is_packed(features, element_bytes, y, bias, arena) && y_row_stride * element_bytes % 16 == 0;
}

struct ScaleManyPlan {
  const char* error;  // nullptr, or why there is no plan
  dim3 grid;
  dim3 block;
  int64_t shared_bytes;
  int positions;  // of the plan, in a thread block
  int across;     // tiles side by side; the blocks of the grid go through these first
};

// The launch for (tokens, features). More positions read the scale of a shared adapter less often: as many as leave
// each processor twice the thread blocks that it has room for.
inline ScaleManyPlan plan_scale_many(int64_t tokens, int64_t features, int element_bytes, int64_t processors,
                                     bool packed) {
  ScaleManyPlan plan{};
  const int64_t width = packed ? 16 / element_bytes : 1, count = kScaleManyThreads * width;
  const int64_t across = (features + count - 1) / count;
  const auto grid = [&](int64_t positions) { return (tokens + positions - 1) / positions * across; };
  int64_t positions = 1;
  while (positions < kScaleManyPositions && grid(2 * positions) >= 2 * kScaleManyBlocks * processors) positions *= 2;
  if (grid(positions) > INT32_MAX) {
    plan.error = "more tiles than a grid can have";
    return plan;
  }
  plan.grid = dim3(static_cast<unsigned>(grid(positions)));
  plan.block = dim3(kScaleManyThreads);
  plan.positions = static_cast<int>(positions), plan.across = static_cast<int>(across);
  return plan;
}

template <typename T, int kWidth>
__device__ __forceinline__ void scale_positions(const ScaleManyArguments& args) {
  using Rows = ScaleVector<T, kWidth>;
  const unsigned across = static_cast<unsigned>(args.across);
  const int64_t feature = (int64_t{blockIdx.x % across} * kScaleManyThreads + threadIdx.x) * kWidth;
  if (feature >= args.features) return;
  const int64_t first = int64_t{blockIdx.x / across} * args.positions;
  const int64_t end = min(first + args.positions, int64_t{args.tokens});
  for (int64_t begin = first; begin < end; begin += kScaleManyBatch) {
    T* y[kScaleManyBatch];  // nullptr where nothing is to be done
    int adapter[kScaleManyBatch];
    typename Rows::Raw raw[kScaleManyBatch] = {};
#pragma unroll
    for (int i = 0; i < kScaleManyBatch; ++i) {
      const bool there = begin + i < end;
      const int number = there ? args.row_numbers[begin + i] : -1, slot = there ? args.slot_numbers[begin + i] : -1;
      adapter[i] = slot >= 0 && slot < args.slots ? args.row_scale[slot] : -1;
      const bool wanted = adapter[i] >= 0 && adapter[i] < args.arena_rows && number >= 0 && number < args.tokens;
      y[i] = wanted ? static_cast<T*>(args.y) + number * args.y_row_stride + feature : nullptr;
      if (wanted) raw[i] = Rows::load(y[i]);
    }
#pragma unroll
    for (int i = 0; i < kScaleManyBatch; ++i) {
      if (!y[i]) continue;
      const ScaleFeatures<T, kWidth> of(args.arena + int64_t{adapter[i]} * args.features,
                                        static_cast<const T*>(args.bias), feature);
      float value[kWidth];
      Rows::widen(raw[i], value);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) value[e] = fmaf(value[e] - of.bias[e], of.scale[e] - 1.0f, value[e]);
      Rows::store(y[i], value);
    }
  }
}

// Floor, for a row: y there and back, 2 * element size a feature, and 4 bytes of scale where no other row has the
// adapter, as many as y has in 16 bits there and back; three operations. Eight thread blocks, at 64 registers a thread,
// have up to 64 KiB on their way.
template <typename T>
__global__ void __launch_bounds__(kScaleManyThreads, kScaleManyBlocks)
    boft_scale_many_kernel(const __grid_constant__ ScaleManyArguments args) {
  if (args.packed) {
    scale_positions<T, 16 / sizeof(T)>(args);
  } else {
    scale_positions<T, 1>(args);
  }
}

}  // namespace fastpeft::many
