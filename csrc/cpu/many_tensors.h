// What the operators for batches of many adapters ask of CPU tensors. Whoever calls them by name gets an error, not a
// crash.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <vector>

#include "cpu/many.h"
#include "cpu/tensor.h"

namespace fastpeft {

// -1 stands for any size.
inline void check_table(const torch::stable::Tensor& table, const char* name, torch::headeronly::ScalarType type,
                        std::initializer_list<int64_t> sizes) {
  check_cpu(table, name);
  STD_TORCH_CHECK(table.scalar_type() == type, name, " must be ", type, ", got ", table.scalar_type());
  bool fits = table.dim() == int64_t(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = sizes.begin()[i] == -1 || sizes.begin()[i] == table.size(int64_t(i));
  }
  STD_TORCH_CHECK(fits, name, " must have the sizes that the other tensors give it");
  STD_TORCH_CHECK(table.is_contiguous(), name, " must be contiguous");
}

inline Matrix matrix_of(const torch::stable::Tensor& x, const char* name, int64_t tokens = -1) {
  check_cpu(x, name);
  const Scalar scalar = scalar_of(x, name);
  STD_TORCH_CHECK(x.dim() == 2 && (tokens == -1 || x.size(0) == tokens), name, " must be a matrix with the rows of y");
  STD_TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1, name, " must have its features side by side");
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), scalar};
}

template <typename T>
inline const T* data_of(const torch::stable::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// `width` may be -1 for any.
inline Arena arena_of(const torch::stable::Tensor& arena, const char* name, int64_t width) {
  check_table(arena, name, torch::headeronly::ScalarType::Float, {-1, width});
  return {data_of<float>(arena), arena.size(0), arena.size(1)};
}

inline Batch batch_of(const torch::stable::Tensor& rows, const torch::stable::Tensor& slots, std::vector<char>& named) {
  const int64_t tokens = int64_t(named.size());
  check_table(rows, "rows", torch::headeronly::ScalarType::Int, {tokens});
  check_table(slots, "slots", torch::headeronly::ScalarType::Int, {tokens});
  return {data_of<int32_t>(rows), data_of<int32_t>(slots), named};
}

inline void run_alone(std::unique_ptr<Work> work) {
  Works works;
  works.push_back(std::move(work));
  run_all(works);
}

}  // namespace fastpeft
