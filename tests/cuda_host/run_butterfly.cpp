// Runs butterfly_fwd_kernel of csrc/cuda/boft.cuh on the CPU, launched as its plan says. tests/test_cuda_boft.py
// builds and calls it:
//
//   run_butterfly plan dtype tokens features b factors max_shared
//       prints the plan
//   run_butterfly run  dtype tokens features b factors max_shared x_row_stride x_offset blocks_offset seeds x blocks y
//       reads x and blocks from files, runs the kernel once for every seed 0, ..., seeds - 1, and writes y
//
// Offsets are elements from a 16-byte boundary. The buffers have no byte more than the tensors, so that reading outside
// of them is seen, and every seed must give the same bits: an order of threads that matters is a race.
#include <fstream>
#include <iostream>
#include <string>

#include "cuda/boft.cuh"

namespace fastpeft {

constexpr size_t kMaxShared = 227 << 10;  // of a thread block on sm_90
float4 shared_memory[kMaxShared / sizeof(float4)];

namespace {

[[noreturn]] void fail(const std::string& message) {
  std::cerr << "run_butterfly: " << message << "\n";
  std::exit(1);
}

// `bytes` of memory that end where the allocation ends and begin `offset` bytes behind a 16-byte boundary.
class Buffer {
 public:
  Buffer(size_t bytes, size_t offset) : memory_(new char[offset + bytes]), data_(memory_.get() + offset) {
    std::memset(memory_.get(), 0xff, offset + bytes);
  }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::unique_ptr<char[]> memory_;
  char* data_;
};

Buffer read_file(const std::string& path, size_t bytes, size_t offset) {
  Buffer buffer(bytes, offset);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(buffer.as<char>(), static_cast<std::streamsize>(bytes))) fail("cannot read " + path);
  return buffer;
}

struct Arguments {
  std::string mode, dtype;
  int64_t tokens = 0, features = 0, b = 0, factors = 0, max_shared = 0;
  int64_t x_row_stride = 0, x_offset = 0, blocks_offset = 0, seeds = 0;
  std::string x_path, blocks_path, y_path;
};

ButterflyPlan plan_for(const Arguments& args, int element_bytes, int kernel_size) {
  const ButterflyPlan plan =
      plan_butterfly(args.tokens, args.features, args.b, args.factors, element_bytes, args.max_shared, kernel_size);
  if (plan.error) fail(plan.error);
  return plan;
}

template <typename T>
void run(const Arguments& args) {
  const size_t numel = static_cast<size_t>(args.tokens * args.features);
  const size_t x_numel = numel ? static_cast<size_t>((args.tokens - 1) * args.x_row_stride + args.features) : 0;
  const size_t blocks_bytes = static_cast<size_t>(args.factors * args.features * args.b) * sizeof(float);
  const Buffer x = read_file(args.x_path, x_numel * sizeof(T), static_cast<size_t>(args.x_offset) * sizeof(T));
  const Buffer blocks = read_file(args.blocks_path, blocks_bytes, static_cast<size_t>(args.blocks_offset) * 4);
  const std::span shared = std::as_writable_bytes(std::span(shared_memory));

  std::string first;
  for (int64_t seed = 0; seed < args.seeds; ++seed) {
    const Buffer y(numel * sizeof(T), 0);
    if (args.tokens > 0) {  // as in the launcher: there are no empty grids
      const int kernel_size = butterfly_kernel_size(args.b, blocks.as<float>());
      const ButterflyPlan plan = plan_for(args, sizeof(T), kernel_size);
      with_butterfly_kernel_size(kernel_size, [&]<int B>() {
        cuda_host::launch(plan.grid, plan.block, shared, static_cast<size_t>(plan.shared_bytes),
                          static_cast<unsigned>(seed), [&] {
                            butterfly_fwd_kernel<T, B>(x.as<T>(), blocks.as<float>(), y.as<T>(), args.tokens,
                                                       args.features, args.x_row_stride, static_cast<int>(args.factors),
                                                       static_cast<int>(args.b), plan.tile);
                          });
      });
    }
    const std::string bits(y.as<char>(), numel * sizeof(T));
    if (seed == 0) first = bits;
    if (bits != first) fail("the order of the threads changes the result, seed " + std::to_string(seed));
  }
  if (!std::ofstream(args.y_path, std::ios::binary).write(first.data(), static_cast<std::streamsize>(first.size()))) {
    fail("cannot write " + args.y_path);
  }
}

template <typename T>
void print_plan(const Arguments& args) {
  const int kernel_size = butterfly_kernel_size(args.b, nullptr);
  const ButterflyPlan plan = plan_for(args, sizeof(T), kernel_size);
  std::cout << "{\"grid\": " << plan.grid.x << ", \"block\": [" << plan.block.x << ", " << plan.block.y
            << "], \"shared_bytes\": " << plan.shared_bytes << ", \"rows\": " << plan.tile.rows
            << ", \"features\": " << plan.tile.features << ", \"row_stride\": " << plan.tile.row_stride
            << ", \"across\": " << plan.tile.across << "}\n";
}

template <typename T>
void call(const Arguments& args) {
  if (args.mode == "plan") {
    print_plan<T>(args);
  } else {
    run<T>(args);
  }
}

}  // namespace
}  // namespace fastpeft

int main(int argc, char** argv) {
  using namespace fastpeft;
  if (argc != 8 && argc != 15) fail("expected 7 or 14 arguments, got " + std::to_string(argc - 1));
  const auto number = [&](int i) { return std::stoll(argv[i]); };
  Arguments args;
  args.mode = argv[1], args.dtype = argv[2];
  args.tokens = number(3), args.features = number(4), args.b = number(5), args.factors = number(6);
  args.max_shared = number(7);
  if (argc == 15) {
    args.x_row_stride = number(8), args.x_offset = number(9), args.blocks_offset = number(10), args.seeds = number(11);
    args.x_path = argv[12], args.blocks_path = argv[13], args.y_path = argv[14];
  }
  if (args.dtype == "float32") {
    call<float>(args);
  } else if (args.dtype == "float16") {
    call<__half>(args);
  } else if (args.dtype == "bfloat16") {
    call<__nv_bfloat16>(args);
  } else {
    fail("unknown dtype " + args.dtype);
  }
}
