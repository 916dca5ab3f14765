// The butterfly product, the scaling of the layer's output and the Cayley transform.
#include <cmath>

#include "check.h"
#include "checks.h"
#include "common/boft_reflectors.h"
#include "loops.h"

namespace fastpeft::check {
namespace {

struct Case {
  int64_t tokens, features, block, factors;
};

constexpr Case kCases[] = {
    {1, 1, 1, 1},                                        // one entry
    {1, 2, 2, 1},                                        // the smallest block with two halves
    {3, 24, 2, 3},                                       // few tokens, three factors
    {5, 96, 16, 2},                                      // three windows
    {2, 128, 32, 3},                                     // the window is the row
    {5, 35, 5, 1},                                       // odd blocks
    {4, 48, 6, 3},                                       // an even size without code of its own
    {6, 35, 5, 1},                                       // the same for more tokens
    {65, 35, 5, 1},                                      // one token more than a tile holds
    {19, 48, 6, 3},   {17, 72, 12, 2}, {7, 128, 64, 2},  // too large for sums in scratch
    {16, 64, 4, 5},                                      // five factors, one window over the row
    {9, 24, 2, 3},    {33, 48, 8, 2},  {64, 96, 16, 2},  // a whole tile
    {130, 40, 4, 2},                                     // three tiles, the last of two tokens
    {17, 128, 32, 2},
};

// Where entry a of block k of factor f is: block s of a window of H = 2^f blocks has the half-blocks s and s + H.
int64_t place(const Case& c, int64_t f, int64_t k, int64_t a) {
  if (f == 0) return k * c.block + a;
  const int64_t meet = int64_t(1) << f, half = c.block / 2;
  return k / meet * meet * c.block + (k % meet + (a < half ? 0 : meet)) * half + a % half;
}

Terms block_entry(const Case& c, const Buffer& blocks, int64_t f, int64_t k, int64_t a, int64_t column) {
  return blocks[((f * (c.features / c.block) + k) * c.block + a) * c.block + column];
}

using Row = std::vector<Terms>;

// row B_f, or row B_f^T on the way back.
Row multiply(const Case& c, const Buffer& blocks, int64_t f, const Row& row, bool back) {
  Row result(c.features);
  for (int64_t k = 0; k < c.features / c.block; ++k) {
    for (int64_t a = 0; a < c.block; ++a) {
      for (int64_t e = 0; e < c.block; ++e) {
        const Terms q = back ? block_entry(c, blocks, f, k, e, a) : block_entry(c, blocks, f, k, a, e);
        result[place(c, f, k, e)] += row[place(c, f, k, a)] * q;
      }
    }
  }
  return result;
}

Row row_of(const Buffer& x, int64_t t, int64_t features) {
  Row row(features);
  for (int64_t j = 0; j < features; ++j) row[j] = x(t, j);
  return row;
}

struct Gradients {
  std::vector<Row> dx;
  Row dblocks;
};

Gradients differentiate(const Case& c, const Buffer& blocks, const Buffer& x, const Buffer& grad) {
  Gradients result{{}, Row(c.factors * c.features * c.block)};
  for (int64_t t = 0; t < c.tokens; ++t) {
    std::vector<Row> inputs(c.factors);  // of each factor
    inputs[c.factors - 1] = row_of(x, t, c.features);
    for (int64_t f = c.factors - 1; f > 0; --f) inputs[f - 1] = multiply(c, blocks, f, inputs[f], false);
    Row g = row_of(grad, t, c.features);
    for (int64_t f = 0; f < c.factors; ++f) {
      int64_t entry = f * c.features * c.block;
      for (int64_t k = 0; k < c.features / c.block; ++k) {
        for (int64_t a = 0; a < c.block; ++a) {
          for (int64_t e = 0; e < c.block; ++e) {
            result.dblocks[entry++] += inputs[f][place(c, f, k, a)] * g[place(c, f, k, e)];
          }
        }
      }
      g = multiply(c, blocks, f, g, true);
    }
    result.dx.push_back(std::move(g));
  }
  return result;
}

// The size is that of the widest vectors, and only they get to its end.
std::string scratch_name(const char* function) {
  return loops.cayley.lanes == 16 ? std::string("butterfly.scratch.") + function : "";
}

// Calls run(range) for ranges of so many windows.
template <typename Run>
void for_each_range(const Case& c, int64_t windows, Run run) {
  const int64_t count = windows * (c.block << (c.factors - 1));
  for (int64_t first = 0; first < c.features; first += count) {
    run(ButterflyRange{first, std::min(count, c.features - first)});
  }
}

void check_case(const Case& c, Scalar scalar) {
  const ButterflyShape shape{c.features, c.block, c.factors, scalar};
  const std::string size = std::string(" ") + name_of(scalar) + " T" + std::to_string(c.tokens) + " d" +
                           std::to_string(c.features) + " b" + std::to_string(c.block) + " m" +
                           std::to_string(c.factors);
  const int64_t all = c.factors * c.features * c.block;
  Buffer x = Buffer::tokens("butterfly.x", scalar, c.tokens, c.features);
  Buffer grad = Buffer::tokens("butterfly.grad", scalar, c.tokens, c.features);
  Buffer blocks = Buffer::floats("butterfly.blocks", all);
  x.fill(), grad.fill(), blocks.fill();

  std::vector<Row> wanted;
  for (int64_t t = 0; t < c.tokens; ++t) {
    Row row = row_of(x, t, c.features);
    for (int64_t f = c.factors - 1; f >= 0; --f) row = multiply(c, blocks, f, row, false);
    wanted.push_back(std::move(row));
  }
  const Gradients gradients = differentiate(c, blocks, x, grad);
  const int64_t depth = c.factors * (c.block + 1);  // roundings of one row on its way through all factors

  for (const int64_t windows : {int64_t(1), int64_t(2), c.features}) {
    now = "butterfly.fwd" + size + " windows" + std::to_string(windows);
    Buffer y = Buffer::tokens("butterfly.y", scalar, c.tokens, c.features);
    for_each_range(c, windows, [&](ButterflyRange range) {
      const Buffer scratch = Buffer::scratch(scratch_name("fwd"), butterfly_scratch_floats(shape, range, false));
      loops.butterfly.fwd(shape, range, c.tokens, x.rows(), blocks.floats(), y.mutable_rows(), scratch.floats());
    });
    y.expect([&](int64_t t, int64_t j) { return rounded(wanted[t][j], depth); });

    for (const bool need_x : {true, false}) {
      for (const bool need_blocks : {true, false}) {
        now = "butterfly.bwd" + size + " windows" + std::to_string(windows) + (need_x ? " dx" : "") +
              (need_blocks ? " dblocks" : "");
        Buffer dx = Buffer::tokens("butterfly.dx", scalar, c.tokens, c.features);
        Buffer dblocks = Buffer::floats("butterfly.dblocks", all);
        dblocks.set([](int64_t, int64_t) { return 0.0; });
        for_each_range(c, windows, [&](ButterflyRange range) {
          const Buffer scratch = Buffer::scratch(scratch_name("bwd"), butterfly_scratch_floats(shape, range, true));
          loops.butterfly.bwd(shape, range, c.tokens, grad.rows(), need_blocks ? x.rows() : Rows{}, blocks.floats(),
                              need_x ? dx.mutable_rows() : MutableRows{}, need_blocks ? dblocks.floats() : nullptr,
                              scratch.floats());
        });
        if (need_x) dx.expect([&](int64_t t, int64_t j) { return rounded(gradients.dx[t][j], depth); });
        if (need_blocks) {
          dblocks.expect([&](int64_t, int64_t i) { return rounded(gradients.dblocks[i], 2 * depth + c.tokens + 1); });
        }
      }
    }
  }
}

void check_scale(Scalar scalar, int64_t tokens, int64_t features, bool has_bias) {
  const std::string size = std::string(" ") + name_of(scalar) + " T" + std::to_string(tokens) + " d" +
                           std::to_string(features) + (has_bias ? " bias" : "");
  Buffer y0 = Buffer::tokens("scale.y0", scalar, tokens, features);
  Buffer grad = Buffer::tokens("scale.grad", scalar, tokens, features);
  Buffer s = Buffer::floats("scale.s", features), bias("scale.bias", scalar, 1, features);
  y0.fill(), grad.fill(), bias.fill();
  s.set([](int64_t, int64_t j) { return j % 3 ? 1.0 + uniform() : 1.0; });
  const auto shift = [&](int64_t j) { return has_bias ? bias[j] : 0.0; };
  const void* bias_data = has_bias ? bias.data() : nullptr;

  now = "scale_fwd" + size;
  const auto wanted = [&](int64_t t, int64_t j) {
    if (s[j] == 1.0) return Within{y0(t, j), 0.0, true};
    const double value = y0(t, j) + (y0(t, j) - shift(j)) * (s[j] - 1.0);
    const double terms = std::abs(y0(t, j)) + (std::abs(y0(t, j)) + std::abs(shift(j))) * std::abs(s[j] - 1.0);
    return rounded({value, terms}, 4);
  };
  const Buffer y = Buffer::tokens("scale.y", scalar, tokens, features);
  loops.butterfly.scale_fwd(scalar, tokens, features, y0.rows(), bias_data, s.floats(), y.mutable_rows());
  y.expect(wanted);

  now = "scale_bwd" + size;
  for (const bool need_s : {true, false}) {
    for (const bool need_scaled : {true, false}) {
      const Buffer scaled = Buffer::tokens("scale.scaled", scalar, tokens, features);
      const Buffer ds = Buffer::floats("scale.ds", features);
      for (int64_t first = 0; first < features; first += kScaleColumns) {
        loops.butterfly.scale_bwd(scalar, tokens, first, std::min(first + kScaleColumns, features), grad.rows(),
                                  need_s ? y0.rows() : Rows{}, bias_data, s.floats(),
                                  need_scaled ? scaled.mutable_rows() : MutableRows{}, need_s ? ds.floats() : nullptr);
      }
      if (need_scaled) scaled.expect([&](int64_t t, int64_t j) { return rounded(grad(t, j) * s[j], 1); });
      if (!need_s) continue;
      ds.expect([&](int64_t, int64_t j) {
        Terms sum;
        for (int64_t t = 0; t < tokens; ++t) {
          sum += Terms(grad(t, j)) * Terms(y0(t, j) - shift(j), std::abs(y0(t, j)) + std::abs(shift(j)));
        }
        return rounded(sum, tokens + 2);
      });
    }
  }

  now = "scale_fwd" + size + " in place";
  loops.butterfly.scale_fwd(scalar, tokens, features, y0.rows(), bias_data, s.floats(), y0.mutable_rows());
  y0.expect(wanted);
}

using Matrix = std::vector<std::vector<double>>;

Matrix zeros(int64_t size) { return Matrix(size, std::vector<double>(size)); }

Matrix product(const Matrix& a, const Matrix& b) {
  const size_t size = a.size();
  Matrix result = zeros(int64_t(size));
  for (size_t i = 0; i < size; ++i) {
    for (size_t k = 0; k < size; ++k) {
      for (size_t j = 0; j < size; ++j) result[i][j] += a[i][k] * b[k][j];
    }
  }
  return result;
}

Matrix sizes(Matrix a) {
  for (auto& row : a) {
    for (double& value : row) value = std::abs(value);
  }
  return a;
}

Matrix transposed(const Matrix& a) {
  Matrix result = a;
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t j = 0; j < a.size(); ++j) result[i][j] = a[j][i];
  }
  return result;
}

Matrix block_of(const Buffer& blocks, int64_t k, int64_t size) {
  Matrix result = zeros(size);
  for (int64_t i = 0; i < size * size; ++i) result[i / size][i % size] = blocks[k * size * size + i];
  return result;
}

// Q = (I - S) A^-1 with A = I + S = L U. A row q of Q comes from q L U = c with the error |q| |L| |U| |A^-1|, times
// three roundings for each of `size` steps (Higham, Accuracy and Stability, theorem 9.4). A^-1 = (Q + I) / 2.
struct Cayley {
  Matrix q, bound;

  explicit Cayley(const Matrix& r) {
    const int64_t size = int64_t(r.size());
    Matrix lower = zeros(size), upper = zeros(size);
    q = zeros(size);
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < size; ++j) {
        const double skew = 0.5 * (r[i][j] - r[j][i]), unit = i == j ? 1.0 : 0.0;
        upper[i][j] = unit + skew;
        lower[i][j] = unit;
        q[i][j] = unit - skew;
      }
    }
    const Matrix c = q;
    for (int64_t k = 0; k < size; ++k) {
      for (int64_t i = k + 1; i < size; ++i) {
        lower[i][k] = upper[i][k] / upper[k][k];
        for (int64_t j = 0; j < size; ++j) upper[i][j] = j <= k ? 0.0 : upper[i][j] - lower[i][k] * upper[k][j];
      }
    }
    for (auto& row : q) {
      for (int64_t j = 0; j < size; ++j) {
        for (int64_t k = 0; k < j; ++k) row[j] -= row[k] * upper[k][j];
        row[j] /= upper[j][j];
      }
      for (int64_t j = size - 1; j >= 0; --j) {
        for (int64_t k = j + 1; k < size; ++k) row[j] -= row[k] * lower[k][j];
      }
    }
    Matrix inverse = q;
    for (int64_t i = 0; i < size; ++i) {
      inverse[i][i] += 1.0;
      for (double& value : inverse[i]) value = 0.5 * std::abs(value);
    }
    // The matrices L and U of float32 differ from these in the first order, which the bound does not notice.
    bound = product(product(product(sizes(q), sizes(lower)), sizes(upper)), inverse);
    const Matrix right = product(sizes(c), inverse);
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < size; ++j) {
        bound[i][j] = kUnit * (double(3 * size + 4) * bound[i][j] + 2.0 * right[i][j] + std::abs(q[i][j]));
      }
    }
  }
};

// H_0 ... H_{b-2} D, of number(n) in the order of fastpeft/ops/boft_many.py.
template <typename Number>
Matrix reflected(int64_t block, Number number) {
  Matrix result = zeros(block);
  for (int64_t i = 0; i < block; ++i) result[i][i] = 1.0;
  for (int64_t j = 0, n = 0; j + 1 < block; n += block - j, ++j) {
    const auto v = [&](int64_t a) { return a == j ? 1.0 : number(n + a - j); };
    for (auto& row : result) {
      double along = 0.0;
      for (int64_t a = j; a < block; ++a) along += row[a] * v(a);
      for (int64_t a = j; a < block; ++a) row[a] -= number(n) * along * v(a);
    }
  }
  for (auto& row : result) {
    for (int64_t j = 0; j + 1 < block; ++j) row[j] = -row[j];
  }
  return result;
}

// Entries up to `scale`: from one on the solution is refined.
void check_cayley(int64_t count, int64_t block, float scale) {
  const std::string size =
      " count" + std::to_string(count) + " b" + std::to_string(block) + " scale" + std::to_string(scale);
  const int64_t entries = block * block;
  now = "cayley.fwd" + size;
  Buffer r = Buffer::floats("cayley.r", count * entries), q = Buffer::floats("cayley.q", count * entries);
  Buffer scratch = Buffer::scratch("cayley.scratch", loops.cayley.scratch_floats(block));
  r.set([&](int64_t, int64_t) { return scale * uniform(); });
  loops.cayley.fwd(r.floats(), count, block, q.floats(), scratch.floats());
  std::vector<Cayley> wanted;
  for (int64_t k = 0; k < count; ++k) wanted.emplace_back(block_of(r, k, block));
  q.expect([&](int64_t, int64_t i) {
    const Cayley& of = wanted[i / entries];
    const int64_t row = i % entries / block, column = i % block;
    return Within{of.q[row][column], of.bound[row][column]};
  });

  now = "cayley.reflectors" + size;
  const int64_t apart = entries + 3, lanes = count + 2, kinds = reflector_numbers(block);
  Buffer spread = Buffer::floats("cayley.reflectors.r", count * apart - 3);
  spread.set([&](int64_t, int64_t i) { return i % apart < entries ? r[i / apart * entries + i % apart] : NAN; });
  const Buffer numbers = Buffer::floats("cayley.numbers", kinds > 0 ? (kinds - 1) * lanes + count : 0);
  loops.cayley.reflectors(spread.floats(), apart, count, block, numbers.floats(), lanes, scratch.floats());
  const auto number = [&](int64_t n, int64_t k) { return double(numbers.floats()[n * lanes + k]); };
  Buffer again = Buffer::floats("", count * entries);
  std::vector<Matrix> products;
  for (int64_t k = 0; k < count; ++k) products.push_back(reflected(block, [&](int64_t n) { return number(n, k); }));
  again.set([&](int64_t, int64_t i) { return products[i / entries][i % entries / block][i % block]; });
  again.expect([&](int64_t, int64_t i) {
    const Cayley& of = wanted[i / entries];
    // Each reflection disturbs a column of length one by so many roundings (Higham, theorem 19.4); and what is wrong in
    // Q, all of it at worst, is so twice, because a product of reflections is orthogonal.
    double all = 0.0;
    for (const auto& row : of.bound) {
      for (const double entry : row) all += entry * entry;
    }
    return Within{of.q[i % entries / block][i % block],
                  2.0 * std::sqrt(all) + double((block - 1) * (block + 8) + 2) * kUnit};
  });

  now = "cayley.bwd" + size;
  Buffer grad = Buffer::floats("cayley.grad", count * entries), dr = Buffer::floats("cayley.dr", count * entries);
  Buffer any = Buffer::floats("cayley.bwd.q", count * entries);  // the formula does not need an orthogonal matrix
  grad.fill(), any.fill();
  loops.cayley.bwd(grad.floats(), any.floats(), count, block, dr.floats(), scratch.floats());
  std::vector<Matrix> ds, terms;
  for (int64_t k = 0; k < count; ++k) {
    Matrix p = block_of(any, k, block);
    for (int64_t i = 0; i < block; ++i) p[i][i] += 1.0;
    const Matrix turned = transposed(p), g = block_of(grad, k, block);
    ds.push_back(product(product(turned, g), turned));
    terms.push_back(product(product(sizes(turned), sizes(g)), sizes(turned)));
  }
  dr.expect([&](int64_t, int64_t i) {
    const int64_t k = i / entries, row = i % entries / block, column = i % block;
    return rounded(
        {-0.25 * (ds[k][row][column] - ds[k][column][row]), 0.25 * (terms[k][row][column] + terms[k][column][row])},
        2 * block + 5);
  });
}

}  // namespace

void check_butterfly() {
  for (const Scalar scalar : kScalars) {
    for (const Case& c : kCases) check_case(c, scalar);
  }
}

void check_scale() {
  for (const Scalar scalar : kScalars) {
    for (const int64_t features : {1, 3, 16, 31, 255, 256, 257, 515}) {
      for (const int64_t tokens : {1, 3, 65, 130}) {
        for (const bool has_bias : {true, false}) check_scale(scalar, tokens, features, has_bias);
      }
    }
  }
}

void check_cayley() {
  const int64_t lanes = loops.cayley.lanes;
  for (const int64_t block : {1, 2, 3, 4, 5, 7, 8, 16, 31, 32}) {
    for (const int64_t count : {int64_t(1), lanes - 1, lanes})
      for (float scale : {1.0f, 8.0f}) check_cayley(count, block, scale);
  }
}

}  // namespace fastpeft::check
