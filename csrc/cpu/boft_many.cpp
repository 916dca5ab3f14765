// The operators fastpeft::boft_rotate_many and boft_scale_many_ on CPU tensors: BOFT, every row of x with an adapter of
// its own. Schemas and fakes: fastpeft/ops/boft_many.py.
//
// Floor, for 32 rows with 32 adapters: 2 m (b + 1 - 2 / b) in bytes of reflectors for each, read once, 1.1 MiB at
// (b, m) = (8, 2) and 1024 features; two multiply-adds for each number.
#include <string.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/boft_reflectors.h"
#include "cpu/boft_loops.h"
#include "cpu/boft_many_loops.h"
#include "cpu/many_tensors.h"
#include "cpu/scratch.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const ButterflyLoops& loops() { return FASTPEFT_ACTIVE(butterfly); }
const ButterflyManyLoops& many_loops() { return FASTPEFT_ACTIVE(butterfly_many); }

// The segments of slots that have a row of the arena, and those rows.
struct ArenaRows {
  std::vector<Segment> segments;
  std::vector<const float*> data;  // of each segment

  ArenaRows(const Arena& arena, const int32_t* table, int64_t slots, const char* name, const Batch& batch)
      : segments(batch.segments(slots, [&](int64_t slot) { return table[slot] != -1; })) {
    for (const Segment& segment : segments) data.push_back(arena.row(table[segment.slot], name));
  }
};

class RotationWork : public Work {
 public:
  RotationWork(const RotationTables& tables, const Batch& batch, const Matrix& x, const Matrix& z, int64_t features)
      : shape_{features, tables.block, tables.factors, strip_features(features, tables.block, tables.factors),
               x.scalar},
        x_(x),
        z_(z),
        reflectors_(tables.reflectors, tables.row, tables.slots, "row_reflectors", batch) {
    tasks = int64_t(reflectors_.data.size());
    size = features * tables.block * tables.factors;
  }

  void run(int64_t task) const override {
    const Segment& segment = reflectors_.segments[task];
    Scratch scratch(many_loops().scratch_floats(shape_));
    many_loops().rotate(shape_, segment.count, segment.of(x_), reflectors_.data[task], segment.into(z_),
                        scratch.data());
  }

 private:
  ReflectorShape shape_;
  Matrix x_, z_;
  ArenaRows reflectors_;
};

class CopyWork : public Work {
 public:
  CopyWork(const std::vector<char>& named, const Matrix& x, const Matrix& z, int64_t features)
      : x_(x), z_(z), bytes_(features * x.element_size()) {
    for (size_t t = 0; t < named.size(); ++t) {
      if (!named[t]) rows_.push_back(int64_t(t));
    }
    tasks = (int64_t(rows_.size()) + kRows - 1) / kRows;
    size = kRows * features / 8;
  }

  void run(int64_t task) const override {
    const size_t last = std::min(rows_.size(), size_t(task + 1) * kRows);
    for (size_t i = size_t(task) * kRows; i < last; ++i) memcpy(z_.row(rows_[i]), x_.row(rows_[i]), bytes_);
  }

 private:
  static constexpr int64_t kRows = 8;
  Matrix x_, z_;
  int64_t bytes_;
  std::vector<int64_t> rows_;
};

class ScaleWork : public Work {
 public:
  ScaleWork(const ScaleTables& tables, const Batch& batch, const void* bias, const Matrix& y)
      : features_(tables.scale.width),
        bias_(static_cast<const char*>(bias)),
        y_(y),
        rows_(tables.scale, tables.row, tables.slots, "row_scale", batch) {
    const int64_t most = torch::stable::get_num_threads();
    columns_ = std::max<int64_t>(16, (features_ / most + 15) / 16 * 16);
    const int64_t parts = (features_ + columns_ - 1) / columns_;
    tasks = parts * int64_t(rows_.data.size());
    size = columns_;
  }

  // Columns in as many parts as there are threads, because that is how a product of few rows leaves y in their caches.
  void run(int64_t task) const override {
    const int64_t rows = int64_t(rows_.data.size()), first = task / rows * columns_, row = task % rows;
    const Segment& segment = rows_.segments[row];
    const Matrix part{static_cast<char*>(y_.data) + first * y_.element_size(), y_.stride, y_.scalar};
    loops().scale_fwd(y_.scalar, segment.count, std::min(columns_, features_ - first), segment.of(part),
                      bias_ == nullptr ? nullptr : bias_ + first * y_.element_size(), rows_.data[row] + first,
                      segment.into(part));
  }

 private:
  int64_t features_, columns_;
  const char* bias_;
  Matrix y_;
  ArenaRows rows_;
};

Tensor boft_rotate_many(const Tensor& x, const Tensor& arena_reflectors, const Tensor& row_reflectors, int64_t factors,
                        int64_t block, const Tensor& rows, const Tensor& slots) {
  const Matrix source = matrix_of(x, "x");
  const int64_t tokens = x.size(0), d = x.size(1);
  STD_TORCH_CHECK(factors > 0 && block > 0 && d % block == 0 &&
                      (factors == 1 || (block % 2 == 0 && factors < 32 && d % (block << (factors - 1)) == 0)),
                  factors, " factors of block size ", block, " do not fit ", d, " features");
  const Arena arena = arena_of(arena_reflectors, "arena_reflectors", factors * (d / block) * reflector_numbers(block));
  check_table(row_reflectors, "row_reflectors", ScalarType::Int, {-1});
  std::vector<char> named(tokens);
  const Batch batch = batch_of(rows, slots, named);
  const Tensor z = allocate(x, {tokens, d});
  if (z.numel() == 0) return z;
  const RotationTables tables{arena, data_of<int32_t>(row_reflectors), row_reflectors.size(0), factors, block};
  const Matrix target{z.mutable_data_ptr(), d, source.scalar};
  Works works;
  works.push_back(rotation_work(tables, batch, source, target, d));
  works.push_back(copy_work(named, source, target, d));
  run_all(works);
  return z;
}

void boft_scale_many(Tensor y, const std::optional<Tensor>& bias, const Tensor& arena_scale, const Tensor& row_scale,
                     const Tensor& rows, const Tensor& slots) {
  const Matrix target = matrix_of(y, "y");
  const int64_t features = y.size(1);
  if (bias) check_table(*bias, "bias", y.scalar_type(), {features});
  const Arena arena = arena_of(arena_scale, "arena_scale", features);
  check_table(row_scale, "row_scale", ScalarType::Int, {-1});
  std::vector<char> named(y.size(0));
  const Batch batch = batch_of(rows, slots, named);
  if (y.numel() == 0) return;
  const ScaleTables tables{arena, data_of<int32_t>(row_scale), row_scale.size(0)};
  run_alone(scale_work(tables, batch, bias ? bias->const_data_ptr() : nullptr, target));
}

}  // namespace

std::unique_ptr<Work> rotation_work(const RotationTables& tables, const Batch& batch, const Matrix& x, const Matrix& z,
                                    int64_t features) {
  return std::make_unique<RotationWork>(tables, batch, x, z, features);
}

std::unique_ptr<Work> copy_work(const std::vector<char>& named, const Matrix& x, const Matrix& z, int64_t features) {
  return std::make_unique<CopyWork>(named, x, z, features);
}

std::unique_ptr<Work> scale_work(const ScaleTables& tables, const Batch& batch, const void* bias, const Matrix& y) {
  return std::make_unique<ScaleWork>(tables, batch, bias, y);
}

}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("boft_rotate_many", TORCH_BOX(&fastpeft::boft_rotate_many));
  m.impl("boft_scale_many_", TORCH_BOX(&fastpeft::boft_scale_many));
}
