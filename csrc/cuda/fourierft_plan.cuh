// FourierFT on CUDA, the host's part: how a transform is split into passes, the tables that these read, and the launch.
#pragma once

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

}  // namespace fastpeft::fourier
