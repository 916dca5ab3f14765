// What every CPU operator asks of its tensors before it takes their pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/half.h"

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

// The loops take any distance between rows, but elements of a row side by side.
inline torch::stable::Tensor with_contiguous_rows(const torch::stable::Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace fastpeft
