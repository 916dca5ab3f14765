// The operators fastpeft::cayley_fwd, cayley_bwd and boft_reflectors on CPU tensors. Schemas and fakes:
// fastpeft/ops/boft.py and boft_many.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "common/boft_reflectors.h"
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

// Calls run(group, scratch) for groups of as many blocks as there are lanes.
template <typename Run>
void in_groups(int64_t groups, int64_t block, Run run) {
  constexpr int64_t kGrainWork = 1 << 18;  // multiply-adds from which on another thread is worth waking
  if (groups * block == 0) return;
  const int64_t grain = 1 + kGrainWork / (loops().lanes * block * block * block);
  torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(loops().scratch_floats(block));
    for (int64_t group = begin; group < end; ++group) run(group, scratch.data());
  });
}

// Calls run(first number, count, scratch) for all blocks, as many at a time as there are lanes.
template <typename Run>
void for_each_group(const Tensor& blocks, Run run) {
  const int64_t count = blocks.size(0) * blocks.size(1), block = blocks.size(2), lanes = loops().lanes;
  in_groups((count + lanes - 1) / lanes, block, [&](int64_t group, float* scratch) {
    const int64_t first = group * lanes;
    run(first * block * block, std::min(lanes, count - first), block, scratch);
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

// Rows of an arena. Blocks at one place of their strips are a group's lanes.
Tensor boft_reflectors(const Tensor& r_any, int64_t factors) {
  check_blocks(r_any, "boft_R");
  const Tensor r = as_contiguous(r_any);
  const int64_t n_blocks = r.size(1), b = r.size(2), features = n_blocks * b;
  STD_TORCH_CHECK(
      factors > 0 && r.size(0) % factors == 0 && b > 0 && factors < 32 && features % (b << (factors - 1)) == 0,
      "boft_reflectors: boft_R must hold factors that fit, got factors=", factors);
  const int64_t in_strip = strip_features(features, b, factors) / b, strips = n_blocks / in_strip;
  const int64_t numbers = reflector_numbers(b), lanes = loops().lanes, groups = (strips + lanes - 1) / lanes;
  Tensor rows = allocate(r, {r.size(0) / factors, factors * n_blocks * numbers});
  const float* from = static_cast<const float*>(r.const_data_ptr());
  float* to = static_cast<float*>(rows.mutable_data_ptr());
  in_groups(r.size(0) * in_strip * groups, b, [&](int64_t group, float* scratch) {
    const int64_t place = group / groups, first = group % groups * lanes;  // place: of all factors
    const int64_t block = place / in_strip * n_blocks + first * in_strip + place % in_strip;
    loops().reflectors(from + block * b * b, in_strip * b * b, std::min(lanes, strips - first), b,
                       to + place * numbers * strips + first, strips, scratch);
  });
  return rows;
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("cayley_fwd", TORCH_BOX(&fastpeft::cayley_fwd));
  m.impl("cayley_bwd", TORCH_BOX(&fastpeft::cayley_bwd));
  m.impl("boft_reflectors", TORCH_BOX(&fastpeft::boft_reflectors));
}
