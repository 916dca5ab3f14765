// The operators fastpeft::boft_rotate_many and boft_scale_many_ on CUDA tensors. Schemas and fakes:
// fastpeft/ops/boft_many.py; maths: boft_many.cuh and boft_scale_many.cuh.
#include <optional>

#include "cuda/boft_many.cuh"
#include "cuda/boft_scale_many.cuh"
#include "cuda/many.h"

namespace fastpeft::many {
namespace {

// An arena of rows of `width` float32, and the row of each slot.
void check_arena(const Tensor& arena, const Tensor& table, const char* op, const char* name, const char* table_name,
                 int64_t width, const Tensor& like, const char* like_name) {
  check_table(arena, op, name, ScalarType::Float, 2, like, like_name);
  check_table(table, op, table_name, ScalarType::Int, 1, like, like_name);
  STD_TORCH_CHECK(arena.size(1) == width, op, ": ", name, " must have rows of ", width, " numbers, got ",
                  arena.size(1));
}

// Checks what a shape can tell; numbers that lead outside of the tensors are nobody's.
Tensor boft_rotate_many(const Tensor& x, const Tensor& arena_reflectors, const Tensor& row_reflectors, int64_t factors,
                        int64_t b, const Tensor& rows, const Tensor& slots) {
  constexpr char kOp[] = "boft_rotate_many";
  check_rows(x, kOp, "x");
  const Element element = element_of(x, kOp, "x");
  const int64_t tokens = x.size(0), features = x.size(1);
  STD_TORCH_CHECK(factors >= 1 && b >= 1 && features % b == 0 &&
                      (factors == 1 || (b % 2 == 0 && factors < 32 && features % (b << (factors - 1)) == 0)),
                  kOp, ": ", factors, " factors of block size ", b, " do not fit ", features, " features");
  check_arena(arena_reflectors, row_reflectors, kOp, "arena_reflectors", "row_reflectors",
              factors * (features / b) * reflector_numbers(b), x, "x");
  check_plan(rows, slots, kOp, x, "x");
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor z = torch::stable::new_empty(x, {tokens, features});
  if (z.numel() == 0) return z;

  const int max_shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const RotatePlan plan = plan_rotate_many(tokens, features, b, factors, max_shared_bytes,
                                           device_attribute(cudaDevAttrMultiProcessorCount, device));
  STD_TORCH_CHECK(plan.error == nullptr, kOp, ": x of shape (", tokens, ", ", features, ") with ", factors,
                  " factors of block size ", b, ": ", plan.error, " (", max_shared_bytes, " bytes on this GPU)");
  const RotateArguments args{
      .element = element,
      .x = x.const_data_ptr(),
      .x_row_stride = x.stride(0),
      .z = z.mutable_data_ptr(),
      .arena = static_cast<const float*>(arena_reflectors.const_data_ptr()),
      .arena_rows = arena_reflectors.size(0),
      .row_reflectors = numbers_of(row_reflectors),
      .row_numbers = numbers_of(rows),
      .slot_numbers = numbers_of(slots),
      .tokens = static_cast<int>(tokens),
      .slots = static_cast<int>(row_reflectors.size(0)),
      .features = static_cast<int>(features),
      .factors = static_cast<int>(factors),
      .block_size = static_cast<int>(b),
      .strip = static_cast<int>(strip_features(features, b, factors)),
      .tile = plan.tile,
  };
  with_boft_kernel_size(boft_kernel_size(b), [&]<int B>() {
    launch_kernel(boft_rotate_many_kernel<B>, plan, current_stream(device), args);
  });
  return z;
}

void boft_scale_many(Tensor y, const std::optional<Tensor>& bias, const Tensor& arena_scale, const Tensor& row_scale,
                     const Tensor& rows, const Tensor& slots) {
  constexpr char kOp[] = "boft_scale_many";
  check_rows(y, kOp, "y");
  const Element element = element_of(y, kOp, "y");
  const int64_t tokens = y.size(0), features = y.size(1);
  if (bias) {
    check_table(*bias, kOp, "bias", y.scalar_type(), 1, y, "y");
    STD_TORCH_CHECK(bias->size(0) == features, kOp, ": bias must have ", features, " features as y has, got ",
                    bias->size(0));
  }
  check_arena(arena_scale, row_scale, kOp, "arena_scale", "row_scale", features, y, "y");
  check_plan(rows, slots, kOp, y, "y");
  if (y.numel() == 0 || arena_scale.numel() == 0 || row_scale.numel() == 0) return;

  const int device = y.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* const data = y.mutable_data_ptr();
  const void* const bias_data = bias ? bias->const_data_ptr() : nullptr;
  const float* const arena = static_cast<const float*>(arena_scale.const_data_ptr());
  const bool packed = scale_many_is_packed(features, bytes_of(element), data, y.stride(0), bias_data, arena);
  const ScaleManyPlan plan = plan_scale_many(tokens, features, bytes_of(element),
                                             device_attribute(cudaDevAttrMultiProcessorCount, device), packed);
  STD_TORCH_CHECK(plan.error == nullptr, kOp, ": y of shape (", tokens, ", ", features, "): ", plan.error);
  const ScaleManyArguments args{
      .y = data,
      .y_row_stride = y.stride(0),
      .bias = bias_data,
      .arena = arena,
      .arena_rows = arena_scale.size(0),
      .row_scale = numbers_of(row_scale),
      .row_numbers = numbers_of(rows),
      .slot_numbers = numbers_of(slots),
      .tokens = static_cast<int>(tokens),
      .slots = static_cast<int>(row_scale.size(0)),
      .features = static_cast<int>(features),
      .positions = plan.positions,
      .across = plan.across,
      .packed = packed,
  };
  with_type(element,
            [&]<typename T>() { launch_kernel(boft_scale_many_kernel<T>, plan, current_stream(device), args); });
}

}  // namespace
}  // namespace fastpeft::many

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) {
  m.impl("boft_rotate_many", TORCH_BOX(&fastpeft::many::boft_rotate_many));
  m.impl("boft_scale_many_", TORCH_BOX(&fastpeft::many::boft_scale_many));
}
