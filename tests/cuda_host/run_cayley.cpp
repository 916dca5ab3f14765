// Runs the kernels of csrc/cuda/boft_cayley.cuh on the CPU, launched as their plan says. tests/test_cuda_cayley.py
// builds and calls it:
//
//   run_cayley plan count b
//       prints the plan
//   run_cayley fwd count b offset seeds r q
//   run_cayley bwd count b offset seeds grad q dr
//       reads the first files, runs the kernel once for every seed 0, ..., seeds - 1, and writes the last one
//
// `offset` counts the floats from a 16-byte boundary. The buffers have no byte more than the tensors, and every seed
// must give the same bits, as in run_butterfly.cpp.
#include "cuda/boft_cayley.cuh"
#include "program.h"

namespace fastpeft {

__shared__ float4 shared_memory[(64 << 10) / sizeof(float4)];

}  // namespace fastpeft

int main(int argc, char** argv) {
  using namespace fastpeft;
  using namespace cuda_host;
  const std::string mode = argc > 3 ? argv[1] : "";
  if ((mode != "plan" || argc != 4) && (mode != "fwd" || argc != 8) && (mode != "bwd" || argc != 9)) {
    fail("see the top of run_cayley.cpp for usage");
  }
  const int64_t count = std::stoll(argv[2]), b = std::stoll(argv[3]);
  const CayleyPlan plan = plan_cayley(count, b);
  if (plan.error) fail(plan.error);
  if (mode == "plan") {
    std::cout << "{\"grid\": " << plan.grid.x << ", \"threads\": " << plan.block.x
              << ", \"shared_bytes\": " << plan.shared_bytes << "}\n";
    return 0;
  }

  const size_t bytes = static_cast<size_t>(count * b * b) * sizeof(float);
  const size_t offset = static_cast<size_t>(std::stoll(argv[4])) * sizeof(float);
  const Buffer one = read_buffer(argv[6], bytes, offset);
  const Buffer other = mode == "bwd" ? read_buffer(argv[7], bytes, offset) : Buffer(0, 0);
  std::string first;
  for (unsigned seed = 0; seed < std::stoul(argv[5]); ++seed) {
    const Buffer out(bytes, offset);
    with_boft_kernel_size(boft_kernel_size(b), [&]<int B>() {
      launch(plan.grid, plan.block, std::as_writable_bytes(std::span(shared_memory)),
             static_cast<size_t>(plan.shared_bytes), seed, [&] {
               if (mode == "fwd") {
                 cayley_fwd_kernel<B>(one.as<float>(), out.as<float>(), count * b, static_cast<int>(b));
               } else {
                 cayley_bwd_kernel<B>(one.as<float>(), other.as<float>(), out.as<float>(), count * b,
                                      static_cast<int>(b));
               }
             });
    });
    check_same(std::string(out.as(), bytes), first, seed);
  }
  write_file(argv[argc - 1], first);
}
