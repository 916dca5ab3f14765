// How the butterfly kernels are launched: tiles, threads and shared memory. What they compute: boft.cuh.
#pragma once

#include "cuda/boft_launch.cuh"

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

// Of `blocks` of that size, of which the kernels with a size of their own read float4s.
inline int butterfly_kernel_size(int64_t b, const void* blocks) {
  return reinterpret_cast<uintptr_t>(blocks) % 16 == 0 ? boft_kernel_size(b) : 0;
}

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
  const auto [tiles, groups] = split_rows(row_tiles, need_blocks ? 2 * processors / across : row_tiles);
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

}  // namespace fastpeft
