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

#include "cuda/boft_factor.cuh"

namespace fastpeft {

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

}  // namespace fastpeft
