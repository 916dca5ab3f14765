// The operators fastpeft::butterfly_fwd, butterfly_bwd, boft_fwd and boft_bwd on CPU tensors. Schemas and fakes:
// fastpeft/ops/boft.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "cpu/boft_loops.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const ButterflyLoops& loops() { return FASTPEFT_ACTIVE(butterfly); }

ButterflyShape check_shape(const Tensor& x, const Tensor& blocks) {
  check_cpu(blocks, "blocks");
  STD_TORCH_CHECK(blocks.dim() == 4 && blocks.size(2) == blocks.size(3) && blocks.size(0) > 0 && blocks.size(3) > 0,
                  "butterfly: blocks must have shape (factors, features / b, b, b)");
  STD_TORCH_CHECK(blocks.scalar_type() == ScalarType::Float, "butterfly: blocks must be float32");
  const ButterflyShape shape{x.size(1), blocks.size(3), blocks.size(0), scalar_of(x, "x")};
  STD_TORCH_CHECK(blocks.size(1) * shape.block == shape.features, "butterfly: blocks cover ",
                  blocks.size(1) * shape.block, " features, x has ", shape.features);
  STD_TORCH_CHECK(shape.factors == 1 || (shape.block % 2 == 0 && shape.factors < 32 &&
                                         shape.features % (shape.block << (shape.factors - 1)) == 0),
                  "butterfly: ", shape.factors, " factors of block size ", shape.block, " do not fit ", shape.features,
                  " features");
  return shape;
}

// Splits the features into ranges of whole windows: about as many features as the cache wants, but enough ranges for
// every thread.
int64_t range_features(const ButterflyShape& shape, int64_t cached, int64_t wanted_ranges) {
  const int64_t window = shape.block << (shape.factors - 1);
  const int64_t wanted = std::min(cached, shape.features / std::max<int64_t>(wanted_ranges, 1));
  return std::max(window, wanted / window * window);
}

// A task is worth handing to another thread from about this many multiply-adds on.
constexpr int64_t kGrainWork = 1 << 17;

// y = x R, both (tokens, features).
void rotate(const Tensor& x_any, const Tensor& blocks_any, const Tensor& y) {
  const ButterflyShape shape = check_shape(x_any, blocks_any);
  const Tensor x = with_contiguous_rows(x_any);
  const Tensor blocks = as_contiguous(blocks_any);
  const int64_t tokens = x.size(0), d = shape.features;
  if (tokens == 0 || d == 0) return;

  constexpr int64_t kCached = 128;  // times kButterflyTokens: a first-level cache
  const int64_t token_tasks = (tokens + kButterflyTokens - 1) / kButterflyTokens;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t count = range_features(shape, kCached, token_tasks >= threads ? 1 : threads);
  const int64_t ranges = (d + count - 1) / count;
  const int64_t work = std::min(tokens, kButterflyTokens) * count * shape.block * shape.factors;
  const float* q = static_cast<const float*>(blocks.const_data_ptr());

  torch::stable::parallel_for(0, token_tasks * ranges, 1 + kGrainWork / work, [&](int64_t begin, int64_t end) {
    Scratch scratch(butterfly_scratch_floats(shape, {0, count}, false));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t token = task / ranges * kButterflyTokens, first = task % ranges * count;
      loops().fwd(shape, {first, std::min(count, d - first)}, std::min(kButterflyTokens, tokens - token),
                  rows_from(x, token), q, rows_into(y, token), scratch.data());
    }
  });
}

// dx = grad R^T if dx is given, which may be grad, and returns the gradient of the blocks, or none of them. Tasks own
// ranges of features with all their tokens, so every block gradient has one owner and one order of addition, whatever
// the number of threads.
Tensor rotate_bwd(const Tensor& grad_any, const Tensor& x_any, const Tensor& blocks_any,
                  const std::optional<Tensor>& dx, bool need_blocks) {
  const ButterflyShape shape = check_shape(x_any, blocks_any);
  STD_TORCH_CHECK(grad_any.size(0) == x_any.size(0) && grad_any.size(1) == x_any.size(1) &&
                      grad_any.scalar_type() == x_any.scalar_type(),
                  "butterfly: grad must have the shape and dtype of x");
  const Tensor x = with_contiguous_rows(x_any);
  const Tensor grad = with_contiguous_rows(grad_any);
  const Tensor blocks = as_contiguous(blocks_any);
  const int64_t tokens = x.size(0), d = shape.features;
  Tensor dblocks = allocate_zeros(blocks, {need_blocks ? shape.factors : 0, blocks.size(1), shape.block, shape.block});
  if (tokens == 0 || d == 0 || (!dx && !need_blocks)) return dblocks;

  constexpr int64_t kCached = 64;  // a page for each factor and the sums of its blocks: a second-level cache
  const int64_t count = range_features(shape, kCached, torch::stable::get_num_threads());
  const int64_t work = 3 * tokens * count * shape.block * shape.factors;
  const float* q = static_cast<const float*>(blocks.const_data_ptr());
  float* dq = need_blocks ? static_cast<float*>(dblocks.mutable_data_ptr()) : nullptr;

  torch::stable::parallel_for(0, (d + count - 1) / count, 1 + kGrainWork / work, [&](int64_t begin, int64_t end) {
    Scratch scratch(butterfly_scratch_floats(shape, {0, count}, true));
    for (int64_t first = begin * count; first < std::min(end * count, d); first += count) {
      loops().bwd(shape, {first, std::min(count, d - first)}, tokens, rows_from(grad, 0), rows_from(x, 0), q,
                  dx ? rows_into(*dx, 0) : MutableRows{}, dq, scratch.data());
    }
  });
  return dblocks;
}

Tensor butterfly_fwd(const Tensor& x_any, const Tensor& blocks) {
  const Tensor x = as_rows(x_any, "x");
  const Tensor y = allocate(x, {x.size(0), x.size(1)});
  rotate(x, blocks, y);
  return like_rows(y, x_any);
}

// One that is not asked for comes back with no rows.
std::tuple<Tensor, Tensor> butterfly_bwd(const Tensor& grad, const Tensor& x_any, const Tensor& blocks, bool need_x,
                                         bool need_blocks) {
  const Tensor x = as_rows(x_any, "x");
  const Tensor dx = allocate(x, {need_x ? x.size(0) : 0, x.size(1)});
  const Tensor dblocks =
      rotate_bwd(as_rows(grad, "grad"), x, blocks, need_x ? std::optional(dx) : std::nullopt, need_blocks);
  return {need_x ? like_rows(dx, x_any) : dx, dblocks};
}

struct Scale {
  const float* s;
  const void* bias;
};

Scale check_scale(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& scale) {
  check_cpu(weight, "weight");
  check_cpu(scale, "scale");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1) && weight.scalar_type() == x.scalar_type(),
                  "boft: weight must have shape (out, ", x.size(1), ") and the dtype of x");
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(0) == weight.size(0) && scale.size(1) == 1 &&
                      scale.scalar_type() == ScalarType::Float,
                  "boft: scale must be float32 of shape (", weight.size(0), ", 1)");
  if (bias) {
    check_cpu(*bias, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == x.scalar_type() &&
                        bias->is_contiguous(),
                    "boft: bias must be a contiguous vector of ", weight.size(0), " entries in the dtype of x");
  }
  return {static_cast<const float*>(scale.const_data_ptr()), bias ? bias->const_data_ptr() : nullptr};
}

// y = (y0 - b) s + b with y0 = x R W^T + b. y0 is returned where it is kept, else without rows.
std::tuple<Tensor, Tensor> boft_fwd(const Tensor& x_any, const Tensor& weight, const std::optional<Tensor>& bias,
                                    const Tensor& blocks, const Tensor& scale_any, bool keep) {
  const Tensor x = as_rows(x_any, "x"), scale = as_contiguous(scale_any);
  // Passed on at once: in memory that stays with the thread, because fresh pages cost as much as the rotation.
  Scratch memory(x.numel());
  const Tensor rotated = tensor_over(memory.data(), x, {x.size(0), x.size(1)});
  rotate(x, blocks, rotated);
  const Scale by = check_scale(x, weight, bias, scale);
  const int64_t tokens = x.size(0), features = weight.size(0);
  const Tensor y0 = base_product(rotated, weight, bias, features);
  Tensor y = keep ? allocate(y0, {tokens, features}) : y0;
  const Scalar scalar = scalar_of(x, "x");
  torch::stable::parallel_for(
      0, tokens, 1 + kGrainWork / std::max<int64_t>(features, 1), [&](int64_t begin, int64_t end) {
        loops().scale_fwd(scalar, end - begin, features, rows_from(y0, begin), by.bias, by.s, rows_into(y, begin));
      });
  return {like_rows(y, x_any), keep ? y0 : allocate(y0, {0, features})};
}

// Gradients of x, blocks and scale; the last if y0 is given. One that is not asked for comes back with no rows.
std::tuple<Tensor, Tensor, Tensor> boft_bwd(const Tensor& grad_any, const Tensor& x_any, const Tensor& weight,
                                            const std::optional<Tensor>& bias, const Tensor& blocks,
                                            const Tensor& scale_any, const std::optional<Tensor>& y0_any, bool need_x,
                                            bool need_blocks) {
  const Tensor x = as_rows(x_any, "x"), grad_rows = as_rows(grad_any, "grad"), scale = as_contiguous(scale_any);
  check_shape(x, blocks);
  const Scale by = check_scale(x, weight, bias, scale);
  const int64_t tokens = x.size(0), features = weight.size(0);
  for (const std::optional<Tensor>& same : {std::optional(grad_rows), y0_any}) {
    if (!same) continue;
    check_cpu(*same, "grad and y0");
    STD_TORCH_CHECK(same->dim() == 2 && same->size(0) == tokens && same->size(1) == features &&
                        same->scalar_type() == x.scalar_type(),
                    "boft: grad and y0 must have shape (", tokens, ", ", features, ") and the dtype of x");
  }
  const Tensor grad = with_contiguous_rows(grad_rows);
  const std::optional<Tensor> y0 = y0_any ? std::optional(with_contiguous_rows(*y0_any)) : std::nullopt;
  const bool rotates = need_x || need_blocks;
  Tensor dscale = allocate_zeros(scale, {y0 ? features : 0, 1});
  Scratch memory(rotates ? tokens * features : 0);
  const Tensor scaled = tensor_over(memory.data(), grad, {rotates ? tokens : 0, features});
  float* ds = y0 ? static_cast<float*>(dscale.mutable_data_ptr()) : nullptr;
  const Scalar scalar = scalar_of(x, "x");
  const int64_t tasks = (features + kScaleColumns - 1) / kScaleColumns;
  const int64_t grain = 1 + kGrainWork / std::max<int64_t>(tokens * kScaleColumns, 1);
  torch::stable::parallel_for(0, tokens ? tasks : 0, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kScaleColumns; first < std::min(end * kScaleColumns, features);
         first += kScaleColumns) {
      loops().scale_bwd(scalar, tokens, first, std::min(first + kScaleColumns, features), rows_from(grad, 0),
                        y0 ? rows_from(*y0, 0) : Rows{}, by.bias, by.s, rotates ? rows_into(scaled, 0) : MutableRows{},
                        ds);
    }
  });
  const Tensor rotated = rotates ? base_gradient(scaled, weight, x.size(1)) : x;
  const Tensor dblocks = rotate_bwd(rotated, x, blocks, need_x ? std::optional(rotated) : std::nullopt, need_blocks);
  return {need_x ? like_rows(rotated, x_any) : allocate(x, {0, x.size(1)}), dblocks, dscale};
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("butterfly_fwd", TORCH_BOX(&fastpeft::butterfly_fwd));
  m.impl("butterfly_bwd", TORCH_BOX(&fastpeft::butterfly_bwd));
  m.impl("boft_fwd", TORCH_BOX(&fastpeft::boft_fwd));
  m.impl("boft_bwd", TORCH_BOX(&fastpeft::boft_bwd));
}
