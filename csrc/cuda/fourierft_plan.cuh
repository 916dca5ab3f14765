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
// registers for 512 threads, of which 76 keep bins. Split: signals that do not fit a multiprocessor; they are in global
// memory, the source and the target at places of their own.
struct ShortSignals {
  static constexpr bool kSplit = false;
  static constexpr int kThreads = 768;  // the most
  static constexpr int kHeld = 16;      // bins that a thread keeps
  static constexpr int kBatch = 4;      // bins whose samples a thread looks up at the same time; divides kHeld
};
struct LongSignals {
  static constexpr bool kSplit = false;
  static constexpr int kThreads = 512, kHeld = 38, kBatch = 2;
};
struct SplitSignals {
  static constexpr bool kSplit = true;
  static constexpr int kThreads = 512, kHeld = 4, kBatch = 4;
};

constexpr int kPairs = 4;           // outputs s and radix - s that a thread computes of a large odd radix
constexpr int kLargestRadix = 127;  // larger primes become convolutions (Bluestein), which are cheaper from there on
constexpr int kMostBins = 1 << 27;  // tables of their transforms are counted in int
constexpr int kMostPasses = 17;     // of 3, the least radix that repeats

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

// A sixteen first, because the pass at the ends of a transform reads and writes global memory and one of 16 has the
// most of it on its way; then 3, 5 and 7, which as last passes would have up to five lanes meet in a bank; large
// radices last, where there are no twiddle factors. Of what is left of the twos, 8 * 4 and 8 * 8 rather than 16 * 2 and
// 16 * 4. Empty: a prime is too large.
inline std::vector<int> radices_of(int length) {
  std::vector<int> radices;
  int twos = 0, rest = length;
  for (; rest % 2 == 0; rest /= 2) ++twos;
  while (twos > 0) {
    const int step = radices.empty() || twos > 6 || twos == 4 ? std::min(twos, 4) : std::min(twos, 3);
    radices.push_back(1 << step);
    twos -= step;
  }
  const size_t second = std::min<size_t>(radices.size(), 1);
  while (rest > 1) {
    const int radix = smallest_factor(rest);
    if (radix > kLargestRadix) return {};
    radices.insert(radix <= 7 ? radices.begin() + second : radices.end(), radix);
    rest /= radix;
  }
  if (radices.empty()) radices.push_back(1);
  return radices;
}

inline bool has_own_butterfly(int radix) { return radix <= 5 ? radix > 1 : radix == 7 || radix == 8 || radix == 16; }

// A transform in float64, for the filters alone: by the smallest factor, recursively. `roots` are those of unity, of
// the length or of a multiple of it.
inline std::vector<Complex> transform_in_double(const std::vector<Complex>& x, const std::vector<Complex>& roots) {
  const int length = int(x.size());
  if (length == 1) return x;
  const int radix = smallest_factor(length), rest = length / radix, stride = int(roots.size()) / length;
  std::vector<Complex> result(x.size());
  for (int q = 0; q < radix; ++q) {
    std::vector<Complex> part(rest);
    for (int j = 0; j < rest; ++j) part[j] = x[j * radix + q];
    part = transform_in_double(part, roots);
    for (int k = 0; k < length; ++k) result[k] += roots[int64_t(q) * k % length * stride] * part[k % rest];
  }
  return result;
}

// What a transform's two pointers must point to.
struct Tables {
  Transform transform;
  std::vector<float2> table;
  std::vector<int> position;
};

// The length of the passes, without building them, for up to `kMostBins`.
inline int64_t size_of_transform(int64_t length) {
  if (!radices_of(int(length)).empty()) return length;
  int64_t best = 0;
  for (int64_t odd : {1, 3, 5, 7}) {
    int64_t size = 16 * odd;
    while (size < 2 * length - 1) size *= 2;
    if (best == 0 || size < best) best = size;
  }
  return best;
}

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
    std::vector<Complex> roots(transform.size);
    for (int k = 0; k < transform.size; ++k) roots[k] = root_of_unity(k, transform.size);
    const std::vector<Complex> spectrum = transform_in_double(conjugate, roots);
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
// another for every 256 keep all of these in different banks for lengths 16^k, at 7 % of the memory; without steps 16
// lanes would meet in the scatter of each length below. The steps are constants, because with each pass of 16 a thread
// computes 32 places. How many lanes meet in a bank, at most, in each pass and in the scatter, which
// tests/cuda_host/run_fourier_banks.cpp counts:
//
//   768     16 3 16      1 1 1     3        5120    16 5 8 8     1 1 2 1   4
//   1024    16 8 8       1 2 1     1        8192    16 16 8 4    1 1 2 1   2
//   2048    16 16 8      1 1 1     1        11008   16 16 43     1 2 3     3
//   3072    16 3 8 8     1 1 2 1   3        14336   16 7 16 8    1 1 1 1   2
//   4096    16 16 16     1 1 1     1        18944   16 8 4 37    1 2 2 3   2
//
// and in the passes of 28672 that work in shared memory, 7 16 16, one.
constexpr int kLowStep = 4, kHighStep = 8;

constexpr int64_t bytes_in_shared_memory(int64_t entries) {
  const int64_t last = entries - 1;
  return (last + (last >> kLowStep) + (last >> kHighStep) + 1) * int64_t(sizeof(float2));
}

enum class Kind { kShort, kLong, kSplit };

struct Plan {
  const char* error;  // nullptr, or why there is no plan
  Kind kind;          // which kernel
  int groups;         // of pairs of tokens, see Arguments
  int blocks;
  int threads;
  int64_t shared_bytes;
  int room;         // of split signals: entries that are in shared memory at a time
  int64_t scratch;  // of split signals: float2s in global memory for each block
};

// The launch for pairs of tokens, from bins of one length to bins of another. Threads: one for each butterfly of radix
// 16, and enough to keep the target's bins in registers. Groups: one for each pair, or fewer with as many each where
// products of n coefficients are summed; the shape alone says how many, so that no sum depends on the GPU. Split
// signals have memory in each block, so that there is one for each multiprocessor.
inline Plan plan_fourier(int64_t tokens, int64_t source_length, int64_t target_length, int64_t n,
                         int64_t max_shared_bytes, int64_t multiprocessors) {
  constexpr int64_t kMostSums = 1 << 21;     // 20 bytes each
  constexpr int64_t kMostScratch = 1 << 26;  // 8 bytes each
  Plan plan{};
  if (std::max(source_length, target_length) > kMostBins) {
    plan.error = "more than 2^27";
    return plan;
  }
  const int64_t source_size = size_of_transform(source_length), target_size = size_of_transform(target_length);
  const int64_t entries = std::max(source_size, target_size);
  const auto most_held = [&](auto signals) { return int64_t(signals.kHeld) * signals.kThreads; };
  const auto threads = [&](auto signals, int64_t least) {
    return int(std::min<int64_t>((std::max((entries + 15) / 16, least) + 31) / 32 * 32, signals.kThreads));
  };
  const auto held_by = [&](auto signals) { return (target_length + signals.kHeld - 1) / signals.kHeld; };
  plan.shared_bytes = bytes_in_shared_memory(entries);
  if (plan.shared_bytes > max_shared_bytes || target_length > most_held(LongSignals{})) {
    plan.kind = Kind::kSplit;
    plan.threads = threads(SplitSignals{}, 1);
    const int64_t fits = max_shared_bytes / int64_t(sizeof(float2)) * 256 / 273;  // one step for 16, one for 256
    plan.room = int(std::min<int64_t>({fits, 16 * SplitSignals::kThreads, entries}));
    plan.shared_bytes = bytes_in_shared_memory(plan.room);
    plan.scratch = source_size + target_size;
  } else if (target_length <= most_held(ShortSignals{}) && entries <= 16 * ShortSignals::kThreads) {
    plan.kind = Kind::kShort;
    plan.threads = threads(ShortSignals{}, held_by(ShortSignals{}));
  } else {
    plan.kind = Kind::kLong;
    plan.threads = threads(LongSignals{}, held_by(LongSignals{}));
  }
  const int64_t pairs = (tokens + 1) / 2;
  const int64_t most = n > 0 ? std::clamp<int64_t>(kMostSums / n, 1, pairs) : pairs;
  const int64_t turns = (pairs + most - 1) / most, groups = (pairs + turns - 1) / turns;
  if (groups > INT32_MAX) plan.error = "more pairs of tokens than a grid has blocks";
  plan.groups = plan.blocks = int(groups);
  if (plan.scratch > 0) {
    plan.blocks = int(std::min({groups, multiprocessors, std::max<int64_t>(kMostScratch / plan.scratch, 1)}));
  }
  return plan;
}

}  // namespace fastpeft::fourier
