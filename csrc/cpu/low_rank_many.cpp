// The operator fastpeft::low_rank_many_ on CPU tensors: LoRA and MoS, every row of x with an adapter of its own. Schema
// and fake: fastpeft/ops/low_rank_many.py. The loops are those of one adapter (cpu/lora_loops.h): their sums for a row
// do not depend on how many rows they are given.
//
// Floor, for 32 rows with 32 adapters of rank r: 4 r (in + out) bytes of A and B for each, read once, 4 MiB at r = 16
// and 1024 features beside the 4 MiB of W; 2 r (in + out) operations for each byte's quarter, which is nothing. x and y
// stay in the first-level cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cpu/lora_loops.h"
#include "cpu/low_rank.h"
#include "cpu/many.h"
#include "cpu/scratch.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Appends where the vectors of a slot's matrix lie.
void collect(std::vector<const float*>& pointers, const Tensor& arena, const Tensor& index, int64_t slot, int64_t rank,
             const char* name) {
  const int64_t per_row = index.size(2);
  const int32_t* numbers = data_of<int32_t>(index) + slot * index.size(1) * per_row;
  for (int64_t i = 0; i < rank * per_row; ++i) pointers.push_back(arena_row(arena, numbers[i], name));
}

void low_rank_many(Tensor y, const Tensor& x, const Tensor& arena_A, const Tensor& index_A, const Tensor& arena_B,
                   const Tensor& index_B, const Tensor& rank, const Tensor& scaling, const Tensor& rows,
                   const Tensor& slots) {
  check_activation(y, "y", -1);
  check_activation(x, "x", y.size(0));
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "x must have the dtype of y");
  check_table(index_A, "index_A", ScalarType::Int, {-1, -1, -1});
  const int64_t count = index_A.size(0), r_max = index_A.size(1), per_row = index_A.size(2);
  check_table(index_B, "index_B", ScalarType::Int, {count, r_max, per_row});
  check_table(arena_A, "arena_A", ScalarType::Float, {-1, -1});
  check_table(arena_B, "arena_B", ScalarType::Float, {-1, -1});
  STD_TORCH_CHECK(arena_A.size(1) * per_row == x.size(1), "arena_A must have rows of ", x.size(1), " / l features");
  STD_TORCH_CHECK(arena_B.size(1) * per_row == y.size(1), "arena_B must have rows of ", y.size(1), " / l features");
  check_table(rank, "rank", ScalarType::Int, {count});
  check_table(scaling, "scaling", ScalarType::Float, {count});
  const int32_t* ranks = data_of<int32_t>(rank);
  const BatchPlan plan(rows, slots, y.size(0), count, [&](int64_t slot) {
    STD_TORCH_CHECK(ranks[slot] >= 0 && ranks[slot] <= r_max, "rank must lie in [0, ", r_max, "], got ", ranks[slot]);
    return ranks[slot] > 0;
  });
  if (plan.segments.empty() || x.numel() == 0 || y.numel() == 0) return;

  std::vector<const float*> pointers;
  std::vector<size_t> starts;  // of each segment's A in `pointers`; its B follows
  int64_t work = 0, most = 0;
  for (const Segment& segment : plan.segments) {
    const int64_t r = ranks[segment.slot];
    work += segment.count * r * (x.size(1) + y.size(1));
    most = std::max(most, segment.count * r);
    const bool known = !starts.empty() && (&segment)[-1].slot == segment.slot;
    starts.push_back(known ? starts.back() : pointers.size());
    if (known) continue;
    collect(pointers, arena_A, index_A, segment.slot, r, "index_A");
    collect(pointers, arena_B, index_B, segment.slot, r, "index_B");
  }
  const Scalar scalar = scalar_of(x, "x");
  const int64_t tasks = int64_t(plan.segments.size());
  torch::stable::parallel_for(0, tasks, grain_of(work / tasks), [&](int64_t begin, int64_t end) {
    Scratch h(most);
    for (int64_t task = begin; task < end; ++task) {
      const Segment& segment = plan.segments[task];
      const int64_t r = ranks[segment.slot];
      const float* const* a = pointers.data() + starts[task];
      const Shards A{a, r, per_row, arena_A.size(1)}, B{a + r * per_row, r, per_row, arena_B.size(1)};
      const float scale = data_of<float>(scaling)[segment.slot];
      lora_loops().project(scalar, segment.of(x), A, segment.count, scale, h.data());
      lora_loops().expand(scalar, h.data(), B, segment.count, segment.into(y));
    }
  });
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("low_rank_many_", TORCH_BOX(&fastpeft::low_rank_many)); }
