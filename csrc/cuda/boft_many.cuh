// BOFT (arXiv 2311.06243) where every row of a batch has its own adapter, a the slot of row t, or none:
//
//     z[t] = x[t] R_a, R_a a product of butterfly factors,    and x[t] where there is none;
//     y[t] += (y[t] - bias) (s_a - 1),                        and nothing where there is none.
//
// What a factor is: boft.cuh. There a tile of many rows shares each block that it reads. Here a number of a block is
// used once for each row, and decoding is bound by reading them: so blocks are reflections, and lie as strips
// (fastpeft/ops/boft_many.py). A thread has a whole block, neighbouring threads have the blocks at one place of
// neighbouring strips, whose numbers of one kind lie side by side. A thread block has some whole strips of a few
// positions of the plan, and one position as long as that fills the GPU; it asks for the numbers of all factors at
// once, before x is there. Positions next to each other that have one adapter share what a thread reads of it.
//
// A row's sums are fused multiply-adds in one order, whatever its neighbours are and however the launch is cut.
//
// Raw pointers only, no allocation, no synchronisation with the host. tests/cuda_host compiles this file for a CPU.
#pragma once

#include <bit>

#include "common/boft_reflectors.h"
#include "cuda/boft_launch.cuh"
#include "cuda/boft_tile.cuh"
#include "cuda/prefetch.cuh"

namespace fastpeft::many {

constexpr int kRotatePositions = 32;  // the most in a thread block

// The most threads in a block: those with wide blocks of Q have twice the registers.
__host__ __device__ constexpr int rotate_threads(int kernel_size) { return kernel_size > 8 ? 128 : 256; }

// Rows for which a thread uses what it has read of a block of this size, as long as they fit its registers.
__host__ __device__ constexpr int rotate_rows(int kernel_size) {
  return kernel_size == 0 ? 1 : kernel_size <= 8 ? 4 : 32 / kernel_size;
}

// Where a row of a tile has its features: with gaps, so that strips begin in different banks (an odd number of them in
// each strip) and the blocks of a wide one do (one for every 32 features). Then a warp meets a bank at most twice, at
// b = 2 four times: tests/cuda_host/run_boft_many_banks.cpp counts.
struct StripLayout {
  int in_strip, in_line;  // a gap after every 2^so many features; 31 for none
  __host__ __device__ __forceinline__ int operator()(int feature) const {
    return feature + (feature >> in_strip) + (feature >> in_line);
  }
};

inline StripLayout strip_layout(int64_t strip) {
  const int zeros = std::countr_zero(static_cast<uint64_t>(strip));
  return {zeros > 0 ? zeros : 31, zeros > 5 ? 5 : 31};
}

struct RotateTile {
  int positions;  // of the plan, a power of two
  int strips;
  int across;  // tiles side by side; the blocks of the grid go through these first
  int pitch;   // floats of a row
  StripLayout layout;
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
  const float* arena;  // [arena_rows, factors, strip / b, b (b + 1) / 2 - 1, features / strip]
  int64_t arena_rows;
  const int* row_reflectors;  // [slots]
  const int* row_numbers;     // [tokens]
  const int* slot_numbers;    // [tokens]
  int tokens, slots, features, factors, block_size, strip;
  RotateTile tile;
};

// The launch for (tokens, features); `processors` is the number of multiprocessors.
//
// Width. Eight strips are a whole sector of every kind of number, fewer would read the others' numbers along. A row of
// 4096 features at (8, 4) is eight tiles of 512, 64 threads that read 35 KiB each.
//
// Positions. More of them read the numbers of a shared adapter less often, and cost parallelism: as many as leave four
// tiles to a processor, up to 32. T = 1 gives 8 tiles here, 16 gives 128, 2048 gives 1024 of 16 positions.
//
// Two tiles had better fit a processor.
inline RotatePlan plan_rotate_many(int64_t tokens, int64_t features, int64_t b, int64_t factors,
                                   int64_t max_shared_bytes, int64_t processors) {
  constexpr int64_t kFeatures = 256, kStrips = 8;
  RotatePlan plan{};
  const int64_t strip = strip_features(features, b, factors), all = features / strip;
  const StripLayout layout = strip_layout(strip);
  const auto pitch = [&](int64_t strips) { return layout(static_cast<int>(strips * strip)); };
  const auto bytes = [&](int64_t positions, int64_t strips) {
    return positions * (pitch(strips) + 2) * static_cast<int64_t>(sizeof(float));
  };
  const auto across = [&](int64_t strips) { return (all + strips - 1) / strips; };
  int64_t strips = kFeatures / strip > kStrips ? kFeatures / strip : kStrips;
  while (strips > kStrips && tokens * across(strips) < processors) strips = strips / 2 > kStrips ? strips / 2 : kStrips;
  if (strips > all) strips = all;
  while (strips > 1 && bytes(1, strips) > max_shared_bytes / 2) strips = (strips + 1) / 2;
  if (bytes(1, strips) > max_shared_bytes) {
    plan.error = "a row of one strip does not fit the shared memory of a thread block";
    return plan;
  }

  int64_t positions = 1;
  while (positions < kRotatePositions && bytes(2 * positions, strips) <= max_shared_bytes / 2 &&
         (tokens + 2 * positions - 1) / (2 * positions) * across(strips) >= 4 * processors) {
    positions *= 2;
  }
  const int64_t grid = (tokens + positions - 1) / positions * across(strips);
  if (grid > INT32_MAX) {
    plan.error = "more tiles than a grid can have";
    return plan;
  }
  plan.grid = dim3(static_cast<unsigned>(grid));
  const int kernel_size = boft_kernel_size(b);
  const int64_t rows = rotate_rows(kernel_size), most = rotate_threads(kernel_size);
  const int64_t threads = (strips * (strip / b) * ((positions + rows - 1) / rows) + 31) / 32 * 32;
  plan.block = dim3(static_cast<unsigned>(threads < most ? threads : most));
  plan.shared_bytes = bytes(positions, strips);
  plan.tile = {static_cast<int>(positions), static_cast<int>(strips), static_cast<int>(across(strips)), pitch(strips),
               layout};
  return plan;
}

// Where the features of one block lie in a row of a tile. An odd b has a single factor, and its halves are neighbours.
struct BlockEntries {
  StripLayout layout;
  int half, low, high;
  __device__ __forceinline__ BlockEntries(StripLayout layout, int strip_begin, int place, int b, int f)
      : layout(layout), half(b / 2) {
    const int others = (1 << f) - 1;
    low = strip_begin + (place & ~others) * b + (place & others) * half;
    high = low + (half << f);
  }
  __device__ __forceinline__ int operator()(int a) const { return layout(a < half ? low + a : high + (a - half)); }
};

// For wide blocks, whose loads would find no registers if the compiler had them sooner.
__device__ __forceinline__ void keep_loads_below() {
#ifdef __CUDA_ARCH__
  __syncwarp(__activemask());
#endif
}

// z Q for one block of R rows. Numbers of the block are `apart` floats from each other.
template <int B, int R>
__device__ __forceinline__ void reflect_rows(const float* numbers, int64_t apart, float* first_row, int pitch,
                                             const BlockEntries& entry) {
  float z[R][B];
#pragma unroll
  for (int a = 0; a < B; ++a) {
#pragma unroll
    for (int r = 0; r < R; ++r) z[r][a] = first_row[r * pitch + entry(a)];
  }
#pragma unroll
  for (int j = 0; j + 1 < B; ++j) {
    if constexpr (B > 16) keep_loads_below();
    const float tau = __ldg(numbers);
    float v[B], even[R], odd[R] = {};
#pragma unroll
    for (int a = j + 1; a < B; ++a) v[a] = __ldg(numbers += apart);
    numbers += apart;
#pragma unroll
    for (int r = 0; r < R; ++r) even[r] = z[r][j];
#pragma unroll
    for (int a = j + 1; a < B; ++a) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        float& sum = (a - j) % 2 ? odd[r] : even[r];
        sum = fmaf(z[r][a], v[a], sum);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float sum = even[r] + odd[r], step = tau * sum;
      z[r][j] = fmaf(tau, sum, -z[r][j]);  // with the sign of D
#pragma unroll
      for (int a = j + 1; a < B; ++a) z[r][a] = fmaf(-step, v[a], z[r][a]);
    }
  }
#pragma unroll
  for (int a = 0; a < B; ++a) {
#pragma unroll
    for (int r = 0; r < R; ++r) first_row[r * pitch + entry(a)] = z[r][a];
  }
}

// The same for one row and any block size, in shared memory.
__device__ __forceinline__ void reflect_any(const float* numbers, int64_t apart, float* row, int b,
                                            const BlockEntries& entry) {
  for (int j = 0; j + 1 < b; ++j) {
    float sum = row[entry(j)];
    for (int a = j + 1; a < b; ++a) sum = fmaf(row[entry(a)], __ldg(numbers + (a - j) * apart), sum);
    const float tau = __ldg(numbers), step = tau * sum;
    row[entry(j)] = fmaf(tau, sum, -row[entry(j)]);
    for (int a = j + 1; a < b; ++a) row[entry(a)] = fmaf(-step, __ldg(numbers + (a - j) * apart), row[entry(a)]);
    numbers += (b - j) * apart;
  }
}

// One factor for `rows` rows of a tile, in place: a thread reads and writes the features of its own block alone.
template <int B>
__device__ __forceinline__ void rotate_factor(const float* numbers,  // [strip / b, b (b + 1) / 2 - 1, all strips]
                                              int64_t all_strips, float* tile, const RotateTile& shape, int strips,
                                              int strip, int b, int f, int rows) {
  constexpr int R = rotate_rows(B);
  const int thread = threadIdx.x, threads = blockDim.x;
  const int items = strips * (strip / b), groups = (rows + R - 1) / R, pitch = shape.pitch;
  for (int unit = thread; unit < items * groups; unit += threads) {
    const int item = unit % items, place = item / strips, of_tile = item % strips, first = unit / items * R;
    const float* const own = numbers + place * reflector_numbers(b) * all_strips + of_tile;
    const BlockEntries entry(shape.layout, of_tile * strip, place, b, f);
    if constexpr (B == 0) {
      reflect_any(own, all_strips, tile + first * pitch, b, entry);
    } else if (first + R <= rows) {
      reflect_rows<B, R>(own, all_strips, tile + first * pitch, pitch, entry);
    } else {
      for (int r = first; r < rows; ++r) reflect_rows<B, 1>(own, all_strips, tile + r * pitch, pitch, entry);
    }
  }
}

// x[numbers[r], :features] for the rows r of a tile. A number that names no row leaves its place as it is, and what is
// computed from that is not stored. Element by element: that has no bank conflicts, and here x is little.
template <typename T>
__device__ __forceinline__ void gather_tile(const T* x, int64_t x_row_stride, const int* numbers, float* tile,
                                            const RotateTile& shape, int rows, int features) {
  constexpr int kBatch = 8;  // so many loads of a thread are on their way before the first is waited for
  TileWalk walk(features, 1);
  while (walk.row < rows) {
    T raw[kBatch] = {};
    int place[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int number = walk.row < rows ? numbers[walk.row] : -1;
      place[i] = number < 0 ? -1 : walk.row * shape.pitch + shape.layout(walk.column);
      if (number >= 0) raw[i] = __ldg(x + number * x_row_stride + walk.column);
      walk.next();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (place[i] >= 0) tile[place[i]] = to_float(raw[i]);
    }
  }
}

template <typename T>
__device__ __forceinline__ void scatter_tile(T* z, int64_t z_row_stride, const int* numbers, const float* tile,
                                             const RotateTile& shape, int rows, int features) {
  for (TileWalk walk(features, 1); walk.row < rows; walk.next()) {
    const int number = numbers[walk.row];
    if (number < 0) continue;
    z[number * z_row_stride + walk.column] = round_to<T>(tile[walk.row * shape.pitch + shape.layout(walk.column)]);
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
  for (int t = static_cast<int>(threadIdx.x); t < tokens; t += static_cast<int>(blockDim.x)) {
    bool named = false;
    for (int position = 0; position < tokens && !named; ++position) named = row_numbers[position] == t;
    for (int column = 0; column < features && !named; ++column) {
      z[t * z_row_stride + column] = x[t * x_row_stride + column];
    }
  }
}

// B is the block size, or 0 for any; grid, block and tile come from plan_rotate_many.
//
// Floor, for a row: 2 m (b + 1 - 2 / b) bytes of reflections a feature, from memory where no other row has the adapter,
// and the row of x and of z; 2 m (b + 1) operations a feature. At (8, 4) and 4096 features that is 280 KiB beside 16:
// 16 rows with 16 adapters are 4.6 MiB, 1.1 us of 4.3 TB/s, and 16 rows with one 0.5 MiB.
template <int B>
__global__ void __launch_bounds__(rotate_threads(B), 2)
    boft_rotate_many_kernel(const __grid_constant__ RotateArguments args) {
  extern __shared__ float4 shared_memory[];
  const RotateTile& shape = args.tile;
  const int b = B > 0 ? B : args.block_size, strip = args.strip;
  float* const tile = reinterpret_cast<float*>(shared_memory);
  int* const numbers = reinterpret_cast<int*>(tile + shape.positions * shape.pitch);  // of rows of x, -1 for none
  int* const adapters = numbers + shape.positions;                                    // rows of the arena, likewise
  const int thread = threadIdx.x, threads = blockDim.x;

  const unsigned across = static_cast<unsigned>(shape.across);
  const int64_t first_position = int64_t{blockIdx.x / across} * shape.positions;
  const int first_strip = static_cast<int>(blockIdx.x % across) * shape.strips, first_feature = first_strip * strip;
  const int64_t all_strips = args.features / strip;
  const int positions = static_cast<int>(min(int64_t{shape.positions}, args.tokens - first_position));
  const int strips = static_cast<int>(min(int64_t{shape.strips}, all_strips - first_strip)), count = strips * strip;

  for (int i = thread; i < positions; i += threads) {
    const int number = args.row_numbers[first_position + i], slot = args.slot_numbers[first_position + i];
    const int adapter = slot >= 0 && slot < args.slots ? args.row_reflectors[slot] : -1;
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

    // Number n of the blocks at place p of factor f is at ((f * places + p) * count of numbers + n) * all_strips.
    const int64_t of_factor = (strip / b) * reflector_numbers(b), kinds = args.factors * of_factor;
    const float* const reflectors = args.arena + adapter * kinds * all_strips + first_strip;
    // All that the factors will read comes nearer while x is read.
    constexpr int kSector = 32 / sizeof(float);
    const int sectors = (strips + kSector - 1) / kSector;
    for (int64_t i = thread; i < kinds * sectors; i += threads) {
      prefetch(reflectors + i / sectors * all_strips + i % sectors * kSector);
    }
    __syncthreads();  // the rows before have been stored
    with_element(args.element, [&]<typename T>() {
      gather_tile(static_cast<const T*>(args.x) + first_feature, args.x_row_stride, numbers + begin, tile, shape, rows,
                  count);
    });
    __syncthreads();
    for (int f = args.factors - 1; f >= 0; --f) {
      rotate_factor<B>(reflectors + f * of_factor * all_strips, all_strips, tile, shape, strips, strip, b, f, rows);
      __syncthreads();
    }
    with_element(args.element, [&]<typename T>() {
      scatter_tile(static_cast<T*>(args.z) + first_feature, args.features, numbers + begin, tile, shape, rows, count);
    });
  }
}

}  // namespace fastpeft::many
