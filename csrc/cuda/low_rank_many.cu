// The operator fastpeft::low_rank_many_ on CUDA tensors. Schema and fake: fastpeft/ops/low_rank_many.py; maths:
// low_rank_many.cuh.
#include "cuda/low_rank_many.cuh"
#include "cuda/many.h"

namespace fastpeft::many {
namespace {

constexpr char kOp[] = "low_rank_many";

Shards shards_of(const Tensor& arena, const Tensor& index, int64_t features, const char* name, const char* index_name,
                 const Tensor& y) {
  check_table(arena, kOp, name, arena.scalar_type(), 2, y, "y");
  check_table(index, kOp, index_name, ScalarType::Int, 3, y, "y");
  const int64_t width = arena.size(1), per_row = index.size(2);
  STD_TORCH_CHECK(width * per_row == features, "low_rank_many: ", name, " must have rows of ", features,
                  " features divided by ", per_row, ", got ", width);
  STD_TORCH_CHECK(index.size(0) * index.size(1) <= INT32_MAX, "low_rank_many: ", index_name,
                  " must have fewer than 2^31 rows");
  return {
      .shards = arena.const_data_ptr(),
      .index = numbers_of(index),
      .count = static_cast<int>(arena.size(0)),
      .width = static_cast<int>(width),
      .per_row = static_cast<int>(per_row),
      .packed = shards_are_packed(arena.const_data_ptr(), width, static_cast<int>(arena.element_size())),
  };
}

// Checks what a shape can tell; numbers that lead outside of the tensors are nobody's or the last one's.
void low_rank_many(Tensor y, const Tensor& x, const Tensor& arena_A, const Tensor& index_A, const Tensor& arena_B,
                   const Tensor& index_B, const Tensor& rank, const Tensor& scaling, const Tensor& rows,
                   const Tensor& slots) {
  check_rows(y, kOp, "y");
  check_rows(x, kOp, "x");
  check_device(x, kOp, "x", y, "y");
  const ScalarType type = y.scalar_type(), shard_type = arena_A.scalar_type();
  const Element element = element_of(y, kOp, "y"), shard_element = element_of(arena_A, kOp, "arena_A");
  STD_TORCH_CHECK(x.scalar_type() == type && x.size(0) == y.size(0), "low_rank_many: x must be ", type, " and have ",
                  y.size(0), " rows as y has, got ", x.scalar_type(), " and ", x.size(0), " rows");
  STD_TORCH_CHECK(arena_B.scalar_type() == shard_type, "low_rank_many: arena_B must have the dtype of arena_A, ",
                  shard_type, ", got ", arena_B.scalar_type());
  const Shards a = shards_of(arena_A, index_A, x.size(1), "arena_A", "index_A", y);
  const Shards b = shards_of(arena_B, index_B, y.size(1), "arena_B", "index_B", y);
  const int64_t tokens = y.size(0), count = index_A.size(0), r_max = index_A.size(1);
  STD_TORCH_CHECK(index_B.size(0) == count && index_B.size(1) == r_max, "low_rank_many: index_B must have ", count,
                  " slots of ", r_max, " rows as index_A has, got ", index_B.size(0), " of ", index_B.size(1));
  check_table(rank, kOp, "rank", ScalarType::Int, 1, y, "y");
  check_table(scaling, kOp, "scaling", ScalarType::Float, 1, y, "y");
  check_plan(rows, slots, kOp, y, "y");
  STD_TORCH_CHECK(rank.size(0) == count && scaling.size(0) == count, "low_rank_many: rank and scaling must have ",
                  count, " entries, one for each slot, got ", rank.size(0), " and ", scaling.size(0));
  if (y.numel() == 0 || x.numel() == 0 || arena_A.numel() == 0 || arena_B.numel() == 0 || count * r_max == 0) return;

  const int device = y.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Plan plan = plan_low_rank_many(tokens, x.size(1), y.size(1), bytes_of(shard_element),
                                       device_attribute(cudaDevAttrMultiProcessorCount, device));
  STD_TORCH_CHECK(plan.error == nullptr, "low_rank_many: y of shape (", tokens, ", ", y.size(1), "): ", plan.error);
  const Arguments args{
      .element = element,
      .x = x.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .x_row_stride = x.stride(0),
      .y_row_stride = y.stride(0),
      .in = static_cast<int>(x.size(1)),
      .out = static_cast<int>(y.size(1)),
      .a = a,
      .b = b,
      .rank = numbers_of(rank),
      .scaling = static_cast<const float*>(scaling.const_data_ptr()),
      .row_numbers = numbers_of(rows),
      .slot_numbers = numbers_of(slots),
      .tokens = static_cast<int>(tokens),
      .slots = static_cast<int>(count),
      .r_max = static_cast<int>(r_max),
      .ranges = plan.ranges,
      .outputs = plan.outputs,
      .front_floats = plan.front_floats,
  };
  with_type(shard_element,
            [&]<typename S>() { launch_kernel(low_rank_many_kernel<S>, plan, current_stream(device), args); });
}

}  // namespace
}  // namespace fastpeft::many

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) { m.impl("low_rank_many_", TORCH_BOX(&fastpeft::many::low_rank_many)); }
