// Runs the kernels of csrc/cuda/boft_scale.cuh on the CPU, launched as their plan says. tests/test_cuda_boft_scale.py
// builds and calls it:
//
//   run_scale plan|fwd|bwd dtype name=value ...
//
// Numbers: tokens, features, processors, seeds; offset, elements of the activations from a 16-byte boundary;
// scale_offset, the same of the scale. Files: scale, and bias where there is one. fwd reads y0 and writes y, in the
// memory of y0 where in_place is 1. bwd reads grad, and y0 where dscale is given, and writes scaled and dscale, those
// that are given. plan prints the plan of the way back.
#include <cuda_runtime.h>

#include "cuda/boft_bwd.cuh"
#include "cuda/boft_scale.cuh"
#include "program.h"

namespace fastpeft {

__shared__ float4 shared_memory[(48 << 10) / sizeof(float4)];

namespace {

using namespace cuda_host;

template <typename T>
void run(const std::string& mode, const Options& options) {
  const int64_t tokens = options.number("tokens"), features = options.number("features");
  const size_t offset = options.size("offset") * sizeof(T), scale_offset = options.size("scale_offset") * sizeof(float);
  const size_t bytes = static_cast<size_t>(tokens * features) * sizeof(T);
  const size_t sums_bytes = static_cast<size_t>(features) * sizeof(float);
  const bool forward = mode == "fwd", sums = options.has("dscale"), scales = forward || options.has("scaled");
  const Buffer scale = options.file("scale", sums_bytes, scale_offset);
  const bool biased = options.has("bias");
  const size_t bias_bytes = biased ? static_cast<size_t>(features) * sizeof(T) : 0;
  const Buffer bias = biased ? options.file("bias", bias_bytes, offset) : Buffer(0, 0);
  const T* const b = biased ? bias.as<T>() : nullptr;
  const Buffer grad = forward ? Buffer(0, 0) : options.file("grad", bytes, offset);
  const std::span shared = std::as_writable_bytes(std::span(shared_memory));

  std::string first, first_sums;
  for (int64_t seed = 0; seed < options.number("seeds"); ++seed) {
    const unsigned order = static_cast<unsigned>(seed);
    const Buffer y0 = forward || sums ? options.file("y0", bytes, offset) : Buffer(0, 0);
    const Buffer apart(scales ? bytes : 0, offset), total(sums ? sums_bytes : 0, 0);
    const Buffer& out = forward && options.number("in_place") ? y0 : apart;
    const T* const before = forward || sums ? y0.as<T>() : nullptr;
    T* const to = scales ? out.as<T>() : nullptr;
    const bool packed = forward ? scale_is_packed(features, sizeof(T), before, to, scale.as(), b)
                                : scale_is_packed(features, sizeof(T), grad.as(), before, to, scale.as(), b);
    const ScalePlan plan = plan_scale(tokens, features, sizeof(T), options.number("processors"), packed, forward);
    if (plan.error) fail(plan.error);
    const Buffer parts(sums && plan.groups > 1 ? static_cast<size_t>(plan.groups) * sums_bytes : 0, 0);
    float* const part = sums ? (plan.groups > 1 ? parts : total).as<float>() : nullptr;
    launch(plan.grid, plan.block, shared, static_cast<size_t>(plan.shared_bytes), order, [&] {
      if (forward) {
        boft_scale_fwd_kernel<T>(before, b, scale.as<float>(), to, tokens, features, plan.across, plan.chunk, packed);
      } else {
        boft_scale_bwd_kernel<T>(grad.as<T>(), before, b, scale.as<float>(), to, part, tokens, features, plan.across,
                                 plan.chunk, packed);
      }
    });
    if (sums && plan.groups > 1) {
      launch(add_parts_grid(features), kAddPartsThreads, shared, 0, order, [&] {
        butterfly_add_parts_kernel(part, total.as<float>(), features, plan.groups, parts_are_packed(features));
      });
    }
    check_same(std::string(out.as(), scales ? bytes : 0), first, seed);
    check_same(std::string(total.as(), sums ? sums_bytes : 0), first_sums, seed);
  }
  if (scales) write_file(options.text(forward ? "y" : "scaled"), first);
  if (sums) write_file(options.text("dscale"), first_sums);
}

template <typename T>
void print_plan(const Options& options) {
  const ScalePlan plan = plan_scale(options.number("tokens"), options.number("features"), sizeof(T),
                                    options.number("processors"), options.number("packed") != 0, false);
  if (plan.error) fail(plan.error);
  std::cout << "{\"grid\": " << plan.grid.x << ", \"across\": " << plan.across << ", \"chunk\": " << plan.chunk
            << ", \"groups\": " << plan.groups << ", \"shared_bytes\": " << plan.shared_bytes << "}\n";
}

}  // namespace
}  // namespace fastpeft

int main(int argc, char** argv) {
  using namespace fastpeft;
  if (argc < 3) cuda_host::fail("see the top of run_scale.cpp for usage");
  const std::string mode = argv[1];
  const cuda_host::Options options(argc - 3, argv + 3);
  cuda_host::with_dtype(argv[2], [&]<typename T>() {
    if (mode == "plan") {
      print_plan<T>(options);
    } else {
      run<T>(mode, options);
    }
  });
}
