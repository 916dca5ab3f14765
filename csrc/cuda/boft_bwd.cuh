// The gradients of the butterfly product, in one pass over the rows, and the sum of their parts. The maths is in
// boft.cuh.
#pragma once

#include "cuda/boft_factor.cuh"

namespace fastpeft {

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

// load_tile to an offset in shared memory, from where the tile starts in x. Elements may be of any type here: that
// matters where a tile comes and goes, and nowhere that is hot.
template <int B>
__device__ __forceinline__ void load_rows(Element element, const void* x, int64_t x_row_stride, int64_t first_row,
                                          int64_t first_feature, int tile, int tile_rows, int rows, int features) {
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
__device__ __forceinline__ void store_rows(Element element, void* y, int64_t y_row_stride, int64_t first_row,
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
    butterfly_bwd_kernel(Element element,
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
