// What LoRA and MoS have in common on CPU tensors: products with a pair of low-rank matrices made of shards.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/lora_loops.h"

namespace fastpeft {

const LoraLoops& lora_loops();

// Pointers to rows or shards, and the matrix they make up.
struct ShardTable {
  std::vector<const float*> pointers;
  int64_t rank, per_row, width;

  Shards view() const { return {pointers.data(), rank, per_row, width}; }
};

// `rank` rows of `width` floats, one after the other.
ShardTable rows_table(const float* rows, int64_t rank, int64_t width);

struct LowRank {
  Shards a;  // A, over the features of x
  Shards b;  // B transposed, over the features of y
  double scaling;
};

// x as dropout left it for the adapter, as rows; checked against the rows of x.
torch::stable::Tensor rows_of_dropped(const torch::stable::Tensor& dropped, const torch::stable::Tensor& x);

// The address of h's numbers; never null, as that of a tensor without any may be.
const float* floats_of(const torch::stable::Tensor& h);

// h = x A^T, y += scaling * h B^T.
void low_rank_fwd(const LowRank& m, const torch::stable::Tensor& x, const torch::stable::Tensor& y, float* h);

// With gB = scaling * grad B: dx += gB A if dx is given, gradients.a = gB^T x if x is given, and
// gradients.b = scaling * h^T grad if h is given; the last two are added where `add` is set. Tasks of the last two own
// columns of the result with all their tokens, so that every sum has one order, whatever the number of threads.
void low_rank_bwd(const LowRank& m, const torch::stable::Tensor& grad, const std::optional<torch::stable::Tensor>& x,
                  const float* h, const std::optional<torch::stable::Tensor>& dx, const LowRank& gradients, bool add);

}  // namespace fastpeft
