// The operators fastpeft::boft_rotate_many and boft_scale_many_ on CPU tensors: BOFT, every row of x with an adapter of
// its own. Schemas and fakes: fastpeft/ops/boft_many.py.
//
// Floor, for 32 rows with 32 adapters: 4 m b in bytes of blocks for each, read once, 2 MiB at (b, m) = (8, 2) and 1024
// features; one multiply-add for each number. A row of a block is a vector (cpu/boft_rows.h), for every number of rows,
// so that their sums have one order.
#include <string.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/boft_loops.h"
#include "cpu/many.h"
#include "cpu/scratch.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const ButterflyLoops& loops() { return FASTPEFT_ACTIVE(butterfly); }

// The segments of slots that have a row of the arena, and those rows.
struct ArenaRows {
  BatchPlan plan;
  std::vector<const float*> data;  // of each segment

  ArenaRows(const Tensor& arena, const Tensor& table, const char* name, const Tensor& rows, const Tensor& slots,
            int64_t tokens)
      : plan(rows, slots, tokens, table.size(0), [&](int64_t slot) { return data_of<int32_t>(table)[slot] != -1; }) {
    for (const Segment& segment : plan.segments) {
      data.push_back(arena_row(arena, data_of<int32_t>(table)[segment.slot], name));
    }
  }
};

Tensor boft_rotate_many(const Tensor& x, const Tensor& arena_blocks, const Tensor& row_blocks, int64_t factors,
                        int64_t block, const Tensor& rows, const Tensor& slots) {
  check_activation(x, "x", -1);
  const int64_t tokens = x.size(0), d = x.size(1);
  STD_TORCH_CHECK(factors > 0 && block > 0 && d % block == 0 &&
                      (factors == 1 || (block % 2 == 0 && factors < 32 && d % (block << (factors - 1)) == 0)),
                  factors, " factors of block size ", block, " do not fit ", d, " features");
  check_table(arena_blocks, "arena_blocks", ScalarType::Float, {-1, factors * d * block});
  check_table(row_blocks, "row_blocks", ScalarType::Int, {-1});
  const ArenaRows blocks(arena_blocks, row_blocks, "row_blocks", rows, slots, tokens);
  const Tensor z = allocate(x, {tokens, d});
  for (int64_t t = 0; t < tokens; ++t) {
    if (!blocks.plan.named[t] && d > 0) memcpy(rows_into(z, t).data, rows_from(x, t).data, d * x.element_size());
  }
  if (blocks.data.empty() || d == 0) return z;

  const ButterflyShape shape{d, block, factors, scalar_of(x, "x")};
  const int64_t tasks = int64_t(blocks.data.size());
  torch::stable::parallel_for(0, tasks, grain_of(d * block * factors), [&](int64_t begin, int64_t end) {
    Scratch scratch(butterfly_scratch_floats(shape, {0, d}, false));
    for (int64_t task = begin; task < end; ++task) {
      const Segment& segment = blocks.plan.segments[task];
      loops().fwd_by_rows(shape, {0, d}, segment.count, segment.of(x), blocks.data[task], segment.into(z),
                          scratch.data());
    }
  });
  return z;
}

void boft_scale_many(Tensor y, const std::optional<Tensor>& bias, const Tensor& arena_scale, const Tensor& row_scale,
                     const Tensor& rows, const Tensor& slots) {
  check_activation(y, "y", -1);
  const int64_t tokens = y.size(0), features = y.size(1);
  if (bias) check_table(*bias, "bias", y.scalar_type(), {features});
  check_table(arena_scale, "arena_scale", ScalarType::Float, {-1, features});
  check_table(row_scale, "row_scale", ScalarType::Int, {-1});
  const ArenaRows scales(arena_scale, row_scale, "row_scale", rows, slots, tokens);
  if (scales.data.empty() || features == 0) return;
  const Scalar scalar = scalar_of(y, "y");
  const void* bias_data = bias ? bias->const_data_ptr() : nullptr;
  const int64_t tasks = int64_t(scales.data.size());
  torch::stable::parallel_for(0, tasks, grain_of(features), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Segment& segment = scales.plan.segments[task];
      loops().scale_fwd(scalar, segment.count, features, segment.of(y), bias_data, scales.data[task], segment.into(y));
    }
  });
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("boft_rotate_many", TORCH_BOX(&fastpeft::boft_rotate_many));
  m.impl("boft_scale_many_", TORCH_BOX(&fastpeft::boft_scale_many));
}
