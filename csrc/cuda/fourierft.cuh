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
// registers until every thread has read.
//
// Raw pointers only, no allocation on the device, no synchronisation with the host. tests/cuda_host compiles this file
// for a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <numbers>
#include <vector>

namespace fastpeft::fourier {

// A kernel's threads and what they keep in registers between the gather and the scatter. Short: 80 registers for each
// of 768 threads, one butterfly of 16 numbers for each, or three blocks of 256 on a multiprocessor. Long: up to 128
// registers for 512 threads, of which 76 keep bins.
struct ShortSignals {
  static constexpr int kThreads = 768;  // the most
  static constexpr int kHeld = 16;      // bins that a thread keeps
  static constexpr int kBatch = 4;      // bins whose samples a thread looks up at the same time; divides kHeld
};
struct LongSignals {
  static constexpr int kThreads = 512, kHeld = 38, kBatch = 2;
};

constexpr int kPairs = 4;           // outputs s and radix - s that a thread computes of a large odd radix
constexpr int kShortSum = 16;       // samples that are summed one after the other
constexpr int kLargestRadix = 127;  // larger primes become convolutions (Bluestein), which are cheaper from there on
constexpr int kMostPasses = 12;
constexpr int kMostBins = 1 << 15;  // for `divide`

// One pass splits every transform of `length` into `radix` transforms of `parts`, decimating in frequency.
struct Pass {
  int radix, length, parts;
  unsigned reciprocal;  // of parts, see `divide`
  int twiddles;         // where in the table they begin: columns of `parts` factors
  int roots;            // of radices without a butterfly of their own, see run_odd_pass
};

// A transform of one length. The pointers are the device's.
struct Transform {
  int length;
  int size;  // of the passes: length, or that of the convolution
  int passes;
  int chirp, filter;    // of a convolution, where in the table they begin; 0 without one
  const float2* table;  // begins with [length] exp(-2 pi i k / length)
  const int* position;  // [length]: where the passes leave bin k
  Pass pass[kMostPasses];
};

// ---------------------------------------------------------------------------------------------------------------------
// On the host: tables in float64, rounded once.

using Complex = std::complex<double>;

// exp(-2 pi i numerator / denominator), with the numerator reduced first: large angles cost digits.
inline Complex root_of_unity(int64_t numerator, int64_t denominator) {
  const double angle = -2.0 * std::numbers::pi * double(numerator % denominator) / double(denominator);
  return {std::cos(angle), std::sin(angle)};
}

inline int smallest_factor(int n) {
  for (int factor = 2; factor * factor <= n; ++factor) {
    if (n % factor == 0) return factor;
  }
  return n;
}

// Sixteens first, because the pass at the ends of a transform reads and writes global memory and one of 16 has the most
// of it on its way; large radices last, where there are no twiddle factors. Of what is left of the twos, 8 * 4 and
// 8 * 8 rather than 16 * 2 and 16 * 4. Empty: a prime is too large.
inline std::vector<int> radices_of(int length) {
  std::vector<int> radices;
  int twos = 0, rest = length;
  for (; rest % 2 == 0; rest /= 2) ++twos;
  while (twos > 0) {
    const int step = radices.empty() || twos > 6 || twos == 4 ? std::min(twos, 4) : std::min(twos, 3);
    radices.push_back(1 << step);
    twos -= step;
  }
  for (; rest > 1; rest /= radices.back()) {
    radices.push_back(smallest_factor(rest));
    if (radices.back() > kLargestRadix) return {};
  }
  if (radices.empty()) radices.push_back(1);
  return radices;
}

inline bool has_own_butterfly(int radix) { return radix <= 5 ? radix > 1 : radix == 7 || radix == 8 || radix == 16; }

// A transform in float64, for the filters alone: by the smallest factor, recursively.
inline std::vector<Complex> transform_in_double(const std::vector<Complex>& x) {
  const int length = int(x.size());
  if (length == 1) return x;
  const int radix = smallest_factor(length), rest = length / radix;
  std::vector<Complex> result(x.size());
  for (int q = 0; q < radix; ++q) {
    std::vector<Complex> part(rest);
    for (int j = 0; j < rest; ++j) part[j] = x[j * radix + q];
    part = transform_in_double(part);
    for (int k = 0; k < length; ++k) result[k] += root_of_unity(int64_t(q) * k, length) * part[k % rest];
  }
  return result;
}

// What a transform's two pointers must point to.
struct Tables {
  Transform transform;
  std::vector<float2> table;
  std::vector<int> position;
};

// The length of the passes, without building them; 0 where it is beyond `kMostBins`.
inline int64_t size_of_transform(int64_t length) {
  if (length > kMostBins) return 0;
  if (!radices_of(int(length)).empty()) return length;
  int64_t best = 0;
  for (int64_t odd : {1, 3, 5, 7}) {
    int64_t size = 16 * odd;
    while (size < 2 * length - 1) size *= 2;
    if (best == 0 || size < best) best = size;
  }
  return best <= kMostBins ? best : 0;
}

// For lengths with a size_of_transform.
inline Tables make_tables(int length) {
  Tables made{};
  Transform& transform = made.transform;
  const auto append = [&](Complex value) { made.table.push_back({float(value.real()), float(value.imag())}); };
  const auto mark = [&] { return int(made.table.size()); };
  for (int k = 0; k < length; ++k) append(root_of_unity(k, length));
  transform.length = length;
  transform.size = int(size_of_transform(length));
  std::vector<int> position(transform.size, 0), bin(transform.size);
  for (int k = 0; k < transform.size; ++k) bin[k] = k;
  int left = transform.size;
  for (int radix : radices_of(transform.size)) {
    const int parts = left / radix;
    Pass& pass = transform.pass[transform.passes++];
    pass = {radix, left, parts, parts == 1 ? 0u : unsigned((uint64_t(1) << 32) / unsigned(parts) + 1), mark(), 0};
    // Radices 8 and 16 are two steps, with twiddle factors w^(j s) after each.
    std::vector<int> columns;
    if (radix == 16) {
      columns = {1, 2, 3, 4, 8, 12};
    } else if (radix == 8) {
      columns = {1, 2, 4, 6};
    } else {
      for (int s = 1; s < radix; ++s) columns.push_back(s);
    }
    if (parts > 1) {
      for (int s : columns) {
        for (int j = 0; j < parts; ++j) append(root_of_unity(int64_t(j) * s, left));
      }
    }
    if (!has_own_butterfly(radix)) {
      const int half = radix / 2, shares = (half + kPairs) / kPairs;
      if (made.table.size() % 2) made.table.push_back({});  // they are read two at a time
      pass.roots = mark();
      for (int q = 1; q <= half; ++q) {
        for (int share = 0; share < shares; ++share) {
          for (int p = 0; p < kPairs; ++p) {
            const int s = share + p * shares;
            append(s <= half ? root_of_unity(s * q, radix) : 0.0);
          }
        }
      }
    }
    // Bin k of a transform is bin k / radix of its part number k % radix.
    for (int k = 0; k < transform.size; ++k) {
      position[k] += bin[k] % radix * parts;
      bin[k] /= radix;
    }
    left = parts;
  }
  made.position = position;
  if (transform.size != length) {
    // X[k] = c[k] sum_j (x[j] c[j]) conj(c[k - j]), c[j] = exp(-pi i j^2 / length): bins stay in natural order.
    made.position.resize(length);
    transform.chirp = mark();
    std::vector<Complex> conjugate(transform.size);
    for (int j = 0; j < length; ++j) {
      const Complex c = root_of_unity(int64_t(j) * j % (2 * length), 2 * length);
      append(c);
      conjugate[j] = conjugate[(transform.size - j) % transform.size] = std::conj(c);
      made.position[j] = j;
    }
    const std::vector<Complex> spectrum = transform_in_double(conjugate);
    transform.filter = mark();
    made.table.resize(made.table.size() + transform.size);
    for (int k = 0; k < transform.size; ++k) {
      const Complex scaled = spectrum[k] / double(transform.size);
      made.table[transform.filter + position[k]] = {float(scaled.real()), float(scaled.imag())};
    }
  }
  return made;
}

// Entry i stands in shared memory, in float2s, at i + i / 16 + i / 256.
//
// A float2 is two banks, and 16 lanes are served at once. Passes read rows that are neighbours or, where blocks are
// short, 16 apart; the scatter writes bin after bin to places 16, 256 and more apart. One step for every 16 entries and
// another for every 256 keep all of these in different banks for lengths 16^k, at 7 % of the memory. Of other
// lengths, two lanes meet in a bank in most of the passes: without steps they would not in the passes, but 16 of them
// would in the scatter. The steps are constants, because with each pass of 16 a thread computes 32 places.
constexpr int kLowStep = 4, kHighStep = 8;

struct Plan {
  const char* error;  // nullptr, or why there is no plan
  dim3 grid;
  dim3 block;
  int64_t shared_bytes;
  bool is_short;  // which kernel
};

// The launch for pairs of tokens, from bins of one length to bins of another, in `groups` blocks or in one for each
// pair (0). Threads: one for each butterfly of radix 16, and enough to keep the target's bins in registers.
inline Plan plan_fourier(int64_t tokens, int64_t source_length, int64_t target_length, int64_t groups,
                         int64_t max_shared_bytes) {
  Plan plan{};
  const int64_t source_size = size_of_transform(source_length), target_size = size_of_transform(target_length);
  const int64_t entries = std::max(source_size, target_size);
  const int64_t last = entries - 1;
  plan.shared_bytes = (last + (last >> kLowStep) + (last >> kHighStep) + 1) * int64_t(sizeof(float2));
  if (source_size == 0 || target_size == 0 || plan.shared_bytes > max_shared_bytes) {
    plan.error = "a signal does not fit the shared memory of a thread block";
    return plan;
  }
  plan.is_short =
      target_length <= ShortSignals::kHeld * ShortSignals::kThreads && entries <= 16 * ShortSignals::kThreads;
  const int held = plan.is_short ? ShortSignals::kHeld : LongSignals::kHeld;
  const int most = plan.is_short ? ShortSignals::kThreads : LongSignals::kThreads;
  if (target_length > int64_t(held) * most) {
    plan.error = "a spectrum does not fit the registers of a thread block";
    return plan;
  }
  const int64_t threads = std::max((entries + 15) / 16, (target_length + held - 1) / held);
  const int64_t pairs = (tokens + 1) / 2, blocks = groups > 0 ? std::min(groups, pairs) : pairs;
  if (blocks > INT32_MAX) {
    plan.error = "more pairs of tokens than a grid has blocks";
    return plan;
  }
  plan.grid = dim3(unsigned(blocks));
  plan.block = dim3(unsigned(std::min<int64_t>((threads + 31) / 32 * 32, most)));
  return plan;
}

// ---------------------------------------------------------------------------------------------------------------------
// On the device.

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void round_into(float* to, float value) { *to = value; }
__device__ __forceinline__ void round_into(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void round_into(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

__device__ __forceinline__ float2 plus(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 minus(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ __forceinline__ float2 times(float2 a, float2 w) {
  return make_float2(a.x * w.x - a.y * w.y, a.y * w.x + a.x * w.y);
}
__device__ __forceinline__ float2 conjugate(float2 a) { return make_float2(a.x, -a.y); }

// i / d for i and d up to kMostBins: the error of the reciprocal, below 2^-32, times i stays below 1 / d.
__device__ __forceinline__ int divide(int i, int d, unsigned reciprocal) {
  return d == 1 ? i : static_cast<int>(__umulhi(static_cast<unsigned>(i), reciprocal));
}

// The buffer in shared memory.
struct Tile {
  float2* entries;
  __device__ __forceinline__ float2& operator[](unsigned i) const {
    return entries[i + (i >> kLowStep) + (i >> kHighStep)];
  }
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

template <int R, bool kDecimate>
__device__ __forceinline__ void run_own_pass(const Tile& tile, const Pass& pass, const float2* table, int size) {
  const int parts = pass.parts;
  const unsigned reciprocal = pass.reciprocal;
  const float2* twiddles = table + pass.twiddles;
#pragma unroll 1
  for (int i = threadIdx.x; i < size / R; i += blockDim.x) {
    const int block = divide(i, parts, reciprocal), j = i - block * parts, base = block * (R * parts) + j;
    float2 a[R];
#pragma unroll
    for (int s = 0; s < R; ++s) a[kDecimate ? s : slot_of<R>(s)] = tile[base + s * parts];
    twiddled_butterfly<R, kDecimate>(a, twiddles + j, parts);
#pragma unroll
    for (int s = 0; s < R; ++s) tile[base + s * parts] = a[kDecimate ? slot_of<R>(s) : s];
  }
}

// Any odd radix. `shares` threads compute a butterfly, each kPairs pairs of outputs s and radix - s in registers,
// s = share, share + shares, ... The table has exp(-2 pi i s q / radix) as they are read, [radix / 2, shares, kPairs];
// whole warps have the same share, and read the same. All of a butterfly is read before any of it is written.
template <bool kDecimate>
__device__ __forceinline__ void run_odd_pass(const Tile& tile, const Pass& pass, const float2* table, int size) {
  static_assert(kPairs % 2 == 0);
  const int radix = pass.radix, parts = pass.parts, half = radix / 2;
  const int butterflies = size / radix, shares = (half + kPairs) / kPairs;
  int at_once = static_cast<int>(blockDim.x) / shares;
  if (at_once >= 32) at_once -= at_once % 32;
  const int share = static_cast<int>(threadIdx.x) / at_once, lane = static_cast<int>(threadIdx.x) % at_once;
#pragma unroll 1
  for (int first = 0; first < butterflies; first += at_once) {
    const int i = first + lane, block = divide(i, parts, pass.reciprocal), j = i - block * parts;
    const int base = block * (radix * parts) + j;
    const bool active = share < shares && i < butterflies;
    const auto read = [&](int q) {
      const float2 value = tile[base + q * parts];
      return kDecimate || parts == 1 ? value : times(value, __ldg(table + pass.twiddles + (q - 1) * parts + j));
    };
    const auto write = [&](int s, float2 value) {
      if (kDecimate && parts > 1 && s > 0) value = times(value, __ldg(table + pass.twiddles + (s - 1) * parts + j));
      tile[base + s * parts] = value;
    };
    float2 even[kPairs] = {}, odd[kPairs] = {};
    if (active) {
      const float4* roots = reinterpret_cast<const float4*>(table + pass.roots + share * kPairs);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) even[p] = tile[base];
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

template <bool kDecimate>
__device__ __forceinline__ void run_pass(const Tile& tile, const Pass& pass, const float2* table, int size) {
  switch (pass.radix) {
    case 16:
      run_own_pass<16, kDecimate>(tile, pass, table, size);
      break;
    case 8:
      run_own_pass<8, kDecimate>(tile, pass, table, size);
      break;
    case 7:
      run_own_pass<7, kDecimate>(tile, pass, table, size);
      break;
    case 5:
      run_own_pass<5, kDecimate>(tile, pass, table, size);
      break;
    case 4:
      run_own_pass<4, kDecimate>(tile, pass, table, size);
      break;
    case 3:
      run_own_pass<3, kDecimate>(tile, pass, table, size);
      break;
    case 2:
      run_own_pass<2, kDecimate>(tile, pass, table, size);
      break;
    default:
      run_odd_pass<kDecimate>(tile, pass, table, size);
  }
  __syncthreads();
}

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
  float* partials;  // [blocks, n]
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
    return make_float2(widen(__ldg(one + i)), other ? widen(__ldg(other + i)) : 0.0f);
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
  __device__ __forceinline__ Raw read(int i) const {
    Raw raw;
    round_into(&raw.one, 0.0f), round_into(&raw.other, 0.0f);
    if (base) raw.one = base[i];
    if (base && pair) raw.other = base[base_stride + i];
    return raw;
  }
  __device__ __forceinline__ void add(int i, const Raw& raw, float2 value) const {
    write(i, plus(make_float2(widen(raw.one), widen(raw.other)), value));
  }

 private:
  __device__ __forceinline__ void write(int i, float2 value) const {
    round_into(y + i, value.x);
    if (pair) round_into(y + y_stride + i, value.y);
  }
};

// Whether the pass at the end that is in natural order takes its numbers from global memory or leaves them there.
__device__ __forceinline__ bool ends_in_registers(const Transform& transform) {
  return !transform.chirp && transform.pass[0].radix == 16;
}

// A signal into the tile, with the first pass where ends_in_registers.
template <typename T>
__device__ __forceinline__ void load_signal(const Signal<T>& signal, const Transform& transform, const Tile& tile) {
  if (ends_in_registers(transform)) {
    const int parts = transform.pass[0].parts;
    const float2* twiddles = transform.table + transform.pass[0].twiddles;
#pragma unroll 1
    for (int j = threadIdx.x; j < parts; j += blockDim.x) {
      float2 a[16];
#pragma unroll
      for (int q = 0; q < 16; ++q) a[q] = signal[j + q * parts];
      twiddled_butterfly<16, true>(a, twiddles + j, parts);
#pragma unroll
      for (int s = 0; s < 16; ++s) tile[j + s * parts] = a[slot_of<16>(s)];
    }
    return;
  }
  const float2* chirp = transform.table + transform.chirp;
  for (int i = threadIdx.x; i < transform.size; i += blockDim.x) {
    float2 value = make_float2(0.0f, 0.0f);
    if (i < transform.length) value = signal[i];
    if (transform.chirp && i < transform.length) value = times(value, __ldg(chirp + i));
    tile[i] = value;
  }
}

// The last pass where ends_in_registers, and the sum with what is there.
template <typename T>
__device__ __forceinline__ void store_result(const Result<T>& result, const Transform& transform, const Tile& tile) {
  if (ends_in_registers(transform)) {
    const int parts = transform.pass[0].parts;
    const float2* twiddles = transform.table + transform.pass[0].twiddles;
#pragma unroll 1
    for (int j = threadIdx.x; j < parts; j += blockDim.x) {
      float2 a[16];
#pragma unroll
      for (int s = 0; s < 16; ++s) a[slot_of<16>(s)] = tile[j + s * parts];
      twiddled_butterfly<16, false>(a, twiddles + j, parts);
      // Reads of what is there do not pass writes, which may be to the same place: some at once, as registers allow.
      constexpr int kReadAtOnce = 8 / sizeof(T);
#pragma unroll
      for (int first = 0; first < 16; first += kReadAtOnce) {
        typename Result<T>::Raw base[kReadAtOnce];
#pragma unroll
        for (int i = 0; i < kReadAtOnce; ++i) base[i] = result.read(j + (first + i) * parts);
#pragma unroll
        for (int i = 0; i < kReadAtOnce; ++i) result.add(j + (first + i) * parts, base[i], a[first + i]);
      }
    }
    return;
  }
  for (int i = threadIdx.x; i < transform.length; i += blockDim.x) {
    result.add(i, result.read(i), tile[i]);
  }
}

// Bin v of the transform of e_row + i e_(row + 1), from a table; of the last row's alone.
__device__ __forceinline__ float2 unit_bin(const Transform& source, int row, int v) {
  unsigned turn = static_cast<unsigned>(row) * static_cast<unsigned>(v) % static_cast<unsigned>(source.length);
  const float2 bin = __ldg(source.table + turn);
  if (row + 1 == source.length) return bin;  // there are as many rows
  turn += v;
  if (turn >= static_cast<unsigned>(source.length)) turn -= source.length;
  const float2 other = __ldg(source.table + turn);
  return make_float2(bin.x - other.y, bin.y + other.x);
}

// Gather, multiply and scatter, from the whole tile to the whole tile. A bin has one thread. Most bins have no sample
// or one: those of kBatch bins are looked up together, without branches, so that they are waited for once.
template <typename Signals>
__device__ __forceinline__ void mix_bins(const Arguments& args, int row, const Tile& tile) {
  constexpr int kHeld = Signals::kHeld, kBatch = Signals::kBatch;
  static_assert(kHeld % kBatch == 0);
  const Transform &source = args.transform[0], &target = args.transform[1];
  const bool unit = !args.source.data;
  const int length = target.length;
  const auto coefficient = [&](int entry) { return __ldg(args.spectrum + entry * args.spectrum_stride); };
  float2 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; i += kBatch) {
    int first[kBatch], last[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int k = threadIdx.x + (i + b) * blockDim.x;
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
      const float2 bin = unit ? unit_bin(source, row, place[b]) : tile[place[b]];
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
          const float2 bin = unit ? unit_bin(source, row, v) : tile[__ldg(source.position + v)];
          sum.x += c * bin.x, sum.y += c * bin.y;
        }
        held[i + b] = plus(held[i + b], sum);
      }
    }
  }
  __syncthreads();  // all of the source has been read
  const float half_scale = 0.5f * args.scale;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int k = threadIdx.x + i * blockDim.x;
    if (k >= length) break;
    float2 value = make_float2(half_scale * held[i].x, half_scale * held[i].y);
    if (target.chirp) value = times(value, __ldg(target.table + target.chirp + k));
    tile[__ldg(target.position + k)] = value;
  }
  for (int k = length + threadIdx.x; k < target.size; k += blockDim.x) tile[k] = make_float2(0.0f, 0.0f);
}

// Everything between a signal's load and its store, decimating into a spectrum or back. A length with a large prime
// factor is a convolution: transformed both ways.
__device__ __forceinline__ void run_transform(const Transform& transform, bool decimate, const Tile& tile) {
  const int end = ends_in_registers(transform) ? 1 : 0, size = transform.size;
  if (decimate || transform.chirp) {
#pragma unroll 1
    for (int i = end; i < transform.passes; ++i) run_pass<true>(tile, transform.pass[i], transform.table, size);
  }
  if (transform.chirp) {
    // The way back is a forward transform between two conjugations.
    for (int p = threadIdx.x; p < size; p += blockDim.x) {
      tile[p] = conjugate(times(tile[p], __ldg(transform.table + transform.filter + p)));
    }
    __syncthreads();
  }
  if (!decimate || transform.chirp) {
#pragma unroll 1
    for (int i = transform.passes - 1; i >= end; --i) run_pass<false>(tile, transform.pass[i], transform.table, size);
  }
  if (transform.chirp) {
    for (int j = threadIdx.x; j < transform.length; j += blockDim.x) {
      tile[j] = times(conjugate(tile[j]), __ldg(transform.table + transform.chirp + j));
    }
    __syncthreads();
  }
}

__device__ __forceinline__ int mirrored(int k, int length) { return k == 0 ? 0 : length - k; }

// Keeps bins u and -u of grad's spectrum for every coefficient. They are read again by the thread that wrote them.
__device__ __forceinline__ void keep_bins(const Arguments& args, const Tile& tile, float4* kept) {
  const Transform& transform = args.transform[0];
  for (int k = threadIdx.x; k < args.n; k += blockDim.x) {
    const int u = __ldg(args.rows + k);
    const float2 g = tile[__ldg(transform.position + u)];
    const float2 g_mirrored = tile[__ldg(transform.position + mirrored(u, transform.length))];
    kept[k] = make_float4(g.x, g.y, g_mirrored.x, g_mirrored.y);
  }
}

// Adds this pair's products, with x's spectrum in the tile.
__device__ __forceinline__ void add_products(const Arguments& args, const Tile& tile, const float4* kept, float* sums,
                                             bool first) {
  const Transform& transform = args.transform[1];
  for (int k = threadIdx.x; k < args.n; k += blockDim.x) {
    const int v = __ldg(args.cols + k);
    const float2 f = tile[__ldg(transform.position + v)];
    const float2 f_mirrored = tile[__ldg(transform.position + mirrored(v, transform.length))];
    const float4 g = kept[k];
    const float product = g.x * f_mirrored.x + g.y * f_mirrored.y + (g.z * f.x + g.w * f.y);
    sums[k] = first ? product : sums[k] + product;
  }
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
template <typename T, typename Signals>
__global__ void __launch_bounds__(Signals::kThreads) fourier_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ float4 shared_memory[];
  const Tile tile{reinterpret_cast<float2*>(shared_memory)};
#pragma unroll 1
  for (unsigned pair = blockIdx.x; 2 * static_cast<int64_t>(pair) < args.tokens; pair += gridDim.x) {
    const int64_t token = 2 * static_cast<int64_t>(pair);
    // Step 0 leaves the spectrum of the source in the tile, step 1 makes the delta of it, step 2 has the spectrum of x.
    // One loop, because each transform's code is long.
#pragma unroll 1
    for (int step = args.source.data ? 0 : 1; step < 3; ++step) {
      if (step == 1 ? !args.y : step == 2 && !args.x.data) continue;
      const Transform& transform = args.transform[step > 0];
      if (step == 1) {
        mix_bins<Signals>(args, static_cast<int>(token), tile);
      } else {
        load_signal(Signal<T>(step == 0 ? args.source : args.x, token, args.tokens), transform, tile);
      }
      __syncthreads();
      run_transform(transform, step != 1, tile);
      if (step == 1) {
        store_result(Result<T>(args, token), transform, tile);
      } else if (args.x.data) {
        if (step == 0) {
          keep_bins(args, tile, args.kept + static_cast<int64_t>(blockIdx.x) * args.n);
        } else {
          add_products(args, tile, args.kept + static_cast<int64_t>(blockIdx.x) * args.n,
                       args.partials + static_cast<int64_t>(blockIdx.x) * args.n, pair == blockIdx.x);
        }
      }
      if (step > 0 || !args.y) __syncthreads();  // the next step loads another signal over this one
    }
  }
}

// The sums of all blocks, in a fixed order: kSumSlices of them side by side, then those.
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
