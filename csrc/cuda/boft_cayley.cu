// The operators fastpeft::cayley_fwd and cayley_bwd on CUDA tensors. Schemas and fakes: fastpeft/ops/boft.py; maths:
// boft_cayley.cuh.
#include "cuda/boft_cayley.cuh"
#include "cuda/tensor.h"

namespace fastpeft {
namespace {

void check_blocks(const Tensor& blocks, const char* name) {
  STD_TORCH_CHECK(blocks.is_cuda(), "cayley: ", name, " must be on a GPU, it is not");
  STD_TORCH_CHECK(blocks.scalar_type() == ScalarType::Float, "cayley: ", name, " must be float32, got ",
                  blocks.scalar_type());
  STD_TORCH_CHECK(blocks.dim() == 4, "cayley: ", name, " must have shape (factors, features / b, b, b), got ",
                  blocks.dim(), " dimensions");
  STD_TORCH_CHECK(blocks.size(2) == blocks.size(3), "cayley: ", name,
                  " must have shape (factors, features / b, b, b), got (", blocks.size(0), ", ", blocks.size(1), ", ",
                  blocks.size(2), ", ", blocks.size(3), ")");
}

// Launches a kernel over all of `blocks`; `arguments` comes first.
template <typename Kernel, typename... Arguments>
void launch_cayley(Kernel kernel, const CayleyPlan& plan, const Tensor& blocks, const Arguments&... arguments) {
  const int64_t b = blocks.size(3);
  launch_kernel(kernel, plan, current_stream(blocks.get_device_index()), arguments..., blocks.numel() / b,
                static_cast<int>(b));
}

CayleyPlan plan_for(const Tensor& blocks, const char* name) {
  const CayleyPlan plan = plan_cayley(blocks.size(0) * blocks.size(1), blocks.size(3));
  STD_TORCH_CHECK(plan.error == nullptr, "cayley: ", name, " of shape (", blocks.size(0), ", ", blocks.size(1), ", ",
                  blocks.size(2), ", ", blocks.size(3), "): ", plan.error);
  return plan;
}

// The orthogonal blocks of the trained ones.
Tensor cayley_fwd(const Tensor& r_any) {
  check_blocks(r_any, "boft_R");
  const torch::stable::accelerator::DeviceGuard guard(r_any.get_device_index());
  const Tensor q = allocate_like(r_any);
  if (q.numel() == 0) return q;
  const CayleyPlan plan = plan_for(r_any, "boft_R");
  const Tensor r = torch::stable::contiguous(r_any);
  with_boft_kernel_size(boft_kernel_size(r.size(3)), [&]<int B>() {
    launch_cayley(cayley_fwd_kernel<B>, plan, r, static_cast<const float*>(r.const_data_ptr()),
                  static_cast<float*>(q.mutable_data_ptr()));
  });
  return q;
}

Tensor cayley_bwd(const Tensor& grad_any, const Tensor& q_any) {
  check_blocks(grad_any, "grad");
  check_blocks(q_any, "blocks");
  check_device(grad_any, "cayley", "grad", q_any, "blocks");
  STD_TORCH_CHECK(
      grad_any.size(0) == q_any.size(0) && grad_any.size(1) == q_any.size(1) && grad_any.size(2) == q_any.size(2),
      "cayley: grad must have the shape of blocks, (", q_any.size(0), ", ", q_any.size(1), ", ", q_any.size(2), ", ",
      q_any.size(3), "), got (", grad_any.size(0), ", ", grad_any.size(1), ", ", grad_any.size(2), ", ",
      grad_any.size(3), ")");
  const torch::stable::accelerator::DeviceGuard guard(q_any.get_device_index());
  const Tensor dr = allocate_like(q_any);
  if (dr.numel() == 0) return dr;
  const CayleyPlan plan = plan_for(q_any, "blocks");
  const Tensor grad = torch::stable::contiguous(grad_any), q = torch::stable::contiguous(q_any);
  with_boft_kernel_size(boft_kernel_size(q.size(3)), [&]<int B>() {
    launch_cayley(cayley_bwd_kernel<B>, plan, q, static_cast<const float*>(grad.const_data_ptr()),
                  static_cast<const float*>(q.const_data_ptr()), static_cast<float*>(dr.mutable_data_ptr()));
  });
  return dr;
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) {
  m.impl("cayley_fwd", TORCH_BOX(&fastpeft::cayley_fwd));
  m.impl("cayley_bwd", TORCH_BOX(&fastpeft::cayley_bwd));
}
