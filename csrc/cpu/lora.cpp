// The operators fastpeft::lora_fwd and lora_bwd on CPU tensors. Schemas and fakes: fastpeft/ops/lora.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/lora_loops.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const LoraLoops& loops() {
#define FASTPEFT_RETURN(isa) \
  if (active_isa() == Isa::isa) return isa::lora;
  FASTPEFT_FOR_EACH_ISA(FASTPEFT_RETURN)
#undef FASTPEFT_RETURN
  return baseline::lora;
}

// Tokens and columns of a task, and the multiply-adds from which on it is worth handing to another thread.
constexpr int64_t kTokens = 16, kColumns = 64, kGrainWork = 1 << 18;

int64_t grain(int64_t work) { return 1 + kGrainWork / std::max<int64_t>(work, 1); }

struct Sizes {
  int64_t tokens, in_features, out_features, rank;
};

Sizes check_sizes(const Tensor& x, const char* name, const std::optional<Tensor>& weight, const Tensor& lora_A,
                  const Tensor& lora_B) {
  check_cpu(x, name);
  STD_TORCH_CHECK(x.dim() == 2, "lora: ", name, " must have shape (tokens, features), got ", x.dim(), " dimensions");
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

// B transposed, (rank, out) floats side by side: a view where B is stored by columns, else a copy in scratch.
const float* transposed_B(const Tensor& lora_B, const Sizes& sizes, Scratch& scratch) {
  const float* data = static_cast<const float*>(lora_B.const_data_ptr());
  if (lora_B.stride(0) == 1 && lora_B.stride(1) == sizes.out_features) return data;
  if (lora_B.stride(1) == 1 || sizes.rank == 1) {
    loops().transpose(data, lora_B.stride(0), sizes.out_features, sizes.rank, scratch.data(), sizes.out_features);
    return scratch.data();
  }
  for (int64_t r = 0; r < sizes.rank; ++r) {
    for (int64_t j = 0; j < sizes.out_features; ++j) {
      scratch.data()[r * sizes.out_features + j] = data[j * lora_B.stride(0) + r * lora_B.stride(1)];
    }
  }
  return scratch.data();
}

// y = x W^T + b + scaling * h B^T and h = x A^T.
std::tuple<Tensor, Tensor> lora_fwd(const Tensor& x_any, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& bias, const Tensor& lora_A, const Tensor& lora_B,
                                    double scaling) {
  const Sizes sizes = check_sizes(x_any, "x", weight, lora_A, lora_B);
  STD_TORCH_CHECK(x_any.size(1) == sizes.in_features, "lora: x has ", x_any.size(1), " features, lora_A ",
                  sizes.in_features);
  Tensor y = base_product(x_any, weight, bias, sizes.out_features);
  Tensor h = torch::stable::new_empty(lora_A, {sizes.tokens, sizes.rank});
  if (sizes.tokens == 0 || sizes.rank == 0) return {y, h};
  const Tensor x = with_contiguous_rows(x_any), a = torch::stable::contiguous(lora_A);
  Scratch scratch((sizes.out_features + sizes.tokens) * sizes.rank);
  const float* b = transposed_B(lora_B, sizes, scratch);
  float* scaled = scratch.data() + sizes.out_features * sizes.rank;
  const float* a_data = static_cast<const float*>(a.const_data_ptr());
  float* h_data = static_cast<float*>(h.mutable_data_ptr());
  const Scalar scalar = scalar_of(x, "x");
  const int64_t tasks = (sizes.tokens + kTokens - 1) / kTokens;
  const int64_t work = kTokens * sizes.rank * (sizes.in_features + sizes.out_features);
  torch::stable::parallel_for(0, tasks, grain(work), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin * kTokens; t < std::min(end * kTokens, sizes.tokens); t += kTokens) {
      const int64_t count = std::min(kTokens, sizes.tokens - t);
      float* tile = h_data + t * sizes.rank;
      loops().project(scalar, rows_from(x, t), a_data, count, sizes.in_features, sizes.rank, 1.0f, tile);
      float* scaled_tile = scaled + t * sizes.rank;
      for (int64_t i = 0; i < count * sizes.rank; ++i) scaled_tile[i] = float(scaling) * tile[i];
      loops().expand(scalar, scaled_tile, b, count, sizes.out_features, sizes.rank, rows_into(y, t));
    }
  });
  return {y, h};
}

// dx = grad W + gB A with gB = scaling * grad B, dA = gB^T x, dB = scaling * grad^T h. A gradient that is not asked for
// comes back with no rows. Tasks of the last two own columns of the result with all their tokens, so that every sum has
// one order, whatever the number of threads.
std::tuple<Tensor, Tensor, Tensor> lora_bwd(const Tensor& grad_any, const std::optional<Tensor>& x_any,
                                            const std::optional<Tensor>& weight, const Tensor& lora_A,
                                            const Tensor& lora_B, const std::optional<Tensor>& h_any, double scaling,
                                            bool need_x) {
  const Sizes sizes = check_sizes(grad_any, "grad", weight, lora_A, lora_B);
  STD_TORCH_CHECK(grad_any.size(1) == sizes.out_features, "lora: grad has ", grad_any.size(1), " features, lora_B ",
                  sizes.out_features);
  if (x_any) {
    check_cpu(*x_any, "x");
    STD_TORCH_CHECK(x_any->dim() == 2 && x_any->size(0) == sizes.tokens && x_any->size(1) == sizes.in_features &&
                        x_any->scalar_type() == grad_any.scalar_type(),
                    "lora: x must have shape (", sizes.tokens, ", ", sizes.in_features, ") and the dtype of grad");
  }
  if (h_any) {
    check_cpu(*h_any, "h");
    STD_TORCH_CHECK(h_any->dim() == 2 && h_any->size(0) == sizes.tokens && h_any->size(1) == sizes.rank &&
                        h_any->scalar_type() == ScalarType::Float,
                    "lora: h must be float32 of shape (", sizes.tokens, ", ", sizes.rank, ")");
  }
  const bool by_columns = lora_B.stride(0) == 1 && lora_B.stride(1) == sizes.out_features;
  Tensor dx = need_x ? base_gradient(grad_any, weight, sizes.in_features)
                     : torch::stable::new_empty(grad_any, {0, sizes.in_features});
  Tensor dA = torch::stable::new_empty(lora_A, {x_any ? sizes.rank : 0, sizes.in_features});
  const int64_t dB_rows = h_any ? sizes.out_features : 0;
  Tensor dB = by_columns && h_any ? torch::stable::new_empty(lora_B, {sizes.rank, dB_rows})
                                  : torch::stable::new_empty(lora_B, {dB_rows, sizes.rank});
  const auto result = [&] { return std::tuple(dx, dA, by_columns && h_any ? torch::stable::transpose(dB, 0, 1) : dB); };
  if (sizes.rank == 0) return result();
  const Tensor grad = with_contiguous_rows(grad_any), a = torch::stable::contiguous(lora_A);
  const Scalar scalar = scalar_of(grad, "grad");
  Scratch scratch((sizes.out_features + sizes.tokens) * sizes.rank);
  const float* a_data = static_cast<const float*>(a.const_data_ptr());

  float* grad_B = scratch.data() + sizes.out_features * sizes.rank;
  if (need_x || x_any) {
    const float* b = transposed_B(lora_B, sizes, scratch);
    const int64_t tasks = (sizes.tokens + kTokens - 1) / kTokens;
    const int64_t work = kTokens * sizes.rank * (sizes.in_features + sizes.out_features);
    torch::stable::parallel_for(0, tasks, grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin * kTokens; t < std::min(end * kTokens, sizes.tokens); t += kTokens) {
        const int64_t count = std::min(kTokens, sizes.tokens - t);
        float* tile = grad_B + t * sizes.rank;
        loops().project(scalar, rows_from(grad, t), b, count, sizes.out_features, sizes.rank, float(scaling), tile);
        if (need_x) {
          loops().expand(scalar, tile, a_data, count, sizes.in_features, sizes.rank, rows_into(dx, t));
        }
      }
    });
  }

  const std::optional<Tensor> x = x_any ? std::optional(with_contiguous_rows(*x_any)) : std::nullopt;
  const std::optional<Tensor> h = h_any ? std::optional(torch::stable::contiguous(*h_any)) : std::nullopt;
  const int64_t a_tasks = x ? (sizes.in_features + kColumns - 1) / kColumns : 0;
  const int64_t b_tasks = h ? (sizes.out_features + kColumns - 1) / kColumns : 0;
  float* dA_data = x ? static_cast<float*>(dA.mutable_data_ptr()) : nullptr;
  float* dB_data = h ? static_cast<float*>(dB.mutable_data_ptr()) : nullptr;
  const int64_t work = sizes.tokens * sizes.rank * kColumns;
  torch::stable::parallel_for(0, a_tasks + b_tasks, grain(work), [&](int64_t begin, int64_t end) {
    Scratch columns(kColumns * sizes.rank);
    for (int64_t task = begin; task < end; ++task) {
      if (task < a_tasks) {
        const int64_t first = task * kColumns, last = std::min(first + kColumns, sizes.in_features);
        loops().correlate(scalar, grad_B, rows_from(*x, 0), sizes.tokens, sizes.rank, first, last, dA_data,
                          sizes.in_features);
        continue;
      }
      const int64_t first = (task - a_tasks) * kColumns, last = std::min(first + kColumns, sizes.out_features);
      const int64_t count = last - first;
      Rows part = rows_from(grad, 0);
      part.data = static_cast<const char*>(part.data) + first * grad.element_size();
      const float* h_data = static_cast<const float*>(h->const_data_ptr());
      loops().correlate(scalar, h_data, part, sizes.tokens, sizes.rank, 0, count, columns.data(), count);
      for (int64_t i = 0; i < count * sizes.rank; ++i) columns.data()[i] *= float(scaling);
      if (by_columns) {
        for (int64_t r = 0; r < sizes.rank; ++r) {
          std::copy_n(columns.data() + r * count, count, dB_data + r * sizes.out_features + first);
        }
      } else {
        loops().transpose(columns.data(), count, sizes.rank, count, dB_data + first * sizes.rank, sizes.rank);
      }
    }
  });
  return result();
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("lora_fwd", TORCH_BOX(&fastpeft::lora_fwd));
  m.impl("lora_bwd", TORCH_BOX(&fastpeft::lora_bwd));
}
