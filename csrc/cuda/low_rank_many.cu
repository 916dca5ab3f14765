// The operator fastpeft::low_rank_many_ on CUDA tensors. Schema and fake: fastpeft/ops/low_rank_many.py; maths:
// low_rank_many.cuh.
#include <optional>

#include "cuda/low_rank_many.cuh"
#include "cuda/tensor.h"

namespace fastpeft::many {
namespace {

constexpr char kOp[] = "low_rank_many";

// x or y: rows at any distance, elements side by side. Nothing is copied: this runs without allocating.
void check_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, "low_rank_many: ", name, " must have shape (tokens, features), got ", tensor.dim(),
                  " dimensions");
  STD_TORCH_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1, "low_rank_many: ", name,
                  " must have its features side by side, got a stride of ", tensor.stride(1));
  STD_TORCH_CHECK(tensor.size(1) <= INT32_MAX, "low_rank_many: ", name, " has more than 2^31 features, ",
                  tensor.size(1));
}

void check_table(const Tensor& tensor, const char* name, ScalarType type, int64_t dims, const Tensor& y) {
  check_device(tensor, kOp, name, y, "y");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "low_rank_many: ", name, " must be ", type, ", got ",
                  tensor.scalar_type());
  STD_TORCH_CHECK(tensor.dim() == dims, "low_rank_many: ", name, " must have ", dims, " dimensions, got ",
                  tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), "low_rank_many: ", name, " must be contiguous, it is not");
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(0) <= INT32_MAX, "low_rank_many: ", name,
                  " has more than 2^31 rows, ", tensor.size(0));
}

Shards shards_of(const Tensor& shards, const std::optional<Tensor>& index, int64_t features, const char* name,
                 const char* index_name, const Tensor& y) {
  check_table(shards, name, shards.scalar_type(), 2, y);
  if (index) check_table(*index, index_name, ScalarType::Int, 2, y);
  const int64_t width = shards.size(1), per_row = index ? index->size(1) : 1;
  STD_TORCH_CHECK(width * per_row == features, "low_rank_many: ", name, " must have shards of ", features,
                  " features divided by the ", per_row, " of a row, got ", width);
  return {
      .shards = shards.const_data_ptr(),
      .index = index ? static_cast<const int*>(index->const_data_ptr()) : nullptr,
      .count = static_cast<int>(shards.size(0)),
      .width = static_cast<int>(width),
      .per_row = static_cast<int>(per_row),
      .packed = shards_are_packed(shards.const_data_ptr(), width, static_cast<int>(shards.element_size())),
  };
}

// Checks what a shape can tell; what is in the tables was checked when they were made.
void low_rank_many(Tensor y, const Tensor& x, const Tensor& shards_A, const std::optional<Tensor>& index_A,
                   const Tensor& shards_B, const std::optional<Tensor>& index_B, const Tensor& first,
                   const Tensor& scaling, const Tensor& adapter) {
  STD_TORCH_CHECK(y.is_cuda(), "low_rank_many: y must be on a GPU, it is not");
  check_rows(y, "y");
  check_rows(x, "x");
  check_device(x, kOp, "x", y, "y");
  const ScalarType type = y.scalar_type(), shard_type = shards_A.scalar_type();
  const Element element = element_of(y, kOp, "y"), shard_element = element_of(shards_A, kOp, "shards_A");
  STD_TORCH_CHECK(x.scalar_type() == type && x.size(0) == y.size(0), "low_rank_many: x must be ", type, " and have ",
                  y.size(0), " rows as y has, got ", x.scalar_type(), " and ", x.size(0), " rows");
  STD_TORCH_CHECK(shards_B.scalar_type() == shard_type, "low_rank_many: shards_B must have the dtype of shards_A, ",
                  shard_type, ", got ", shards_B.scalar_type());
  STD_TORCH_CHECK(index_A.has_value() == index_B.has_value(),
                  "low_rank_many: index_A and index_B must both be given or neither");
  const Shards a = shards_of(shards_A, index_A, x.size(1), "shards_A", "index_A", y);
  const Shards b = shards_of(shards_B, index_B, y.size(1), "shards_B", "index_B", y);
  const int64_t rows = index_A ? index_A->size(0) : shards_A.size(0);
  const int64_t rows_of_B = index_B ? index_B->size(0) : shards_B.size(0);
  STD_TORCH_CHECK(rows == rows_of_B, "low_rank_many: B must have as many rows as A, ", rows, ", got ", rows_of_B);
  check_table(first, "first", ScalarType::Int, 1, y);
  check_table(scaling, "scaling", ScalarType::Float, 1, y);
  check_table(adapter, "adapter", ScalarType::Int, 1, y);
  const int64_t tokens = y.size(0), adapters = scaling.size(0);
  STD_TORCH_CHECK(first.size(0) == adapters + 1, "low_rank_many: first must have ", adapters + 1,
                  " entries, one more than scaling, got ", first.size(0));
  STD_TORCH_CHECK(adapter.size(0) == tokens, "low_rank_many: adapter must have an entry for each of the ", tokens,
                  " rows of y, got ", adapter.size(0));
  if (y.numel() == 0 || x.numel() == 0 || shards_A.numel() == 0 || shards_B.numel() == 0 || adapters == 0) return;

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
      .first = static_cast<const int*>(first.const_data_ptr()),
      .scaling = static_cast<const float*>(scaling.const_data_ptr()),
      .adapter = static_cast<const int*>(adapter.const_data_ptr()),
      .adapters = static_cast<int>(adapters),
      .rows = static_cast<int>(rows),
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
