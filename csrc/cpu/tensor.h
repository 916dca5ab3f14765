// What every CPU operator asks of its tensors before it takes their pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>

#include "common/half.h"
#include "cpu/rows.h"

namespace fastpeft {

inline void check_cpu(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
}

inline Scalar scalar_of(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  " must be float32, bfloat16 or float16");
  return type == ScalarType::Float      ? Scalar::float32
         : type == ScalarType::BFloat16 ? Scalar::bfloat16
                                        : Scalar::float16;
}

// Without a call where nothing is to be done: one through the dispatcher takes as long as a small kernel.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The loops take any distance between rows, but elements of a row side by side.
inline torch::stable::Tensor with_contiguous_rows(const torch::stable::Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// x W^T + b, (tokens, out), by the library; zeros where there is no W.
inline torch::stable::Tensor base_product(const torch::stable::Tensor& x,
                                          const std::optional<torch::stable::Tensor>& weight,
                                          const std::optional<torch::stable::Tensor>& bias, int64_t out_features) {
  if (!weight) return torch::stable::new_zeros(x, {x.size(0), out_features});
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(*weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// grad W, (tokens, in), by the library; zeros where there is no W.
inline torch::stable::Tensor base_gradient(const torch::stable::Tensor& grad,
                                           const std::optional<torch::stable::Tensor>& weight, int64_t in_features) {
  if (!weight) return torch::stable::new_zeros(grad, {grad.size(0), in_features});
  return torch::stable::matmul(grad, *weight);
}

inline Rows rows_from(const torch::stable::Tensor& x, int64_t token) {
  return {static_cast<const char*>(x.const_data_ptr()) + token * x.stride(0) * x.element_size(), x.stride(0)};
}

inline MutableRows rows_into(const torch::stable::Tensor& y, int64_t token) {
  return {static_cast<char*>(y.mutable_data_ptr()) + token * y.stride(0) * y.element_size(), y.stride(0)};
}

}  // namespace fastpeft
