// The operators fastpeft::boft_rotate_many and boft_scale_many_ on CPU tensors: BOFT, every row of x with an adapter of
// its own. Schemas and fakes: fastpeft/ops/boft_many.py.
//
// Floor, for 32 rows with 32 adapters: 4 m b in bytes of blocks for each, read once, 2 MiB at (b, m) = (8, 2) and 1024
// features; one multiply-add for each number. A row of a block is a vector (cpu/boft_rows.h), for every number of rows,
// so that their sums have one order.
#include <string.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/boft_loops.h"
#include "cpu/many_tensors.h"
#include "cpu/scratch.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const ButterflyLoops& loops() { return FASTPEFT_ACTIVE(butterfly); }

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
      : shape_{features, tables.block, tables.factors, x.scalar},
        x_(x),
        z_(z),
        blocks_(tables.blocks, tables.row, tables.slots, "row_blocks", batch) {
    tasks = int64_t(blocks_.data.size());
    size = features * tables.block * tables.factors;
  }

  void run(int64_t task) const override {
    const ButterflyRange range{0, shape_.features};
    const Segment& segment = blocks_.segments[task];
    Scratch scratch(butterfly_scratch_floats(shape_, range, false));
    loops().fwd_by_rows(shape_, range, segment.count, segment.of(x_), blocks_.data[task], segment.into(z_),
                        scratch.data());
  }

 private:
  ButterflyShape shape_;
  Matrix x_, z_;
  ArenaRows blocks_;
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
        bias_(bias),
        y_(y),
        rows_(tables.scale, tables.row, tables.slots, "row_scale", batch) {
    tasks = int64_t(rows_.data.size());
    size = features_;
  }

  void run(int64_t task) const override {
    const Segment& segment = rows_.segments[task];
    loops().scale_fwd(y_.scalar, segment.count, features_, segment.of(y_), bias_, rows_.data[task], segment.into(y_));
  }

 private:
  int64_t features_;
  const void* bias_;
  Matrix y_;
  ArenaRows rows_;
};

Tensor boft_rotate_many(const Tensor& x, const Tensor& arena_blocks, const Tensor& row_blocks, int64_t factors,
                        int64_t block, const Tensor& rows, const Tensor& slots) {
  const Matrix source = matrix_of(x, "x");
  const int64_t tokens = x.size(0), d = x.size(1);
  STD_TORCH_CHECK(factors > 0 && block > 0 && d % block == 0 &&
                      (factors == 1 || (block % 2 == 0 && factors < 32 && d % (block << (factors - 1)) == 0)),
                  factors, " factors of block size ", block, " do not fit ", d, " features");
  const Arena arena = arena_of(arena_blocks, "arena_blocks", factors * d * block);
  check_table(row_blocks, "row_blocks", ScalarType::Int, {-1});
  std::vector<char> named(tokens);
  const Batch batch = batch_of(rows, slots, named);
  const Tensor z = allocate(x, {tokens, d});
  if (z.numel() == 0) return z;
  const RotationTables tables{arena, data_of<int32_t>(row_blocks), row_blocks.size(0), factors, block};
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
