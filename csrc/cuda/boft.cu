// The operators fastpeft::butterfly_fwd, butterfly_bwd, boft_fwd and boft_bwd on CUDA tensors. Schemas and fakes:
// fastpeft/ops/boft.py; maths: boft.cuh and boft_scale.cuh.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <optional>
#include <tuple>

#include "cuda/boft.cuh"
#include "cuda/boft_bwd.cuh"
#include "cuda/boft_scale.cuh"
#include "cuda/tensor.h"

namespace fastpeft {
namespace {

// x (tokens, features), and blocks (factors, features / b, b, b).
void check_arguments(const Tensor& x, const Tensor& blocks) {
  check_device(blocks, "butterfly", "blocks", x, "x");
  STD_TORCH_CHECK(blocks.scalar_type() == ScalarType::Float, "butterfly: blocks must be float32, got ",
                  blocks.scalar_type());
  STD_TORCH_CHECK(blocks.dim() == 4, "butterfly: blocks must have shape (factors, features / b, b, b), got ",
                  blocks.dim(), " dimensions");
  const int64_t factors = blocks.size(0), b = blocks.size(3), features = x.size(1);
  STD_TORCH_CHECK(factors >= 1 && b >= 1 && blocks.size(2) == b && blocks.size(1) * b == features,
                  "butterfly: blocks must have shape (factors, features / b, b, b) with ", features,
                  " features, as x has, got (", factors, ", ", blocks.size(1), ", ", blocks.size(2), ", ", b, ")");
  STD_TORCH_CHECK(factors == 1 || (b % 2 == 0 && factors < 32 && features % (b << (factors - 1)) == 0),
                  "butterfly: ", factors, " factors want an even block size b and a multiple of b * 2^", factors - 1,
                  " features, got b = ", b, " and ", features, " features");
}

void check_same_rows(const Tensor& rows, const char* op, const char* name, const Tensor& x, int64_t features) {
  check_device(rows, op, name, x, "x");
  STD_TORCH_CHECK(rows.size(0) == x.size(0) && rows.size(1) == features, op, ": ", name, " must have shape (",
                  x.size(0), ", ", features, ") as rows, got (", rows.size(0), ", ", rows.size(1), ")");
  STD_TORCH_CHECK(rows.scalar_type() == x.scalar_type(), op, ": ", name, " must have x's dtype, ", x.scalar_type(),
                  ", got ", rows.scalar_type());
}

int shared_bytes_of(int device) { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

// y = x R.
Tensor butterfly_fwd(const Tensor& x_any, const Tensor& blocks_any) {
  const Tensor x = as_rows(x_any, "butterfly", "x");
  const Element element = element_of(x, "butterfly", "x");
  check_arguments(x, blocks_any);
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor y = allocate_like(x_any);
  if (y.numel() == 0) return y;

  const Tensor blocks = torch::stable::contiguous(blocks_any);
  const int64_t tokens = x.size(0), features = x.size(1), factors = blocks.size(0), b = blocks.size(3);
  const float* const q = static_cast<const float*>(blocks.const_data_ptr());
  const int kernel_size = butterfly_kernel_size(b, q), max_shared_bytes = shared_bytes_of(device);
  const ButterflyPlan plan =
      plan_butterfly(tokens, features, b, factors, bytes_of(element), max_shared_bytes, kernel_size);
  STD_TORCH_CHECK(plan.error == nullptr, "butterfly: x of shape (", tokens, ", ", features, ") with ", factors,
                  " factors of block size ", b, ": ", plan.error, " (", max_shared_bytes, " bytes on this GPU)");
  with_type(element, [&]<typename T>() {
    with_boft_kernel_size(kernel_size, [&]<int B>() {
      launch_kernel(butterfly_fwd_kernel<T, B>, plan, current_stream(device), static_cast<const T*>(x.const_data_ptr()),
                    q, static_cast<T*>(y.mutable_data_ptr()), tokens, features, x.stride(0), static_cast<int>(factors),
                    static_cast<int>(b), plan.tile);
    });
  });
  return y;
}

// sums = parts[0] + parts[1] + ...
void add_parts(const Tensor& parts, const Tensor& sums, int groups, cudaStream_t stream) {
  const int64_t size = sums.numel();
  butterfly_add_parts_kernel<<<add_parts_grid(size), kAddPartsThreads, 0, stream>>>(
      static_cast<const float*>(parts.const_data_ptr()), static_cast<float*>(sums.mutable_data_ptr()), size, groups,
      parts_are_packed(size));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// dx = grad R^T and the gradient of the blocks. One that is not asked for comes back with no rows.
std::tuple<Tensor, Tensor> butterfly_bwd(const Tensor& grad_any, const Tensor& x_any, const Tensor& blocks_any,
                                         bool need_x, bool need_blocks) {
  const Tensor x = as_rows(x_any, "butterfly", "x"), grad = as_rows(grad_any, "butterfly", "grad");
  const Element element = element_of(x, "butterfly", "x");
  check_arguments(x, blocks_any);
  check_same_rows(grad, "butterfly", "grad", x, x.size(1));
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor blocks = torch::stable::contiguous(blocks_any);
  const int64_t factors = blocks.size(0), b = blocks.size(3), tokens = x.size(0), features = x.size(1);
  const Tensor dx = need_x ? allocate_like(x_any) : torch::stable::new_empty(x, {0, features});
  const std::vector<int64_t> blocks_sizes{need_blocks ? factors : 0, blocks.size(1), b, b};
  if (tokens == 0 || features == 0) return {dx, torch::stable::new_zeros(blocks, blocks_sizes)};
  const Tensor dblocks = torch::stable::new_empty(blocks, blocks_sizes);
  if (!need_x && !need_blocks) return {dx, dblocks};

  const float* const q = static_cast<const float*>(blocks.const_data_ptr());
  const int kernel_size = butterfly_kernel_size(b, q), max_shared_bytes = shared_bytes_of(device);
  const ButterflyBwdPlan plan =
      plan_butterfly_bwd(tokens, features, b, factors, bytes_of(element), max_shared_bytes,
                         device_attribute(cudaDevAttrMultiProcessorCount, device), kernel_size, need_blocks);
  STD_TORCH_CHECK(plan.error == nullptr, "butterfly: the gradient of x of shape (", tokens, ", ", features, ") with ",
                  factors, " factors of block size ", b, ": ", plan.error, " (", max_shared_bytes,
                  " bytes on this GPU)");
  // A single group writes its part where the sums belong.
  const bool in_parts = need_blocks && plan.groups > 1;
  const Tensor parts =
      in_parts ? torch::stable::new_empty(blocks, {plan.groups, factors, blocks.size(1), b, b}) : dblocks;
  const cudaStream_t stream = current_stream(device);
  with_boft_kernel_size(kernel_size, [&]<int B>() {
    launch_kernel(butterfly_bwd_kernel<B>, plan, stream, element, grad.const_data_ptr(), x.const_data_ptr(), q,
                  need_x ? dx.mutable_data_ptr() : nullptr,
                  need_blocks ? static_cast<float*>(parts.mutable_data_ptr()) : nullptr, tokens, features,
                  grad.stride(0), x.stride(0), static_cast<int>(factors), static_cast<int>(b), plan.tile, plan.chunk,
                  plan.sums_in_shared);
  });
  if (in_parts) add_parts(parts, dblocks, plan.groups, stream);
  return {dx, dblocks};
}

// x (tokens, in), weight (out, in), bias (out,), scale (out, 1).
void check_layer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& scale) {
  check_device(weight, "boft", "weight", x, "x");
  check_device(scale, "boft", "scale", x, "x");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1) && weight.scalar_type() == x.scalar_type(),
                  "boft: weight must have shape (out, ", x.size(1), ") and the dtype of x, ", x.scalar_type());
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(0) == weight.size(0) && scale.size(1) == 1 &&
                      scale.scalar_type() == ScalarType::Float,
                  "boft: scale must be float32 of shape (", weight.size(0), ", 1)");
  if (!bias) return;
  check_device(*bias, "boft", "bias", x, "x");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == x.scalar_type(),
                  "boft: bias must have shape (", weight.size(0), ",) and the dtype of x, ", x.scalar_type());
}

// As the kernels read them.
struct Scale {
  Tensor scale;                // [out], contiguous
  std::optional<Tensor> bias;  // likewise

  Scale(const Tensor& scale_any, const std::optional<Tensor>& bias_any) : scale(torch::stable::contiguous(scale_any)) {
    if (bias_any) bias = torch::stable::contiguous(*bias_any);
  }
  const float* s() const { return static_cast<const float*>(scale.const_data_ptr()); }
  const void* b() const { return bias ? bias->const_data_ptr() : nullptr; }
};

ScalePlan plan_for(const Tensor& rows, bool packed, bool forward) {
  const ScalePlan plan =
      plan_scale(rows.size(0), rows.size(1), static_cast<int>(rows.element_size()),
                 device_attribute(cudaDevAttrMultiProcessorCount, rows.get_device_index()), packed, forward);
  STD_TORCH_CHECK(plan.error == nullptr, "boft: the scale of rows of shape (", rows.size(0), ", ", rows.size(1),
                  "): ", plan.error);
  return plan;
}

// y = (y0 - b) s + b with y0 = x R W^T + b, by the library's product. y0 is returned where it is kept, else without
// rows.
std::tuple<Tensor, Tensor> boft_fwd(const Tensor& x_any, const Tensor& weight, const std::optional<Tensor>& bias,
                                    const Tensor& blocks, const Tensor& scale_any, bool keep) {
  const Tensor x = as_rows(x_any, "boft", "x");
  const Element element = element_of(x, "boft", "x");
  check_layer(x, weight, bias, scale_any);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor rotated = butterfly_fwd(x, blocks);
  const int64_t tokens = x.size(0), features = weight.size(0);
  const Tensor y = allocate_like(x_any, features);
  const Tensor y0 = torch::stable::new_empty(x, {keep ? tokens : 0, features});
  if (y.numel() == 0) return {y, y0};

  const Tensor product = keep ? y0 : torch::stable::view(y, {tokens, features});
  const Tensor by = torch::stable::transpose(weight, 0, 1);
  STABLE_TORCH_ERROR_CODE_CHECK(
      bias ? aoti_torch_cuda_addmm_out(product.get(), bias->get(), rotated.get(), by.get(), 1.0, 1.0)
           : aoti_torch_cuda_mm_out(product.get(), rotated.get(), by.get()));
  const Scale of(scale_any, bias);
  const void* from = product.const_data_ptr();
  void* to = y.mutable_data_ptr();
  const bool packed = scale_is_packed(features, bytes_of(element), from, to, of.s(), of.b());
  const ScalePlan plan = plan_for(product, packed, true);
  with_type(element, [&]<typename T>() {
    launch_kernel(boft_scale_fwd_kernel<T>, plan, current_stream(x.get_device_index()), static_cast<const T*>(from),
                  static_cast<const T*>(of.b()), of.s(), static_cast<T*>(to), tokens, features, plan.across, plan.chunk,
                  packed);
  });
  return {y, y0};
}

// g s where it is needed, and the gradient of the scale where y0 is given; what is not has no rows. All are contiguous.
std::tuple<Tensor, Tensor> scale_bwd(Element element, const Tensor& grad, const std::optional<Tensor>& y0,
                                     const Scale& of, bool need_scaled) {
  const int64_t tokens = grad.size(0), features = grad.size(1);
  const Tensor scaled = torch::stable::new_empty(grad, {need_scaled ? tokens : 0, features});
  const std::vector<int64_t> scale_sizes{y0 ? features : 0, 1};
  if (tokens == 0 || features == 0 || (!y0 && !need_scaled)) {
    return {scaled, torch::stable::new_zeros(of.scale, scale_sizes)};
  }
  const Tensor dscale = torch::stable::new_empty(of.scale, scale_sizes);
  const void* const from = grad.const_data_ptr();
  const void* const before = y0 ? y0->const_data_ptr() : nullptr;
  void* const to = need_scaled ? scaled.mutable_data_ptr() : nullptr;
  const bool packed = scale_is_packed(features, bytes_of(element), from, before, to, of.s(), of.b());
  const ScalePlan plan = plan_for(grad, packed, false);
  // A single group writes its part where the sums belong.
  const bool in_parts = y0 && plan.groups > 1;
  const Tensor parts = in_parts ? torch::stable::new_empty(of.scale, {plan.groups, features}) : dscale;
  const cudaStream_t stream = current_stream(grad.get_device_index());
  with_type(element, [&]<typename T>() {
    launch_kernel(boft_scale_bwd_kernel<T>, plan, stream, static_cast<const T*>(from), static_cast<const T*>(before),
                  static_cast<const T*>(of.b()), of.s(), static_cast<T*>(to),
                  y0 ? static_cast<float*>(parts.mutable_data_ptr()) : nullptr, tokens, features, plan.across,
                  plan.chunk, packed);
  });
  if (in_parts) add_parts(parts, dscale, plan.groups, stream);
  return {scaled, dscale};
}

// Gradients of x, blocks and scale; the last if y0 is given. One that is not asked for comes back with no rows.
std::tuple<Tensor, Tensor, Tensor> boft_bwd(const Tensor& grad_any, const Tensor& x_any, const Tensor& weight,
                                            const std::optional<Tensor>& bias, const Tensor& blocks,
                                            const Tensor& scale_any, const std::optional<Tensor>& y0_any, bool need_x,
                                            bool need_blocks) {
  const Tensor x = as_rows(x_any, "boft", "x");
  const Element element = element_of(x, "boft", "x");
  check_layer(x, weight, bias, scale_any);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor grad = torch::stable::contiguous(as_rows(grad_any, "boft", "grad"));
  check_same_rows(grad, "boft", "grad", x, weight.size(0));
  std::optional<Tensor> y0;
  if (y0_any) {
    y0 = torch::stable::contiguous(as_rows(*y0_any, "boft", "y0"));
    check_same_rows(*y0, "boft", "y0", x, weight.size(0));
  }
  const bool rotates = need_x || need_blocks;
  const auto [scaled, dscale] = scale_bwd(element, grad, y0, Scale(scale_any, bias), rotates);
  if (!rotates) {
    return {torch::stable::new_empty(x, {0, x.size(1)}),
            torch::stable::new_empty(blocks, {0, blocks.size(1), blocks.size(2), blocks.size(3)}), dscale};
  }
  const Tensor rotated = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(rotated.get(), scaled.get(), weight.get()));
  const auto [dx, dblocks] = butterfly_bwd(rotated, x_any, blocks, need_x, need_blocks);
  return {dx, dblocks, dscale};
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) {
  m.impl("butterfly_fwd", TORCH_BOX(&fastpeft::butterfly_fwd));
  m.impl("butterfly_bwd", TORCH_BOX(&fastpeft::butterfly_bwd));
  m.impl("boft_fwd", TORCH_BOX(&fastpeft::boft_fwd));
  m.impl("boft_bwd", TORCH_BOX(&fastpeft::boft_bwd));
}
