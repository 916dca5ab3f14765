// One butterfly factor, or its transpose, on a tile in shared memory. The maths is in boft.cuh.
#pragma once

#include "cuda/boft_tile.cuh"

namespace fastpeft {

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

}  // namespace fastpeft
