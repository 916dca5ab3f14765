// The butterfly product of BOFT (Liu et al., ICLR 2024, arXiv 2311.06243): y = x R, R = B_{m-1} ... B_0.
//
// A row vector meets the factors in the order f = m-1, ..., 0. Factor f works in windows of 2H half-blocks of r = b/2
// entries, H = 2^f. Block k = w*H + s takes z = (half-block s, half-block s + H) of window w, computes
//
//     out[c] = sum_a z[a] * Q[f, k, a, c]
//
// and puts it back where z was. So a factor is done in place, its permutations are index arithmetic, and the whole
// product never leaves a window of b*2^(m-1) features: a tile of rows of some windows stays in shared memory, as
// float32, while all factors are applied, and is rounded once at the end.
//
// Raw pointers only, no allocation, no synchronisation with the host. tests/cuda_host compiles this file for a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastpeft {

constexpr int kButterflyThreads = 256;      // the most threads in a block
constexpr int kButterflyRows = 32;          // the most rows in a tile
constexpr int kButterflyRowsPerThread = 4;  // each value of Q that a thread reads is used for so many rows
constexpr int kButterflyColumns = 8;        // columns of one block that a thread of the generic path computes

// What one thread block holds in shared memory.
struct ButterflyTile {
  int rows;        // a power of two
  int features;    // whole windows
  int row_stride;  // floats from one row to the next
  int across;      // tiles side by side; the blocks of the grid go through these first
};

struct ButterflyPlan {
  const char* error;  // nullptr, or why there is no plan
  dim3 grid;
  dim3 block;
  int64_t shared_bytes;
  ButterflyTile tile;
};

// Block sizes that have a kernel of their own, which reads float4s of `blocks`; 0 names the generic one.
inline int butterfly_kernel_size(int64_t b, const void* blocks) {
  const bool own = b == 2 || b == 4 || b == 8 || b == 16 || b == 32;
  return own && reinterpret_cast<uintptr_t>(blocks) % 16 == 0 ? static_cast<int>(b) : 0;
}

// Calls f with the kernel size as a template argument.
template <typename F>
void with_butterfly_kernel_size(int kernel_size, F&& f) {
  switch (kernel_size) {
    case 2:
      return f.template operator()<2>();
    case 4:
      return f.template operator()<4>();
    case 8:
      return f.template operator()<8>();
    case 16:
      return f.template operator()<16>();
    case 32:
      return f.template operator()<32>();
    default:
      return f.template operator()<0>();
  }
}

// The launch for x (tokens, features) with m factors of block size b, where features is a multiple of b*2^(m-1).
//
// Rows. Q is read once per tile, so more rows mean less of that traffic: at 32 rows it is b*m/8 bytes per element of
// x, hidden behind x itself up to b = 8 or so and behind the arithmetic above that. Two tiles should fit a
// multiprocessor, so that one loads while the other computes, but not at the price of fewer rows than a thread works
// on; a window too wide for that has the shared memory to itself, at fewer rows if need be, down to one.
//
// Features. About 256, one per thread from b = 8 on, in whole windows; in a multiple of 16 bytes too where that is
// possible, so that no tile starts unaligned. A tile costs its threads two barriers per factor, and wider ones would
// only add latency.
//
// Row stride. Threads of a warp read the same columns of neighbouring rows. With float4s a quarter-warp is served at
// once: 4/c rows times the c threads that share a block, c = b/8, which read and write c neighbouring float4s. So rows
// b/2 words apart (modulo the 32 banks) never collide. Narrower blocks read float2s (b = 4, 8 rows of 2 blocks in a
// half-warp) or floats (b = 2, 8 rows of 4 blocks), and there 4 words keep 8 rows apart; in factor 0, whose
// half-blocks lie b and not b/2 apart, two blocks still meet in a bank.
inline ButterflyPlan plan_butterfly(int64_t tokens, int64_t features, int64_t b, int64_t factors, int element_bytes,
                                    int64_t max_shared_bytes, int kernel_size) {
  constexpr int64_t kFeatures = 256;
  ButterflyPlan plan{};
  const int64_t window = b << (factors - 1);
  // The generic path computes from one buffer into another; the others have a whole block in their registers.
  const int64_t buffers = kernel_size == 0 ? 2 : 1;
  const int64_t skew = kernel_size > 8 ? kernel_size / 2 : 4;
  const auto row_stride = [&](int64_t rows, int64_t count) {
    return rows == 1 ? (count + 3) / 4 * 4 : (count - skew + 31) / 32 * 32 + skew;
  };
  const auto bytes = [&](int64_t rows, int64_t count) {
    return buffers * rows * row_stride(rows, count) * static_cast<int64_t>(sizeof(float));
  };

  int64_t rows = kButterflyRows;
  while (rows > 1 && rows / 2 >= tokens) rows /= 2;
  while (rows > kButterflyRowsPerThread && bytes(rows, window) > max_shared_bytes / 2) rows /= 2;
  while (rows > 1 && bytes(rows, window) > max_shared_bytes) rows /= 2;
  if (bytes(rows, window) > max_shared_bytes) {
    plan.error = "one row of one window does not fit the shared memory of a thread block";
    return plan;
  }

  int64_t step = window;  // the least common multiple of the window and 16 bytes
  while (step * element_bytes % 16 != 0) step += window;
  if (step > kFeatures) step = window;
  int64_t count = step > kFeatures ? step : kFeatures / step * step;
  while (count > step && bytes(rows, count) > max_shared_bytes / 2) count -= step;
  if (bytes(rows, count) > max_shared_bytes) count = window;
  if (count > features) count = features;

  const int64_t across = (features + count - 1) / count;
  const int64_t grid = (tokens + rows - 1) / rows * across;
  if (grid > INT32_MAX) {
    plan.error = "more tiles than a grid can have";
    return plan;
  }

  // Threads: x goes over the groups of rows and, fastest, over the threads that share a block; y over the blocks. All
  // powers of two, so that threads that share a block are in one warp.
  const int64_t groups = rows > kButterflyRowsPerThread ? rows / kButterflyRowsPerThread : 1;
  const int64_t shared_by = kernel_size > 8 ? kernel_size / 8 : 1;
  const int64_t pieces = kernel_size == 0 ? (b + kButterflyColumns - 1) / kButterflyColumns : 1;
  const int64_t x = groups * shared_by;
  int64_t y = 1;
  while (x * y < 32 || (x * y < kButterflyThreads && y < count / b * pieces)) y *= 2;

  plan.grid = dim3(static_cast<unsigned>(grid));
  plan.block = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
  plan.shared_bytes = bytes(rows, count);
  plan.tile = {static_cast<int>(rows), static_cast<int>(count), static_cast<int>(row_stride(rows, count)),
               static_cast<int>(across)};
  return plan;
}

// Conversions, by overload and by template.
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
template <typename T>
__device__ __forceinline__ T round_to(float value);
template <>
__device__ __forceinline__ float round_to<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half round_to<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// 1, 2 or 4 neighbouring floats.
__device__ __forceinline__ float pack(const float (&in)[1]) { return in[0]; }
__device__ __forceinline__ float2 pack(const float (&in)[2]) { return make_float2(in[0], in[1]); }
__device__ __forceinline__ float4 pack(const float (&in)[4]) { return make_float4(in[0], in[1], in[2], in[3]); }
__device__ __forceinline__ void unpack(float in, float (&out)[1]) { out[0] = in; }
__device__ __forceinline__ void unpack(float2 in, float (&out)[2]) { out[0] = in.x, out[1] = in.y; }
__device__ __forceinline__ void unpack(float4 in, float (&out)[4]) {
  out[0] = in.x, out[1] = in.y, out[2] = in.z, out[3] = in.w;
}

// How elements travel between global memory and the tile: one by one, or 16 bytes at a time. `index` counts the Raws
// of a row.
//
// The tile is indexed as an array of the vectors that are meant, here and below: where nvcc 13 sees a pointer to floats
// plus a sum cast to a float4*, it stores four single floats.
template <typename T>
struct Single {
  using Raw = T;
  static constexpr int kWidth = 1;

  static __device__ __forceinline__ void to_tile(float* tile, int row_stride, int row, int index, const Raw& raw) {
    tile[row * row_stride + index] = to_float(raw);
  }
  static __device__ __forceinline__ Raw from_tile(const float* tile, int row_stride, int row, int index) {
    return round_to<T>(tile[row * row_stride + index]);
  }
};

template <typename T>
struct Packed {
  using Raw = uint4;
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kVectors = kWidth / 4;

  // Eight 16-bit elements are two float4s of the tile. If all threads took the first one first, they would leave every
  // other 16 bytes of a 256-byte span untouched, and lanes l and l + 4 would meet in a bank: so every other group of
  // four begins with the second.
  static __device__ __forceinline__ int first_vector(int index) { return kVectors == 2 ? index >> 2 & 1 : 0; }

  static __device__ __forceinline__ void to_tile(float* tile, int row_stride, int row, int index, const Raw& raw) {
    T values[kWidth];
    memcpy(values, &raw, 16);
    float4 part[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      part[i] = make_float4(to_float(values[4 * i]), to_float(values[4 * i + 1]), to_float(values[4 * i + 2]),
                            to_float(values[4 * i + 3]));
    }
    float4* vectors = reinterpret_cast<float4*>(tile);
    const int place = row * (row_stride / 4) + index * kVectors, first = first_vector(index);
    vectors[place + first] = first ? part[kVectors - 1] : part[0];
    if constexpr (kVectors == 2) vectors[place + 1 - first] = first ? part[0] : part[1];
  }

  static __device__ __forceinline__ Raw from_tile(const float* tile, int row_stride, int row, int index) {
    const float4* vectors = reinterpret_cast<const float4*>(tile);
    const int place = row * (row_stride / 4) + index * kVectors, first = first_vector(index);
    float4 part[kVectors];
    part[0] = vectors[place + first];
    if constexpr (kVectors == 2) {
      part[1] = vectors[place + 1 - first];
      if (first) {
        const float4 swapped = part[0];
        part[0] = part[1], part[1] = swapped;
      }
    }
    T values[kWidth];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      values[4 * i] = round_to<T>(part[i].x);
      values[4 * i + 1] = round_to<T>(part[i].y);
      values[4 * i + 2] = round_to<T>(part[i].z);
      values[4 * i + 3] = round_to<T>(part[i].w);
    }
    Raw raw;
    memcpy(&raw, values, 16);
    return raw;
  }
};

// Walks a (rows, columns) rectangle with all threads of the block, along rows, dividing only at the start.
struct TileWalk {
  int row, column, columns, step_rows, step_columns;
  __device__ __forceinline__ explicit TileWalk(int columns) : columns(columns) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int threads = blockDim.x * blockDim.y;
    row = thread / columns, column = thread % columns;
    step_rows = threads / columns, step_columns = threads % columns;
  }
  __device__ __forceinline__ void next() {
    row += step_rows, column += step_columns;
    if (column >= columns) column -= columns, ++row;
  }
};

// Reads x[:rows, :features] into the tile.
template <typename Access, typename T>
__device__ __forceinline__ void load_tile(const T* x, int64_t x_row_stride, float* tile, int row_stride, int rows,
                                          int features) {
  using Raw = typename Access::Raw;
  constexpr int kBatch = 4;  // so many loads of a thread are on their way before the first is waited for
  TileWalk walk(features / Access::kWidth);
  while (walk.row < rows) {
    Raw raw[kBatch];
    int row[kBatch], column[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      row[i] = walk.row, column[i] = walk.column;
      walk.next();
      if (row[i] < rows) raw[i] = __ldg(reinterpret_cast<const Raw*>(x + row[i] * x_row_stride) + column[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (row[i] < rows) Access::to_tile(tile, row_stride, row[i], column[i], raw[i]);
    }
  }
}

// Writes the tile to y[:rows, :features].
template <typename Access, typename T>
__device__ __forceinline__ void store_tile(T* y, int64_t y_row_stride, const float* tile, int row_stride, int rows,
                                           int features) {
  using Raw = typename Access::Raw;
  for (TileWalk walk(features / Access::kWidth); walk.row < rows; walk.next()) {
    reinterpret_cast<Raw*>(y + walk.row * y_row_stride)[walk.column] =
        Access::from_tile(tile, row_stride, walk.row, walk.column);
  }
}

template <typename T>
__device__ __forceinline__ bool rows_are_packed(const T* first, int64_t row_stride, int features) {
  constexpr int kWidth = Packed<T>::kWidth;
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && row_stride % kWidth == 0 && features % kWidth == 0;
}

// Where a group of threads finds its rows in the tile: rows group, group + groups, ... so that neighbouring threads
// have neighbouring rows, which the row stride keeps in different banks. For a row that is not there it has its first
// one again, and writes the same to it twice.
struct ThreadRows {
  int offset[kButterflyRowsPerThread];
  __device__ __forceinline__ ThreadRows(int group, int groups, int rows, int row_stride) {
#pragma unroll
    for (int j = 0; j < kButterflyRowsPerThread; ++j) {
      offset[j] = (group + j * groups < rows ? group + j * groups : group) * row_stride;
    }
  }
};

// Applies factor f to the tile in place. A thread has P columns of either half of one block, for 4 rows: a product of
// (4, b) by (b, 2P) in registers. A block of b = 16 or 32 is shared by 2 or 4 threads of one warp.
template <int B>
__device__ __forceinline__ void apply_factor(const float* q,  // [tile_blocks, B, B]
                                             float* tile, int row_stride, int rows, int tile_blocks, int f) {
  constexpr int kHalf = B / 2;              // r
  constexpr int P = kHalf < 4 ? kHalf : 4;  // entries that are read and written at a time
  constexpr int kSharedBy = kHalf / P;      // threads
  constexpr int R = kButterflyRowsPerThread;
  using Vector = decltype(pack(*static_cast<float (*)[P]>(nullptr)));
  Vector* vectors = reinterpret_cast<Vector*>(tile);  // places in the tile and in Q are counted in Vectors
  const int column = threadIdx.x % kSharedBy;
  const int group = threadIdx.x / kSharedBy, groups = blockDim.x / kSharedBy;
  const ThreadRows row(group, groups, rows, row_stride / P);
  const int half_blocks = 1 << f;               // H
  const int to_high = half_blocks * kSharedBy;  // from the first half-block of z to the second

  // The trip count is the same for all threads, as the barrier inside wants it.
  for (int first = 0; first < tile_blocks; first += blockDim.y) {
    const int k = first + threadIdx.y;
    const bool active = k < tile_blocks && group < rows;
    const int low = (k >> f) * 2 * to_high + (k & (half_blocks - 1)) * kSharedBy;
    float out[R][2][P] = {};
    if (active) {
      const Vector* q_row = reinterpret_cast<const Vector*>(q + static_cast<int64_t>(k) * (B * B)) + column;
// Two steps of a wide block at once would spill.
#pragma unroll(B > 8 ? 1 : 2)
      for (int a = 0; a < 2 * kSharedBy; ++a) {
        const int place = low + (a < kSharedBy ? a : to_high + a - kSharedBy);
        float z[R][P];
#pragma unroll
        for (int j = 0; j < R; ++j) unpack(vectors[row.offset[j] + place], z[j]);
#pragma unroll
        for (int p = 0; p < P; ++p, q_row += 2 * kSharedBy) {
          float weight[2][P];
          unpack(__ldg(q_row), weight[0]);
          unpack(__ldg(q_row + kSharedBy), weight[1]);
#pragma unroll
          for (int j = 0; j < R; ++j) {
#pragma unroll
            for (int c = 0; c < P; ++c) {
              out[j][0][c] = fmaf(z[j][p], weight[0][c], out[j][0][c]);
              out[j][1][c] = fmaf(z[j][p], weight[1][c], out[j][1][c]);
            }
          }
        }
      }
    }
    if constexpr (kSharedBy > 1) __syncwarp();  // all of them have read z before one of them overwrites it
    if (active) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        vectors[row.offset[j] + low + column] = pack(out[j][0]);
        vectors[row.offset[j] + low + to_high + column] = pack(out[j][1]);
      }
    }
  }
}

// The same for any b, from one buffer to another: a thread has some neighbouring columns of one block. Odd b occur
// with a single factor only, where the two half-blocks are neighbours and it does not matter where one ends.
__device__ __forceinline__ void apply_factor_generic(const float* q,  // [tile_blocks, b, b]
                                                     const float* from, float* to, int row_stride, int rows,
                                                     int tile_blocks, int b, int f) {
  constexpr int R = kButterflyRowsPerThread, C = kButterflyColumns;
  const int group = threadIdx.x;
  if (group >= rows) return;
  const ThreadRows row(group, blockDim.x, rows, row_stride);
  const int half_blocks = 1 << f, half = b / 2;
  const int pieces = (b + C - 1) / C;
  for (int item = threadIdx.y; item < tile_blocks * pieces; item += blockDim.y) {
    const int k = item / pieces, first = item % pieces * C;
    const int low = (k >> f) * half_blocks * b + (k & (half_blocks - 1)) * half;
    const int high = low + half_blocks * half;
    const auto place = [&](int a) { return a < half ? low + a : high + (a - half); };
    const float* q_row = q + static_cast<int64_t>(k) * b * b + first;
    float out[R][C] = {};
    for (int a = 0; a < b; ++a, q_row += b) {
      float weight[C], z[R];
#pragma unroll
      for (int c = 0; c < C; ++c) weight[c] = first + c < b ? __ldg(q_row + c) : 0.0f;
#pragma unroll
      for (int j = 0; j < R; ++j) z[j] = from[row.offset[j] + place(a)];
#pragma unroll
      for (int j = 0; j < R; ++j) {
#pragma unroll
        for (int c = 0; c < C; ++c) out[j][c] = fmaf(z[j], weight[c], out[j][c]);
      }
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (first + c >= b) break;
#pragma unroll
      for (int j = 0; j < R; ++j) to[row.offset[j] + place(first + c)] = out[j][c];
    }
  }
}

// The narrowest blocks are bound by memory and want many loads on their way: three thread blocks, at 80 registers a
// thread. From b = 8 on, a thread's 4 by 8 product and the Q of its next steps would spill there.
constexpr int butterfly_blocks_per_multiprocessor(int kernel_size) {
  return kernel_size == 2 || kernel_size == 4 ? 3 : 2;
}

// B is the block size, or 0 for any `block_size`. Grid, block and tile come from plan_butterfly.
template <typename T, int B>
__global__ void __launch_bounds__(kButterflyThreads, butterfly_blocks_per_multiprocessor(B))
    butterfly_fwd_kernel(const T* __restrict__ x,           // [tokens, features], rows x_row_stride apart
                         const float* __restrict__ blocks,  // [factors, features / b, b, b]
                         T* __restrict__ y,                 // [tokens, features]
                         int64_t tokens, int64_t features, int64_t x_row_stride, int factors, int block_size,
                         ButterflyTile shape) {
  extern __shared__ float4 shared_memory[];
  float* tile = reinterpret_cast<float*>(shared_memory);
  const int b = B > 0 ? B : block_size;

  const int64_t first_row = static_cast<int64_t>(blockIdx.x / shape.across) * shape.rows;
  const int64_t first_feature = static_cast<int64_t>(blockIdx.x % shape.across) * shape.features;
  const int rows = static_cast<int>(min(static_cast<int64_t>(shape.rows), tokens - first_row));
  const int count = static_cast<int>(min(static_cast<int64_t>(shape.features), features - first_feature));
  const T* x_tile = x + first_row * x_row_stride + first_feature;
  T* y_tile = y + first_row * features + first_feature;

  if (rows_are_packed(x_tile, x_row_stride, count)) {
    load_tile<Packed<T>>(x_tile, x_row_stride, tile, shape.row_stride, rows, count);
  } else {
    load_tile<Single<T>>(x_tile, x_row_stride, tile, shape.row_stride, rows, count);
  }
  __syncthreads();

  float* other = tile + shape.rows * shape.row_stride;  // used by the generic path only
  for (int f = factors - 1; f >= 0; --f) {
    const float* q = blocks + (f * features + first_feature) * b;  // block k of factor f is at (f*features/b + k)*b*b
    if constexpr (B > 0) {
      apply_factor<B>(q, tile, shape.row_stride, rows, count / B, f);
    } else {
      apply_factor_generic(q, tile, other, shape.row_stride, rows, count / b, b, f);
      float* const result = other;
      other = tile, tile = result;
    }
    __syncthreads();
  }

  if (rows_are_packed(y_tile, features, count)) {
    store_tile<Packed<T>>(y_tile, features, tile, shape.row_stride, rows, count);
  } else {
    store_tile<Single<T>>(y_tile, features, tile, shape.row_stride, rows, count);
  }
}

}  // namespace fastpeft
