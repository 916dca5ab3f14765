// BOFT (arXiv 2311.06243) where every row of a batch has its own adapter, a the slot of row t, or none:
//
//     z[t] = x[t] R_a, R_a a product of butterfly factors,    and x[t] where there is none;
//     y[t] += (y[t] - bias) (s_a - 1),                        and nothing where there is none.
//
// What a factor is: boft.cuh. There a tile of many rows shares each block that it reads. Here a number of a block is
// used once for each row, and decoding is bound by reading 4 m b bytes of blocks for every feature of a row: what
// counts is that they are on their way early, and in many places. So a thread block has a range of windows of a few
// positions of the plan, and one position as long as that fills the GPU; it asks for the blocks of all factors at once,
// before x is there; and it has each factor compute from one buffer in shared memory into another, so that threads wait
// for each other once a factor. Positions next to each other that have one adapter share what a thread reads of it.
//
// A row's sums are fused multiply-adds in the order of the rows of its blocks, as in boft_factor.cuh, whatever its
// neighbours are and however the launch is cut.
//
// Raw pointers only, no allocation, no synchronisation with the host. tests/cuda_host compiles this file for a CPU.
#pragma once

#include "cuda/boft_factor.cuh"
#include "cuda/prefetch.cuh"

namespace fastpeft::many {

constexpr int kRotateThreads = 256;   // the most threads in a block
constexpr int kRotateRows = 4;        // for which a thread uses what it has read of Q
constexpr int kRotatePositions = 32;  // the most in a thread block

struct RotateTile {
  int positions;  // of the plan, a power of two
  int features;   // whole windows
  int across;     // tiles side by side; the blocks of the grid go through these first
};

struct RotatePlan {
  const char* error;  // nullptr, or why there is no plan
  dim3 grid;
  dim3 block;
  int64_t shared_bytes;
  RotateTile tile;
};

struct RotateArguments {
  Element element;  // of x and z
  const void* x;    // [tokens, features], rows x_row_stride elements apart
  int64_t x_row_stride;
  void* z;             // [tokens, features]
  const float* arena;  // [arena_rows, factors, features / b, b, b]
  int64_t arena_rows;
  const int* row_blocks;    // [slots]
  const int* row_numbers;   // [tokens]
  const int* slot_numbers;  // [tokens]
  int tokens, slots, features, factors, block_size;
  RotateTile tile;
};

// What a thread computes of a block of size B, and how it reads it: some neighbouring columns, which are whole float4s
// of Q. At B = 2 a float4 is a whole block.
template <int B>
struct RotatePiece {
  static constexpr int kHalf = B / 2;
  static constexpr int kColumns = B < 4 ? B : 4;
  static constexpr int kSharedBy = B / kColumns;          // threads
  static constexpr int kEntries = kHalf < 4 ? kHalf : 4;  // of z that are read at a time
};

// Features of a row that one thread computes.
constexpr int rotate_columns(int kernel_size) { return kernel_size == 2 ? 2 : 4; }

// The launch for (tokens, features); the kernel size is that of butterfly_kernel_size, `processors` the number of
// multiprocessors.
//
// Width. A row of 4096 features at (8, 4) has 512 KiB of blocks, which would be on one processor's way to the
// second-level cache (80 GB/s) for 6.5 us. Tiles of 256 features are two warps that read 8 KiB for each factor;
// narrower ones are for batches that would leave processors idle, and gain nothing below 64 features, 8 KiB for all
// factors, which take no longer than the first byte.
//
// Positions. More of them read the blocks of a shared adapter less often, and cost parallelism: as many as leave four
// tiles to a processor, up to 32. T = 1 gives 64 tiles of 64 features here, 16 gives 256 of 256 features, 2048 gives
// 1024 of 32 positions.
//
// Two buffers have to fit, and two tiles to a processor where narrower ones allow it.
inline RotatePlan plan_rotate_many(int64_t tokens, int64_t features, int64_t b, int64_t factors, int element_bytes,
                                   int64_t max_shared_bytes, int64_t processors, int kernel_size) {
  constexpr int64_t kNarrowest = 64;
  RotatePlan plan{};
  const int64_t window = b << (factors - 1);
  const auto bytes = [&](int64_t positions, int64_t count) {
    return 2 * (butterfly_tile_floats(positions, count) + positions) * static_cast<int64_t>(sizeof(float));
  };
  if (bytes(1, window) > max_shared_bytes) {
    plan.error = "two rows of one window do not fit the shared memory of a thread block";
    return plan;
  }
  const auto [step, wanted] = butterfly_width(window, element_bytes);
  const auto across = [&](int64_t count) { return (features + count - 1) / count; };
  int64_t count = wanted;
  while (count > step && count > kNarrowest && tokens * across(count) < processors) {
    count = count / 2 / step > 1 ? count / 2 / step * step : step;
  }
  while (count > step && bytes(1, count) > max_shared_bytes / 2) count -= step;
  if (bytes(1, count) > max_shared_bytes) count = window;
  if (count > features) count = features;

  int64_t positions = 1;
  while (positions < kRotatePositions && bytes(2 * positions, count) <= max_shared_bytes / 2 &&
         (tokens + 2 * positions - 1) / (2 * positions) * across(count) >= 4 * processors) {
    positions *= 2;
  }
  const int64_t grid = (tokens + positions - 1) / positions * across(count);
  if (grid > INT32_MAX) {
    plan.error = "more tiles than a grid can have";
    return plan;
  }
  plan.grid = dim3(static_cast<unsigned>(grid));
  if (kernel_size == 0) {
    plan.block = butterfly_threads(positions, count, b, 0);
  } else {
    const int64_t groups = (positions + kRotateRows - 1) / kRotateRows;
    const int64_t threads = (count / rotate_columns(kernel_size) * groups + 31) / 32 * 32;
    plan.block = dim3(static_cast<unsigned>(threads < kRotateThreads ? threads : kRotateThreads));
  }
  plan.shared_bytes = bytes(positions, count);
  plan.tile = {static_cast<int>(positions), static_cast<int>(count), static_cast<int>(across(count))};
  return plan;
}

__device__ __forceinline__ int thread_number() { return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); }
__device__ __forceinline__ int thread_count() { return static_cast<int>(blockDim.x * blockDim.y); }

// The thread's columns of one block, for R rows. Nothing comes between the loads of Q, so that all are on their way
// before the first is waited for.
template <int B, int R>
__device__ __forceinline__ void multiply_rows(const float4* q,  // the thread's first in the block
                                              const float* from, float* to, const int (&row)[R], int low, int high,
                                              int piece) {
  using Piece = RotatePiece<B>;
  constexpr int C = Piece::kColumns, P = Piece::kEntries;
  constexpr int kMost = R == 1 ? 16 : 8, kHeld = B < kMost ? B : kMost;  // rows of Q in registers
  constexpr int kVectors = kHeld * C / 4;
  using Entries = decltype(pack(*static_cast<float (*)[P]>(nullptr)));
  const Entries* const z_vectors = reinterpret_cast<const Entries*>(from);
  float out[R][C] = {};
#pragma unroll 1  // or wide blocks spill
  for (int first = 0; first < B; first += kHeld) {
    float4 raw[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) raw[i] = __ldg(q + (first + i) * Piece::kSharedBy);
    float weight[kHeld * C];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      weight[4 * i] = raw[i].x, weight[4 * i + 1] = raw[i].y, weight[4 * i + 2] = raw[i].z,
                 weight[4 * i + 3] = raw[i].w;
    }
#pragma unroll
    for (int a = 0; a < kHeld; a += P) {
      const int at = first + a, place = at < Piece::kHalf ? low + at : high + at - Piece::kHalf;
      float z[R][P];
#pragma unroll
      for (int j = 0; j < R; ++j) unpack(z_vectors[(row[j] ^ place) / P], z[j]);
#pragma unroll
      for (int p = 0; p < P; ++p) {
#pragma unroll
        for (int j = 0; j < R; ++j) {
#pragma unroll
          for (int c = 0; c < C; ++c) out[j][c] = fmaf(z[j][p], weight[(a + p) * C + c], out[j][c]);
        }
      }
    }
  }
  if constexpr (B <= 4) {  // the columns are a whole block, half of them in either half
    Entries* const vectors = reinterpret_cast<Entries*>(to);
#pragma unroll
    for (int j = 0; j < R; ++j) {
      float part[2][P];
#pragma unroll
      for (int c = 0; c < C; ++c) part[c / P][c % P] = out[j][c];
      vectors[(row[j] ^ low) / P] = pack(part[0]), vectors[(row[j] ^ high) / P] = pack(part[1]);
    }
  } else {
    const int column = piece * C;
    const int place = column < Piece::kHalf ? low + column : high + column - Piece::kHalf;
#pragma unroll
    for (int j = 0; j < R; ++j) reinterpret_cast<float4*>(to)[(row[j] ^ place) / 4] = pack(out[j]);
  }
}

// One factor for `rows` rows of a tile, from one buffer to another. Threads are groups, which take turns with the rows,
// of one for each piece of a block.
template <int B>
__device__ __forceinline__ void rotate_factor(const float* q,  // [blocks, B, B]
                                              const float* from, float* to, const RotateTile& tile, int blocks, int f,
                                              int rows) {
  using Layout = ButterflyLayout<B>;
  using Piece = RotatePiece<B>;
  const int columns = tile.features / Piece::kColumns;
  const bool in_groups = thread_count() >= 2 * columns;
  const int groups = in_groups ? thread_count() / columns : 1, group = in_groups ? thread_number() / columns : 0;
  const int half_blocks = 1 << f;
  if (group >= groups) return;
  for (int item = thread_number() - group * columns; item < blocks * Piece::kSharedBy;
       item += in_groups ? columns : thread_count()) {
    const int k = item / Piece::kSharedBy, piece = item % Piece::kSharedBy;
    const int unit = (k >> f) * 2 * half_blocks + (k & (half_blocks - 1));
    const int low = Layout::column_part(unit * Piece::kHalf, tile.positions);
    const int high = Layout::column_part((unit + half_blocks) * Piece::kHalf, tile.positions);
    const float4* const own = reinterpret_cast<const float4*>(q + int64_t{k} * (B * B)) + piece;
    int r = group;
    for (; r + (kRotateRows - 1) * groups < rows; r += kRotateRows * groups) {
      int row[kRotateRows];
#pragma unroll
      for (int j = 0; j < kRotateRows; ++j) row[j] = Layout::row_part(r + j * groups);
      multiply_rows<B, kRotateRows>(own, from, to, row, low, high, piece);
    }
    for (; r < rows; r += groups) {
      const int row[1] = {Layout::row_part(r)};
      multiply_rows<B, 1>(own, from, to, row, low, high, piece);
    }
  }
}

// x[numbers[r], :features] for the rows r of a tile. A number that names no row leaves its place as it is, and what is
// computed from that is not stored.
template <typename Access, typename T>
__device__ __forceinline__ void gather_tile(const T* x, int64_t x_row_stride, const int* numbers, float* tile,
                                            int tile_rows, int rows, int features) {
  using Raw = typename Access::Raw;
  constexpr int kBatch = 4;  // so many loads of a thread are on their way before the first is waited for
  const int columns = features / Access::kWidth;
  TileWalk walk(columns, Access::kPass);
  while (walk.row < rows) {
    Raw raw[kBatch] = {};
    int row[kBatch], column[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      row[i] = walk.row, column[i] = walk.column;
      walk.next();
      const int number = row[i] < rows && column[i] < columns ? numbers[row[i]] : -1;
      if (number < 0) row[i] = -1;
      if (number >= 0) raw[i] = __ldg(reinterpret_cast<const Raw*>(x + number * x_row_stride) + column[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (row[i] >= 0) Access::to_tile(tile, tile_rows, row[i], column[i], raw[i]);
    }
  }
}

template <typename Access, typename T>
__device__ __forceinline__ void scatter_tile(T* z, int64_t z_row_stride, const int* numbers, const float* tile,
                                             int tile_rows, int rows, int features) {
  using Raw = typename Access::Raw;
  const int columns = features / Access::kWidth;
  for (TileWalk walk(columns, Access::kPass); walk.row < rows; walk.next()) {
    if (walk.column >= columns || numbers[walk.row] < 0) continue;
    reinterpret_cast<Raw*>(z + numbers[walk.row] * z_row_stride)[walk.column] =
        Access::from_tile(tile, tile_rows, walk.row, walk.column);
  }
}

// z = x for the rows of these numbers, in elements or in vectors of them.
template <typename Raw, typename T>
__device__ __forceinline__ void copy_rows(const T* x, int64_t x_row_stride, T* z, int64_t z_row_stride,
                                          const int* numbers, int rows, int features) {
  const int columns = features / static_cast<int>(sizeof(Raw) / sizeof(T));
  for (TileWalk walk(columns, 1); walk.row < rows; walk.next()) {
    const int number = numbers[walk.row];
    if (number < 0) continue;
    reinterpret_cast<Raw*>(z + number * z_row_stride)[walk.column] =
        __ldg(reinterpret_cast<const Raw*>(x + number * x_row_stride) + walk.column);
  }
}

// z = x for every row that no position names. There are some where a position names none: that is no plan that anybody
// makes, so it may take its time, and thread blocks that come here may write the same.
template <typename T>
__device__ __forceinline__ void copy_unnamed(const T* x, int64_t x_row_stride, T* z, int64_t z_row_stride,
                                             const int* row_numbers, int tokens, int features) {
  for (int t = thread_number(); t < tokens; t += thread_count()) {
    bool named = false;
    for (int position = 0; position < tokens && !named; ++position) named = row_numbers[position] == t;
    for (int column = 0; column < features && !named; ++column) {
      z[t * z_row_stride + column] = x[t * x_row_stride + column];
    }
  }
}

// B is the block size, or 0 for any; grid, block and tile come from plan_rotate_many.
//
// Floor, for a row: 4 m b bytes of blocks a feature, from memory where no other row has the adapter, and the row of x
// and of z; 2 m b operations a feature. At (8, 4) and 4096 features that is 512 KiB beside 16: 16 rows with 16 adapters
// are 8 MiB, 2.0 us of 4.3 TB/s, and 16 rows with one 0.8 MiB.
template <int B>
__global__ void __launch_bounds__(kRotateThreads, 2)
    boft_rotate_many_kernel(const __grid_constant__ RotateArguments args) {
  extern __shared__ float4 shared_memory[];
  const RotateTile& shape = args.tile;
  const int b = B > 0 ? B : args.block_size;
  const int64_t tile_floats = butterfly_tile_floats(shape.positions, shape.features);
  float* const first_tile = reinterpret_cast<float*>(shared_memory);
  int* const numbers = reinterpret_cast<int*>(first_tile + 2 * tile_floats);  // of rows of x, -1 for none
  int* const adapters = numbers + shape.positions;                            // rows of the arena, likewise

  const unsigned across = static_cast<unsigned>(shape.across);
  const int64_t first_position = int64_t{blockIdx.x / across} * shape.positions;
  const int64_t first_feature = int64_t{blockIdx.x % across} * shape.features;
  const int positions = static_cast<int>(min(int64_t{shape.positions}, args.tokens - first_position));
  const int count = static_cast<int>(min(int64_t{shape.features}, args.features - first_feature));

  for (int i = thread_number(); i < positions; i += thread_count()) {
    const int number = args.row_numbers[first_position + i], slot = args.slot_numbers[first_position + i];
    const int adapter = slot >= 0 && slot < args.slots ? args.row_blocks[slot] : -1;
    numbers[i] = number >= 0 && number < args.tokens ? number : -1;
    adapters[i] = adapter >= 0 && adapter < args.arena_rows ? adapter : -1;
  }
  __syncthreads();

  for (int begin = 0, end = 0; begin < positions; begin = end) {
    const int adapter = adapters[begin];
    bool all_named = true;
    for (end = begin; end < positions && adapters[end] == adapter; ++end) all_named &= numbers[end] >= 0;
    const int rows = end - begin;
    if (!all_named) {
      with_element(args.element, [&]<typename T>() {
        copy_unnamed(static_cast<const T*>(args.x) + first_feature, args.x_row_stride,
                     static_cast<T*>(args.z) + first_feature, args.features, args.row_numbers, args.tokens, count);
      });
    }
    if (adapter < 0) {
      with_element(args.element, [&]<typename T>() {
        const T* const x = static_cast<const T*>(args.x) + first_feature;
        T* const z = static_cast<T*>(args.z) + first_feature;
        if (rows_are_packed(x, args.x_row_stride, count) && rows_are_packed(z, args.features, count)) {
          copy_rows<uint4>(x, args.x_row_stride, z, args.features, numbers + begin, rows, count);
        } else {
          copy_rows<T>(x, args.x_row_stride, z, args.features, numbers + begin, rows, count);
        }
      });
      continue;
    }

    // Block k of factor f is at (f * features / b + k) * b * b.
    const float* const blocks = args.arena + (int64_t{adapter} * args.factors * args.features + first_feature) * b;
    const auto factor_blocks = [&](int f) { return blocks + int64_t{f} * args.features * b; };
    // All that the factors will read comes nearer while x is read.
    constexpr int kLine = 128 / sizeof(float);
    for (int f = args.factors - 1; f >= 0; --f) {
      for (int64_t i = int64_t{thread_number()} * kLine; i < int64_t{count} * b; i += int64_t{thread_count()} * kLine) {
        prefetch(factor_blocks(f) + i);
      }
    }
    __syncthreads();  // the rows before have been stored
    with_element(args.element, [&]<typename T>() {
      const T* const x = static_cast<const T*>(args.x) + first_feature;
      if (rows_are_packed(x, args.x_row_stride, count)) {
        gather_tile<Packed<T, B>>(x, args.x_row_stride, numbers + begin, first_tile, shape.positions, rows, count);
      } else {
        gather_tile<Single<T, B>>(x, args.x_row_stride, numbers + begin, first_tile, shape.positions, rows, count);
      }
    });
    __syncthreads();
    float *tile = first_tile, *other = first_tile + tile_floats;
    for (int f = args.factors - 1; f >= 0; --f) {
      if constexpr (B > 0) {
        rotate_factor<B>(factor_blocks(f), tile, other, shape, count / B, f, rows);
      } else {
        apply_factor_generic(factor_blocks(f), tile, other, shape.positions, count / b, b, f);
      }
      __syncthreads();
      float* const result = other;
      other = tile, tile = result;
    }
    with_element(args.element, [&]<typename T>() {
      T* const z = static_cast<T*>(args.z) + first_feature;
      if (rows_are_packed(z, args.features, count)) {
        scatter_tile<Packed<T, B>>(z, args.features, numbers + begin, tile, shape.positions, rows, count);
      } else {
        scatter_tile<Single<T, B>>(z, args.features, numbers + begin, tile, shape.positions, rows, count);
      }
    });
  }
}

}  // namespace fastpeft::many
