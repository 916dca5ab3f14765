#include "cpu/fft_plan.h"

#include <cmath>
#include <complex>
#include <list>
#include <mutex>
#include <numbers>
#include <vector>

namespace fastpeft {
namespace {

using Complex = std::complex<double>;

// exp(-2 pi i numerator / denominator), with the numerator reduced first: large angles cost digits.
Complex root(int64_t numerator, int64_t denominator) {
  const double angle = -2.0 * std::numbers::pi * double(numerator % denominator) / double(denominator);
  return {std::cos(angle), std::sin(angle)};
}

void append(std::vector<float>& numbers, Complex value) {
  numbers.push_back(float(value.real()));
  numbers.push_back(float(value.imag()));
}

int64_t smallest_factor(int64_t n) {
  for (int64_t factor = 2; factor * factor <= n; ++factor) {
    if (n % factor == 0) return factor;
  }
  return n;
}

// Fours first and large radices last: the last pass reads rows side by side and needs no twiddle factors.
std::vector<int64_t> radices(int64_t length, int64_t& leaf) {
  std::vector<int64_t> result;
  while (length % 4 == 0) {
    result.push_back(4);
    length /= 4;
  }
  while (length > 1) {
    const int64_t factor = smallest_factor(length);
    if (factor > kMaxRadix) break;
    result.push_back(factor);
    length /= factor;
  }
  leaf = length;
  return result;
}

int64_t smooth_length(int64_t least) {
  for (int64_t length = least;; ++length) {
    int64_t rest = length;
    for (int64_t factor : {2, 3, 5}) {
      while (rest % factor == 0) rest /= factor;
    }
    if (rest == 1) return length;
  }
}

// A transform in float64, for the filters alone: by the smallest factor, recursively.
std::vector<Complex> transform(const std::vector<Complex>& x) {
  const int64_t length = int64_t(x.size());
  if (length == 1) return x;
  const int64_t radix = smallest_factor(length), rest = length / radix;
  std::vector<Complex> result(x.size());
  for (int64_t q = 0; q < radix; ++q) {
    std::vector<Complex> part(rest);
    for (int64_t j = 0; j < rest; ++j) part[j] = x[j * radix + q];
    part = transform(part);
    for (int64_t k = 0; k < length; ++k) result[k] += root(q * k, length) * part[k % rest];
  }
  return result;
}

// A plan and the memory behind its pointers.
struct OwnedPlan : FftPlan {
  std::vector<std::vector<float>> tables;
  std::vector<int32_t> positions;
  std::shared_ptr<const FftPlan> inner;

  explicit OwnedPlan(int64_t size) : FftPlan{} {
    length = size;
    int64_t blocks = 1, rest = size;
    positions.assign(size, 0);
    std::vector<int64_t> bin(size);
    for (int64_t k = 0; k < size; ++k) bin[k] = k;
    for (int64_t radix : radices(size, leaf)) {
      const int64_t part = rest / radix;
      std::vector<float> twiddles, roots;
      for (int64_t j = 0; j < part; ++j) {
        for (int64_t s = 1; s < radix; ++s) append(twiddles, root(j * s, rest));
      }
      for (int64_t k = 0; k < radix; ++k) append(roots, root(k, radix));
      pass[passes++] = {radix, rest, keep(std::move(twiddles)), keep(std::move(roots))};
      // Bin k of a transform is bin k / radix of its part number k % radix.
      for (int64_t k = 0; k < size; ++k) {
        positions[k] += int32_t(bin[k] % radix * part);
        bin[k] /= radix;
      }
      blocks *= radix;
      rest = part;
    }
    for (int64_t k = 0; k < size; ++k) positions[k] += int32_t(bin[k]);
    position = positions.data();
    if (leaf > 1) plan_convolution();
  }

  void plan_convolution() {
    const int64_t padded = smooth_length(2 * leaf - 1);
    inner = fft_plan(padded);
    convolution = inner.get();
    std::vector<float> chirps, filters(2 * padded);
    std::vector<Complex> conjugate(padded);
    for (int64_t j = 0; j < leaf; ++j) {
      const Complex c = root(j * j % (2 * leaf), 2 * leaf);
      append(chirps, c);
      conjugate[j] = conjugate[(padded - j) % padded] = std::conj(c);
    }
    const std::vector<Complex> spectrum = transform(conjugate);
    for (int64_t k = 0; k < padded; ++k) {
      const Complex scaled = spectrum[k] / double(padded);
      filters[2 * convolution->position[k]] = float(scaled.real());
      filters[2 * convolution->position[k] + 1] = float(scaled.imag());
    }
    chirp = keep(std::move(chirps));
    filter = keep(std::move(filters));
  }

  const float* keep(std::vector<float> table) {
    tables.push_back(std::move(table));
    return tables.back().data();
  }
};

struct OwnedRealPlan : RealFftPlan {
  std::vector<std::shared_ptr<const FftPlan>> plans;
  std::vector<std::vector<float>> tables;
  std::vector<int32_t> positions;

  explicit OwnedRealPlan(int64_t size) : RealFftPlan{} {
    constexpr int64_t kWhole = 32;  // lengths below are not worth a level
    length = size;
    int64_t rest = size;
    for (; rest % 4 == 0 && rest >= kWhole; rest /= 2) {
      std::vector<float> twiddles;
      for (int64_t j = 0; j < rest / 4; ++j) append(twiddles, root(j, rest));
      tables.push_back(std::move(twiddles));
      level[levels++] = part(rest, rest / 4, tables.back().data());
    }
    last = part(rest, rest, nullptr);
    for (int64_t k = 0; k < size; ++k) positions.push_back(row_of(k));
    position = positions.data();
  }

  RealFftLevel part(int64_t whole, int64_t transformed, const float* twiddles) {
    plans.push_back(fft_plan(transformed));
    rows += transformed;
    return {whole, rows - transformed, plans.back().get(), twiddles};
  }

  int32_t row_of(int64_t bin) const {
    for (int n = 0; n < levels; ++n, bin /= 2) {
      const RealFftLevel& at = level[n];
      if (bin % 4 == 1) return int32_t(at.first_row + at.plan->position[bin / 4]);
      if (bin % 4 == 3) return ~int32_t(at.first_row + at.plan->position[(at.length - bin) / 4]);
    }
    return int32_t(last.first_row + last.plan->position[bin]);
  }
};

// The plan of a length: the one that was made, or another one.
template <typename Owned, typename Plan>
std::shared_ptr<const Plan> kept_plan(int64_t length) {
  constexpr size_t kKept = 64;                          // some 12 bytes for each unit of length
  static std::recursive_mutex mutex;                    // a plan may ask for the plan of its convolution
  static std::list<std::shared_ptr<const Plan>> plans;  // the most recently used first
  const std::lock_guard lock(mutex);
  for (auto at = plans.begin(); at != plans.end(); ++at) {
    if ((*at)->length == length) {
      plans.splice(plans.begin(), plans, at);
      return plans.front();
    }
  }
  std::shared_ptr<const Plan> plan = std::make_shared<const Owned>(length);
  plans.push_front(plan);
  if (plans.size() > kKept) plans.pop_back();
  return plan;
}

}  // namespace

std::shared_ptr<const FftPlan> fft_plan(int64_t length) { return kept_plan<OwnedPlan, FftPlan>(length); }

std::shared_ptr<const RealFftPlan> real_fft_plan(int64_t length) {
  return kept_plan<OwnedRealPlan, RealFftPlan>(length);
}

}  // namespace fastpeft
