// The butterfly product by reflections, and reflections from trained blocks.
#include "check.h"
#include "checks.h"
#include "common/boft_reflectors.h"
#include "loops.h"

namespace fastpeft::check {
namespace {

struct Case {
  int64_t features, block, factors;
};

constexpr Case kCases[] = {
    {5, 1, 1},    // blocks of one number, which are nothing
    {8, 2, 1},    // strips of half a vector
    {21, 7, 1},   // odd blocks, odd strips
    {24, 6, 3},   // an even size without code of its own
    {48, 4, 3},   // three strips
    {272, 8, 1},  // 17 strips: whole vectors, and one that is left
    {128, 8, 4}, {64, 2, 5}, {64, 16, 2}, {128, 32, 2},
};

// Where number n of block k of factor f is.
int64_t place(const Case& c, int64_t f, int64_t k, int64_t n) {
  const int64_t strip = strip_features(c.features, c.block, c.factors), in_strip = strip / c.block;
  const int64_t strips = c.features / strip, numbers = reflector_numbers(c.block);
  return ((f * in_strip + k % in_strip) * numbers + n) * strips + k / in_strip;
}

// Where entry a of block k of factor f is in a row.
int64_t feature(const Case& c, int64_t f, int64_t k, int64_t a) {
  if (c.block % 2 != 0) return k * c.block + a;
  const int64_t meet = int64_t(1) << f, half = c.block / 2;
  return k / meet * meet * c.block + (k % meet + (a < half ? 0 : meet)) * half + a % half;
}

void check_rotate(const Case& c, Scalar scalar, int64_t tokens) {
  const ReflectorShape shape{c.features, c.block, c.factors, strip_features(c.features, c.block, c.factors), scalar};
  const int64_t n_blocks = c.features / c.block, b = c.block;
  now = std::string("butterfly_many.rotate ") + name_of(scalar) + " T" + std::to_string(tokens) + " d" +
        std::to_string(c.features) + " b" + std::to_string(b) + " m" + std::to_string(c.factors);
  std::vector<double> numbers(size_t(c.factors * n_blocks * reflector_numbers(b)));
  for (int64_t f = 0; f < c.factors; ++f) {
    for (int64_t k = 0; k < n_blocks; ++k) {
      for (int64_t j = 0, n = 0; j + 1 < b; n += b - j, ++j) {
        double length = 1.0;
        for (int64_t a = 1; a < b - j; ++a) {
          const double v = uniform();
          numbers[size_t(place(c, f, k, n + a))] = v;
          length += v * v;
        }
        numbers[size_t(place(c, f, k, n))] = 2.0 / length;
      }
    }
  }
  Buffer x = Buffer::tokens("butterfly_many.x", scalar, tokens, c.features);
  Buffer reflectors = Buffer::floats("butterfly_many.reflectors", int64_t(numbers.size()));
  x.fill();
  reflectors.set([&](int64_t, int64_t i) { return numbers[size_t(i)]; });

  std::vector<std::vector<Terms>> wanted;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<Terms> row(static_cast<size_t>(c.features));
    for (int64_t j = 0; j < c.features; ++j) row[size_t(j)] = x(t, j);
    for (int64_t f = c.factors - 1; f >= 0; --f) {
      for (int64_t k = 0; k < n_blocks; ++k) {
        const auto entry = [&](int64_t a) -> Terms& { return row[size_t(feature(c, f, k, a))]; };
        for (int64_t j = 0, n = 0; j + 1 < b; n += b - j, ++j) {
          const auto v = [&](int64_t a) { return a == 0 ? Terms(1.0) : Terms(reflectors[place(c, f, k, n + a)]); };
          Terms along;
          for (int64_t a = 0; a < b - j; ++a) along += entry(j + a) * v(a);
          const Terms step = along * Terms(reflectors[place(c, f, k, n)]);
          for (int64_t a = 0; a < b - j; ++a) entry(j + a) += step * v(a) * Terms(-1.0, 1.0);
          entry(j).value = -entry(j).value;
        }
      }
    }
    wanted.push_back(std::move(row));
  }
  const Buffer z = Buffer::tokens("butterfly_many.z", scalar, tokens, c.features);
  // The size is that of the widest vectors and of tokens that travel together, and only they get to its end.
  const bool to_the_end = loops.cayley.lanes == 16 && tokens > 1 && b % 2 == 0 && b <= 8 && c.features == 272;
  const Buffer scratch =
      Buffer::scratch(to_the_end ? "butterfly_many.scratch" : "", loops.butterfly_many.scratch_floats(shape));
  loops.butterfly_many.rotate(shape, tokens, x.rows(), reflectors.floats(), z.mutable_rows(), scratch.floats());
  // A number goes through a sum of up to b terms, two products and a difference in each reflection.
  const int64_t roundings = c.factors * (b - 1) * (b + 4) + 1;
  z.expect([&](int64_t t, int64_t j) { return rounded(wanted[size_t(t)][size_t(j)], roundings); });
}

}  // namespace

void check_butterfly_many() {
  for (const Scalar scalar : kScalars) {
    for (const Case& c : kCases) {
      for (const int64_t tokens : {1, 2, 5}) check_rotate(c, scalar, tokens);
    }
  }
}

}  // namespace fastpeft::check
