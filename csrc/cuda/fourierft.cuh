// FourierFT (Gao et al., ICML 2024, arXiv 2405.03003) on CUDA: the delta of two tokens in one thread block.
//
// A real matrix acts on the two parts of a complex signal separately, so two tokens travel as one signal z. With
// H[u, v] = 1/2 (S[u, v] + S[-u, -v]), which is Hermitian,
//
//   delta(z) = scale * F1 (H F2 z),     scale = alpha / (d1 d2), F1 and F2 the transforms of length d1 and d2
//
// because both of the paper's inverse transforms become forward ones when u and v run backwards. The gradient of x is
// the same with H transposed, and with G = F1 g, X = F2 x
//
//   dL/dc_k = scale * 1/2 Re sum (G[u] conj X[-v] + conj G[-u] X[v])
//
// where the sum over signals is one over tokens: products of different tokens cancel. Row i of the dense update is the
// gradient of x for the unit vector e_i, whose transform is known: w^(i u).
//
// One buffer of shared memory holds the signal from its load to its store. Transforms are in place: decimating in
// frequency they leave bin k in place position[k], and transposed they take bins from there and leave natural order,
// so that a permutation is only an index of the gather and of the scatter between them. What the gather sums stays in
// registers until every thread has read. Signals that do not fit are split: they lie in global memory, with the source
// and the target apart, and go through shared memory part by part.
//
// Raw pointers only, no allocation on the device, no synchronisation with the host. tests/cuda_host compiles this file
// for a CPU.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/element.cuh"
#include "cuda/fourierft_signal.cuh"

namespace fastpeft::fourier {

constexpr int kShortSum = 16;  // samples that are summed one after the other

// Rows of elements side by side, of the type that a kernel is for.
struct Rows {
  const void* data;  // nullptr: there are none
  int64_t stride;
};

struct Arguments {
  int64_t tokens;
  float scale;
  Transform transform[2];  // of the source and of the target
  Rows source;             // [tokens, source length]; nullptr: unit vectors, row t of them e_t
  Rows base;               // [tokens, target length], what the delta is added to; nullptr: zeros
  void* y;                 // [tokens, target length]: base + delta, may be base; nullptr: not wanted
  int64_t y_stride;

  // The mix from bins of the source to bins of the target, samples sorted by target bin. Each stands at two places,
  // the other one its mirror image, with half its coefficient.
  const int* offsets;     // [target length + 1]
  const int* sources;     // [samples]
  const int* entries;     // [samples]
  const float* spectrum;  // [n], spectrum_stride apart
  int64_t spectrum_stride;

  // Where products are wanted: source is grad, and
  Rows x;           // [tokens, target length]; nullptr: no products
  const int* rows;  // [n], bins of source
  const int* cols;  // [n], bins of x
  int n;
  float4* kept;     // [blocks, n], what a block remembers of grad's spectrum
  float* partials;  // [groups, n]

  // Pairs of tokens p, p + groups, ... are a group, whose products are summed one after the other. Blocks are as many,
  // or fewer where signals are split.
  unsigned groups;

  // Of split signals.
  float2* scratch;  // [blocks, sizes of the two transforms]
  int room;         // of shared memory
};

// Two rows as one complex row, of a token without a partner with nothing beside it.
template <typename T>
struct Signal {
  const T* one;
  const T* other;
  __device__ __forceinline__ Signal(Rows rows, int64_t token, int64_t tokens)
      : one(static_cast<const T*>(rows.data) + token * rows.stride),
        other(token + 1 < tokens ? one + rows.stride : nullptr) {}
  __device__ __forceinline__ float2 operator[](int i) const {
    return make_float2(to_float(__ldg(one + i)), other ? to_float(__ldg(other + i)) : 0.0f);
  }
};

// base + delta, rounded once. `base` may be where the result goes: no __ldg.
template <typename T>
struct Result {
  const T* base;
  T* y;
  int64_t base_stride, y_stride;
  bool pair;
  __device__ __forceinline__ Result(const Arguments& args, int64_t token)
      : base(args.base.data ? static_cast<const T*>(args.base.data) + token * args.base.stride : nullptr),
        y(static_cast<T*>(args.y) + token * args.y_stride),
        base_stride(args.base.stride),
        y_stride(args.y_stride),
        pair(token + 1 < args.tokens) {}
  // In two steps: with conversions under the same conditions as loads, each load would be waited for at once.
  struct Raw {
    T one, other;
  };
  static constexpr int kReadAtOnce = 8 / sizeof(T);
  __device__ __forceinline__ Raw read(int i) const {
    Raw raw;
    raw.one = raw.other = round_to<T>(0.0f);
    if (base) raw.one = base[i];
    if (base && pair) raw.other = base[base_stride + i];
    return raw;
  }
  __device__ __forceinline__ void add(int i, const Raw& raw, float2 value) const {
    write(i, plus(make_float2(to_float(raw.one), to_float(raw.other)), value));
  }

 private:
  __device__ __forceinline__ void write(int i, float2 value) const {
    y[i] = round_to<T>(value.x);
    if (pair) y[y_stride + i] = round_to<T>(value.y);
  }
};

// Bin v of the transform of e_row + i e_(row + 1), from a table; of the last row's alone.
template <typename Signals>
__device__ __forceinline__ float2 unit_bin(const Transform& source, int row, int v) {
  using Product = std::conditional_t<Signals::kSplit, uint64_t, unsigned>;  // what fits a multiprocessor is below 2^16
  const unsigned length = source.length;
  unsigned turn = static_cast<unsigned>(static_cast<Product>(row) * static_cast<unsigned>(v) % length);
  const float2 bin = __ldg(source.table + turn);
  if (row + 1 == source.length) return bin;  // there are as many rows
  turn += v;
  if (turn >= length) turn -= length;
  const float2 other = __ldg(source.table + turn);
  return make_float2(bin.x - other.y, bin.y + other.x);
}

// Gather, multiply and scatter, from a whole buffer to a whole buffer; they are one unless signals are split. A bin has
// one thread. Most bins have no sample or one: those of kBatch bins are looked up together, without branches, so that
// they are waited for once.
template <typename Signals, typename Buffer>
__device__ __forceinline__ void mix_bins(const Arguments& args, int row, const Buffer& from, const Buffer& to) {
  constexpr int kHeld = Signals::kHeld, kBatch = Signals::kBatch;
  static_assert(kHeld % kBatch == 0);
  const Transform &source = args.transform[0], &target = args.transform[1];
  const bool unit = !args.source.data;
  const int length = target.length;
  const auto coefficient = [&](int entry) { return __ldg(args.spectrum + entry * args.spectrum_stride); };
  int start = 0;
  do {
    float2 held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; i += kBatch) {
      int first[kBatch], last[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int k = start + threadIdx.x + (i + b) * blockDim.x;
        first[b] = last[b] = 0;
        if (k < length) first[b] = __ldg(args.offsets + k), last[b] = __ldg(args.offsets + k + 1);
      }
      int place[kBatch], entry[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        place[b] = entry[b] = 0;
        if (first[b] < last[b]) place[b] = __ldg(args.sources + first[b]), entry[b] = __ldg(args.entries + first[b]);
      }
      float c[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        c[b] = 0.0f;
        if (first[b] < last[b]) c[b] = coefficient(entry[b]);
        if (!unit) place[b] = __ldg(source.position + place[b]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float2 bin = unit ? unit_bin<Signals>(source, row, place[b]) : from[place[b]];
        held[i + b] = make_float2(c[b] * bin.x, c[b] * bin.y);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        // Sums of sums: a bin can have as many samples as there are coefficients.
#pragma unroll 1
        for (int s = first[b] + 1; s < last[b];) {
          float2 sum = make_float2(0.0f, 0.0f);
          const int end = min(s + kShortSum, last[b]);
#pragma unroll 1
          for (; s < end; ++s) {
            const float c = coefficient(__ldg(args.entries + s));
            const int v = __ldg(args.sources + s);
            const float2 bin = unit ? unit_bin<Signals>(source, row, v) : from[__ldg(source.position + v)];
            sum.x += c * bin.x, sum.y += c * bin.y;
          }
          held[i + b] = plus(held[i + b], sum);
        }
      }
    }
    if (!Signals::kSplit) __syncthreads();  // all of the source has been read
    const float half_scale = 0.5f * args.scale;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int k = start + threadIdx.x + i * blockDim.x;
      if (k >= length) break;
      float2 value = make_float2(half_scale * held[i].x, half_scale * held[i].y);
      if (target.chirp) value = times(value, __ldg(target.table + target.chirp + k));
      to[__ldg(target.position + k)] = value;
    }
    start += kHeld * blockDim.x;
  } while (Signals::kSplit && start < length);
  for (int k = length + threadIdx.x; k < target.size; k += blockDim.x) to[k] = make_float2(0.0f, 0.0f);
}

__device__ __forceinline__ int mirrored(int k, int length) { return k == 0 ? 0 : length - k; }

// Keeps bins u and -u of grad's spectrum for every coefficient. They are read again by the thread that wrote them.
template <typename Buffer>
__device__ __forceinline__ void keep_bins(const Arguments& args, const Buffer& buffer, float4* kept) {
  const Transform& transform = args.transform[0];
  for (int k = threadIdx.x; k < args.n; k += blockDim.x) {
    const int u = __ldg(args.rows + k);
    const float2 g = buffer[__ldg(transform.position + u)];
    const float2 g_mirrored = buffer[__ldg(transform.position + mirrored(u, transform.length))];
    kept[k] = make_float4(g.x, g.y, g_mirrored.x, g_mirrored.y);
  }
}

// Adds this pair's products, with x's spectrum in the buffer.
template <typename Buffer>
__device__ __forceinline__ void add_products(const Arguments& args, const Buffer& buffer, const float4* kept,
                                             float* sums, bool first) {
  const Transform& transform = args.transform[1];
  for (int k = threadIdx.x; k < args.n; k += blockDim.x) {
    const int v = __ldg(args.cols + k);
    const float2 f = buffer[__ldg(transform.position + v)];
    const float2 f_mirrored = buffer[__ldg(transform.position + mirrored(v, transform.length))];
    const float4 g = kept[k];
    const float product = g.x * f_mirrored.x + g.y * f_mirrored.y + (g.z * f.x + g.w * f.y);
    sums[k] = first ? product : sums[k] + product;
  }
}

// The group's next pair of tokens; after its last the first of the block's next group; at the end one that is not
// there.
template <typename Signals>
__device__ __forceinline__ unsigned next_pair(const Arguments& args, unsigned pair) {
  if (!Signals::kSplit) return pair + gridDim.x;
  pair += args.groups;
  if (2 * static_cast<int64_t>(pair) < args.tokens) return pair;
  const unsigned group = pair % args.groups + gridDim.x;
  return group < args.groups ? group : static_cast<unsigned>(args.tokens);
}

// The delta of pairs of tokens, the gradients of x and of the coefficients, and the dense update added to a weight:
// which of them, the pointers in `args` say. A merge has rows of the weight as tokens, with the mix of the gradient of
// x, rather than columns with that of the delta: rows lie side by side in memory.
//
// Floor, for each pair of tokens, of elements of e bytes: e (2 source + 4 target) bytes for the delta with its base,
// e 2 target more for the gradient of coefficients, e 4 target for a merge. From L2 or L1: 12 bytes of tables for each
// unit of length, 16 for each sample, 44 for each coefficient with a gradient. Operations: 5 L log2 L for each
// transform, 4 for a sample. A delta of 4096 by 4096 in bfloat16 has 48 KiB to move, 1400 cycles of a multiprocessor
// (4.8 TB/s, 132 of them at 1.75 GHz), and 352 KiB in shared memory, 2800 cycles: 16 L bytes for each pass, half of
// that for one that ends in global memory and for the scatter. What it waits for are instructions: 400 for a butterfly
// of 16 numbers, of them 254 on floats and the others on places and loads, 25 for a bin of the mix; 5700 cycles.
//
// Split, a transform of L moves 24 L bytes through L2 on its way from the load to a spectrum (8 out of the first pass,
// 8 into shared memory, 8 out of it) and 56 L from the mix to the result (8 more into the last pass, and the scatter's
// 8 cost a sector of 32), 16 L more for a pass that works in global memory: none for lengths up to 16 * 8192 that 16
// divides. From 28672 to 8192 that is 1.1 MB, 47000 cycles of a multiprocessor at 24 bytes for each; the scratch of 132
// blocks is 39 MB, and stays in an L2 of 50 MB.
template <typename T, typename Signals>
__global__ void __launch_bounds__(Signals::kThreads) fourier_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ float4 shared_memory[];
  const auto buffer_of = [&](int which) {
    const Tile tile{reinterpret_cast<float2*>(shared_memory)};
    if constexpr (Signals::kSplit) {
      const int sizes[2] = {args.transform[0].size, args.transform[1].size};
      float2* scratch = args.scratch + static_cast<int64_t>(blockIdx.x) * (int64_t{sizes[0]} + sizes[1]);
      return Scratch{scratch + (which ? sizes[0] : 0), tile, args.room};
    } else {
      return tile;
    }
  };
#pragma unroll 1
  for (unsigned pair = blockIdx.x; 2 * static_cast<int64_t>(pair) < args.tokens;
       pair = next_pair<Signals>(args, pair)) {
    const int64_t token = 2 * static_cast<int64_t>(pair);
    // Step 0 leaves the spectrum of the source in its buffer, step 1 makes the delta of it, step 2 has the spectrum of
    // x. One loop, because each transform's code is long.
#pragma unroll 1
    for (int step = args.source.data ? 0 : 1; step < 3; ++step) {
      if (step == 1 ? !args.y : step == 2 && !args.x.data) continue;
      const Transform& transform = args.transform[step > 0];
      const auto buffer = buffer_of(step > 0);
      if (step == 1) {
        mix_bins<Signals>(args, static_cast<int>(token), buffer_of(0), buffer);
      } else {
        load_signal(Signal<T>(step == 0 ? args.source : args.x, token, args.tokens), transform, buffer);
      }
      __syncthreads();
      run_transform(transform, step != 1, buffer);
      if (step == 1) {
        store_result(Result<T>(args, token), transform, buffer);
      } else if (args.x.data) {
        float4* kept = args.kept + static_cast<int64_t>(blockIdx.x) * args.n;
        if (step == 0) {
          keep_bins(args, buffer, kept);
        } else {
          const unsigned group = Signals::kSplit ? pair % args.groups : blockIdx.x;
          add_products(args, buffer, kept, args.partials + static_cast<int64_t>(group) * args.n, pair == group);
        }
      }
      if (step > 0 || !args.y) __syncthreads();  // the next step loads another signal over this one
    }
  }
}

// The sums of all groups, in a fixed order: kSumSlices of them side by side, then those.
//
// Floor: 4 groups n bytes, from L2 where they have just been written.
constexpr int kSumLanes = 32, kSumSlices = 16;
constexpr int kSumSharedBytes = kSumLanes * kSumSlices * int(sizeof(double));

__global__ void __launch_bounds__(kSumLanes* kSumSlices)
    sum_partials_kernel(const float* __restrict__ partials,  // [groups, n]
                        float* __restrict__ sums,            // [n]
                        int groups, int n, float scale) {
  extern __shared__ float4 shared_memory[];
  double* slices = reinterpret_cast<double*>(shared_memory);  // [kSumSlices, kSumLanes]
  const int k = blockIdx.x * kSumLanes + threadIdx.x;
  double sum = 0.0;
  if (k < n) {
#pragma unroll 8
    for (int group = threadIdx.y; group < groups; group += kSumSlices) {
      sum += __ldg(partials + static_cast<int64_t>(group) * n + k);
    }
  }
  slices[threadIdx.y * kSumLanes + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || k >= n) return;
#pragma unroll
  for (int slice = 1; slice < kSumSlices; ++slice) sum += slices[slice * kSumLanes + threadIdx.x];
  sums[k] = static_cast<float>(0.5 * scale * sum);
}

}  // namespace fastpeft::fourier
