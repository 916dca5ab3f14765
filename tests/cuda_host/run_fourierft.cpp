// Runs the kernels of csrc/cuda/fourierft.cuh on the CPU, launched as their plan says. tests/test_cuda_fourierft.py
// builds and calls it:
//
//   run_fourierft plan in out tokens n max_shared multiprocessors
//       prints the plan of the way from `in` to `out`
//   run_fourierft run dtype key=value ...
//       runs fourier_kernel, and sum_partials_kernel where products are wanted, once for every seed
//
// Of the numbers, `padding` and `offset` are elements between rows of x, and from a 16-byte boundary; n coefficients
// are `stride` apart; pairs of tokens make `groups` groups, in `blocks` blocks. Files: source, x, base,
// offsets, sources, entries, spectrum, rows, cols are read, those that are not named are not there, and y and sums are
// written. The buffers have no byte more than the tensors, so that reading outside of them is seen, and every seed must
// give the same bits: an order of threads that matters is a race.
#include <array>
#include <optional>
#include <tuple>

#include "cuda/fourierft.cuh"
#include "program.h"

namespace fastpeft::fourier {

constexpr size_t kMaxShared = 227 << 10;  // of a thread block on sm_90
__shared__ float4 shared_memory[kMaxShared / sizeof(float4)];

namespace {

using namespace cuda_host;

std::optional<Buffer> read_buffer(const Options& options, const std::string& name, size_t bytes, size_t offset = 0) {
  if (!options.has(name)) return {};
  return options.file(name, bytes, offset);
}

template <typename T>
T* data_of(const std::optional<Buffer>& buffer) {
  return buffer ? buffer->as<T>() : nullptr;
}

Plan checked_plan(int64_t tokens, int64_t in, int64_t out, int64_t n, int64_t max_shared, int64_t multiprocessors) {
  const Plan plan = plan_fourier(tokens, in, out, n, max_shared, multiprocessors);
  if (plan.error) fail(plan.error);
  return plan;
}

template <typename T>
void run_kernel(Kind kind, const Arguments& args) {
  switch (kind) {
    case Kind::kShort:
      return fourier_kernel<T, ShortSignals>(args);
    case Kind::kLong:
      return fourier_kernel<T, LongSignals>(args);
    case Kind::kSplit:
      return fourier_kernel<T, SplitSignals>(args);
  }
}

template <typename T>
void run(const Options& options) {
  const int64_t tokens = options.number("tokens"), in = options.number("in"), out = options.number("out");
  const int64_t n = options.number("n"), padding = options.number("padding"), stride = options.number("stride");
  const size_t samples = options.size("samples"), offset = options.size("offset") * sizeof(T);
  const auto matrix_bytes = [&](int64_t width) {
    return static_cast<size_t>((tokens - 1) * (width + padding) + width) * sizeof(T);
  };
  const auto source = read_buffer(options, "source", matrix_bytes(in), offset);
  const auto x = read_buffer(options, "x", matrix_bytes(out), offset);
  const auto base = read_buffer(options, "base", matrix_bytes(out), offset);
  const auto offsets = read_buffer(options, "offsets", static_cast<size_t>(out + 1) * 4);
  const auto sources = read_buffer(options, "sources", samples * 4);
  const auto entries = read_buffer(options, "entries", samples * 4);
  const auto spectrum =
      read_buffer(options, "spectrum", n == 0 ? 0 : static_cast<size_t>((n - 1) * stride + 1) * sizeof(float));
  const auto rows = read_buffer(options, "rows", static_cast<size_t>(n) * 4);
  const auto cols = read_buffer(options, "cols", static_cast<size_t>(n) * 4);
  const Plan plan = checked_plan(tokens, in, out, x ? n : 0, options.number("max_shared"), 132);
  const int64_t groups = options.has("groups") ? options.number("groups") : plan.groups;
  const int64_t blocks = options.has("blocks") ? options.number("blocks") : groups;
  const Tables tables[2] = {make_tables(static_cast<int>(in)), make_tables(static_cast<int>(out))};
  const std::span shared = std::as_writable_bytes(std::span(shared_memory));

  std::string first_y, first_sums;
  for (int64_t seed = 0; seed < options.number("seeds"); ++seed) {
    std::optional<Buffer> y;
    if (options.has("y")) y.emplace(matrix_bytes(out), offset);
    // In place where there is a base: as the operators call it.
    if (y && base) std::memcpy(y->as<char>(), data_of<char>(base), matrix_bytes(out));
    const Buffer kept(static_cast<size_t>(blocks * n) * sizeof(float4), 0);
    const Buffer partials(static_cast<size_t>(groups * n) * sizeof(float), 0);
    const Buffer scratch(static_cast<size_t>(blocks * plan.scratch) * sizeof(float2), 0);
    const Buffer sums(static_cast<size_t>(n) * sizeof(float), 0);
    Arguments args{
        .tokens = tokens,
        .scale = std::stof(options.text("scale")),
        .transform = {tables[0].transform, tables[1].transform},
        .source = {data_of<T>(source), in + padding},
        .base = {base ? data_of<T>(y) : nullptr, out + padding},
        .y = data_of<T>(y),
        .y_stride = out + padding,
        .offsets = data_of<int>(offsets),
        .sources = data_of<int>(sources),
        .entries = data_of<int>(entries),
        .spectrum = data_of<float>(spectrum),
        .spectrum_stride = stride,
        .x = {data_of<T>(x), out + padding},
        .rows = data_of<int>(rows),
        .cols = data_of<int>(cols),
        .n = static_cast<int>(n),
        .kept = kept.as<float4>(),
        .partials = partials.as<float>(),
        .groups = static_cast<unsigned>(groups),
        .scratch = scratch.as<float2>(),
        .room = plan.room,
    };
    for (int i = 0; i < 2; ++i) {
      args.transform[i].table = tables[i].table.data();
      args.transform[i].position = tables[i].position.data();
    }
    cuda_host::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(plan.threads), shared,
                      static_cast<size_t>(plan.shared_bytes), static_cast<unsigned>(seed),
                      [&] { run_kernel<T>(plan.kind, args); });
    if (x && n > 0) {
      cuda_host::launch(
          static_cast<unsigned>((n + kSumLanes - 1) / kSumLanes), dim3(kSumLanes, kSumSlices), shared, kSumSharedBytes,
          static_cast<unsigned>(seed),
          [&] { sum_partials_kernel(args.partials, sums.as<float>(), static_cast<int>(groups), args.n, args.scale); });
    }
    check_same(y ? std::string(y->as(), matrix_bytes(out)) : "", first_y, seed);
    check_same(std::string(sums.as(), static_cast<size_t>(n) * sizeof(float)), first_sums, seed);
  }
  if (options.has("y")) write_file(options.text("y"), first_y);
  if (options.has("sums")) write_file(options.text("sums"), first_sums);
}

void print_plan(int64_t in, int64_t out, int64_t tokens, int64_t n, int64_t max_shared, int64_t multiprocessors) {
  const Plan plan = checked_plan(tokens, in, out, n, max_shared, multiprocessors);
  const char* kinds[] = {"short", "long", "split"};
  std::cout << "{\"groups\": " << plan.groups << ", \"blocks\": " << plan.blocks << ", \"threads\": " << plan.threads
            << ", \"shared_bytes\": " << plan.shared_bytes << ", \"kind\": \"" << kinds[static_cast<int>(plan.kind)]
            << "\", \"room\": " << plan.room << ", \"scratch\": " << plan.scratch << ", \"radices\": [";
  for (const char* separator = ""; int radix : radices_of(static_cast<int>(size_of_transform(in)))) {
    std::cout << separator << radix;
    separator = ", ";
  }
  std::cout << "]}\n";
}

}  // namespace
}  // namespace fastpeft::fourier

int main(int argc, char** argv) {
  using namespace fastpeft::fourier;
  using namespace cuda_host;
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "plan" && argc == 8) {
    int64_t numbers[6];
    for (int i = 0; i < 6; ++i) numbers[i] = std::stoll(argv[2 + i]);
    std::apply(print_plan, std::to_array(numbers));
    return 0;
  }
  if (mode != "run" || argc < 3) fail("see the top of run_fourierft.cpp");
  const Options options(argc - 3, argv + 3);
  with_dtype(argv[2], [&]<typename T>() { run<T>(options); });
}
