// Counts the bank conflicts of the butterfly kernels, launched as their plans say on ones:
//
//   run_banks fwd|bwd dtype tokens features b factors offset
//       prints the highest degree of each kind of access to shared memory, see banks.h. Rows of activations begin
//       `offset` elements from a 16-byte boundary
#include "banks.h"
#include "cuda/boft.cuh"
#include "cuda/boft_bwd.cuh"
#include "program.h"

namespace fastpeft {

constexpr int64_t kMaxShared = 227 << 10;  // of a thread block on sm_90
__shared__ float4 shared_memory[kMaxShared / sizeof(float4)];

namespace {

using namespace cuda_host;

struct alignas(16) Aligned {
  char bytes[16];
};

template <typename T>
std::map<std::string, unsigned> count(const std::string& mode, int64_t tokens, int64_t features, int64_t b,
                                      int64_t factors, int64_t offset) {
  const size_t numel = static_cast<size_t>(tokens * features), padded = numel * sizeof(T) / 16 + 2;
  std::vector<Aligned> x(padded), grad(padded), y(padded), blocks(static_cast<size_t>(factors * features * b) / 4 + 1);
  std::vector<Aligned> parts(2 * blocks.size());  // of two groups
  const auto rows = [&](std::vector<Aligned>& of) { return reinterpret_cast<T*>(of.data()) + offset; };
  const auto floats = [](std::vector<Aligned>& of) { return reinterpret_cast<float*>(of.data()); };

  const std::span shared = std::as_writable_bytes(std::span(shared_memory));
  const int kernel_size = butterfly_kernel_size(b, blocks.data()), block_size = static_cast<int>(b);
  const ButterflyPlan fwd = plan_butterfly(tokens, features, b, factors, sizeof(T), kMaxShared, kernel_size);
  const ButterflyBwdPlan bwd =
      plan_butterfly_bwd(tokens, features, b, factors, sizeof(T), kMaxShared, 1, kernel_size, true);
  const ButterflyPlan& plan = mode == "fwd" ? fwd : bwd;
  if (plan.error) fail(plan.error);
  cuda_host::Banks banks(shared);
  with_boft_kernel_size(kernel_size, [&]<int B>() {
    cuda_host::launch(plan.grid, plan.block, shared, static_cast<size_t>(plan.shared_bytes), 0, [&] {
      if (mode == "fwd") {
        butterfly_fwd_kernel<T, B>(rows(x), floats(blocks), rows(y), tokens, features, features,
                                   static_cast<int>(factors), block_size, plan.tile);
      } else {
        butterfly_bwd_kernel<B>(kElement<T>, rows(grad), rows(x), floats(blocks), rows(y), floats(parts), tokens,
                                features, features, features, static_cast<int>(factors), block_size, plan.tile,
                                bwd.chunk, bwd.sums_in_shared);
      }
    });
  });
  return banks.degrees();
}

}  // namespace
}  // namespace fastpeft

int main(int argc, char** argv) {
  if (argc != 8) return 2;
  const std::string mode = argv[1], dtype = argv[2];
  const auto number = [&](int i) { return std::stoll(argv[i]); };
  const auto run = dtype == "float32" ? fastpeft::count<float> : fastpeft::count<__nv_bfloat16>;
  const char* separator = "{";
  for (const auto& [kind, degree] : run(mode, number(3), number(4), number(5), number(6), number(7))) {
    std::cout << separator << "\"" << kind << "\": " << degree;
    separator = ", ";
  }
  std::cout << "}\n";
}
