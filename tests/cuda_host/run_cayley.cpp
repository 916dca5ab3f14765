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
#include <fstream>
#include <iostream>
#include <string>

#include "cuda/boft_cayley.cuh"

namespace fastpeft {

float4 shared_memory[(64 << 10) / sizeof(float4)];

namespace {

[[noreturn]] void fail(const std::string& message) {
  std::cerr << "run_cayley: " << message << "\n";
  std::exit(1);
}

// Floats that end where the allocation ends and begin `offset` of them behind a 16-byte boundary.
struct Buffer {
  size_t count, offset;
  std::unique_ptr<float[]> memory;

  Buffer(size_t count, size_t offset) : count(count), offset(offset), memory(new float[offset + count]) {
    std::memset(memory.get(), 0xff, (offset + count) * sizeof(float));
  }
  float* data() const { return memory.get() + offset; }
  char* bytes() const { return reinterpret_cast<char*>(data()); }
};

void read_file(const std::string& path, const Buffer& buffer) {
  std::ifstream file(path, std::ios::binary);
  if (!file.read(buffer.bytes(), static_cast<std::streamsize>(buffer.count * sizeof(float)))) {
    fail("cannot read " + path);
  }
}

}  // namespace
}  // namespace fastpeft

int main(int argc, char** argv) {
  using namespace fastpeft;
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

  const size_t numel = static_cast<size_t>(count * b * b), offset = static_cast<size_t>(std::stoll(argv[4]));
  const Buffer one(numel, offset), other(numel, offset);
  read_file(argv[6], one);
  if (mode == "bwd") read_file(argv[7], other);
  std::string first;
  for (unsigned seed = 0; seed < std::stoul(argv[5]); ++seed) {
    const Buffer out(numel, offset);
    with_cayley_kernel_size(cayley_kernel_size(b), [&]<int B>() {
      cuda_host::launch(plan.grid, plan.block, std::as_writable_bytes(std::span(shared_memory)),
                        static_cast<size_t>(plan.shared_bytes), seed, [&] {
                          if (mode == "fwd") {
                            cayley_fwd_kernel<B>(one.data(), out.data(), count * b, static_cast<int>(b));
                          } else {
                            cayley_bwd_kernel<B>(one.data(), other.data(), out.data(), count * b, static_cast<int>(b));
                          }
                        });
    });
    const std::string bits(out.bytes(), numel * sizeof(float));
    if (seed == 0) first = bits;
    if (bits != first) fail("the order of the threads changes the result, seed " + std::to_string(seed));
  }
  const std::string path = argv[argc - 1];
  if (!std::ofstream(path, std::ios::binary).write(first.data(), static_cast<std::streamsize>(first.size()))) {
    fail("cannot write " + path);
  }
}
