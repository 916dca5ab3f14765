// FourierFT's transforms and the plans behind them.
#include <complex>
#include <limits>
#include <numbers>

#include "check.h"
#include "checks.h"
#include "loops.h"

namespace fastpeft::check {
namespace {

using Complex = std::complex<double>;

// exp(-2 pi i k / length) for all k.
std::vector<Complex> roots_of(int64_t length) {
  std::vector<Complex> roots;
  for (int64_t k = 0; k < length; ++k) {
    const double angle = -2.0 * std::numbers::pi * double(k) / double(length);
    roots.emplace_back(std::cos(angle), std::sin(angle));
  }
  return roots;
}

// How often the loops round, at most, relative to the 2-norm of all bins. A pass adds up `radix` products, whose sizes
// are at most sqrt(radix) times the norm of the sum.
double roundings_of(const FftPlan& plan) {
  double count = 0.0;
  for (int pass = 0; pass < plan.passes; ++pass) {
    count += double(plan.pass[pass].radix + 3) * std::sqrt(double(plan.pass[pass].radix));
  }
  if (plan.leaf == 1) return count;
  // Two transforms with the filter between them; what the filter does not keep was rounded nevertheless.
  const int64_t padded = plan.convolution->length;
  double largest = 0.0;
  for (int64_t k = 0; k < padded; ++k) {
    largest = std::max(largest, std::abs(Complex(plan.filter[2 * k], plan.filter[2 * k + 1])));
  }
  return count + (2.0 * roundings_of(*plan.convolution) + 10.0) * double(padded) * largest / std::sqrt(plan.leaf);
}

void check_plan(const FftPlan& plan, int64_t length) {
  now = "fft_plan " + std::to_string(length);
  int64_t rest = length;
  for (int pass = 0; pass < plan.passes; ++pass) {
    if (plan.pass[pass].length != rest || rest % plan.pass[pass].radix) fail("the passes do not fit together");
    rest /= plan.pass[pass].radix;
  }
  if (plan.length != length || plan.leaf != rest) fail("the passes do not make up the length");
  std::vector<bool> seen(length);
  for (int64_t k = 0; k < length; ++k) {
    if (plan.position[k] < 0 || plan.position[k] >= length || seen[plan.position[k]]) fail("two bins share a row");
    seen[plan.position[k]] = true;
  }
}

struct Entry {
  int64_t row, column;  // bins of the output and of the input
};

// One direction: bins of `from` features to bins of `to`, every entry and its mirror image.
struct Mix {
  std::shared_ptr<const FftPlan> source, target;
  std::vector<int32_t> sources, offsets{0};
  std::vector<double> values;  // as the loops have them
  Buffer coefficients;
  std::unique_ptr<int32_t[]> sources_copy, offsets_copy;
  FourierMix view;
  double norm;       // of the matrix, an upper bound
  int64_t most = 0;  // samples in one bin

  Mix(int64_t from, int64_t to, const std::vector<Entry>& entries, const std::vector<double>& spectrum)
      : source(fft_plan(from)),
        target(fft_plan(to)),
        coefficients(Buffer::floats("fourier.coefficients", 2 * int64_t(entries.size()))) {
    std::vector<std::vector<std::pair<int64_t, double>>> bins(to);
    for (size_t i = 0; i < entries.size(); ++i) {
      const auto [u, v] = entries[i];
      bins[u].emplace_back(v, 0.5 * spectrum[i]);
      bins[(to - u) % to].emplace_back((from - v) % from, 0.5 * spectrum[i]);
    }
    std::vector<double> columns(from);
    double largest_row = 0.0, largest_column = 0.0;
    for (const auto& bin : bins) {
      double sum = 0.0;
      for (const auto& [v, c] : bin) {
        sources.push_back(int32_t(v));
        values.push_back(c);
        sum += std::abs(c);
        largest_column = std::max(largest_column, columns[v] += std::abs(c));
      }
      offsets.push_back(int32_t(sources.size()));
      largest_row = std::max(largest_row, sum);
      most = std::max(most, int64_t(bin.size()));
    }
    coefficients.set([&](int64_t, int64_t i) { return values[i]; });
    for (size_t i = 0; i < values.size(); ++i) values[i] = coefficients[int64_t(i)];
    norm = std::sqrt(largest_row * largest_column);
    sources_copy = exact("fourier.sources", sources);
    offsets_copy = exact("fourier.offsets", offsets);
    view = {source.get(), target.get(), offsets_copy.get(), sources_copy.get(), coefficients.floats()};
  }
};

std::vector<Complex> transform(const std::vector<Complex>& roots, const Buffer& x, int64_t t) {
  const int64_t length = int64_t(roots.size());
  std::vector<Complex> bins(length);
  for (int64_t k = 0; k < length; ++k) {
    int64_t turn = 0;
    for (int64_t j = 0; j < length; ++j) {
      bins[k] += x(t, j) * roots[turn];
      turn += k;
      if (turn >= length) turn -= length;
    }
  }
  return bins;
}

double norm_of(const Buffer& x, int64_t t, int64_t length) {
  double sum = 0.0;
  for (int64_t j = 0; j < length; ++j) sum += x(t, j) * x(t, j);
  return std::sqrt(sum);
}

// What the mix and the transform back make of the bins of a real token.
std::vector<double> synthesis(const Mix& mix, const std::vector<Complex>& roots, const std::vector<Complex>& bins) {
  const int64_t length = mix.target->length;
  std::vector<double> result(length);
  for (int64_t k = 0; k < length; ++k) {
    Complex sum;
    for (int32_t s = mix.offsets[k]; s < mix.offsets[k + 1]; ++s) sum += mix.values[s] * bins[mix.sources[s]];
    int64_t turn = 0;
    for (int64_t j = 0; j < length; ++j) {
      result[j] += (sum * roots[turn]).real();
      turn += k;
      if (turn >= length) turn -= length;
    }
  }
  return result;
}

struct Case {
  int64_t in, out;
  int64_t entries;  // of the spectrum; they cover every bin of the longer side if there are as many
  bool all_tokens;  // or the first and the last only, where the plain transform takes long
};

constexpr Case kCases[] = {
    {1, 1, 1, true},
    {1, 2, 2, true},
    {2, 1, 1, true},
    {1, 43, 43, true},
    {43, 2, 43, true},
    {16, 16, 64, true},  // several samples in a bin
    {24, 35, 35, true},
    {49, 11, 49, true},
    {7, 80, 0, true},  // an empty spectrum
    {254, 43, 254, true},
    {43, 254, 254, true},
    {131, 24, 131, true},
    {24, 262, 262, true},  // a prime and twice that prime: convolutions
    {768, 131, 768, false},
    {131, 768, 768, false},
    {1021, 30, 1021, false},
    {30, 1021, 1021, false},
    {3, 2048, 2048, false},  // passes depth first with any vector
    {4 * 257, 254, 1028, false},
};

void check_case(const Case& c, Scalar scalar, int64_t tokens) {
  const std::string size = std::string(" ") + name_of(scalar) + " T" + std::to_string(tokens) + " in" +
                           std::to_string(c.in) + " out" + std::to_string(c.out) + " n" + std::to_string(c.entries);
  std::vector<Entry> entries, mirrored;
  std::vector<double> spectrum;
  for (int64_t i = 0; i < c.entries; ++i) {
    entries.push_back({(7 * i + 3 + i / c.out) % c.out, i % c.in});
    mirrored.push_back({entries.back().column, entries.back().row});
    spectrum.push_back(uniform());
  }
  const std::vector<Complex> in_roots = roots_of(c.in), out_roots = roots_of(c.out);
  Buffer x = Buffer::tokens("fourier.x", scalar, tokens, c.in);
  Buffer grad = Buffer::tokens("fourier.grad", scalar, tokens, c.out);
  x.fill(), grad.fill();
  double x_norm = 0.0, grad_norm = 0.0, norms = 0.0;  // largest ones; the sum of products
  for (int64_t t = 0; t < tokens; ++t) {
    const double a = norm_of(x, t, c.in), b = norm_of(grad, t, c.out);
    x_norm = std::max(x_norm, a), grad_norm = std::max(grad_norm, b), norms += a * b;
  }
  const auto is_checked = [&](int64_t t) { return c.all_tokens || t == 0 || t == tokens - 1; };
  const auto check_sum = [&](const Buffer& y, const Mix& mix, const std::vector<std::vector<double>>& delta,
                             double from_norm) {
    // Two tokens are one signal, so what rounding one of them does may end up in the other.
    const double roundings = roundings_of(*mix.source) + roundings_of(*mix.target) + double(mix.most) + 2.0;
    const double lengths = std::sqrt(double(mix.source->length) * double(mix.target->length));
    const double bound = roundings * kUnit * lengths * mix.norm * std::numbers::sqrt2 * from_norm;
    y.expect([&](int64_t t, int64_t j) {
      if (!is_checked(t)) return Within{0.0, std::numeric_limits<double>::infinity()};
      const double sum = y(t, j) + delta[t][j];
      return Within{sum, bound + kUnit * (std::abs(sum) + bound)};
    });
  };

  std::vector<std::vector<Complex>> x_bins(tokens), grad_bins(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    if (!is_checked(t) && tokens > 2) continue;
    x_bins[t] = transform(in_roots, x, t), grad_bins[t] = transform(out_roots, grad, t);
  }

  now = "fourier.fwd" + size;
  {
    const Mix mix(c.in, c.out, entries, spectrum);
    check_plan(*mix.source, c.in), check_plan(*mix.target, c.out);
    now = "fourier.fwd" + size;
    Buffer y = Buffer::tokens("fourier.y", scalar, tokens, c.out);
    y.fill();
    const Buffer scratch =
        Buffer::scratch("fourier.fwd.scratch", loops.fourier.scratch_floats(*mix.source, *mix.target));
    loops.fourier.fwd(mix.view, scalar, tokens, x.rows(), y.mutable_rows(), scratch.floats());
    std::vector<std::vector<double>> delta(tokens);
    for (int64_t t = 0; t < tokens; ++t) {
      if (is_checked(t)) delta[t] = synthesis(mix, out_roots, x_bins[t]);
    }
    check_sum(y, mix, delta, x_norm);
  }

  const Mix mix(c.out, c.in, mirrored, spectrum);
  std::vector<std::vector<double>> delta(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    if (is_checked(t)) delta[t] = synthesis(mix, in_roots, grad_bins[t]);
  }
  std::vector<int32_t> rows, columns;
  for (const Entry& entry : entries) {
    rows.push_back(int32_t(entry.row));
    columns.push_back(int32_t(entry.column));
  }
  const auto rows_copy = exact("fourier.rows", rows), columns_copy = exact("fourier.cols", columns);
  const FourierPlaces places{c.entries, rows_copy.get(), columns_copy.get()};
  for (const auto& [need_x, need_products] : {std::pair(true, true), {true, false}, {false, true}}) {
    now = "fourier.bwd" + size + (need_x ? " dx" : "") + (need_products ? " products" : "");
    Buffer dx = Buffer::tokens("fourier.dx", scalar, tokens, c.in);
    Buffer products = Buffer::floats("fourier.products", c.entries);
    dx.fill(), products.fill();
    const Buffer scratch =
        Buffer::scratch("fourier.bwd.scratch", loops.fourier.scratch_floats(*mix.source, *mix.target));
    loops.fourier.bwd(mix.view, scalar, tokens, grad.rows(), need_x ? dx.mutable_rows() : MutableRows{},
                      need_products ? x.rows() : Rows{}, places, products.floats(), scratch.floats());
    if (need_x) check_sum(dx, mix, delta, grad_norm);
    if (!need_products || !(c.all_tokens || tokens <= 2)) continue;
    const double roundings = roundings_of(*mix.source) + roundings_of(*mix.target) + 2.0 * double(loops.fourier.lanes);
    const double lengths = std::sqrt(double(c.in) * double(c.out));
    products.expect([&](int64_t, int64_t k) {
      double sum = products[k];
      for (int64_t t = 0; t < tokens; ++t) sum += (grad_bins[t][rows[k]] * x_bins[t][columns[k]]).real();
      return Within{sum, kUnit * (2.0 * roundings * lengths * norms + std::abs(sum))};
    });
  }
}

}  // namespace

void check_fourier() {
  const int64_t lanes = loops.fourier.lanes;
  for (const Case& c : kCases) {
    for (const Scalar scalar : kScalars) {
      for (const int64_t tokens : {int64_t(1), int64_t(2), lanes, lanes + 1, 2 * lanes}) {
        if (c.all_tokens || tokens == 2 || tokens == lanes + 1) check_case(c, scalar, tokens);
      }
    }
  }
}

}  // namespace fastpeft::check
