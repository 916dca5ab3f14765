// The operators fastpeft::cayley_fwd and cayley_bwd on CPU tensors. Schemas and fakes: fastpeft/ops/boft.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "cpu/boft_cayley_loops.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const CayleyLoops& loops() { return FASTPEFT_ACTIVE(cayley); }

void check_blocks(const Tensor& blocks, const char* name) {
  check_cpu(blocks, name);
  STD_TORCH_CHECK(blocks.dim() == 4 && blocks.size(2) == blocks.size(3) && blocks.scalar_type() == ScalarType::Float,
                  "cayley: ", name, " must be float32 of shape (factors, features / b, b, b)");
}

// Calls run(first block, count, scratch) for all blocks, as many at a time as there are lanes.
template <typename Run>
void for_each_group(const Tensor& blocks, Run run) {
  constexpr int64_t kGrainWork = 1 << 18;  // multiply-adds from which on another thread is worth waking
  const int64_t count = blocks.size(0) * blocks.size(1), block = blocks.size(2), lanes = loops().lanes;
  if (count * block == 0) return;
  const int64_t grain = 1 + kGrainWork / (lanes * block * block * block);
  torch::stable::parallel_for(0, (count + lanes - 1) / lanes, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(loops().scratch_floats(block));
    for (int64_t first = begin * lanes; first < std::min(end * lanes, count); first += lanes) {
      run(first * block * block, std::min(lanes, count - first), block, scratch.data());
    }
  });
}

// The orthogonal blocks of the trained ones.
Tensor cayley_fwd(const Tensor& r_any) {
  check_blocks(r_any, "boft_R");
  const Tensor r = as_contiguous(r_any);
  Tensor q = allocate(r, {r.size(0), r.size(1), r.size(2), r.size(3)});
  const float* from = static_cast<const float*>(r.const_data_ptr());
  float* to = static_cast<float*>(q.mutable_data_ptr());
  for_each_group(r, [&](int64_t offset, int64_t count, int64_t block, float* scratch) {
    loops().fwd(from + offset, count, block, to + offset, scratch);
  });
  return q;
}

Tensor cayley_bwd(const Tensor& grad_any, const Tensor& q_any) {
  check_blocks(grad_any, "grad");
  check_blocks(q_any, "blocks");
  const Tensor grad = as_contiguous(grad_any), q = as_contiguous(q_any);
  STD_TORCH_CHECK(grad.size(0) == q.size(0) && grad.size(1) == q.size(1) && grad.size(2) == q.size(2),
                  "cayley: grad must have the shape of blocks");
  Tensor dr = allocate(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  const float* g = static_cast<const float*>(grad.const_data_ptr());
  const float* from = static_cast<const float*>(q.const_data_ptr());
  float* to = static_cast<float*>(dr.mutable_data_ptr());
  for_each_group(q, [&](int64_t offset, int64_t count, int64_t block, float* scratch) {
    loops().bwd(g + offset, from + offset, count, block, to + offset, scratch);
  });
  return dr;
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("cayley_fwd", TORCH_BOX(&fastpeft::cayley_fwd));
  m.impl("cayley_bwd", TORCH_BOX(&fastpeft::cayley_bwd));
}
