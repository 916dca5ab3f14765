// Runs the butterfly kernels of csrc/cuda/boft.cuh on the CPU, launched as their plans say. tests/test_cuda_boft.py
// builds and calls it:
//
//   run_butterfly plan dtype tokens features b factors max_shared
//       prints the plan
//   run_butterfly plan_bwd dtype tokens features b factors max_shared processors need_blocks
//       prints the plan of the way back
//   run_butterfly run  dtype tokens features b factors max_shared x_row_stride x_offset blocks_offset seeds x blocks y
//       reads x and blocks from files, runs the kernel once for every seed 0, ..., seeds - 1, and writes y
//   run_butterfly bwd  (as run, up to blocks) processors grad dx dblocks
//       the same for the gradients; a path of - says that one is not needed. grad lies in memory as x does
//
// Offsets are elements from a 16-byte boundary. The buffers have no byte more than the tensors, so that reading outside
// of them is seen, and every seed must give the same bits: an order of threads that matters is a race.
#include "cuda/boft.cuh"
#include "cuda/boft_bwd.cuh"
#include "program.h"

namespace fastpeft {

constexpr size_t kMaxShared = 227 << 10;  // of a thread block on sm_90
__shared__ float4 shared_memory[kMaxShared / sizeof(float4)];

namespace {

using namespace cuda_host;

struct Arguments {
  std::string mode, dtype;
  int64_t tokens = 0, features = 0, b = 0, factors = 0, max_shared = 0;
  int64_t x_row_stride = 0, x_offset = 0, blocks_offset = 0, seeds = 0;
  std::string x_path, blocks_path, y_path;
  int64_t processors = 0;
  std::string grad_path, dx_path, dblocks_path;
  bool need_x = false, need_blocks = false;
};

ButterflyPlan plan_for(const Arguments& args, int element_bytes, int kernel_size) {
  const ButterflyPlan plan =
      plan_butterfly(args.tokens, args.features, args.b, args.factors, element_bytes, args.max_shared, kernel_size);
  if (plan.error) fail(plan.error);
  return plan;
}

ButterflyBwdPlan bwd_plan_for(const Arguments& args, Element element, int kernel_size) {
  const ButterflyBwdPlan plan = plan_butterfly_bwd(args.tokens, args.features, args.b, args.factors, bytes_of(element),
                                                   args.max_shared, args.processors, kernel_size, args.need_blocks);
  if (plan.error) fail(plan.error);
  return plan;
}

template <typename T>
Buffer read_rows(const Arguments& args, const std::string& path) {
  const int64_t numel = args.tokens ? (args.tokens - 1) * args.x_row_stride + args.features : 0;
  return read_buffer(path, static_cast<size_t>(numel) * sizeof(T), static_cast<size_t>(args.x_offset) * sizeof(T));
}

Buffer read_blocks(const Arguments& args) {
  const size_t bytes = static_cast<size_t>(args.factors * args.features * args.b) * sizeof(float);
  return read_buffer(args.blocks_path, bytes, static_cast<size_t>(args.blocks_offset) * sizeof(float));
}

// The gradients, as the operator launches them: nothing for no tokens, and no sum of parts for a single group.
template <typename T>
void run_bwd(const Arguments& args) {
  const size_t dx_bytes = args.need_x ? static_cast<size_t>(args.tokens * args.features) * sizeof(T) : 0;
  const int64_t size = args.need_blocks ? args.factors * args.features * args.b : 0;
  const Buffer x = read_rows<T>(args, args.x_path), grad = read_rows<T>(args, args.grad_path);
  const Buffer blocks = read_blocks(args);
  const std::span shared = std::as_writable_bytes(std::span(shared_memory));
  const int kernel_size = butterfly_kernel_size(args.b, blocks.as<float>());
  const ButterflyBwdPlan plan = bwd_plan_for(args, kElement<T>, kernel_size);

  std::string first_dx, first_dblocks;
  for (int64_t seed = 0; seed < args.seeds; ++seed) {
    const Buffer dx(dx_bytes, 0), dblocks(static_cast<size_t>(size) * sizeof(float), 0);
    const Buffer parts(static_cast<size_t>(size * plan.groups) * sizeof(float), 0);
    const bool add = plan.groups > 1;
    with_boft_kernel_size(kernel_size, [&]<int B>() {
      cuda_host::launch(
          plan.grid, plan.block, shared, static_cast<size_t>(plan.shared_bytes), static_cast<unsigned>(seed), [&] {
            butterfly_bwd_kernel<B>(
                kElement<T>, grad.as<T>(), x.as<T>(), blocks.as<float>(), args.need_x ? dx.as<T>() : nullptr,
                !args.need_blocks ? nullptr
                : add             ? parts.as<float>()
                                  : dblocks.as<float>(),
                args.tokens, args.features, args.x_row_stride, args.x_row_stride, static_cast<int>(args.factors),
                static_cast<int>(args.b), plan.tile, plan.chunk, plan.sums_in_shared);
          });
    });
    if (args.need_blocks && add) {
      cuda_host::launch(add_parts_grid(size), kAddPartsThreads, shared, 0, static_cast<unsigned>(seed), [&] {
        butterfly_add_parts_kernel(parts.as<float>(), dblocks.as<float>(), size, plan.groups, parts_are_packed(size));
      });
    }
    check_same(std::string(dx.as<char>(), dx_bytes), first_dx, seed);
    check_same(std::string(dblocks.as<char>(), static_cast<size_t>(size) * sizeof(float)), first_dblocks, seed);
  }
  if (args.need_x) write_file(args.dx_path, first_dx);
  if (args.need_blocks) write_file(args.dblocks_path, first_dblocks);
}

template <typename T>
void run(const Arguments& args) {
  const size_t numel = static_cast<size_t>(args.tokens * args.features);
  const Buffer x = read_rows<T>(args, args.x_path);
  const Buffer blocks = read_blocks(args);
  const std::span shared = std::as_writable_bytes(std::span(shared_memory));

  std::string first;
  for (int64_t seed = 0; seed < args.seeds; ++seed) {
    const Buffer y(numel * sizeof(T), 0);
    if (args.tokens > 0) {  // as in the launcher: there are no empty grids
      const int kernel_size = butterfly_kernel_size(args.b, blocks.as<float>());
      const ButterflyPlan plan = plan_for(args, sizeof(T), kernel_size);
      with_boft_kernel_size(kernel_size, [&]<int B>() {
        cuda_host::launch(plan.grid, plan.block, shared, static_cast<size_t>(plan.shared_bytes),
                          static_cast<unsigned>(seed), [&] {
                            butterfly_fwd_kernel<T, B>(x.as<T>(), blocks.as<float>(), y.as<T>(), args.tokens,
                                                       args.features, args.x_row_stride, static_cast<int>(args.factors),
                                                       static_cast<int>(args.b), plan.tile);
                          });
      });
    }
    check_same(std::string(y.as<char>(), numel * sizeof(T)), first, seed);
  }
  write_file(args.y_path, first);
}

void print_plan(const ButterflyPlan& plan) {
  std::cout << "{\"grid\": " << plan.grid.x << ", \"block\": [" << plan.block.x << ", " << plan.block.y
            << "], \"shared_bytes\": " << plan.shared_bytes << ", \"rows\": " << plan.tile.rows
            << ", \"features\": " << plan.tile.features << ", \"across\": " << plan.tile.across;
}

template <typename T>
void call(const Arguments& args) {
  const int kernel_size = butterfly_kernel_size(args.b, nullptr);
  if (args.mode == "plan") {
    print_plan(plan_for(args, sizeof(T), kernel_size));
    std::cout << "}\n";
  } else if (args.mode == "plan_bwd") {
    const ButterflyBwdPlan plan = bwd_plan_for(args, kElement<T>, kernel_size);
    print_plan(plan);
    std::cout << ", \"chunk\": " << plan.chunk << ", \"groups\": " << plan.groups
              << ", \"sums_in_shared\": " << plan.sums_in_shared << "}\n";
  } else if (args.mode == "bwd") {
    run_bwd<T>(args);
  } else {
    run<T>(args);
  }
}

}  // namespace
}  // namespace fastpeft

int main(int argc, char** argv) {
  using namespace fastpeft;
  using cuda_host::fail;
  const std::map<std::string, int> counts = {{"plan", 8}, {"plan_bwd", 10}, {"run", 15}, {"bwd", 18}};
  Arguments args;
  args.mode = argc > 1 ? argv[1] : "";
  if (!counts.contains(args.mode) || argc != counts.at(args.mode)) fail("see the top of run_butterfly.cpp for usage");
  const auto number = [&](int i) { return std::stoll(argv[i]); };
  args.dtype = argv[2];
  args.tokens = number(3), args.features = number(4), args.b = number(5), args.factors = number(6);
  args.max_shared = number(7);
  if (args.mode == "plan_bwd") args.processors = number(8), args.need_blocks = number(9) != 0;
  if (argc >= 15) {
    args.x_row_stride = number(8), args.x_offset = number(9), args.blocks_offset = number(10), args.seeds = number(11);
    args.x_path = argv[12], args.blocks_path = argv[13];
  }
  if (args.mode == "run") args.y_path = argv[14];
  if (args.mode == "bwd") {
    args.processors = number(14), args.grad_path = argv[15], args.dx_path = argv[16], args.dblocks_path = argv[17];
    args.need_x = args.dx_path != "-", args.need_blocks = args.dblocks_path != "-";
  }
  cuda_host::with_dtype(args.dtype, [&]<typename T>() { call<T>(args); });
}
