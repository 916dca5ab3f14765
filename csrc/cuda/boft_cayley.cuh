// BOFT's Cayley transform (Liu et al., ICLR 2024, arXiv 2311.06243, section 4) and its derivative, all blocks in one
// launch: Q = (I - S)(I + S)^-1 with S = (R - R^T) / 2.
//
// As cpu/boft_cayley_loops.cpp does, Q (I + S) = I - S is solved by elimination without pivoting, I + S = L U: the
// symmetric part of I + S is the identity, so no pivot is below one. But the rows may grow, by as much as |S|, and take
// digits with them. One step of refinement, Q += (I - Q - (I + Q) S)(I + S)^-1 with (I + S)^-1 = (I + Q) / 2, gives
// them back: up to entries of 100 the error is that of a solve with pivots, or below.
//
// A thread has one row of I + S, and afterwards the same row of Q, which depends on no other one. What threads share
// are rows of L and U, of S and of Q, through shared memory: all threads of a block read the same one at the same time.
//
// Raw pointers only, no allocation, no synchronisation with the host. tests/cuda_host compiles this file for a CPU.
#pragma once

#include "cuda/boft_launch.cuh"

namespace fastpeft {

// Threads of a thread block, two warps that do not wait for each other: few, because a layer has few blocks (4096
// features and b = 8, m = 2 are 8192 rows, 128 thread blocks), and what takes time is one row after the other.
constexpr int kCayleyThreads = 64;
constexpr int kCayleyMaxBlock = 64;  // a thread for each row; in registers where the block size has its own kernel

// Floats from one row of a matrix in shared memory to the next. Where rows are in registers, threads copy whole rows,
// 16 bytes at a time: with 4 more words the eight threads of a quarter-warp are in different banks from b = 8 on. Else
// each thread walks along its own row, and an odd distance keeps all of them apart.
constexpr int cayley_row_stride(int b, bool in_registers) { return in_registers ? b + (b < 4 ? b : 4) : b | 1; }

struct CayleyPlan {
  const char* error;  // nullptr, or why there is no plan
  dim3 grid;
  dim3 block;
  int64_t shared_bytes;
};

// The launch for `count` blocks of size b, either way. Two matrices in shared memory for each block where rows are in
// registers, else three, for one block.
inline CayleyPlan plan_cayley(int64_t count, int64_t b) {
  CayleyPlan plan{};
  if (b > kCayleyMaxBlock) {
    plan.error = "the block size may be up to 64";
    return plan;
  }
  const bool in_registers = boft_kernel_size(b) > 0;
  const int64_t row_floats = cayley_row_stride(static_cast<int>(b), in_registers);
  const int64_t grid = in_registers ? (count * b + kCayleyThreads - 1) / kCayleyThreads : count;
  if (grid > INT32_MAX) {
    plan.error = "more blocks than a grid can have";
    return plan;
  }
  plan.grid = dim3(static_cast<unsigned>(grid));
  plan.block = dim3(in_registers ? kCayleyThreads : b > 32 ? 64 : 32);
  plan.shared_bytes = (in_registers ? 2 * kCayleyThreads : 3 * b) * row_floats * static_cast<int64_t>(sizeof(float));
  return plan;
}

// 2 or 4 neighbouring floats.
template <int P>
struct CayleyVector;
template <>
struct CayleyVector<2> {
  static __device__ __forceinline__ void load(const float* from, float* to) {
    const float2 value = *reinterpret_cast<const float2*>(from);
    to[0] = value.x, to[1] = value.y;
  }
  static __device__ __forceinline__ void store(float* to, const float* from) {
    *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
  }
};
template <>
struct CayleyVector<4> {
  static __device__ __forceinline__ void load(const float* from, float* to) {
    const float4 value = *reinterpret_cast<const float4*>(from);
    to[0] = value.x, to[1] = value.y, to[2] = value.z, to[3] = value.w;
  }
  static __device__ __forceinline__ void store(float* to, const float* from) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  }
};

// 32 rows of B floats, some blocks, that the threads of a warp have in shared memory.
template <int B>
struct CayleyRows {
  static constexpr int kStride = cayley_row_stride(B, true);
  static constexpr int P = B < 4 ? B : 4;
  float* data;

  // This warp's part of the i-th matrix.
  static __device__ __forceinline__ CayleyRows in_shared(float4* shared_memory, int i) {
    const int first = i * kCayleyThreads + static_cast<int>(threadIdx.x) / 32 * 32;
    return {reinterpret_cast<float*>(shared_memory) + first * kStride};
  }

  // From and to rows [first_row, rows) of global memory, neighbouring threads at neighbouring floats, whatever the
  // alignment. Rows that are not there are zeros.
  __device__ __forceinline__ void fetch(const float* __restrict__ from, int64_t first_row, int64_t rows) const {
    const int lane = threadIdx.x % 32;
    const int64_t left = (rows - first_row) * B;
    from += first_row * B;
#pragma unroll
    for (int e = lane; e < 32 * B; e += 32) data[e / B * kStride + e % B] = e < left ? __ldg(from + e) : 0.0f;
  }
  __device__ __forceinline__ void put(float* __restrict__ to, int64_t first_row, int64_t rows) const {
    const int lane = threadIdx.x % 32;
    const int64_t left = (rows - first_row) * B;
    to += first_row * B;
#pragma unroll
    for (int e = lane; e < 32 * B; e += 32) {
      if (e < left) to[e] = data[e / B * kStride + e % B];
    }
  }

  __device__ __forceinline__ void read(int row, float (&to)[B], int first = 0) const {
#pragma unroll
    for (int j = first / P * P; j < B; j += P) CayleyVector<P>::load(data + row * kStride + j, to + j);
  }
  __device__ __forceinline__ void write(int row, const float (&from)[B]) const {
#pragma unroll
    for (int j = 0; j < B; j += P) CayleyVector<P>::store(data + row * kStride + j, from + j);
  }
  __device__ __forceinline__ float entry(int row, int column) const { return data[row * kStride + column]; }
};

// Q of every block. B is the block size; rows are the rows of all blocks together.
//
// Floor. Bytes: R and Q once, 8 a number. Operations: 20/3 * b a number, six tenths of them to refine: for b = 32 27 to
// a byte, what an H100 has outside its tensor cores is 20; for narrower blocks less. What counts is neither, but the
// instructions of one warp, over 5000 at b = 32, and the 3 b steps in which a row of L or U is handed on.
//
// 64 threads of at most 168 registers and 18 KiB (b = 32): six thread blocks, 19 % of a multiprocessor's threads, but a
// layer of 4096 features and two factors has no more than one or two for each. Without the six ptxas holds registers
// back for more thread blocks, and spills.
template <int B>
__global__ void __launch_bounds__(kCayleyThreads, 6) cayley_fwd_kernel(const float* __restrict__ r,  // [rows, B]
                                                                       float* __restrict__ q_out,    // [rows, B]
                                                                       int64_t rows, int) {
  extern __shared__ float4 shared_memory[];
  const auto lu = CayleyRows<B>::in_shared(shared_memory, 0), skew = CayleyRows<B>::in_shared(shared_memory, 1);
  const int lane = threadIdx.x % 32, i = lane % B, first = lane - i;  // row i of the block whose rows begin at `first`
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kCayleyThreads + threadIdx.x / 32 * 32;
  if (first_row >= rows) return;  // the whole warp

  float a[B], q[B];
  lu.fetch(r, first_row, rows);
  __syncwarp();
  lu.read(lane, a);
#pragma unroll
  for (int j = 0; j < B; ++j) {
    a[j] = i == j ? 0.0f : 0.5f * (a[j] - lu.entry(first + j, i));
  }
  skew.write(lane, a);
#pragma unroll
  for (int j = 0; j < B; ++j) {
    q[j] = i == j ? 1.0f : -a[j];
    if (i == j) a[j] = 1.0f;
  }
  __syncwarp();

  // I + S = L U with ones on the diagonal of L. Row k is done in step k, and lies in shared memory from there on, with
  // the diagonal of U inverted; its thread goes on with a copy that nobody reads.
#pragma unroll
  for (int k = 0; k < B; ++k) {
    if (i == k) {
      a[k] = 1.0f / a[k];
      lu.write(lane, a);
    }
    __syncwarp();
    float u[B];
    lu.read(first + k, u, k);
    const float factor = a[k] = a[k] * u[k];
#pragma unroll
    for (int j = k + 1; j < B; ++j) a[j] = fmaf(-factor, u[j], a[j]);
  }
  // Q L U = I - S: by U from the left, then by L from the right.
#pragma unroll
  for (int k = 0; k < B; ++k) {
    float u[B];
    lu.read(first + k, u, k);
    q[k] *= u[k];
#pragma unroll
    for (int j = k + 1; j < B; ++j) q[j] = fmaf(-q[k], u[j], q[j]);
  }
#pragma unroll
  for (int k = B - 1; k > 0; --k) {
    float l[B];
    lu.read(first + k, l);
#pragma unroll
    for (int j = 0; j < k; ++j) q[j] = fmaf(-q[k], l[j], q[j]);
  }

  // From here on rows k are taken P at a time, by loops: unrolled they would be most of the program.
  constexpr int P = CayleyRows<B>::P;
  __syncwarp();       // L has been read
  lu.write(lane, q);  // read by others after the next barrier
  float rest[B];      // of row i: I - Q - (I + Q) S
#pragma unroll
  for (int j = 0; j < B; ++j) rest[j] = (i == j ? 1.0f : 0.0f) - q[j];
#pragma unroll(B > 8 ? 1 : B)
  for (int k = 0; k < B; k += P) {
    float own[P], s[B];
    CayleyVector<P>::load(lu.data + lane * lu.kStride + k, own);
#pragma unroll
    for (int n = 0; n < P; ++n) {
      skew.read(first + k + n, s);
      const float p = (i == k + n ? 1.0f : 0.0f) + own[n];
#pragma unroll
      for (int j = 0; j < B; ++j) rest[j] = fmaf(-p, s[j], rest[j]);
    }
  }
  __syncwarp();  // S has been read
  skew.write(lane, rest);
#pragma unroll(B > 8 ? 1 : B)
  for (int k = 0; k < B; k += P) {  // rest += rest Q
    float own[P], other[B];
    CayleyVector<P>::load(skew.data + lane * skew.kStride + k, own);
#pragma unroll
    for (int n = 0; n < P; ++n) {
      lu.read(first + k + n, other);
#pragma unroll
      for (int j = 0; j < B; ++j) rest[j] = fmaf(own[n], other[j], rest[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < B; ++j) q[j] = fmaf(0.5f, rest[j], q[j]);
  skew.write(lane, q);
  __syncwarp();
  skew.put(q_out, first_row, rows);
}

// dR = (dS - dS^T) / 2 with dS = -P^T G P^T / 2 and P = Q + I, as fastpeft/ops/boft.py derives.
//
// Floor. Bytes: G, Q and dR once, 12 a number. Operations: 4 * b a number: for b = 32 11 to a byte. Registers and
// threads as forward.
template <int B>
__global__ void __launch_bounds__(kCayleyThreads, 6) cayley_bwd_kernel(const float* __restrict__ grad,  // [rows, B]
                                                                       const float* __restrict__ q,     // [rows, B]
                                                                       float* __restrict__ dr,          // [rows, B]
                                                                       int64_t rows, int) {
  extern __shared__ float4 shared_memory[];
  const auto g = CayleyRows<B>::in_shared(shared_memory, 0), p = CayleyRows<B>::in_shared(shared_memory, 1);
  const int lane = threadIdx.x % 32, i = lane % B, first = lane - i;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kCayleyThreads + threadIdx.x / 32 * 32;
  if (first_row >= rows) return;  // the whole warp

  g.fetch(grad, first_row, rows);
  p.fetch(q, first_row, rows);
  __syncwarp();
  p.data[lane * p.kStride + i] += 1.0f;  // read by others after the next barrier
  constexpr int P = CayleyRows<B>::P;
  float product[B] = {};  // row i of -P^T G / 2
#pragma unroll(B > 8 ? P : B)
  for (int k = 0; k < B; ++k) {
    float row[B];
    g.read(first + k, row);
    const float factor = -0.5f * p.entry(first + k, i);
#pragma unroll
    for (int j = 0; j < B; ++j) product[j] = fmaf(factor, row[j], product[j]);
  }
  __syncwarp();  // G has been read: dS takes its place
#pragma unroll(B > 8 ? 1 : B)
  for (int j = 0; j < B; j += P) {
    float sums[P] = {};
#pragma unroll
    for (int n = 0; n < P; ++n) {
      float row[B];
      p.read(first + j + n, row);
#pragma unroll
      for (int k = 0; k < B; ++k) sums[n] = fmaf(product[k], row[k], sums[n]);
    }
    CayleyVector<P>::store(g.data + lane * g.kStride + j, sums);
  }
  __syncwarp();
  float ds[B];
  g.read(lane, ds);
#pragma unroll
  for (int j = 0; j < B; ++j) ds[j] = i == j ? 0.0f : 0.5f * (ds[j] - g.entry(first + j, i));
  p.write(lane, ds);
  __syncwarp();
  p.put(dr, first_row, rows);
}

// One block of any size up to kCayleyMaxBlock, in three matrices of shared memory.
struct CayleyMatrices {
  float* data;
  int b, stride;

  __device__ __forceinline__ CayleyMatrices(float4* shared_memory, int b)
      : data(reinterpret_cast<float*>(shared_memory)), b(b), stride(b | 1) {}

  __device__ __forceinline__ float& operator()(int matrix, int row, int column) const {
    return data[(matrix * b + row) * stride + column];
  }
  // Calls f(row, column, e) for entry e of a block, with all threads.
  template <typename F>
  __device__ __forceinline__ void for_each(F f) const {
    for (int e = threadIdx.x; e < b * b; e += blockDim.x) f(e / b, e % b, e);
  }
};

// The same for any b, which the second number is: a thread block for each block.
template <>
__global__ void __launch_bounds__(kCayleyThreads, 6) cayley_fwd_kernel<0>(const float* __restrict__ r,
                                                                          float* __restrict__ q_out, int64_t, int b) {
  extern __shared__ float4 shared_memory[];
  const CayleyMatrices m(shared_memory, b);
  constexpr int kLu = 0, kQ = 1, kSkew = 2;
  const int i = threadIdx.x;
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * b * b;

  m.for_each([&](int row, int column, int e) { m(kQ, row, column) = __ldg(r + offset + e); });
  __syncthreads();
  m.for_each([&](int row, int column, int) {
    const float s = row == column ? 0.0f : 0.5f * (m(kQ, row, column) - m(kQ, column, row));
    m(kSkew, row, column) = s;
    m(kLu, row, column) = row == column ? 1.0f : s;
  });
  __syncthreads();
  // The diagonal of U is left as it is: who inverts it would be waited for.
  for (int k = 0; k + 1 < b; ++k) {
    if (i > k && i < b) {
      const float factor = m(kLu, i, k) *= 1.0f / m(kLu, k, k);
      for (int j = k + 1; j < b; ++j) m(kLu, i, j) = fmaf(-factor, m(kLu, k, j), m(kLu, i, j));
    }
    __syncthreads();
  }
  if (i < b) {
    for (int j = 0; j < b; ++j) m(kQ, i, j) = i == j ? 1.0f : -m(kSkew, i, j);
    for (int k = 0; k < b; ++k) {
      const float value = m(kQ, i, k) *= 1.0f / m(kLu, k, k);
      for (int j = k + 1; j < b; ++j) m(kQ, i, j) = fmaf(-value, m(kLu, k, j), m(kQ, i, j));
    }
    for (int k = b - 1; k > 0; --k) {
      const float value = m(kQ, i, k);
      for (int j = 0; j < k; ++j) m(kQ, i, j) = fmaf(-value, m(kLu, k, j), m(kQ, i, j));
    }
  }
  __syncthreads();  // L has been read: what is left over takes its place
  if (i < b) {
    for (int j = 0; j < b; ++j) {
      float sum = (i == j ? 1.0f : 0.0f) - m(kQ, i, j);
      for (int k = 0; k < b; ++k) sum = fmaf(-((i == k ? 1.0f : 0.0f) + m(kQ, i, k)), m(kSkew, k, j), sum);
      m(kLu, i, j) = sum;
    }
  }
  __syncthreads();
  if (i < b) {
    for (int j = 0; j < b; ++j) {
      float step = m(kLu, i, j);
      for (int k = 0; k < b; ++k) step = fmaf(m(kLu, i, k), m(kQ, k, j), step);
      m(kSkew, i, j) = fmaf(0.5f, step, m(kQ, i, j));
    }
  }
  __syncthreads();
  m.for_each([&](int row, int column, int e) { q_out[offset + e] = m(kSkew, row, column); });
}

template <>
__global__ void __launch_bounds__(kCayleyThreads, 6) cayley_bwd_kernel<0>(const float* __restrict__ grad,
                                                                          const float* __restrict__ q,
                                                                          float* __restrict__ dr, int64_t, int b) {
  extern __shared__ float4 shared_memory[];
  const CayleyMatrices m(shared_memory, b);
  constexpr int kG = 0, kP = 1, kProduct = 2;
  const int i = threadIdx.x;
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * b * b;

  m.for_each([&](int row, int column, int e) {
    m(kG, row, column) = __ldg(grad + offset + e);
    m(kP, row, column) = __ldg(q + offset + e) + (row == column ? 1.0f : 0.0f);
  });
  __syncthreads();
  if (i < b) {
    for (int j = 0; j < b; ++j) {
      float sum = 0.0f;
      for (int k = 0; k < b; ++k) sum = fmaf(m(kP, k, i), m(kG, k, j), sum);
      m(kProduct, i, j) = -0.5f * sum;
    }
  }
  __syncthreads();  // G has been read: dS takes its place
  if (i < b) {
    for (int j = 0; j < b; ++j) {
      float sum = 0.0f;
      for (int k = 0; k < b; ++k) sum = fmaf(m(kProduct, i, k), m(kP, j, k), sum);
      m(kG, i, j) = sum;
    }
  }
  __syncthreads();
  m.for_each([&](int row, int column, int e) {
    dr[offset + e] = row == column ? 0.0f : 0.5f * (m(kG, row, column) - m(kG, column, row));
  });
}

}  // namespace fastpeft
