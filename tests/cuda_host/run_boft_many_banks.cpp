// Counts the bank conflicts of the butterfly kernels for many adapters, launched as their plan says on zeros:
//
//   run_boft_many_banks dtype tokens features b factors processors offset
//       prints the highest degree of each kind of access to shared memory, see banks.h. Rows of x begin `offset`
//       elements from a 16-byte boundary
#include "banks.h"
#include "cuda/boft_many.cuh"
#include "program.h"

namespace fastpeft::many {

constexpr int64_t kMaxShared = 227 << 10;  // of a thread block on sm_90
__shared__ float4 shared_memory[kMaxShared / sizeof(float4)];

namespace {

using namespace cuda_host;

struct alignas(16) Aligned {
  char bytes[16];
};

template <typename T>
std::map<std::string, unsigned> count(int64_t tokens, int64_t features, int64_t b, int64_t factors, int64_t processors,
                                      int64_t offset) {
  const size_t padded = static_cast<size_t>(tokens * features) * sizeof(T) / 16 + 2;
  std::vector<Aligned> x(padded), z(padded);
  std::vector<float> arena(static_cast<size_t>(factors * (features / b) * reflector_numbers(b)));
  std::vector<int> rows(static_cast<size_t>(tokens)), slots(rows.size(), 0);
  std::iota(rows.begin(), rows.end(), 0);
  const int table = 0;

  const std::span shared = std::as_writable_bytes(std::span(shared_memory));
  const RotatePlan plan = plan_rotate_many(tokens, features, b, factors, kMaxShared, processors);
  if (plan.error) fail(plan.error);
  const RotateArguments args{
      .element = kElement<T>,
      .x = reinterpret_cast<T*>(x.data()) + offset,
      .x_row_stride = features,
      .z = z.data(),
      .arena = arena.data(),
      .arena_rows = 1,
      .row_reflectors = &table,
      .row_numbers = rows.data(),
      .slot_numbers = slots.data(),
      .tokens = static_cast<int>(tokens),
      .slots = 1,
      .features = static_cast<int>(features),
      .factors = static_cast<int>(factors),
      .block_size = static_cast<int>(b),
      .strip = static_cast<int>(strip_features(features, b, factors)),
      .tile = plan.tile,
  };
  cuda_host::Banks banks(shared);
  with_boft_kernel_size(boft_kernel_size(b), [&]<int B>() {
    launch(plan.grid, plan.block, shared, static_cast<size_t>(plan.shared_bytes), 0,
           [&] { boft_rotate_many_kernel<B>(args); });
  });
  return banks.degrees();
}

}  // namespace
}  // namespace fastpeft::many

int main(int argc, char** argv) {
  if (argc != 8) return 2;
  const std::string dtype = argv[1];
  const auto number = [&](int i) { return std::stoll(argv[i]); };
  const auto run = dtype == "float32" ? fastpeft::many::count<float> : fastpeft::many::count<__nv_bfloat16>;
  const char* separator = "{";
  for (const auto& [kind, degree] : run(number(2), number(3), number(4), number(5), number(6), number(7))) {
    std::cout << separator << "\"" << kind << "\": " << degree;
    separator = ", ";
  }
  std::cout << "}\n";
}
