// The products of LoRA and MoS with a short side.
#include "check.h"
#include "checks.h"
#include "loops.h"

namespace fastpeft::check {
namespace {

struct Case {
  int64_t tokens, rank, per_row, width;
};

constexpr Case kCases[] = {
    {1, 1, 1, 1},    {1, 16, 1, 64}, {3, 3, 1, 15},   {4, 16, 1, 16},
    {5, 17, 1, 100}, {8, 1, 1, 33},  {130, 17, 1, 5},  // three partial sums
    {64, 8, 1, 131}, {65, 3, 1, 67}, {7, 16, 3, 33},   // rows of several shards
    {9, 17, 4, 1},   {6, 5, 2, 16},  {5, 3, 5, 47},
};

// A matrix whose rows are made of shards of a pool, each shard with not a float behind it. Where `shared`, there are
// only two thirds as many shards as places.
struct Matrix {
  std::vector<Buffer> pool;
  std::vector<size_t> which;  // shard of each place
  std::unique_ptr<const float*[]> table;
  Shards view;

  Matrix(const std::string& name, const Case& c, bool shared) {
    const int64_t places = c.rank * c.per_row, shards = shared ? (2 * places + 2) / 3 : places;
    for (int64_t i = 0; i < shards; ++i) {
      pool.push_back(Buffer::floats(name, c.width));
      pool.back().fill();
    }
    std::vector<const float*> pointers;
    for (int64_t place = 0; place < places; ++place) {
      which.push_back(size_t(5 * place % shards));
      pointers.push_back(pool[which.back()].floats());
    }
    table = exact(name + ".table", pointers);
    view = {table.get(), c.rank, c.per_row, c.width};
  }

  double operator()(int64_t r, int64_t j) const {
    return pool[which[r * view.per_row + j / view.width]][j % view.width];
  }
};

void check_case(const Case& c, Scalar scalar, bool shared) {
  const int64_t features = c.per_row * c.width;
  const std::string size = std::string(" ") + name_of(scalar) + " T" + std::to_string(c.tokens) + " r" +
                           std::to_string(c.rank) + " " + std::to_string(c.per_row) + "x" + std::to_string(c.width) +
                           (shared ? " shared" : "");
  const double scale = float(0.3);
  Buffer x = Buffer::tokens("lora.x", scalar, c.tokens, features);
  x.fill();

  now = "lora.project" + size;
  {
    const Matrix m("lora.project.m", c, shared);
    const Buffer h("lora.project.h", Scalar::float32, c.tokens, c.rank);
    loops.lora.project(scalar, x.rows(), m.view, c.tokens, float(scale), h.floats());
    h.expect([&](int64_t t, int64_t r) {
      Terms sum;
      for (int64_t j = 0; j < features; ++j) sum += Terms(x(t, j)) * m(r, j);
      return rounded(scale * sum, features + 2);
    });
  }

  Buffer h("lora.h", Scalar::float32, c.tokens, c.rank);
  h.fill();
  now = "lora.expand" + size;
  {
    const Matrix m("lora.expand.m", c, shared);
    Buffer y = Buffer::tokens("lora.y", scalar, c.tokens, features);
    y.fill();
    loops.lora.expand(scalar, h.floats(), m.view, c.tokens, y.mutable_rows());
    y.expect([&](int64_t t, int64_t j) {
      Terms sum;
      for (int64_t r = 0; r < c.rank; ++r) sum += Terms(h(t, r)) * m(r, j);
      sum += y(t, j);
      return rounded(sum, c.rank + 2);
    });
  }

  for (const int64_t columns : {c.width, int64_t(1), int64_t(7), int64_t(16)}) {
    now = "lora.correlate" + size + " columns" + std::to_string(columns);
    const Matrix m("lora.correlate.m", c, shared);
    for (int64_t first = 0; first < c.width; first += columns) {
      loops.lora.correlate(scalar, h.floats(), x.rows(), c.tokens, float(scale), m.view, first,
                           std::min(first + columns, c.width), true);
    }
    std::vector<std::vector<Terms>> wanted(m.pool.size(), std::vector<Terms>(c.width));
    for (int64_t place = 0; place < c.rank * c.per_row; ++place) {
      for (int64_t i = 0; i < c.width; ++i) {
        Terms sum;
        for (int64_t t = 0; t < c.tokens; ++t) {
          sum += Terms(h(t, place / c.per_row)) * x(t, place % c.per_row * c.width + i);
        }
        wanted[m.which[place]][i] += scale * sum;
      }
    }
    for (size_t shard = 0; shard < m.pool.size(); ++shard) {
      m.pool[shard].expect([&](int64_t, int64_t i) {
        Terms sum = wanted[shard][i];
        sum += m.pool[shard][i];
        return rounded(sum, c.tokens + 5);  // a shard stands in two places at most
      });
    }
  }
}

void check_transpose(int64_t rows, int64_t columns) {
  now = "lora.transpose " + std::to_string(rows) + "x" + std::to_string(columns);
  Buffer in = Buffer::tokens("lora.transpose.in", Scalar::float32, rows, columns);
  const Buffer out = Buffer::tokens("lora.transpose.out", Scalar::float32, columns, rows);
  in.fill();
  loops.lora.transpose(in.floats(), in.stride(), rows, columns, out.floats(), out.stride());
  out.expect([&](int64_t j, int64_t i) { return Within{in(i, j), 0.0, true}; });
}

}  // namespace

void check_lora() {
  for (const Scalar scalar : kScalars) {
    for (const Case& c : kCases) {
      for (const bool shared : {false, true}) check_case(c, scalar, shared);
    }
  }
  for (const int64_t rows : {1, 3, 15, 16, 17, 40}) {
    for (const int64_t columns : {1, 5, 16, 31, 33}) check_transpose(rows, columns);
  }
}

}  // namespace fastpeft::check
