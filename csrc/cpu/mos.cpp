// The operators fastpeft::mos_fwd and mos_bwd_ on CPU tensors. Schemas and fakes: fastpeft/ops/mos.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/low_rank.h"
#include "cpu/tensor.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_pool(const Tensor& pool, const char* name) {
  check_cpu(pool, name);
  STD_TORCH_CHECK(pool.dim() == 2 && pool.scalar_type() == ScalarType::Float, "mos: ", name,
                  " must be a float32 matrix");
}

void check_sum(const Tensor& sum, const char* name, const Tensor& pool) {
  check_pool(sum, name);
  STD_TORCH_CHECK(sum.size(0) == pool.size(0) && sum.size(1) == pool.size(1) && sum.is_contiguous(), "mos: ", name,
                  " must be contiguous and have the shape of its pool");
}

Tensor contiguous_index(const Tensor& index, const char* name) {
  check_cpu(index, name);
  STD_TORCH_CHECK(index.dim() == 2 && index.scalar_type() == ScalarType::Long, "mos: ", name,
                  " must be an int64 matrix");
  return as_contiguous(index);
}

Tensor contiguous_pool(const Tensor& pool, const char* name) {
  check_pool(pool, name);
  return as_contiguous(pool);
}

// The shards that make up a matrix, of a pool or, as `data`, of its gradient.
ShardTable shards_of(const float* data, const Tensor& pool, const Tensor& index, const char* name) {
  const int64_t rank = index.size(0), per_row = index.size(1), width = pool.size(1), count = pool.size(0);
  ShardTable table{std::vector<const float*>(rank * per_row), rank, per_row, width};
  const int64_t* shards = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < rank * per_row; ++i) {
    STD_TORCH_CHECK(shards[i] >= 0 && shards[i] < count, "mos: ", name, " must lie in [0, ", count, "), got ",
                    shards[i]);
    table.pointers[i] = data + shards[i] * width;
  }
  return table;
}

struct Adapter {
  Tensor pool_A, index_A, pool_B, index_B;
  ShardTable a, b;

  Adapter(const Tensor& pool_A_any, const Tensor& index_A_any, const Tensor& pool_B_any, const Tensor& index_B_any)
      : pool_A(contiguous_pool(pool_A_any, "pool_A")),
        index_A(contiguous_index(index_A_any, "index_A")),
        pool_B(contiguous_pool(pool_B_any, "pool_B")),
        index_B(contiguous_index(index_B_any, "index_B")),
        a(shards_of(static_cast<const float*>(pool_A.const_data_ptr()), pool_A, index_A, "index_A")),
        b(shards_of(static_cast<const float*>(pool_B.const_data_ptr()), pool_B, index_B, "index_B")) {
    STD_TORCH_CHECK(a.rank == b.rank && a.per_row == b.per_row, "mos: index_A and index_B must have one shape");
  }
};

void check_activation(const Tensor& x, const char* name, int64_t features, const std::optional<Tensor>& weight,
                      const Adapter& adapter) {
  STD_TORCH_CHECK(x.size(1) == features, "mos: ", name, " must have shape (..., ", features, ")");
  scalar_of(x, name);
  if (!weight) return;
  check_cpu(*weight, "weight");
  const int64_t out = adapter.b.view().features(), in = adapter.a.view().features();
  STD_TORCH_CHECK(
      weight->dim() == 2 && weight->size(0) == out && weight->size(1) == in && weight->scalar_type() == x.scalar_type(),
      "mos: weight must have shape (", out, ", ", in, ") and the dtype of ", name);
}

// y = x W^T + b + scaling * h B^T and h = x A^T, or h = dropped A^T.
std::tuple<Tensor, Tensor> mos_fwd(const Tensor& x_any, const std::optional<Tensor>& weight,
                                   const std::optional<Tensor>& bias, const Tensor& pool_A, const Tensor& index_A,
                                   const Tensor& pool_B, const Tensor& index_B, double scaling,
                                   const std::optional<Tensor>& dropped) {
  const Tensor x = as_rows(x_any, "x");
  const Adapter adapter(pool_A, index_A, pool_B, index_B);
  const LowRank m{adapter.a.view(), adapter.b.view(), scaling};
  check_activation(x, "x", m.a.features(), weight, adapter);
  const Tensor y = base_product(x, weight, bias, m.b.features());
  Tensor h = allocate(pool_A, {x.size(0), m.a.rank});
  low_rank_fwd(m, dropped ? rows_of_dropped(*dropped, x) : x, y, static_cast<float*>(h.mutable_data_ptr()));
  return {like_rows(y, x_any), h};
}

// Adds the gradients of the pools into dpool_A (which needs x) and dpool_B (which needs h), where they are given, and
// returns that of x, without rows where it is not asked for.
Tensor mos_bwd_(const std::optional<Tensor>& dpool_A, const std::optional<Tensor>& dpool_B, const Tensor& grad_any,
                const std::optional<Tensor>& x_any, const std::optional<Tensor>& weight, const Tensor& pool_A,
                const Tensor& index_A, const Tensor& pool_B, const Tensor& index_B, const std::optional<Tensor>& h_any,
                double scaling, bool need_x) {
  const Tensor grad = as_rows(grad_any, "grad");
  std::optional<Tensor> x;
  if (x_any) x = as_rows(*x_any, "x");
  const Adapter adapter(pool_A, index_A, pool_B, index_B);
  const LowRank m{adapter.a.view(), adapter.b.view(), scaling};
  check_activation(grad, "grad", m.b.features(), weight, adapter);
  STD_TORCH_CHECK(dpool_A.has_value() == x.has_value() && dpool_B.has_value() == h_any.has_value(),
                  "mos: dpool_A goes with x, dpool_B with h");
  if (x) {
    check_activation(*x, "x", m.a.features(), weight, adapter);
    check_sum(*dpool_A, "dpool_A", pool_A);
    STD_TORCH_CHECK(x->size(0) == grad.size(0) && x->scalar_type() == grad.scalar_type(),
                    "mos: x must have the tokens and the dtype of grad");
  }
  if (h_any) {
    check_cpu(*h_any, "h");
    check_sum(*dpool_B, "dpool_B", pool_B);
    STD_TORCH_CHECK(h_any->dim() == 2 && h_any->size(0) == grad.size(0) && h_any->size(1) == m.a.rank &&
                        h_any->scalar_type() == ScalarType::Float,
                    "mos: h must be float32 of shape (", grad.size(0), ", ", m.a.rank, ")");
  }
  std::optional<Tensor> h;
  if (h_any) h = as_contiguous(*h_any);
  const std::optional<Tensor> dx = need_x ? std::optional(base_gradient(grad, weight, m.a.features())) : std::nullopt;
  ShardTable da{{}, m.a.rank, m.a.per_row, m.a.width}, db{{}, m.b.rank, m.b.per_row, m.b.width};
  if (x) da = shards_of(static_cast<float*>(dpool_A->mutable_data_ptr()), pool_A, adapter.index_A, "index_A");
  if (h) db = shards_of(static_cast<float*>(dpool_B->mutable_data_ptr()), pool_B, adapter.index_B, "index_B");
  low_rank_bwd(m, grad, x, h ? floats_of(*h) : nullptr, dx, {da.view(), db.view(), scaling}, true);
  return dx ? like_rows(*dx, grad_any) : allocate(grad, {0, m.a.features()});
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("mos_fwd", TORCH_BOX(&fastpeft::mos_fwd));
  m.impl("mos_bwd_", TORCH_BOX(&fastpeft::mos_bwd_));
}
