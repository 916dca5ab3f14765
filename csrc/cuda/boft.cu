// The operator fastpeft::butterfly_fwd on CUDA tensors. Schema and fake: fastpeft/ops/boft.py; maths: boft.cuh.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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

void check_arguments(const Tensor& x, const Tensor& blocks) {
  STD_TORCH_CHECK(x.is_cuda(), "butterfly: x must be on a GPU, it is not");
  STD_TORCH_CHECK(blocks.is_cuda() && blocks.get_device_index() == x.get_device_index(),
                  "butterfly: blocks must be on x's device, GPU ", x.get_device_index(), ", got ",
                  blocks.is_cuda() ? "GPU " : "device index ", blocks.get_device_index());
  STD_TORCH_CHECK(x.dim() == 2, "butterfly: x must have shape (tokens, features), got ", x.dim(), " dimensions");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "butterfly: x must be float32, bfloat16 or float16, got ", type);
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

Tensor butterfly_fwd(const Tensor& x_any, const Tensor& blocks_any) {
  check_arguments(x_any, blocks_any);
  const int64_t tokens = x_any.size(0), features = x_any.size(1);
  const torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor y = torch::stable::new_empty(x_any, {tokens, features});
  if (tokens == 0 || features == 0) return y;

  // The kernel takes any distance between rows, but elements of a row side by side.
  const bool rows_are_contiguous = features == 1 || x_any.stride(1) == 1;
  const Tensor x = rows_are_contiguous ? x_any : torch::stable::contiguous(x_any);
  const Tensor blocks = torch::stable::contiguous(blocks_any);
  const ButterflyArguments args{
      .x = x.const_data_ptr(),
      .blocks = static_cast<const float*>(blocks.const_data_ptr()),
      .y = y.mutable_data_ptr(),
      .tokens = tokens,
      .features = features,
      .x_row_stride = x.stride(0),
      .b = static_cast<int>(blocks.size(3)),
      .factors = static_cast<int>(blocks.size(0)),
  };
  int max_shared_bytes = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device_index()));
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const auto launch = x.scalar_type() == ScalarType::Float      ? launch_butterfly_fwd<float>
                      : x.scalar_type() == ScalarType::BFloat16 ? launch_butterfly_fwd<__nv_bfloat16>
                                                                : launch_butterfly_fwd<__half>;
  launch(args, max_shared_bytes, static_cast<cudaStream_t>(stream));
  return y;
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) { m.impl("butterfly_fwd", TORCH_BOX(&fastpeft::butterfly_fwd)); }
