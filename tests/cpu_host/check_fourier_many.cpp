// FourierFT for tokens that each have a spectrum, some of them at places of their own.
#include <algorithm>
#include <complex>
#include <numbers>

#include "check.h"
#include "checks.h"
#include "loops.h"

namespace fastpeft::check {
namespace {

std::complex<double> root(int64_t turn, int64_t length) {
  const double angle = -2.0 * std::numbers::pi * double(turn % length) / double(length);
  return {std::cos(angle), std::sin(angle)};
}

// Passes and levels that an entry goes through, at most.
int64_t passes_of(const RealFftPlan& plan) {
  int64_t most = plan.levels + plan.last.plan->passes;
  for (int n = 0; n < plan.levels; ++n) most = std::max<int64_t>(most, n + 1 + plan.level[n].plan->passes);
  return most;
}

void check_case(int64_t in, int64_t out, int64_t n, int64_t kinds, Scalar scalar, int64_t tokens) {
  now = std::string("fourier_many.fwd ") + name_of(scalar) + " T" + std::to_string(tokens) + " in" +
        std::to_string(in) + " out" + std::to_string(out) + " n" + std::to_string(n);
  const auto source = real_fft_plan(in), target = real_fft_plan(out);
  Buffer x = Buffer::tokens("fourier_many.x", scalar, tokens, in);
  Buffer y = Buffer::tokens("fourier_many.y", scalar, tokens, out);
  Buffer spectrum = Buffer::tokens("fourier_many.spectrum", Scalar::float32, tokens, n);
  x.fill(), y.fill(), spectrum.fill();
  std::vector<std::vector<int32_t>> places(kinds);
  std::vector<std::unique_ptr<int32_t[]>> copies;
  for (int64_t kind = 0; kind < kinds; ++kind) {
    for (int64_t k = 0; k < n; ++k) places[kind].push_back(int32_t((7 * k + 3 + kind) % out));
    for (int64_t k = 0; k < n; ++k) places[kind].push_back(int32_t((k + 5 * kind) % in));
    copies.push_back(exact("fourier_many.places", places[kind]));
  }
  FourierTile tile{};
  tile.count = tokens;
  tile.n = n;
  for (int64_t t = 0; t < tokens; ++t) {
    tile.x[t] = x.rows(t).data;
    tile.y[t] = y.mutable_rows(t).data;
    tile.spectrum[t] = static_cast<const float*>(spectrum.rows(t).data);
    tile.places[t] = copies[t % kinds].get();
    tile.scale[t] = 0.5f + float(t);
  }
  const Buffer scratch = Buffer::scratch("fourier_many.scratch", loops.fourier_many.scratch_floats(*source, *target));
  loops.fourier_many.fwd(*source, *target, scalar, tile, scratch.floats());

  std::vector<std::vector<Terms>> delta(tokens, std::vector<Terms>(out));
  for (int64_t t = 0; t < tokens; ++t) {
    const std::vector<int32_t>& at = places[t % kinds];
    for (int64_t k = 0; k < n; ++k) {
      std::complex<double> bin;
      double size = 0.0;
      for (int64_t j = 0; j < in; ++j) bin += x(t, j) * root(at[n + k] * j, in), size += std::abs(x(t, j));
      const double c = double(tile.scale[t]) * spectrum(t, k);
      for (int64_t i = 0; i < out; ++i) {
        delta[t][i] += Terms((c * bin * root(at[k] * i, out)).real(), std::abs(c) * size);
      }
    }
  }
  // A number goes through few roundings in each pass, and is one of n products.
  const int64_t roundings = 16 * (passes_of(*source) + passes_of(*target)) + n + 4;
  y.expect([&](int64_t t, int64_t i) { return rounded(Terms(y(t, i)) += delta[t][i], roundings); });
}

}  // namespace

void check_fourier_many() {
  const int64_t lanes = loops.fourier_many.lanes;
  for (const Scalar scalar : kScalars) {
    for (const int64_t tokens : {int64_t(1), lanes - 1, lanes}) {
      check_case(1, 2, 1, 1, scalar, tokens);
      check_case(16, 24, 20, 1, scalar, tokens);
      check_case(35, 49, 37, 2, scalar, tokens);
      check_case(80, 7, 5, lanes, scalar, tokens);
      check_case(6, 10, 0, 1, scalar, tokens);
      check_case(32, 288, 70, 2, scalar, tokens);
      check_case(524, 144, 90, 1, scalar, tokens);  // a level of a prime length that becomes a convolution
    }
  }
}

}  // namespace fastpeft::check
