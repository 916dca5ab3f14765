// The tile of a butterfly kernel in shared memory: where it lies, how it comes and goes.
#pragma once

#include "cuda/boft_plan.cuh"
#include "cuda/element.cuh"

namespace fastpeft {

// Where the floats of a tile lie. It is cut into lines of 32 features, a float for each bank of shared memory: line l
// of row t begins at float (l * rows + t) * 32. A line is made of units, half-blocks of b/2 floats, and which of them
// lies where is the number of the unit with some bits flipped: all n = log2(64 / b) of them in odd lines, all but the
// top i where bit i of the row is set, i < 3.
//
// No access of the specialised kernels to a tile has a bank conflict. What is served at once, a warp at 4 bytes, half
// of it at 8 and a quarter at 16, are, beside the vectors of a unit, 2^n units, whose rows differ in the lowest g bits
// and whose numbers in n - g of the lowest n - g + 1: all but bit f, which factor f has for its two half-blocks. Rows
// that differ flip a bit above those, or all n - g + 1 of them, and so do lines next to each other for g = 0: no other
// unit can undo either. tests/cuda_host/run_banks.cpp counts.
//
// Both parts are linear: of xors of rows or columns they are the xors. The address is the xor of the two.
template <int B>
struct ButterflyLayout {
  static constexpr int kUnit = B > 0 ? B / 2 : 4;  // any will do where blocks have no kernel of their own
  static constexpr int kFlip = 32 / kUnit - 1;

  static __device__ __forceinline__ int row_part(int row) {
    const int flip = (row & 1 ? kFlip : 0) ^ (row & 2 ? kFlip >> 1 : 0) ^ (row & 4 ? kFlip >> 2 : 0);
    return row * 32 ^ flip * kUnit;
  }
  static __device__ __forceinline__ int column_part(int column, int rows) {
    return (column >> 5) * (rows * 32) + ((column & 31) ^ (column & 32 ? kFlip * kUnit : 0));
  }
};

// How elements travel between global memory and the tile: one by one, or 16 bytes at a time. `index` counts the Raws
// of a row; so many lanes as kPass are served at once.
//
// The tile is indexed as an array of the vectors that are meant, here and below: where nvcc 13 sees a pointer to floats
// plus a sum cast to a float4*, it stores four single floats.
template <typename T, int B>
struct Single {
  using Raw = T;
  using Layout = ButterflyLayout<B>;
  static constexpr int kWidth = 1, kPass = 32;

  static __device__ __forceinline__ void to_tile(float* tile, int tile_rows, int row, int index, const Raw& raw) {
    tile[Layout::column_part(index, tile_rows) ^ Layout::row_part(row)] = to_float(raw);
  }
  static __device__ __forceinline__ Raw from_tile(const float* tile, int tile_rows, int row, int index) {
    return round_to<T>(tile[Layout::column_part(index, tile_rows) ^ Layout::row_part(row)]);
  }
};

template <typename T, int B>
struct Packed {
  using Raw = uint4;
  using Layout = ButterflyLayout<B>;
  static constexpr int kWidth = 16 / sizeof(T), kPass = 8;
  static constexpr int kVectors = kWidth / 4;

  // Eight 16-bit elements are two float4s of the tile, and lanes l and l + 4 have theirs in neighbouring lines. Where
  // the layout moves them by an even number of float4s, which is from b = 16 on, one of the two begins with its second.
  static __device__ __forceinline__ int first_vector(int index) {
    return kVectors == 2 && Layout::kUnit > 4 ? index >> 2 & 1 : 0;
  }
  // Units of less than a float4 may lie in it in reverse order.
  static __device__ __forceinline__ float4 ordered(const float4& value, int place) {
    if (Layout::kUnit == 1 && place & 1) return make_float4(value.w, value.z, value.y, value.x);
    if (Layout::kUnit == 2 && place & 2) return make_float4(value.z, value.w, value.x, value.y);
    return value;
  }

  static __device__ __forceinline__ void to_tile(float* tile, int tile_rows, int row, int index, const Raw& raw) {
    T values[kWidth];
    memcpy(values, &raw, 16);
    const int place = Layout::column_part(index * kWidth, tile_rows) ^ Layout::row_part(row);
    float4 part[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      part[i] = ordered(make_float4(to_float(values[4 * i]), to_float(values[4 * i + 1]), to_float(values[4 * i + 2]),
                                    to_float(values[4 * i + 3])),
                        place);
    }
    float4* vectors = reinterpret_cast<float4*>(tile);
    const int vector = place >> 2, first = first_vector(index);
    vectors[vector ^ first] = first ? part[kVectors - 1] : part[0];
    if constexpr (kVectors == 2) vectors[vector ^ 1 ^ first] = first ? part[0] : part[1];
  }

  static __device__ __forceinline__ Raw from_tile(const float* tile, int tile_rows, int row, int index) {
    const float4* vectors = reinterpret_cast<const float4*>(tile);
    const int place = Layout::column_part(index * kWidth, tile_rows) ^ Layout::row_part(row);
    const int vector = place >> 2, first = first_vector(index);
    float4 part[kVectors];
    part[0] = vectors[vector ^ first];
    if constexpr (kVectors == 2) {
      part[1] = vectors[vector ^ 1 ^ first];
      if (first) {
        const float4 swapped = part[0];
        part[0] = part[1], part[1] = swapped;
      }
    }
    T values[kWidth];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float4 value = ordered(part[i], place);
      values[4 * i] = round_to<T>(value.x);
      values[4 * i + 1] = round_to<T>(value.y);
      values[4 * i + 2] = round_to<T>(value.z);
      values[4 * i + 3] = round_to<T>(value.w);
    }
    Raw raw;
    memcpy(&raw, values, 16);
    return raw;
  }
};

// Walks a (rows, columns) rectangle with all threads of the block, along rows, dividing only at the start. What is
// served at once is in one row: some threads may be beyond its end.
struct TileWalk {
  int row, column, columns, step_rows, step_columns;
  __device__ __forceinline__ TileWalk(int columns, int pass) : columns((columns + pass - 1) / pass * pass) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int threads = blockDim.x * blockDim.y;
    row = thread / this->columns, column = thread % this->columns;
    step_rows = threads / this->columns, step_columns = threads % this->columns;
  }
  __device__ __forceinline__ void next() {
    row += step_rows, column += step_columns;
    if (column >= columns) column -= columns, ++row;
  }
};

// Reads x[:rows, :features] into the tile.
template <typename Access, typename T>
__device__ __forceinline__ void load_tile(const T* x, int64_t x_row_stride, float* tile, int tile_rows, int rows,
                                          int features) {
  using Raw = typename Access::Raw;
  constexpr int kBatch = 4;  // so many loads of a thread are on their way before the first is waited for
  const int columns = features / Access::kWidth;
  TileWalk walk(columns, Access::kPass);
  while (walk.row < rows) {
    Raw raw[kBatch] = {};  // or what is not loaded is a value of the last round, and keeps a register meanwhile
    int row[kBatch], column[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      row[i] = walk.column < columns ? walk.row : rows, column[i] = walk.column;
      walk.next();
      if (row[i] < rows) raw[i] = __ldg(reinterpret_cast<const Raw*>(x + row[i] * x_row_stride) + column[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (row[i] < rows) Access::to_tile(tile, tile_rows, row[i], column[i], raw[i]);
    }
  }
}

// Writes the tile to y[:rows, :features].
template <typename Access, typename T>
__device__ __forceinline__ void store_tile(T* y, int64_t y_row_stride, const float* tile, int tile_rows, int rows,
                                           int features) {
  using Raw = typename Access::Raw;
  const int columns = features / Access::kWidth;
  for (TileWalk walk(columns, Access::kPass); walk.row < rows; walk.next()) {
    if (walk.column >= columns) continue;
    reinterpret_cast<Raw*>(y + walk.row * y_row_stride)[walk.column] =
        Access::from_tile(tile, tile_rows, walk.row, walk.column);
  }
}

template <typename T>
__device__ __forceinline__ bool rows_are_packed(const T* first, int64_t row_stride, int features) {
  constexpr int kWidth = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && row_stride % kWidth == 0 && features % kWidth == 0;
}

}  // namespace fastpeft
