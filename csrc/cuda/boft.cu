// The operators fastpeft::butterfly_fwd and butterfly_bwd on CUDA tensors. Schemas and fakes: fastpeft/ops/boft.py;
// maths: boft.cuh.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>
#include <vector>

#include "cuda/boft.cuh"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kDefaultSharedBytes = 48 << 10;  // a kernel has to ask for more than this

struct ButterflyArguments {
  const void* x;        // [tokens, features], rows x_row_stride apart
  const float* blocks;  // [factors, features / b, b, b]
  void* y;              // [tokens, features]
  int64_t tokens, features, x_row_stride;
  int b, factors;
};

template <typename T>
void launch_butterfly_fwd(const ButterflyArguments& args, int64_t max_shared_bytes, cudaStream_t stream) {
  const int kernel_size = butterfly_kernel_size(args.b, args.blocks);
  const ButterflyPlan plan =
      plan_butterfly(args.tokens, args.features, args.b, args.factors, sizeof(T), max_shared_bytes, kernel_size);
  STD_TORCH_CHECK(plan.error == nullptr, "butterfly: x of shape (", args.tokens, ", ", args.features, ") with ",
                  args.factors, " factors of block size ", args.b, ": ", plan.error, " (", max_shared_bytes,
                  " bytes on this GPU)");
  with_butterfly_kernel_size(kernel_size, [&]<int B>() {
    const auto kernel = butterfly_fwd_kernel<T, B>;
    if (plan.shared_bytes > kDefaultSharedBytes) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(plan.shared_bytes)));
    }
    kernel<<<plan.grid, plan.block, static_cast<size_t>(plan.shared_bytes), stream>>>(
        static_cast<const T*>(args.x), args.blocks, static_cast<T*>(args.y), args.tokens, args.features,
        args.x_row_stride, args.factors, args.b, plan.tile);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void launch_butterfly_bwd(ButterflyElement element, const ButterflyBwdPlan& plan, int kernel_size,
                          const ButterflyArguments& args, const void* grad, int64_t grad_row_stride, float* parts,
                          cudaStream_t stream) {
  with_butterfly_kernel_size(kernel_size, [&]<int B>() {
    const auto kernel = butterfly_bwd_kernel<B>;
    if (plan.shared_bytes > kDefaultSharedBytes) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(plan.shared_bytes)));
    }
    kernel<<<plan.grid, plan.block, static_cast<size_t>(plan.shared_bytes), stream>>>(
        element, grad, args.x, args.blocks, args.y, parts, args.tokens, args.features, grad_row_stride,
        args.x_row_stride, args.factors, args.b, plan.tile, plan.chunk, plan.sums_in_shared);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void check_arguments(const Tensor& x, const Tensor& blocks) {
  STD_TORCH_CHECK(blocks.is_cuda() && blocks.get_device_index() == x.get_device_index(),
                  "butterfly: blocks must be on x's device, GPU ", x.get_device_index(), ", got ",
                  blocks.is_cuda() ? "GPU " : "device index ", blocks.get_device_index());
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "butterfly: x must be float32, bfloat16 or float16, got ", type);
  STD_TORCH_CHECK(blocks.scalar_type() == ScalarType::Float, "butterfly: blocks must be float32, got ",
                  blocks.scalar_type());
  STD_TORCH_CHECK(blocks.dim() == 4, "butterfly: blocks must have shape (factors, features / b, b, b), got ",
                  blocks.dim(), " dimensions");
  const int64_t factors = blocks.size(0), b = blocks.size(3), features = x.size(x.dim() - 1);
  STD_TORCH_CHECK(factors >= 1 && b >= 1 && blocks.size(2) == b && blocks.size(1) * b == features,
                  "butterfly: blocks must have shape (factors, features / b, b, b) with ", features,
                  " features, as x has, got (", factors, ", ", blocks.size(1), ", ", blocks.size(2), ", ", b, ")");
  STD_TORCH_CHECK(factors == 1 || (b % 2 == 0 && factors < 32 && features % (b << (factors - 1)) == 0),
                  "butterfly: ", factors, " factors want an even block size b and a multiple of b * 2^", factors - 1,
                  " features, got b = ", b, " and ", features, " features");
}

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// (..., features) as (tokens, features) with the elements of a row side by side: kernels take any distance between
// rows. A copy only where there is no such view.
Tensor as_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cuda(), "butterfly: ", name, " must be on a GPU, it is not");
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims > 0, "butterfly: ", name, " must have shape (..., features), got a scalar");
  const int64_t features = x.size(dims - 1);
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) tokens *= x.size(i);
  const Tensor rows = dims == 2 ? x : torch::stable::reshape(x, {tokens, features});
  return features == 1 || rows.stride(1) == 1 ? rows : torch::stable::contiguous(rows);
}

// A new tensor of x's shape, or of no rows.
Tensor allocate_like(const Tensor& x, bool needed) {
  if (!needed) return torch::stable::new_empty(x, {0, x.size(x.dim() - 1)});
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return torch::stable::new_empty(x, sizes);
}

Tensor butterfly_fwd(const Tensor& x_any, const Tensor& blocks_any) {
  const Tensor x = as_rows(x_any, "x");
  check_arguments(x, blocks_any);
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor y = allocate_like(x_any, true);
  if (y.numel() == 0) return y;

  const Tensor blocks = torch::stable::contiguous(blocks_any);
  const ButterflyArguments args{
      .x = x.const_data_ptr(),
      .blocks = static_cast<const float*>(blocks.const_data_ptr()),
      .y = y.mutable_data_ptr(),
      .tokens = x.size(0),
      .features = x.size(1),
      .x_row_stride = x.stride(0),
      .b = static_cast<int>(blocks.size(3)),
      .factors = static_cast<int>(blocks.size(0)),
  };
  const auto launch = x.scalar_type() == ScalarType::Float      ? launch_butterfly_fwd<float>
                      : x.scalar_type() == ScalarType::BFloat16 ? launch_butterfly_fwd<__nv_bfloat16>
                                                                : launch_butterfly_fwd<__half>;
  launch(args, device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device), current_stream(device));
  return y;
}

// One that is not asked for comes back with no rows.
std::tuple<Tensor, Tensor> butterfly_bwd(const Tensor& grad_any, const Tensor& x_any, const Tensor& blocks_any,
                                         bool need_x, bool need_blocks) {
  const Tensor x = as_rows(x_any, "x"), grad = as_rows(grad_any, "grad");
  check_arguments(x, blocks_any);
  const int device = x.get_device_index();
  STD_TORCH_CHECK(grad.get_device_index() == device, "butterfly: grad must be on x's device, GPU ", device,
                  ", got GPU ", grad.get_device_index());
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(1) == x.size(1), "butterfly: grad must have x's shape, (",
                  x.size(0), ", ", x.size(1), ") as rows, got (", grad.size(0), ", ", grad.size(1), ")");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "butterfly: grad must have x's dtype, ", x.scalar_type(),
                  ", got ", grad.scalar_type());
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor blocks = torch::stable::contiguous(blocks_any);
  const int64_t factors = blocks.size(0), b = blocks.size(3), tokens = x.size(0), features = x.size(1);
  const Tensor dx = allocate_like(x_any, need_x);
  const std::vector<int64_t> blocks_sizes{need_blocks ? factors : 0, blocks.size(1), b, b};
  if (tokens == 0 || features == 0) return {dx, torch::stable::new_zeros(blocks, blocks_sizes)};
  const Tensor dblocks = torch::stable::new_empty(blocks, blocks_sizes);
  if (!need_x && !need_blocks) return {dx, dblocks};

  const ScalarType type = x.scalar_type();
  const ButterflyElement element = type == ScalarType::Float  ? ButterflyElement::kFloat32
                                   : type == ScalarType::Half ? ButterflyElement::kFloat16
                                                              : ButterflyElement::kBFloat16;
  const int kernel_size = butterfly_kernel_size(b, blocks.const_data_ptr());
  const int max_shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const ButterflyBwdPlan plan =
      plan_butterfly_bwd(tokens, features, b, factors, bytes_of(element), max_shared_bytes,
                         device_attribute(cudaDevAttrMultiProcessorCount, device), kernel_size, need_blocks);
  STD_TORCH_CHECK(plan.error == nullptr, "butterfly: the gradient of x of shape (", tokens, ", ", features, ") with ",
                  factors, " factors of block size ", b, ": ", plan.error, " (", max_shared_bytes,
                  " bytes on this GPU)");
  // A single group writes its part where the sums belong.
  const Tensor parts = need_blocks && plan.groups > 1
                           ? torch::stable::new_empty(blocks, {plan.groups, factors, blocks.size(1), b, b})
                           : dblocks;
  const ButterflyArguments args{
      .x = x.const_data_ptr(),
      .blocks = static_cast<const float*>(blocks.const_data_ptr()),
      .y = need_x ? dx.mutable_data_ptr() : nullptr,
      .tokens = tokens,
      .features = features,
      .x_row_stride = x.stride(0),
      .b = static_cast<int>(b),
      .factors = static_cast<int>(factors),
  };
  const cudaStream_t stream = current_stream(device);
  launch_butterfly_bwd(element, plan, kernel_size, args, grad.const_data_ptr(), grad.stride(0),
                       need_blocks ? static_cast<float*>(parts.mutable_data_ptr()) : nullptr, stream);
  if (need_blocks && plan.groups > 1) {
    const int64_t size = dblocks.numel();
    butterfly_add_parts_kernel<<<add_parts_grid(size), kAddPartsThreads, 0, stream>>>(
        static_cast<const float*>(parts.const_data_ptr()), static_cast<float*>(dblocks.mutable_data_ptr()), size,
        plan.groups, parts_are_packed(size));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {dx, dblocks};
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) {
  m.impl("butterfly_fwd", TORCH_BOX(&fastpeft::butterfly_fwd));
  m.impl("butterfly_bwd", TORCH_BOX(&fastpeft::butterfly_bwd));
}
