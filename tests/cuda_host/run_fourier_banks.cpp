// Counts the bank conflicts of FourierFT's kernel on two tokens, from a length to the same length:
//
//   run_fourier_banks length max_shared
//       prints the highest degree between two barriers each, see banks.h: of the way to a spectrum pass by pass, of the
//       scatter, and of the way back. Without coefficients: what the gather reads lies where chance puts it
#include "banks.h"
#include "cuda/fourierft.cuh"
#include "program.h"

namespace fastpeft::fourier {

__shared__ float4 shared_memory[(227 << 10) / sizeof(float4)];  // of a thread block on sm_90

namespace {

std::vector<unsigned> count(int length, int64_t max_shared) {
  const Plan plan = plan_fourier(2, length, length, 0, max_shared, 1);
  if (plan.error || plan.kind == Kind::kSplit) cuda_host::fail("no plan for the length in shared memory");
  const Tables tables = make_tables(length);
  const std::vector<float> x(2 * static_cast<size_t>(length), 1.0f);
  const std::vector<int> offsets(static_cast<size_t>(length) + 1);
  std::vector<float> y(x.size());
  Arguments args{};
  args.tokens = 2, args.scale = 1.0f, args.groups = 1;
  for (Transform& transform : args.transform) {
    transform = tables.transform;
    transform.table = tables.table.data(), transform.position = tables.position.data();
  }
  args.source = {x.data(), length};
  args.y = y.data(), args.y_stride = length;
  args.offsets = offsets.data();

  const std::span shared = std::as_writable_bytes(std::span(shared_memory));
  cuda_host::Banks banks(shared);
  cuda_host::launch(1, static_cast<unsigned>(plan.threads), shared, static_cast<size_t>(plan.shared_bytes), 0, [&] {
    if (plan.kind == Kind::kShort) {
      fourier_kernel<float, ShortSignals>(args);
    } else {
      fourier_kernel<float, LongSignals>(args);
    }
  });
  return banks.degrees_between_barriers();
}

}  // namespace
}  // namespace fastpeft::fourier

int main(int argc, char** argv) {
  if (argc != 3) cuda_host::fail("see the top of run_fourier_banks.cpp");
  const char* separator = "[";
  for (unsigned degree : fastpeft::fourier::count(std::stoi(argv[1]), std::stoll(argv[2]))) {
    std::cout << separator << degree;
    separator = ", ";
  }
  std::cout << "]\n";
}
