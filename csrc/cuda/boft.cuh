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
// The way back meets them in the order f = 0, ..., m-1: with z the input of factor f and g the gradient of its output,
// dQ[f] += z^T g for each block, then g = g Q[f]^T.
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
  int rows;      // a power of two
  int features;  // whole windows
  int across;    // tiles side by side; the blocks of the grid go through these first
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

__host__ __device__ constexpr int64_t butterfly_tile_floats(int64_t rows, int64_t features) {
  return rows * ((features + 31) / 32 * 32);
}

// The fewest features of a tile, whole windows, and how many there had better be: about 256, one per thread from b = 8
// on; in a multiple of 16 bytes too where that is possible, so that no tile starts unaligned. A tile costs its threads
// two barriers per factor, and wider ones would only add latency.
struct ButterflyWidth {
  int64_t step, wanted;
};
inline ButterflyWidth butterfly_width(int64_t window, int element_bytes) {
  constexpr int64_t kFeatures = 256;
  int64_t step = window;  // the least common multiple of the window and 16 bytes
  while (step * element_bytes % 16 != 0) step += window;
  if (step > kFeatures) step = window;
  return {step, step > kFeatures ? step : kFeatures / step * step};
}

// Threads of a block: x goes over the groups of rows and, fastest, over the threads that share a block of Q; y over the
// blocks. All powers of two, so that threads that share a block are in one warp.
inline dim3 butterfly_threads(int64_t rows, int64_t features, int64_t b, int kernel_size) {
  const int64_t groups = rows > kButterflyRowsPerThread ? rows / kButterflyRowsPerThread : 1;
  const int64_t shared_by = kernel_size > 8 ? kernel_size / 8 : 1;
  const int64_t pieces = kernel_size == 0 ? (b + kButterflyColumns - 1) / kButterflyColumns : 1;
  const int64_t x = groups * shared_by;
  int64_t y = 1;
  while (x * y < 32 || (x * y < kButterflyThreads && y < features / b * pieces)) y *= 2;
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

// The launch for x (tokens, features) with m factors of block size b, where features is a multiple of b*2^(m-1).
//
// Rows. Q is read once per tile, so more rows mean less of that traffic: at 32 rows it is b*m/8 bytes per element of
// x, hidden behind x itself up to b = 8 or so and behind the arithmetic above that. Two tiles should fit a
// multiprocessor, so that one loads while the other computes, but not at the price of fewer rows than a thread works
// on; a window too wide for that has the shared memory to itself, at fewer rows if need be, down to one.
inline ButterflyPlan plan_butterfly(int64_t tokens, int64_t features, int64_t b, int64_t factors, int element_bytes,
                                    int64_t max_shared_bytes, int kernel_size) {
  ButterflyPlan plan{};
  const int64_t window = b << (factors - 1);
  // The generic path computes from one buffer into another; the others have a whole block in their registers.
  const int64_t buffers = kernel_size == 0 ? 2 : 1;
  const auto bytes = [&](int64_t rows, int64_t count) {
    return buffers * butterfly_tile_floats(rows, count) * static_cast<int64_t>(sizeof(float));
  };

  int64_t rows = kButterflyRows;
  while (rows > 1 && rows / 2 >= tokens) rows /= 2;
  while (rows > kButterflyRowsPerThread && bytes(rows, window) > max_shared_bytes / 2) rows /= 2;
  while (rows > 1 && bytes(rows, window) > max_shared_bytes) rows /= 2;
  if (bytes(rows, window) > max_shared_bytes) {
    plan.error = "one row of one window does not fit the shared memory of a thread block";
    return plan;
  }

  auto [step, count] = butterfly_width(window, element_bytes);
  while (count > step && bytes(rows, count) > max_shared_bytes / 2) count -= step;
  if (bytes(rows, count) > max_shared_bytes) count = window;
  if (count > features) count = features;

  const int64_t across = (features + count - 1) / count;
  const int64_t grid = (tokens + rows - 1) / rows * across;
  if (grid > INT32_MAX) {
    plan.error = "more tiles than a grid can have";
    return plan;
  }
  plan.grid = dim3(static_cast<unsigned>(grid));
  plan.block = butterfly_threads(rows, count, b, kernel_size);
  plan.shared_bytes = bytes(rows, count);
  plan.tile = {static_cast<int>(rows), static_cast<int>(count), static_cast<int>(across)};
  return plan;
}

// Of one factor's block gradients in shared memory: of an even number of blocks, see `correlate`.
__host__ __device__ constexpr int64_t butterfly_sums_floats(int64_t features, int64_t b) {
  return (features / b + 1) / 2 * 2 * b * b;
}

struct ButterflyBwdPlan : ButterflyPlan {
  int chunk;            // rows of a group, whole tiles; the grid goes through the tiles side by side, then the groups
  int groups;           // a part of the block gradients each, where they are needed
  bool sums_in_shared;  // or in the part itself
};

// The launch for the way back; `processors` is the number of multiprocessors.
//
// A thread block keeps its features for a chunk of rows and adds up their block gradients, b*m float32 a feature, which
// stay in shared memory beside a tile of g and one of z as long as two thread blocks fit a multiprocessor. With two
// factors and 32 rows on an H100 (113 KiB each) that is 256 features for b = 8 (81 KiB) and 16 (98), 192 for 32 (100);
// on an A100 (81 KiB each) 256, 192 (74) and 128 (68). Where two do not fit (b = 32 with four factors wants 128 KiB of
// sums) the sums are updated in global memory, once for each tile: 8 bytes for 32 rows, from the second-level cache.
// There are as many groups as fill the GPU once, two thread blocks to a multiprocessor, and not more, because every
// group writes a part. Without block gradients a group is a tile.
inline ButterflyBwdPlan plan_butterfly_bwd(int64_t tokens, int64_t features, int64_t b, int64_t factors,
                                           int element_bytes, int64_t max_shared_bytes, int64_t processors,
                                           int kernel_size, bool need_blocks) {
  constexpr int64_t kReserved = 1 << 10;  // of every thread block, by the system
  ButterflyBwdPlan plan{};
  const int64_t window = b << (factors - 1);
  const int64_t pages = (need_blocks ? 2 : 1) + (kernel_size == 0 ? 1 : 0);
  const auto bytes = [&](int64_t rows, int64_t count, bool with_sums) {
    const int64_t sums = with_sums ? butterfly_sums_floats(count, b) * factors : 0;
    return (pages * butterfly_tile_floats(rows, count) + sums) * static_cast<int64_t>(sizeof(float));
  };
  const int64_t half = (max_shared_bytes - kReserved) / 2;

  int64_t most_rows = kButterflyRows;
  while (most_rows > 1 && most_rows / 2 >= tokens) most_rows /= 2;
  const auto [step, wanted] = butterfly_width(window, element_bytes);
  int64_t rows = 0, count = 0;
  // The first that fits: few rows cost less than sums out of reach, and narrow tiles less than few rows.
  const auto try_fit = [&](int64_t limit, int64_t least_rows, int64_t narrowest, bool with_sums) {
    for (int64_t r = most_rows; rows == 0 && r >= 1 && (r >= least_rows || r == most_rows); r /= 2) {
      for (int64_t c = wanted; rows == 0 && c >= narrowest; c -= step) {
        if (bytes(r, c, with_sums) <= limit) rows = r, count = c, plan.sums_in_shared = with_sums;
      }
    }
  };
  if (need_blocks) try_fit(half, kButterflyRows / 2, step, true);
  try_fit(half, kButterflyRowsPerThread, step, false);
  try_fit(max_shared_bytes, 1, step, false);
  if (rows == 0 && bytes(1, window, false) <= max_shared_bytes) rows = 1, count = window;
  if (rows == 0) {
    plan.error = "one row of one window, and of its gradient, does not fit the shared memory of a thread block";
    return plan;
  }
  if (count > features) count = features;

  const int64_t across = (features + count - 1) / count, row_tiles = (tokens + rows - 1) / rows;
  int64_t groups = row_tiles;
  if (need_blocks) {
    groups = 2 * processors / across;
    if (groups < 1) groups = 1;
    if (groups > row_tiles) groups = row_tiles;
  }
  const int64_t tiles = (row_tiles + groups - 1) / groups;  // of a group
  groups = (row_tiles + tiles - 1) / tiles;
  if (groups * across > INT32_MAX || tiles * rows > INT32_MAX) {
    plan.error = "more tiles than a grid can have, or a group";
    return plan;
  }
  plan.grid = dim3(static_cast<unsigned>(groups * across));
  plan.block = butterfly_threads(rows, count, b, kernel_size);
  plan.shared_bytes = bytes(rows, count, plan.sums_in_shared);
  plan.tile = {static_cast<int>(rows), static_cast<int>(count), static_cast<int>(across)};
  plan.chunk = static_cast<int>(tiles * rows);
  plan.groups = static_cast<int>(groups);
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

// Where a group of threads finds its rows in the tile: rows group, group + groups, ... or some of them twice where the
// tile has fewer than a thread takes. Rows beyond the last token are computed like any other, and not stored.
template <int B>
struct ThreadRows {
  int part[kButterflyRowsPerThread];
  __device__ __forceinline__ ThreadRows(int group, int groups, int tile_rows) {
#pragma unroll
    for (int j = 0; j < kButterflyRowsPerThread; ++j) {
      part[j] = ButterflyLayout<B>::row_part((group + j * groups) & (tile_rows - 1));
    }
  }
};

// Applies factor f, or its transpose, to the tile in place. A thread has P columns of either half of one block, for 4
// rows: a product of (4, b) by (b, 2P) in registers. A block of b = 16 or 32 is shared by 2 or 4 threads of one warp.
// kSteps of P entries of z are under way at once: with two of them wide blocks would spill.
template <int B, bool kTransposed = false, int kSteps = (B > 8 ? 1 : 2)>
__device__ __forceinline__ void apply_factor(const float* q,  // [tile_blocks, B, B]
                                             float* tile, int tile_rows, int tile_blocks, int f) {
  using Layout = ButterflyLayout<B>;
  constexpr int kHalf = B / 2;              // r
  constexpr int P = kHalf < 4 ? kHalf : 4;  // entries that are read and written at a time
  constexpr int kSharedBy = kHalf / P;      // threads
  constexpr int R = kButterflyRowsPerThread;
  using Vector = decltype(pack(*static_cast<float (*)[P]>(nullptr)));
  Vector* vectors = reinterpret_cast<Vector*>(tile);  // places in the tile and in Q are counted in Vectors
  const int column = threadIdx.x % kSharedBy;
  const int group = threadIdx.x / kSharedBy, groups = blockDim.x / kSharedBy;
  ThreadRows<B> row(group, groups, tile_rows);
#pragma unroll
  for (int j = 0; j < R; ++j) row.part[j] /= P;
  const int half_blocks = 1 << f;  // H

  // The trip count is the same for all threads, as the barrier inside wants it.
  for (int first = 0; first < tile_blocks; first += blockDim.y) {
    const int k = first + threadIdx.y;
    const bool active = k < tile_blocks;
    // The half-blocks of z; what is added to their places is smaller than a half-block, and rows flip nothing there.
    const int unit = (k >> f) * 2 * half_blocks + (k & (half_blocks - 1));
    const int low = Layout::column_part(unit * kHalf, tile_rows) / P;
    const int high = Layout::column_part((unit + half_blocks) * kHalf, tile_rows) / P;
    float out[R][2][P] = {};
    if (active) {
      // Transposed, a thread has P rows of Q in either half, and steps along them.
      const Vector* q_row =
          reinterpret_cast<const Vector*>(q + static_cast<int64_t>(k) * (B * B)) + (kTransposed ? column * B : column);
#pragma unroll kSteps
      for (int a = 0; a < 2 * kSharedBy; ++a) {
        const int place = a < kSharedBy ? low + a : high + a - kSharedBy;
        float z[R][P];
#pragma unroll
        for (int j = 0; j < R; ++j) unpack(vectors[row.part[j] ^ place], z[j]);
        if constexpr (kTransposed) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int c = 0; c < P; ++c) {
              float weight[P];
              unpack(__ldg(q_row + a + (h * kHalf + c) * (B / P)), weight);
#pragma unroll
              for (int j = 0; j < R; ++j) {
#pragma unroll
                for (int p = 0; p < P; ++p) out[j][h][c] = fmaf(z[j][p], weight[p], out[j][h][c]);
              }
            }
          }
        } else {
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
    }
    if constexpr (kSharedBy > 1) __syncwarp();  // all of them have read z before one of them overwrites it
    if (active) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        vectors[row.part[j] ^ (low + column)] = pack(out[j][0]);
        vectors[row.part[j] ^ (high + column)] = pack(out[j][1]);
      }
    }
  }
}

// Where the entries of block k of factor f lie in a row of the tile. Odd b occur with a single factor only, where the
// two half-blocks are neighbours and it does not matter where one ends.
struct BlockPlaces {
  int half, low, high, tile_rows;
  __device__ __forceinline__ BlockPlaces(int k, int b, int f, int tile_rows) : half(b / 2), tile_rows(tile_rows) {
    const int half_blocks = 1 << f;
    low = (k >> f) * half_blocks * b + (k & (half_blocks - 1)) * half;
    high = low + half_blocks * half;
  }
  __device__ __forceinline__ int operator()(int a) const {
    return ButterflyLayout<0>::column_part(a < half ? low + a : high + (a - half), tile_rows);
  }
};

// apply_factor for any b, from one buffer to another: a thread has some neighbouring columns of one block.
template <bool kTransposed = false>
__device__ __forceinline__ void apply_factor_generic(const float* q,  // [tile_blocks, b, b]
                                                     const float* from, float* to, int tile_rows, int tile_blocks,
                                                     int b, int f) {
  constexpr int R = kButterflyRowsPerThread, C = kButterflyColumns;
  const ThreadRows<0> row(threadIdx.x, blockDim.x, tile_rows);
  const int pieces = (b + C - 1) / C;
  for (int item = threadIdx.y; item < tile_blocks * pieces; item += blockDim.y) {
    const int k = item / pieces, first = item % pieces * C;
    const BlockPlaces place(k, b, f, tile_rows);
    const float* q_row = q + static_cast<int64_t>(k) * b * b + (kTransposed ? first * b : first);
    float out[R][C] = {};
    for (int a = 0; a < b; ++a, q_row += kTransposed ? 1 : b) {
      float weight[C], z[R];
#pragma unroll
      for (int c = 0; c < C; ++c) weight[c] = first + c < b ? __ldg(q_row + (kTransposed ? c * b : c)) : 0.0f;
#pragma unroll
      for (int j = 0; j < R; ++j) z[j] = from[row.part[j] ^ place(a)];
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
      for (int j = 0; j < R; ++j) to[row.part[j] ^ place(first + c)] = out[j][c];
    }
  }
}

// The gradients of one factor's blocks that a thread block adds up, tile by tile.
struct ButterflySums {
  float* shared;     // count * b floats of the thread block's own, or nullptr
  float* part;       // [tile_blocks, b, b] in global memory
  bool first, last;  // of the tiles

  __device__ __forceinline__ const float* from() const { return shared ? shared : part; }
  __device__ __forceinline__ float* to() const { return shared && !last ? shared : part; }
};

// sums += z^T g for each block of factor f.
//
// A thread has a patch of a block: up to 4 entries of z against P entries of either half of g, for every kSplit-th row.
// That is 32 products for three float4s. When the rows are through, the kSplit lanes that share a patch exchange halves
// of it until each has the total of its own share, always in the same order.
//
// Banks. Lanes that want the same word are served at once. For b = 8 a quarter-warp has four rows of two blocks, and
// its neighbour the other half of z: the halves of one z may share a bank. The sums in shared memory are in the order
// of the threads, each in a place that only one thread touches, so they need no barrier and have no conflicts.
template <int B>
__device__ __forceinline__ void correlate(const float* z_tile, const float* g_tile, int tile_rows, int rows,
                                          int tile_blocks, int f, const ButterflySums& sums) {
  using Layout = ButterflyLayout<B>;
  constexpr int kHalf = B / 2, P = kHalf < 4 ? kHalf : 4, kVectors = kHalf / P;
  constexpr int A = B < 4 ? B : 4;                                   // entries of z; both halves if b <= 4
  constexpr int kPatches = B / A * kVectors;                         // of a block
  constexpr int kSplit = B == 4 ? 8 : B <= 8 ? 4 : B == 16 ? 2 : 1;  // lanes that share a patch
  constexpr int kOwn = 2 * A / kSplit;                               // Vectors of it that a lane has at the end
  constexpr int kTogether = B == 8 ? 2 : 1;                          // blocks that go through their patches together
  using Vector = decltype(pack(*static_cast<float (*)[P]>(nullptr)));
  const Vector* z_vectors = reinterpret_cast<const Vector*>(z_tile);
  const Vector* g_vectors = reinterpret_cast<const Vector*>(g_tile);
  const int half_blocks = 1 << f;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int lane = thread % kSplit;
  const int total = (tile_blocks + kTogether - 1) / kTogether * kTogether * kPatches * kSplit;

  // The trip count is the same for all threads, as the exchange wants it.
  for (int first = 0; first < total; first += threads) {
    const int index = first + thread, item = index / kSplit;
    const int k = item / (kPatches * kTogether) * kTogether + item % kTogether, patch = item / kTogether % kPatches;
    const int z_vector = patch % kVectors, g_vector = patch / kVectors % kVectors;
    const int z_half = patch / (kVectors * kVectors);  // 0 if b <= 4
    const bool active = k < tile_blocks;
    float sum[2 * A][P] = {};
    if (active) {
      const int unit = (k >> f) * 2 * half_blocks + (k & (half_blocks - 1));
      const auto place = [&](int half, int vector) {
        const int column = Layout::column_part((unit + half * half_blocks) * kHalf, tile_rows);
        return (column ^ Layout::row_part(lane)) / P + vector;
      };
      int z_place[A / P];
#pragma unroll
      for (int i = 0; i < A / P; ++i) z_place[i] = place(z_half + i, z_vector);
      const int g_place[2] = {place(0, g_vector), place(1, g_vector)};
#pragma unroll 2
      for (int step = 0; lane + step < rows; step += kSplit) {
        const int row = Layout::row_part(step) / P;  // the same for all threads
        float z[A / P][P], g[2][P];
#pragma unroll
        for (int i = 0; i < A / P; ++i) unpack(z_vectors[z_place[i] ^ row], z[i]);
#pragma unroll
        for (int h = 0; h < 2; ++h) unpack(g_vectors[g_place[h] ^ row], g[h]);
#pragma unroll
        for (int a = 0; a < A; ++a) {
#pragma unroll
          for (int p = 0; p < P; ++p) {
            sum[2 * a][p] = fmaf(z[a / P][a % P], g[0][p], sum[2 * a][p]);
            sum[2 * a + 1][p] = fmaf(z[a / P][a % P], g[1][p], sum[2 * a + 1][p]);
          }
        }
      }
    }
#pragma unroll
    for (int n = A; n >= kOwn; n /= 2) {
      const int distance = kSplit * n / (2 * A);
      const bool upper = lane & distance;
#pragma unroll
      for (int i = 0; i < n; ++i) {
#pragma unroll
        for (int p = 0; p < P; ++p) {
          const float low = sum[i][p], high = sum[i + n][p];
          sum[i][p] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, distance);
        }
      }
    }
    if (!active) continue;
    // The lane's Vectors 2a and 2a + 1 are the halves of one row of the block; in shared memory they lie `total` apart.
    const int a_first = z_half * kHalf + z_vector * P + lane * kOwn / 2;
    const int in_part = (k * B * B + a_first * B + lane * kOwn % 2 * kHalf) / P + g_vector;
    if (!sums.first) {
      const Vector* from = reinterpret_cast<const Vector*>(sums.from()) + (sums.shared ? index : in_part);
      const int half = sums.shared ? total : kVectors, row = sums.shared ? 2 * total : B / P;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        float before[P];
        unpack(from[i / 2 * row + i % 2 * half], before);
#pragma unroll
        for (int p = 0; p < P; ++p) sum[i][p] += before[p];
      }
    }
    const bool to_shared = sums.shared && !sums.last;
    Vector* to = reinterpret_cast<Vector*>(sums.to()) + (to_shared ? index : in_part);
    const int half = to_shared ? total : kVectors, row = to_shared ? 2 * total : B / P;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) to[i / 2 * row + i % 2 * half] = pack(sum[i]);
  }
}

// The same for any b: a thread has some neighbouring columns of one row of a block.
__device__ __forceinline__ void correlate_generic(const float* z_tile, const float* g_tile, int tile_rows, int rows,
                                                  int tile_blocks, int b, int f, const ButterflySums& sums) {
  constexpr int C = kButterflyColumns;
  const int pieces = (b + C - 1) / C;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int item = thread; item < tile_blocks * b * pieces; item += threads) {
    const int block_row = item / pieces, first = item % pieces * C, k = block_row / b;
    const BlockPlaces place(k, b, f, tile_rows);
    const int z_place = place(block_row % b);
    int g_place[C];
#pragma unroll
    for (int c = 0; c < C; ++c) g_place[c] = place(first + c < b ? first + c : first);
    float sum[C] = {};
    for (int t = 0; t < rows; ++t) {
      const int row = ButterflyLayout<0>::row_part(t);
      const float z = z_tile[row ^ z_place];
#pragma unroll
      for (int c = 0; c < C; ++c) sum[c] = fmaf(z, g_tile[row ^ g_place[c]], sum[c]);
    }
    const int at = block_row * b + first;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (first + c < b) sums.to()[at + c] = (sums.first ? 0.0f : sums.from()[at + c]) + sum[c];
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
    load_tile<Packed<T, B>>(x_tile, x_row_stride, tile, shape.rows, rows, count);
  } else {
    load_tile<Single<T, B>>(x_tile, x_row_stride, tile, shape.rows, rows, count);
  }
  __syncthreads();

  float* other = tile + butterfly_tile_floats(shape.rows, shape.features);  // used by the generic path only
  for (int f = factors - 1; f >= 0; --f) {
    const float* q = blocks + (f * features + first_feature) * b;  // block k of factor f is at (f*features/b + k)*b*b
    if constexpr (B > 0) {
      apply_factor<B>(q, tile, shape.rows, count / B, f);
    } else {
      apply_factor_generic(q, tile, other, shape.rows, count / b, b, f);
      float* const result = other;
      other = tile, tile = result;
    }
    __syncthreads();
  }

  if (rows_are_packed(y_tile, features, count)) {
    store_tile<Packed<T, B>>(y_tile, features, tile, shape.rows, rows, count);
  } else {
    store_tile<Single<T, B>>(y_tile, features, tile, shape.rows, rows, count);
  }
}

// Activations of the way back. One kernel takes them all: the types matter where a tile comes and goes, and nowhere
// that is hot.
enum class ButterflyElement : int { kFloat32, kFloat16, kBFloat16 };

constexpr int bytes_of(ButterflyElement element) { return element == ButterflyElement::kFloat32 ? 4 : 2; }

template <typename F>
__device__ __forceinline__ void with_element(ButterflyElement element, F&& f) {
  if (element == ButterflyElement::kFloat32) {
    f.template operator()<float>();
  } else if (element == ButterflyElement::kFloat16) {
    f.template operator()<__half>();
  } else {
    f.template operator()<__nv_bfloat16>();
  }
}

// load_tile to an offset in shared memory, from where the tile starts in x.
template <int B>
__device__ __forceinline__ void load_rows(ButterflyElement element, const void* x, int64_t x_row_stride,
                                          int64_t first_row, int64_t first_feature, int tile, int tile_rows, int rows,
                                          int features) {
  extern __shared__ float4 shared_memory[];
  float* to = reinterpret_cast<float*>(shared_memory) + tile;
  with_element(element, [&]<typename T>() {
    const T* first = static_cast<const T*>(x) + first_row * x_row_stride + first_feature;
    if (rows_are_packed(first, x_row_stride, features)) {
      load_tile<Packed<T, B>>(first, x_row_stride, to, tile_rows, rows, features);
    } else {
      load_tile<Single<T, B>>(first, x_row_stride, to, tile_rows, rows, features);
    }
  });
}

template <int B>
__device__ __forceinline__ void store_rows(ButterflyElement element, void* y, int64_t y_row_stride, int64_t first_row,
                                           int64_t first_feature, int tile, int tile_rows, int rows, int features) {
  extern __shared__ float4 shared_memory[];
  const float* from = reinterpret_cast<const float*>(shared_memory) + tile;
  with_element(element, [&]<typename T>() {
    T* first = static_cast<T*>(y) + first_row * y_row_stride + first_feature;
    if (rows_are_packed(first, y_row_stride, features)) {
      store_tile<Packed<T, B>>(first, y_row_stride, from, tile_rows, rows, features);
    } else {
      store_tile<Single<T, B>>(first, y_row_stride, from, tile_rows, rows, features);
    }
  });
}

// dx = g R^T, and a part of the block gradients for each group of rows. B is the block size, or 0 for any `block_size`;
// everything else comes from plan_butterfly_bwd. Any Q will do.
//
// The inputs of the factors are computed again from x, each time from the start: a second tile is all the room that
// takes, and for one or two factors, which is what BOFT is trained with, no arithmetic either that keeping them all
// would save.
//
// Floor. Bytes: grad, x and dx once, 3 * element size a feature and token; x again from the second-level cache for each
// factor but the first; b*m*4 a feature and group for the sums. Operations: 2*b*(2*m + m*(m-1)/2) a feature and token.
// For b = 8 and m = 2 in bfloat16 80 to 6 bytes: 13 a byte, of the 14 to 20 that an H200 or H100 has outside its tensor
// cores. So the widest block that memory bounds is b = 8; from b = 16 on it is arithmetic. Shared memory comes before
// both while blocks are narrow: 64 bytes a feature and token for b = 8 and m = 2, where an H100 moves 9 bytes of it for
// each of its memory's.
//
// Two thread blocks of 256 threads to a multiprocessor, 128 registers a thread: 16 warps, 25 % of an H100.
template <int B>
__global__ void __launch_bounds__(kButterflyThreads, 2)
    butterfly_bwd_kernel(ButterflyElement element,
                         const void* __restrict__ grad,     // [tokens, features], rows grad_row_stride apart
                         const void* __restrict__ x,        // [tokens, features], rows x_row_stride apart
                         const float* __restrict__ blocks,  // [factors, features / b, b, b]
                         void* __restrict__ dx,             // [tokens, features], or nullptr
                         float* __restrict__ parts,         // [groups, factors, features / b, b, b], or nullptr
                         int64_t tokens, int64_t features, int64_t grad_row_stride, int64_t x_row_stride, int factors,
                         int block_size, ButterflyTile shape, int chunk, bool sums_in_shared) {
  extern __shared__ float4 shared_memory[];
  float* const floats = reinterpret_cast<float*>(shared_memory);
  const int b = B > 0 ? B : block_size;
  const int page = static_cast<int>(butterfly_tile_floats(shape.rows, shape.features));
  // Offsets in shared memory.
  int g = 0;
  int z = parts ? page : 0;  // not used without block gradients
  int other = z + page;      // used by the generic path only
  const int own_sums = z + (B > 0 ? page : 2 * page);

  const int group = static_cast<int>(blockIdx.x) / shape.across;
  const int64_t first_feature = static_cast<int64_t>(static_cast<int>(blockIdx.x) % shape.across) * shape.features;
  const int count = static_cast<int>(min(static_cast<int64_t>(shape.features), features - first_feature));
  const int64_t first_row = static_cast<int64_t>(group) * chunk;
  const int chunk_rows = static_cast<int>(min(int64_t{chunk}, tokens - first_row));

  constexpr int kSteps = B > 4 ? 1 : 2;  // there are fewer registers left than on the way there
  const auto apply = [&]<bool kTransposed>(int& tile, int f) {
    const float* q = blocks + (f * features + first_feature) * b;
    if constexpr (B > 0) {
      apply_factor<B, kTransposed, kSteps>(q, floats + tile, shape.rows, count / B, f);
    } else {
      apply_factor_generic<kTransposed>(q, floats + tile, floats + other, shape.rows, count / b, b, f);
      const int result = other;
      other = tile, tile = result;
    }
    __syncthreads();
  };

  for (int done = 0; done < chunk_rows; done += shape.rows) {
    const int rows = min(shape.rows, chunk_rows - done);
    __syncthreads();  // the last tiles have been read
    load_rows<B>(element, grad, grad_row_stride, first_row + done, first_feature, g, shape.rows, rows, count);
    for (int f = 0; f < factors; ++f) {
      if (parts) {
        load_rows<B>(element, x, x_row_stride, first_row + done, first_feature, z, shape.rows, rows, count);
        __syncthreads();
        for (int i = factors - 1; i > f; --i) apply.template operator()<false>(z, i);
        const ButterflySums sums{
            .shared = sums_in_shared ? floats + own_sums + f * butterfly_sums_floats(shape.features, b) : nullptr,
            .part = parts + ((static_cast<int64_t>(group) * factors + f) * features + first_feature) * b,
            .first = done == 0,
            .last = done + rows == chunk_rows,
        };
        if constexpr (B > 0) {
          correlate<B>(floats + z, floats + g, shape.rows, rows, count / B, f, sums);
        } else {
          correlate_generic(floats + z, floats + g, shape.rows, rows, count / b, b, f, sums);
        }
      }
      __syncthreads();
      if (f + 1 < factors || dx) apply.template operator()<true>(g, f);
    }
    if (dx) store_rows<B>(element, dx, features, first_row + done, first_feature, g, shape.rows, rows, count);
  }
}

constexpr int kAddPartsThreads = 128;

// Four sums to a thread where they come in fours, else one.
inline bool parts_are_packed(int64_t size) { return size % 4 == 0; }
inline unsigned add_parts_grid(int64_t size) {
  const int64_t items = parts_are_packed(size) ? size / 4 : size;
  return static_cast<unsigned>((items + kAddPartsThreads - 1) / kAddPartsThreads);
}

// sums = parts[0] + parts[1] + ..., in this order.
//
// Floor. Bytes: 4 a sum and group, most of them from the second-level cache, where they have just been written, and 4 a
// sum. About 32 registers: nothing but the number of sums limits the threads.
__global__ void __launch_bounds__(kAddPartsThreads, 8)
    butterfly_add_parts_kernel(const float* __restrict__ parts,  // [groups, size]
                               float* __restrict__ sums,         // [size]
                               int64_t size, int groups, bool packed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddPartsThreads + threadIdx.x;
  if (packed) {
    if (i >= size / 4) return;
    const float4* part = reinterpret_cast<const float4*>(parts) + i;
    float4 sum = *part;
#pragma unroll 4
    for (int group = 1; group < groups; ++group) {
      const float4 next = part[group * (size / 4)];
      sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
    }
    reinterpret_cast<float4*>(sums)[i] = sum;
  } else {
    if (i >= size) return;
    float sum = parts[i];
    for (int group = 1; group < groups; ++group) sum += parts[group * size + i];
    sums[i] = sum;
  }
}

}  // namespace fastpeft
