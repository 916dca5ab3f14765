// The operator fastpeft::low_rank_many_ on CPU tensors: LoRA and MoS, every row of x with an adapter of its own. Schema
// and fake: fastpeft/ops/low_rank_many.py. The loops are those of one adapter (cpu/lora_loops.h): their sums for a row
// do not depend on how many rows they are given.
//
// Floor, for 32 rows with 32 adapters of rank r: 4 r (in + out) bytes of A and B for each, read once, 4 MiB at r = 16
// and 1024 features beside the 4 MiB of W; 2 r (in + out) operations for each byte's quarter, which is nothing. x and y
// stay in the first-level cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cpu/lora_loops.h"
#include "cpu/low_rank.h"
#include "cpu/many_tensors.h"
#include "cpu/scratch.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

class LowRankWork : public Work {
 public:
  LowRankWork(const LowRankTables& tables, const Batch& batch, const Matrix& x, const Matrix& y)
      : tables_(tables), x_(x), y_(y) {
    const int64_t r_max = tables.r_max;
    segments_ = batch.segments(tables.slots, [&](int64_t slot) {
      const int64_t r = tables.rank[slot];
      STD_TORCH_CHECK(r >= 0 && r <= r_max, "rank must lie in [0, ", r_max, "], got ", r);
      return r > 0;
    });
    tasks = int64_t(segments_.size());
    for (const Segment& segment : segments_) size += segment.count * tables.rank[segment.slot];
    if (tasks > 0) size = size * (tables.a.width + tables.b.width) * tables.per_row / tasks;
  }

  void run(int64_t task) const override {
    const Segment& segment = segments_[task];
    const int64_t r = tables_.rank[segment.slot], per_row = tables_.per_row;
    std::vector<const float*> shards;
    shards.reserve(2 * r * per_row);
    collect(tables_.a, tables_.index_a, segment.slot, r, "index_A", shards);
    collect(tables_.b, tables_.index_b, segment.slot, r, "index_B", shards);
    const Shards A{shards.data(), r, per_row, tables_.a.width}, B{A.shards + r * per_row, r, per_row, tables_.b.width};
    prefetch(A);
    prefetch(B);
    Scratch h(segment.count * r);
    lora_loops().project(x_.scalar, segment.of(x_), A, segment.count, tables_.scaling[segment.slot], h.data());
    lora_loops().expand(x_.scalar, h.data(), B, segment.count, segment.into(y_));
  }

 private:
  // Where the vectors of a slot's matrix lie.
  void collect(const Arena& arena, const int32_t* index, int64_t slot, int64_t rank, const char* name,
               std::vector<const float*>& shards) const {
    const int32_t* numbers = index + slot * tables_.r_max * tables_.per_row;
    for (int64_t i = 0; i < rank * tables_.per_row; ++i) shards.push_back(arena.row(numbers[i], name));
  }

  // What a layer's small adapters read is too short for a processor to see coming, and is asked for at once.
  static void prefetch(const Shards& m) {
    constexpr int64_t kLine = 16, kMost = 16 << 10;  // floats
    const int64_t count = m.rank * m.per_row;
    if (count * m.width > kMost) return;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < m.width; j += kLine) __builtin_prefetch(m.shards[i] + j);
    }
  }

  LowRankTables tables_;
  Matrix x_, y_;
  std::vector<Segment> segments_;
};

void low_rank_many(Tensor y, const Tensor& x, const Tensor& arena_A, const Tensor& index_A, const Tensor& arena_B,
                   const Tensor& index_B, const Tensor& rank, const Tensor& scaling, const Tensor& rows,
                   const Tensor& slots) {
  const Matrix target = matrix_of(y, "y"), source = matrix_of(x, "x", y.size(0));
  STD_TORCH_CHECK(source.scalar == target.scalar, "x must have the dtype of y");
  check_table(index_A, "index_A", ScalarType::Int, {-1, -1, -1});
  const int64_t count = index_A.size(0), r_max = index_A.size(1), per_row = index_A.size(2);
  check_table(index_B, "index_B", ScalarType::Int, {count, r_max, per_row});
  const Arena a = arena_of(arena_A, "arena_A", -1), b = arena_of(arena_B, "arena_B", -1);
  STD_TORCH_CHECK(a.width * per_row == x.size(1), "arena_A must have rows of ", x.size(1), " / l features");
  STD_TORCH_CHECK(b.width * per_row == y.size(1), "arena_B must have rows of ", y.size(1), " / l features");
  check_table(rank, "rank", ScalarType::Int, {count});
  check_table(scaling, "scaling", ScalarType::Float, {count});
  std::vector<char> named(y.size(0));
  const Batch batch = batch_of(rows, slots, named);
  if (x.numel() == 0 || y.numel() == 0) return;
  const LowRankTables tables{a,
                             b,
                             data_of<int32_t>(index_A),
                             data_of<int32_t>(index_B),
                             data_of<int32_t>(rank),
                             data_of<float>(scaling),
                             count,
                             r_max,
                             per_row};
  run_alone(low_rank_work(tables, batch, source, target));
}

}  // namespace

std::unique_ptr<Work> low_rank_work(const LowRankTables& tables, const Batch& batch, const Matrix& x, const Matrix& y) {
  return std::make_unique<LowRankWork>(tables, batch, x, y);
}

}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("low_rank_many_", TORCH_BOX(&fastpeft::low_rank_many)); }
