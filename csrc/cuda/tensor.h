// What CUDA operators ask of tensors and of the device before they launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "cuda/element.cuh"

namespace fastpeft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Launches a kernel, which has to ask for more than 48 KiB of shared memory.
template <typename Kernel, typename Plan, typename... Arguments>
void launch_kernel(Kernel kernel, const Plan& plan, cudaStream_t stream, const Arguments&... arguments) {
  if (plan.shared_bytes > 48 << 10) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes)));
  }
  kernel<<<plan.grid, plan.block, static_cast<size_t>(plan.shared_bytes), stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

inline void check_device(const Tensor& tensor, const char* op, const char* name, const Tensor& like,
                         const char* like_name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the device of ", like_name, ", GPU ", like.get_device_index(), ", got ",
                  tensor.is_cuda() ? "GPU " : "device index ", tensor.get_device_index());
}

inline Element element_of(const Tensor& tensor, const char* op, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ", name,
                  " must be float32, bfloat16 or float16, got ", type);
  return type == ScalarType::Float  ? Element::kFloat32
         : type == ScalarType::Half ? Element::kFloat16
                                    : Element::kBFloat16;
}

// Calls f with the type as a template argument.
template <typename F>
void with_type(Element element, F&& f) {
  if (element == Element::kFloat32) return f.template operator()<float>();
  if (element == Element::kFloat16) return f.template operator()<__half>();
  return f.template operator()<__nv_bfloat16>();
}

// (..., features) as (tokens, features) with the elements of a row side by side: kernels take any distance between
// rows. A copy only where there is no such view.
inline Tensor as_rows(const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(x.is_cuda(), op, ": ", name, " must be on a GPU, it is not");
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims > 0, op, ": ", name, " must have shape (..., features), got a scalar");
  const int64_t features = x.size(dims - 1);
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) tokens *= x.size(i);
  const Tensor rows = dims == 2 ? x : torch::stable::reshape(x, {tokens, features});
  return features == 1 || rows.stride(1) == 1 ? rows : torch::stable::contiguous(rows);
}

// A new tensor with the leading sizes of x, and the last one where it is given.
inline Tensor allocate_like(const Tensor& x, int64_t features = -1) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  if (features >= 0) sizes.back() = features;
  return torch::stable::new_empty(x, sizes);
}

}  // namespace fastpeft
