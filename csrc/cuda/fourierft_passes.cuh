// FourierFT on CUDA: the passes of a transform, by all threads of a block.
#pragma once

#include "cuda/fourierft_plan.cuh"

namespace fastpeft::fourier {

__device__ __forceinline__ float2 plus(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 minus(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ __forceinline__ float2 times(float2 a, float2 w) {
  return make_float2(a.x * w.x - a.y * w.y, a.y * w.x + a.x * w.y);
}
__device__ __forceinline__ float2 conjugate(float2 a) { return make_float2(a.x, -a.y); }

// Where the passes work: a buffer in shared memory,
struct Tile {
  float2* entries;
  __device__ __forceinline__ float2& operator[](unsigned i) const {
    return entries[i + (i >> kLowStep) + (i >> kHighStep)];
  }
  // i / pass.parts for less than 2^15 entries: the error of the reciprocal, below 2^-32, times i stays below 1 / parts.
  static __device__ __forceinline__ int block_of(int i, const Pass& pass) {
    return pass.parts == 1 ? i : static_cast<int>(__umulhi(static_cast<unsigned>(i), pass.reciprocal));
  }
};

// or one in global memory, parts of which go through a tile.
struct Scratch {
  float2* entries;
  Tile tile;
  int room;  // of the tile
  __device__ __forceinline__ float2& operator[](unsigned i) const { return entries[i]; }
  static __device__ __forceinline__ int block_of(int i, const Pass& pass) { return i / pass.parts; }
};

// a -> its transform, in place.
__device__ __forceinline__ void butterfly(float2 (&a)[2]) {
  const float2 sum = plus(a[0], a[1]);
  a[1] = minus(a[0], a[1]);
  a[0] = sum;
}

__device__ __forceinline__ void butterfly(float2 (&a)[4]) {
  const float2 even = plus(a[0], a[2]), even_difference = minus(a[0], a[2]);
  const float2 odd = plus(a[1], a[3]), odd_difference = minus(a[1], a[3]);
  a[0] = plus(even, odd);
  a[2] = minus(even, odd);
  a[1] = make_float2(even_difference.x + odd_difference.y, even_difference.y - odd_difference.x);
  a[3] = make_float2(even_difference.x - odd_difference.y, even_difference.y + odd_difference.x);
}

// Entries q and R - q enter outputs s and R - s by their sum and their difference alone.
template <int R>
__device__ __forceinline__ void odd_butterfly(float2 (&a)[R], const float (&cosines)[R / 2 + 1],
                                              const float (&sines)[R / 2 + 1]) {
  constexpr int kHalf = R / 2;
  float2 sum[kHalf + 1], difference[kHalf + 1];
  const float2 first = a[0];
#pragma unroll
  for (int q = 1; q <= kHalf; ++q) {
    sum[q] = plus(a[q], a[R - q]);
    difference[q] = minus(a[q], a[R - q]);
    a[0] = plus(a[0], sum[q]);
  }
#pragma unroll
  for (int s = 1; s <= kHalf; ++s) {
    float2 even = first, odd = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int q = 1; q <= kHalf; ++q) {
      const int turn = s * q % R, other = turn <= kHalf ? turn : R - turn;
      const float cosine = cosines[other], sine = turn <= kHalf ? sines[other] : -sines[other];
      even.x += cosine * sum[q].x, even.y += cosine * sum[q].y;
      odd.x -= sine * difference[q].y, odd.y += sine * difference[q].x;
    }
    a[s] = plus(even, odd);
    a[R - s] = minus(even, odd);
  }
}

// exp(-2 pi i k / R) for k up to R / 2.
__device__ __forceinline__ void butterfly(float2 (&a)[3]) {
  const float cosines[] = {1.0f, -0.5f}, sines[] = {0.0f, -0.866025404f};
  odd_butterfly<3>(a, cosines, sines);
}
__device__ __forceinline__ void butterfly(float2 (&a)[5]) {
  const float cosines[] = {1.0f, 0.309016994f, -0.809016994f}, sines[] = {0.0f, -0.951056516f, -0.587785252f};
  odd_butterfly<5>(a, cosines, sines);
}
__device__ __forceinline__ void butterfly(float2 (&a)[7]) {
  const float cosines[] = {1.0f, 0.623489802f, -0.222520934f, -0.900968868f};
  const float sines[] = {0.0f, -0.781831482f, -0.974927912f, -0.433883739f};
  odd_butterfly<7>(a, cosines, sines);
}

// exp(-2 pi i k / 16) for k that are known at compile time.
__device__ __forceinline__ float2 times_sixteenth(float2 a, int k) {
  const float values[] = {1.0f, 0.923879533f, 0.707106781f, 0.382683432f, 0.0f};
  const auto cosine = [&](int turn) {
    return turn <= 4    ? values[turn]
           : turn <= 8  ? -values[8 - turn]
           : turn <= 12 ? -values[turn - 8]
                        : values[16 - turn];
  };
  if (k == 0) return a;
  if (k == 4) return make_float2(a.y, -a.x);
  return times(a, make_float2(cosine(k % 16), cosine((k + 4) % 16)));
}

// Transforms of 4 R2 numbers as R2 and 4, and one after the other the twiddle factors of both:
// with q = q1 + 4 q2 and s = s2 + R2 s1, exponents q s / (4 R2) are q2 s2 / R2 + q1 s2 / (4 R2) + q1 s1 / 4.
template <int R2, bool kDecimate>
__device__ __forceinline__ void composite_butterfly(float2 (&a)[4 * R2], const float2* twiddles, int parts) {
  // Decimating, a is read as [q2][q1] and left as [s1][s2]; the transpose goes from [s1][s2] to [q2][q1].
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    if ((step == 0) == kDecimate) {
      float2 w[R2 - 1];
#pragma unroll
      for (int i = 0; i < R2 - 1; ++i) w[i] = parts > 1 ? __ldg(twiddles + i * parts) : make_float2(1.0f, 0.0f);
#pragma unroll
      for (int q1 = 0; q1 < 4; ++q1) {
        float2 b[R2];
#pragma unroll
        for (int q2 = 0; q2 < R2; ++q2) b[q2] = a[q1 + 4 * q2];
        if (kDecimate) butterfly(b);
#pragma unroll
        for (int s2 = 1; s2 < R2; ++s2) b[s2] = times(times_sixteenth(b[s2], q1 * s2 * (4 / R2)), w[s2 - 1]);
        if (!kDecimate) butterfly(b);
#pragma unroll
        for (int s2 = 0; s2 < R2; ++s2) a[q1 + 4 * s2] = b[s2];
      }
    } else {
      float2 w[3];
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        w[i] = parts > 1 ? __ldg(twiddles + (R2 - 1 + i) * parts) : make_float2(1.0f, 0.0f);
      }
#pragma unroll
      for (int s2 = 0; s2 < R2; ++s2) {
        float2 b[4];
#pragma unroll
        for (int s1 = 0; s1 < 4; ++s1) b[s1] = a[s1 + 4 * s2];
        if (kDecimate) butterfly(b);
#pragma unroll
        for (int s1 = 1; s1 < 4; ++s1) b[s1] = times(b[s1], w[s1 - 1]);
        if (!kDecimate) butterfly(b);
#pragma unroll
        for (int q1 = 0; q1 < 4; ++q1) a[q1 + 4 * s2] = b[q1];
      }
    }
  }
}

// Where number i of the butterfly stands among a[0 .. R-1] outside of the transform's natural order: the output s = s2
// + R2 s1 of a composite radix is a[s1 + 4 s2].
template <int R>
__device__ __forceinline__ constexpr int slot_of(int s) {
  constexpr int kR2 = R / 4;
  return R > 7 ? s / kR2 + s % kR2 * 4 : s;
}

// a -> its transform with the twiddle factors after it (decimating) or before it. Inputs of the first and outputs of
// the second are a[q]; outputs of the first and inputs of the second, a[slot_of(s)].
template <int R, bool kDecimate>
__device__ __forceinline__ void twiddled_butterfly(float2 (&a)[R], const float2* twiddles, int parts) {
  if constexpr (R > 7) {
    composite_butterfly<R / 4, kDecimate>(a, twiddles, parts);
  } else {
    if (kDecimate) butterfly(a);
    if (parts > 1) {
#pragma unroll
      for (int s = 1; s < R; ++s) a[s] = times(a[s], __ldg(twiddles + (s - 1) * parts));
    }
    if (!kDecimate) butterfly(a);
  }
}

template <int R, bool kDecimate, typename Buffer>
__device__ __forceinline__ void run_own_pass(const Buffer& buffer, const Pass& pass, const float2* table, int size) {
  const int parts = pass.parts;
  const float2* twiddles = table + pass.twiddles;
#pragma unroll 1
  for (int i = threadIdx.x; i < size / R; i += blockDim.x) {
    const int block = Buffer::block_of(i, pass), j = i - block * parts, base = block * (R * parts) + j;
    float2 a[R];
#pragma unroll
    for (int s = 0; s < R; ++s) a[kDecimate ? s : slot_of<R>(s)] = buffer[base + s * parts];
    twiddled_butterfly<R, kDecimate>(a, twiddles + j, parts);
#pragma unroll
    for (int s = 0; s < R; ++s) buffer[base + s * parts] = a[kDecimate ? slot_of<R>(s) : s];
  }
}

// Any odd radix. `shares` threads compute a butterfly, each kPairs pairs of outputs s and radix - s in registers,
// s = share, share + shares, ... The table has exp(-2 pi i s q / radix) as they are read, [radix / 2, shares, kPairs];
// whole warps have the same share, and read the same. All of a butterfly is read before any of it is written.
template <bool kDecimate, typename Buffer>
__device__ __forceinline__ void run_odd_pass(const Buffer& buffer, const Pass& pass, const float2* table, int size) {
  static_assert(kPairs % 2 == 0);
  const int radix = pass.radix, parts = pass.parts, half = radix / 2;
  const int butterflies = size / radix, shares = (half + kPairs) / kPairs;
  int at_once = static_cast<int>(blockDim.x) / shares;
  if (at_once >= 32) at_once -= at_once % 32;
  const int share = static_cast<int>(threadIdx.x) / at_once, lane = static_cast<int>(threadIdx.x) % at_once;
#pragma unroll 1
  for (int first = 0; first < butterflies; first += at_once) {
    const int i = first + lane, block = Buffer::block_of(i, pass), j = i - block * parts;
    const int base = block * (radix * parts) + j;
    const bool active = share < shares && i < butterflies;
    const auto read = [&](int q) {
      const float2 value = buffer[base + q * parts];
      return kDecimate || parts == 1 ? value : times(value, __ldg(table + pass.twiddles + (q - 1) * parts + j));
    };
    const auto write = [&](int s, float2 value) {
      if (kDecimate && parts > 1 && s > 0) value = times(value, __ldg(table + pass.twiddles + (s - 1) * parts + j));
      buffer[base + s * parts] = value;
    };
    float2 even[kPairs] = {}, odd[kPairs] = {};
    if (active) {
      const float4* roots = reinterpret_cast<const float4*>(table + pass.roots + share * kPairs);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) even[p] = buffer[base];
#pragma unroll 1
      for (int q = 1; q <= half; ++q, roots += shares * (kPairs / 2)) {
        const float2 one = read(q), other = read(radix - q);
        const float2 sum = plus(one, other), difference = minus(one, other);
        const auto add = [&](int p, float cosine, float sine) {
          even[p].x += cosine * sum.x, even[p].y += cosine * sum.y;
          odd[p].x -= sine * difference.y, odd[p].y += sine * difference.x;
        };
#pragma unroll
        for (int p = 0; p < kPairs; p += 2) {
          const float4 w = __ldg(roots + p / 2);
          add(p, w.x, w.y);
          add(p + 1, w.z, w.w);
        }
      }
    }
    __syncthreads();
    if (active) {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int s = share + p * shares;
        if (s > half) break;
        write(s, plus(even[p], odd[p]));
        if (s > 0) write(radix - s, minus(even[p], odd[p]));
      }
    }
  }
}

template <bool kDecimate, typename Buffer>
__device__ __forceinline__ void run_pass(const Buffer& buffer, const Pass& pass, const float2* table, int size) {
  switch (pass.radix) {
    case 16:
      run_own_pass<16, kDecimate>(buffer, pass, table, size);
      break;
    case 8:
      run_own_pass<8, kDecimate>(buffer, pass, table, size);
      break;
    case 7:
      run_own_pass<7, kDecimate>(buffer, pass, table, size);
      break;
    case 5:
      run_own_pass<5, kDecimate>(buffer, pass, table, size);
      break;
    case 4:
      run_own_pass<4, kDecimate>(buffer, pass, table, size);
      break;
    case 3:
      run_own_pass<3, kDecimate>(buffer, pass, table, size);
      break;
    case 2:
      run_own_pass<2, kDecimate>(buffer, pass, table, size);
      break;
    default:
      run_odd_pass<kDecimate>(buffer, pass, table, size);
  }
  __syncthreads();
}

// Whether the pass at the end that is in natural order takes its numbers from global memory or leaves them there.
__device__ __forceinline__ bool ends_in_registers(const Transform& transform) {
  return !transform.chirp && transform.pass[0].radix == 16;
}

// The passes from number `first` on over `count` entries from `place` on, which are in the tile, and the way back: a
// length with a large prime factor is a convolution and goes both ways.
__device__ __forceinline__ void run_inner_passes(const Transform& transform, bool decimate, const Tile& tile, int first,
                                                 int place, int count) {
  if (decimate || transform.chirp) {
#pragma unroll 1
    for (int i = first; i < transform.passes; ++i) run_pass<true>(tile, transform.pass[i], transform.table, count);
  }
  if (transform.chirp) {
    // The way back is a forward transform between two conjugations.
    const float2* filter = transform.table + transform.filter + place;
    for (int p = threadIdx.x; p < count; p += blockDim.x) tile[p] = conjugate(times(tile[p], __ldg(filter + p)));
    __syncthreads();
  }
  if (!decimate || transform.chirp) {
#pragma unroll 1
    for (int i = transform.passes - 1; i >= first; --i) {
      run_pass<false>(tile, transform.pass[i], transform.table, count);
    }
  }
}

__device__ __forceinline__ void run_passes(const Transform& transform, bool decimate, const Tile& tile, int first) {
  run_inner_passes(transform, decimate, tile, first, 0, transform.size);
}

// Passes run in global memory until their parts fit the tile; then as many parts as fit go through it together.
__device__ __forceinline__ void run_passes(const Transform& transform, bool decimate, const Scratch& scratch,
                                           int first) {
  const int size = transform.size;
  int inner = first;
  while (inner < transform.passes && transform.pass[inner].length > scratch.room) ++inner;
  if (decimate || transform.chirp) {
#pragma unroll 1
    for (int i = first; i < inner; ++i) run_pass<true>(scratch, transform.pass[i], transform.table, size);
  }
  const int part = inner < transform.passes ? transform.pass[inner].length : 1;
  const int at_once = scratch.room / part * part;
#pragma unroll 1
  for (int place = 0; place < size; place += at_once) {
    const int count = min(at_once, size - place);
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += blockDim.x) scratch.tile[i] = scratch[place + i];
    __syncthreads();
    run_inner_passes(transform, decimate, scratch.tile, inner, place, count);
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += blockDim.x) scratch[place + i] = scratch.tile[i];
    __syncthreads();
  }
  if (!decimate || transform.chirp) {
#pragma unroll 1
    for (int i = inner - 1; i >= first; --i) run_pass<false>(scratch, transform.pass[i], transform.table, size);
  }
}

// Everything between a signal's load and its store, decimating into a spectrum or back.
template <typename Buffer>
__device__ __forceinline__ void run_transform(const Transform& transform, bool decimate, const Buffer& buffer) {
  run_passes(transform, decimate, buffer, ends_in_registers(transform) ? 1 : 0);
  if (transform.chirp) {
    for (int j = threadIdx.x; j < transform.length; j += blockDim.x) {
      buffer[j] = times(conjugate(buffer[j]), __ldg(transform.table + transform.chirp + j));
    }
    __syncthreads();
  }
}

}  // namespace fastpeft::fourier
