// What the operators for batches of many adapters ask of CUDA tensors: what a shape can tell. Numbers in tables are not
// looked at, which would be to wait for the device: kernels keep those that lead outside inside.
#pragma once

#include "cuda/tensor.h"

namespace fastpeft::many {

// x or y: rows at any distance, elements side by side. Nothing is copied: this runs without allocating.
inline void check_rows(const Tensor& tensor, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), op, ": ", name, " must be on a GPU, it is not");
  STD_TORCH_CHECK(tensor.dim() == 2, op, ": ", name, " must have shape (tokens, features), got ", tensor.dim(),
                  " dimensions");
  STD_TORCH_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1, op, ": ", name,
                  " must have its features side by side, got a stride of ", tensor.stride(1));
  STD_TORCH_CHECK(tensor.size(1) <= INT32_MAX, op, ": ", name, " has more than 2^31 features, ", tensor.size(1));
}

inline void check_table(const Tensor& tensor, const char* op, const char* name, ScalarType type, int64_t dims,
                        const Tensor& like, const char* like_name) {
  check_device(tensor, op, name, like, like_name);
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ", type, ", got ", tensor.scalar_type());
  STD_TORCH_CHECK(tensor.dim() == dims, op, ": ", name, " must have ", dims, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous, it is not");
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(0) <= INT32_MAX, op, ": ", name, " has more than 2^31 rows, ",
                  tensor.size(0));
}

// The plan of a batch of as many rows as `like` has.
inline void check_plan(const Tensor& rows, const Tensor& slots, const char* op, const Tensor& like,
                       const char* like_name) {
  check_table(rows, op, "rows", ScalarType::Int, 1, like, like_name);
  check_table(slots, op, "slots", ScalarType::Int, 1, like, like_name);
  STD_TORCH_CHECK(rows.size(0) == like.size(0) && slots.size(0) == like.size(0), op,
                  ": rows and slots must have an entry for each of the ", like.size(0), " rows of ", like_name,
                  ", got ", rows.size(0), " and ", slots.size(0));
}

inline const int* numbers_of(const Tensor& table) { return static_cast<const int*>(table.const_data_ptr()); }

}  // namespace fastpeft::many
