#include "cpu/low_rank.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/scratch.h"
#include "cpu/tensor.h"

namespace fastpeft {
namespace {

using torch::stable::Tensor;

// Tokens and columns of a task, and the multiply-adds from which on it is worth handing to another thread.
constexpr int64_t kTokens = 16, kColumns = 64, kGrainWork = 1 << 18;

// Calls run(first, count) for tiles of tokens.
template <typename Run>
void for_each_tile(const LowRank& m, int64_t tokens, Run run) {
  const int64_t work = kTokens * m.a.rank * (m.a.features() + m.b.features());
  const int64_t grain = 1 + kGrainWork / std::max<int64_t>(work, 1);
  torch::stable::parallel_for(0, (tokens + kTokens - 1) / kTokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin * kTokens; t < std::min(end * kTokens, tokens); t += kTokens) {
      run(t, std::min(kTokens, tokens - t));
    }
  });
}

}  // namespace

const LoraLoops& lora_loops() { return FASTPEFT_ACTIVE(lora); }

ShardTable rows_table(const float* rows, int64_t rank, int64_t width) {
  ShardTable table{std::vector<const float*>(rank), rank, 1, width};
  for (int64_t r = 0; r < rank; ++r) table.pointers[r] = rows + r * width;
  return table;
}

Tensor rows_of_dropped(const Tensor& dropped, const Tensor& x) {
  const Tensor rows = as_rows(dropped, "dropped");
  STD_TORCH_CHECK(rows.size(0) == x.size(0) && rows.size(1) == x.size(1) && rows.scalar_type() == x.scalar_type(),
                  "dropped must have the shape and the dtype of x");
  return rows;
}

const float* floats_of(const Tensor& h) {
  static const float nothing = 0.0f;
  return h.numel() == 0 ? &nothing : static_cast<const float*>(h.const_data_ptr());
}

void low_rank_fwd(const LowRank& m, const Tensor& x_any, const Tensor& y, float* h) {
  const Tensor x = with_contiguous_rows(x_any);
  const Scalar scalar = scalar_of(x, "x");
  for_each_tile(m, x.size(0), [&](int64_t t, int64_t count) {
    float* tile = h + t * m.a.rank;
    lora_loops().project(scalar, rows_from(x, t), m.a, count, 1.0f, tile);
    Scratch scaled(count * m.a.rank);
    for (int64_t i = 0; i < count * m.a.rank; ++i) scaled.data()[i] = float(m.scaling) * tile[i];
    lora_loops().expand(scalar, scaled.data(), m.b, count, rows_into(y, t));
  });
}

void low_rank_bwd(const LowRank& m, const Tensor& grad_any, const std::optional<Tensor>& x_any, const float* h,
                  const std::optional<Tensor>& dx, const LowRank& gradients, bool add) {
  const Tensor grad = with_contiguous_rows(grad_any);
  const std::optional<Tensor> x = x_any ? std::optional(with_contiguous_rows(*x_any)) : std::nullopt;
  const Scalar scalar = scalar_of(grad, "grad");
  const int64_t tokens = grad.size(0), rank = m.a.rank;
  Scratch scratch(tokens * rank);
  float* grad_B = scratch.data();
  if (dx || x) {
    for_each_tile(m, tokens, [&](int64_t t, int64_t count) {
      lora_loops().project(scalar, rows_from(grad, t), m.b, count, float(m.scaling), grad_B + t * rank);
      if (dx) lora_loops().expand(scalar, grad_B + t * rank, m.a, count, rows_into(*dx, t));
    });
  }
  const int64_t a_tasks = x ? (m.a.width + kColumns - 1) / kColumns : 0;
  const int64_t b_tasks = h ? (m.b.width + kColumns - 1) / kColumns : 0;
  const int64_t work = tokens * rank * kColumns * std::max(m.a.per_row, m.b.per_row);
  const int64_t grain = 1 + kGrainWork / std::max<int64_t>(work, 1);
  torch::stable::parallel_for(0, a_tasks + b_tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      if (task < a_tasks) {
        const int64_t first = task * kColumns, last = std::min(first + kColumns, m.a.width);
        lora_loops().correlate(scalar, grad_B, rows_from(*x, 0), tokens, 1.0f, gradients.a, first, last, add);
      } else {
        const int64_t first = (task - a_tasks) * kColumns, last = std::min(first + kColumns, m.b.width);
        lora_loops().correlate(scalar, h, rows_from(grad, 0), tokens, float(m.scaling), gradients.b, first, last, add);
      }
    }
  });
}

}  // namespace fastpeft
