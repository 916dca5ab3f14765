// What every CPU operator asks of its tensors before it takes their pointers.
#pragma once

#include <string.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <vector>

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

// The stable interface drops what went wrong in an allocation.
inline void check_allocated(bool done, const torch::stable::Tensor& like, int64_t elements) {
  STD_TORCH_CHECK(done, "not enough memory for ", elements, " elements of ", like.element_size(), " bytes");
}

inline torch::stable::Tensor contiguous_copy(const torch::stable::Tensor& tensor) {
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::exception&) {
    check_allocated(false, tensor, tensor.numel());
    throw;
  }
}

// Without a call where nothing is to be done: one through the dispatcher takes as long as a small kernel.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : contiguous_copy(tensor);
}

// The loops take any distance between rows, but elements of a row side by side.
inline torch::stable::Tensor with_contiguous_rows(const torch::stable::Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : contiguous_copy(tensor);
}

// This, the views and the two products below call the library directly: by the name of an operator, through the
// dispatcher, a call takes as long as a small kernel.

struct Layout {
  std::array<int64_t, 4> strides;
  int64_t elements = 1;
  int32_t dtype;

  Layout(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes) {
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= std::max<int64_t>(sizes.begin()[i], 1);
      elements *= sizes.begin()[i];
    }
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  }
};

// A new tensor in the dtype of `like`.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes) {
  const Layout layout(like, sizes);
  AtenTensorHandle made;
  const AOTITorchError error = aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), layout.strides.data(),
                                                        layout.dtype, aoti_torch_device_type_cpu(), 0, &made);
  check_allocated(error == TORCH_SUCCESS, like, layout.elements);
  return torch::stable::Tensor(made);
}

// A tensor over memory that outlives it.
inline torch::stable::Tensor tensor_over(void* data, const torch::stable::Tensor& like,
                                         std::initializer_list<int64_t> sizes) {
  const Layout layout(like, sizes);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, int64_t(sizes.size()), sizes.begin(),
                                                                   layout.strides.data(), 0, layout.dtype,
                                                                   aoti_torch_device_type_cpu(), 0, &made));
  return torch::stable::Tensor(made);
}

inline torch::stable::Tensor allocate_zeros(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes) {
  torch::stable::Tensor made = allocate(like, sizes);
  memset(made.mutable_data_ptr(), 0, made.numel() * made.element_size());
  return made;
}

// The same memory in another shape. Not a view to autograd: an output made of it can be changed in place.
inline torch::stable::Tensor reshaped(const torch::stable::Tensor& tensor, int64_t dims, const int64_t* sizes,
                                      const int64_t* strides) {
  AtenTensorHandle view;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), dims, sizes, strides, 0, &view));
  return torch::stable::Tensor(view);
}

inline torch::stable::Tensor transposed(const torch::stable::Tensor& matrix) {
  const std::array<int64_t, 2> sizes{matrix.size(1), matrix.size(0)}, strides{matrix.stride(1), matrix.stride(0)};
  return reshaped(matrix, 2, sizes.data(), strides.data());
}

// (..., features) as (tokens, features): a view where one stride leads from token to token, else a copy.
inline torch::stable::Tensor as_rows(const torch::stable::Tensor& x, const char* name) {
  check_cpu(x, name);
  const int64_t dims = x.dim();
  if (dims == 2) return x;
  STD_TORCH_CHECK(dims > 0, name, " must have shape (..., features), got a scalar");
  const int64_t features = x.size(dims - 1);
  int64_t tokens = 1;
  std::optional<int64_t> stride;
  bool regular = true;
  for (int64_t i = dims - 2; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (!stride) stride = x.stride(i);
    regular &= x.stride(i) == *stride * tokens;
    tokens *= x.size(i);
  }
  const std::array<int64_t, 2> sizes{tokens, features};
  if (regular) {
    const std::array<int64_t, 2> strides{stride.value_or(features), x.stride(dims - 1)};
    return reshaped(x, 2, sizes.data(), strides.data());
  }
  const std::array<int64_t, 2> strides{features, 1};
  return reshaped(contiguous_copy(x), 2, sizes.data(), strides.data());
}

// Contiguous (tokens, features) with the leading sizes of x.
inline torch::stable::Tensor like_rows(const torch::stable::Tensor& y, const torch::stable::Tensor& x) {
  const int64_t dims = x.dim();
  if (dims == 2) return y;
  std::vector<int64_t> sizes(dims, y.size(1)), strides(dims, 1);
  for (int64_t i = dims - 2; i >= 0; --i) {
    sizes[i] = x.size(i);
    strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  }
  return reshaped(y, dims, sizes.data(), strides.data());
}

// What it was made of has been checked.
inline void check_product(AOTITorchError error) {
  STD_TORCH_CHECK(error == TORCH_SUCCESS, "the library's product failed: not enough memory for a copy of its factors");
}

// x W^T + b, (tokens, out), as aten::linear computes it; zeros where there is no W.
inline torch::stable::Tensor base_product(const torch::stable::Tensor& x,
                                          const std::optional<torch::stable::Tensor>& weight,
                                          const std::optional<torch::stable::Tensor>& bias, int64_t out_features) {
  if (!weight) return allocate_zeros(x, {x.size(0), out_features});
  if (bias) {
    check_cpu(*bias, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features && bias->scalar_type() == x.scalar_type(),
                    "bias must be a vector of ", out_features, " entries in the dtype of x");
  }
  torch::stable::Tensor y = allocate(x, {x.size(0), out_features});
  const torch::stable::Tensor by = transposed(*weight);
  check_product(bias ? aoti_torch_cpu_addmm_out(y.get(), bias->get(), x.get(), by.get(), 1.0, 1.0)
                     : aoti_torch_cpu_mm_out(y.get(), x.get(), by.get()));
  return y;
}

// grad W, (tokens, in), by the library; zeros where there is no W.
inline torch::stable::Tensor base_gradient(const torch::stable::Tensor& grad,
                                           const std::optional<torch::stable::Tensor>& weight, int64_t in_features) {
  if (!weight) return allocate_zeros(grad, {grad.size(0), in_features});
  torch::stable::Tensor dx = allocate(grad, {grad.size(0), in_features});
  check_product(aoti_torch_cpu_mm_out(dx.get(), grad.get(), weight->get()));
  return dx;
}

inline Rows rows_from(const torch::stable::Tensor& x, int64_t token) {
  return {static_cast<const char*>(x.const_data_ptr()) + token * x.stride(0) * x.element_size(), x.stride(0)};
}

inline MutableRows rows_into(const torch::stable::Tensor& y, int64_t token) {
  return {static_cast<char*>(y.mutable_data_ptr()) + token * y.stride(0) * y.element_size(), y.stride(0)};
}

}  // namespace fastpeft
