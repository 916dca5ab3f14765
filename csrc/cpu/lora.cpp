// The operators fastpeft::lora_fwd and lora_bwd on CPU tensors. Schemas and fakes: fastpeft/ops/lora.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/low_rank.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Sizes {
  int64_t tokens, in_features, out_features, rank;
};

Sizes check_sizes(const Tensor& x, const char* name, const std::optional<Tensor>& weight, const Tensor& lora_A,
                  const Tensor& lora_B) {
  scalar_of(x, name);
  for (const Tensor& matrix : {lora_A, lora_B}) {
    check_cpu(matrix, "the adapter");
    STD_TORCH_CHECK(matrix.dim() == 2 && matrix.scalar_type() == ScalarType::Float,
                    "lora: lora_A and lora_B must be float32 matrices");
  }
  STD_TORCH_CHECK(lora_A.size(0) == lora_B.size(1), "lora: lora_A has rank ", lora_A.size(0), ", lora_B ",
                  lora_B.size(1));
  const Sizes sizes{x.size(0), lora_A.size(1), lora_B.size(0), lora_A.size(0)};
  if (weight) {
    check_cpu(*weight, "weight");
    STD_TORCH_CHECK(weight->dim() == 2 && weight->size(0) == sizes.out_features &&
                        weight->size(1) == sizes.in_features && weight->scalar_type() == x.scalar_type(),
                    "lora: weight must have shape (", sizes.out_features, ", ", sizes.in_features,
                    ") and the dtype of ", name);
  }
  return sizes;
}

// Whether B is stored by columns, so that B transposed lies there as it is wanted.
bool by_columns(const Tensor& lora_B) { return lora_B.stride(0) == 1 && lora_B.stride(1) == lora_B.size(0); }

// B transposed, (rank, out) floats side by side: in place where B is stored by columns, else a copy in scratch.
const float* transposed_B(const Tensor& lora_B, const Sizes& sizes, float* copy) {
  const float* data = static_cast<const float*>(lora_B.const_data_ptr());
  if (by_columns(lora_B)) return data;
  if (lora_B.stride(1) == 1) {
    lora_loops().transpose(data, lora_B.stride(0), sizes.out_features, sizes.rank, copy, sizes.out_features);
    return copy;
  }
  for (int64_t r = 0; r < sizes.rank; ++r) {
    for (int64_t j = 0; j < sizes.out_features; ++j) {
      copy[r * sizes.out_features + j] = data[j * lora_B.stride(0) + r * lora_B.stride(1)];
    }
  }
  return copy;
}

// y = x W^T + b + scaling * h B^T and h = x A^T, or h = dropped A^T.
std::tuple<Tensor, Tensor> lora_fwd(const Tensor& x_any, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& bias, const Tensor& lora_A, const Tensor& lora_B,
                                    double scaling, const std::optional<Tensor>& dropped) {
  const Tensor x = as_rows(x_any, "x");
  const Sizes sizes = check_sizes(x, "x", weight, lora_A, lora_B);
  STD_TORCH_CHECK(x.size(1) == sizes.in_features, "lora: x has ", x.size(1), " features, lora_A ", sizes.in_features);
  const Tensor y = base_product(x, weight, bias, sizes.out_features);
  Tensor h = allocate(lora_A, {sizes.tokens, sizes.rank});
  const Tensor a = as_contiguous(lora_A);
  Scratch scratch(sizes.out_features * sizes.rank);
  const auto a_rows = rows_table(static_cast<const float*>(a.const_data_ptr()), sizes.rank, sizes.in_features);
  const auto b_rows = rows_table(transposed_B(lora_B, sizes, scratch.data()), sizes.rank, sizes.out_features);
  low_rank_fwd({a_rows.view(), b_rows.view(), scaling}, dropped ? rows_of_dropped(*dropped, x) : x, y,
               static_cast<float*>(h.mutable_data_ptr()));
  return {like_rows(y, x_any), h};
}

// dx = grad W + gB A with gB = scaling * grad B, dA = gB^T x, dB = scaling * grad^T h. A gradient that is not asked for
// comes back with no rows.
std::tuple<Tensor, Tensor, Tensor> lora_bwd(const Tensor& grad_any, const std::optional<Tensor>& x_any,
                                            const std::optional<Tensor>& weight, const Tensor& lora_A,
                                            const Tensor& lora_B, const std::optional<Tensor>& h_any, double scaling,
                                            bool need_x) {
  const Tensor grad = as_rows(grad_any, "grad");
  std::optional<Tensor> x;
  if (x_any) x = as_rows(*x_any, "x");
  const Sizes sizes = check_sizes(grad, "grad", weight, lora_A, lora_B);
  STD_TORCH_CHECK(grad.size(1) == sizes.out_features, "lora: grad has ", grad.size(1), " features, lora_B ",
                  sizes.out_features);
  if (x) {
    STD_TORCH_CHECK(
        x->size(0) == sizes.tokens && x->size(1) == sizes.in_features && x->scalar_type() == grad.scalar_type(),
        "lora: x must have shape (", sizes.tokens, ", ", sizes.in_features, ") and the dtype of grad");
  }
  if (h_any) {
    check_cpu(*h_any, "h");
    STD_TORCH_CHECK(h_any->dim() == 2 && h_any->size(0) == sizes.tokens && h_any->size(1) == sizes.rank &&
                        h_any->scalar_type() == ScalarType::Float,
                    "lora: h must be float32 of shape (", sizes.tokens, ", ", sizes.rank, ")");
  }
  std::optional<Tensor> h;
  if (h_any) h = as_contiguous(*h_any);
  const std::optional<Tensor> dx =
      need_x ? std::optional(base_gradient(grad, weight, sizes.in_features)) : std::nullopt;
  Tensor dA = allocate(lora_A, {x ? sizes.rank : 0, sizes.in_features});
  const bool flipped = by_columns(lora_B) && h;
  Tensor dB = flipped ? allocate(lora_B, {sizes.rank, sizes.out_features})
                      : allocate(lora_B, {h ? sizes.out_features : 0, sizes.rank});

  const Tensor a = as_contiguous(lora_A);
  // B transposed, and its gradient likewise, where they do not lie like that already.
  const int64_t matrix = sizes.out_features * sizes.rank;
  Scratch scratch(2 * matrix);
  float* da_data = static_cast<float*>(dA.mutable_data_ptr());
  float* db_data = flipped ? static_cast<float*>(dB.mutable_data_ptr()) : scratch.data() + matrix;
  const auto a_rows = rows_table(static_cast<const float*>(a.const_data_ptr()), sizes.rank, sizes.in_features);
  const auto b_rows = rows_table(transposed_B(lora_B, sizes, scratch.data()), sizes.rank, sizes.out_features);
  const auto da_rows = rows_table(da_data, sizes.rank, sizes.in_features);
  const auto db_rows = rows_table(db_data, sizes.rank, sizes.out_features);
  low_rank_bwd({a_rows.view(), b_rows.view(), scaling}, grad, x, h ? floats_of(*h) : nullptr, dx,
               {da_rows.view(), db_rows.view(), scaling}, false);
  if (h && !flipped) {
    lora_loops().transpose(db_data, sizes.out_features, sizes.rank, sizes.out_features,
                           static_cast<float*>(dB.mutable_data_ptr()), sizes.rank);
  }
  return {dx ? like_rows(*dx, grad_any) : allocate(grad, {0, sizes.in_features}), dA, flipped ? transposed(dB) : dB};
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("lora_fwd", TORCH_BOX(&fastpeft::lora_fwd));
  m.impl("lora_bwd", TORCH_BOX(&fastpeft::lora_bwd));
}
