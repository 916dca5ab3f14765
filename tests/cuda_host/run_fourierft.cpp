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
#include <fstream>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <tuple>

#include "cuda/fourierft.cuh"

namespace fastpeft::fourier {

constexpr size_t kMaxShared = 227 << 10;  // of a thread block on sm_90
__shared__ float4 shared_memory[kMaxShared / sizeof(float4)];

namespace {

[[noreturn]] void fail(const std::string& message) {
  std::cerr << "run_fourierft: " << message << "\n";
  std::exit(1);
}

// `bytes` of memory that end where the allocation ends and begin `offset` bytes behind a 16-byte boundary.
class Buffer {
 public:
  Buffer(size_t bytes, size_t offset)
      : bytes_(bytes), memory_(new char[offset + bytes]), data_(memory_.get() + offset) {
    std::memset(memory_.get(), 0xff, offset + bytes);
  }
  template <typename T = void>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  std::string bits() const { return {data_, bytes_}; }

 private:
  size_t bytes_;
  std::unique_ptr<char[]> memory_;
  char* data_;
};

using Options = std::map<std::string, std::string>;

int64_t number(const Options& options, const std::string& name, int64_t otherwise) {
  const auto found = options.find(name);
  return found == options.end() ? otherwise : std::stoll(found->second);
}

std::optional<Buffer> read_file(const Options& options, const std::string& name, size_t bytes, size_t offset = 0) {
  const auto path = options.find(name);
  if (path == options.end()) return {};
  std::optional<Buffer> buffer(std::in_place, bytes, offset);
  std::ifstream file(path->second, std::ios::binary | std::ios::ate);
  if (file.tellg() != static_cast<std::streamoff>(bytes)) {
    fail(path->second + " does not have " + std::to_string(bytes) + " bytes");
  }
  file.seekg(0);
  if (bytes > 0 && !file.read(buffer->as<char>(), static_cast<std::streamsize>(bytes))) fail("cannot read " + name);
  return buffer;
}

void write_file(const Options& options, const std::string& name, const std::string& bits) {
  const auto path = options.find(name);
  if (path == options.end()) return;
  if (!std::ofstream(path->second, std::ios::binary).write(bits.data(), static_cast<std::streamsize>(bits.size()))) {
    fail("cannot write " + path->second);
  }
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
  const int64_t tokens = number(options, "tokens", 1), in = number(options, "in", 1), out = number(options, "out", 1);
  const int64_t n = number(options, "n", 0), samples = number(options, "samples", 2 * n);
  const int64_t padding = number(options, "padding", 0);
  const int64_t stride = number(options, "stride", 1);
  const size_t offset = static_cast<size_t>(number(options, "offset", 0)) * sizeof(T);
  const auto matrix_bytes = [&](int64_t width) {
    return static_cast<size_t>((tokens - 1) * (width + padding) + width) * sizeof(T);
  };
  const auto source = read_file(options, "source", matrix_bytes(in), offset);
  const auto x = read_file(options, "x", matrix_bytes(out), offset);
  const auto base = read_file(options, "base", matrix_bytes(out), offset);
  const auto offsets = read_file(options, "offsets", static_cast<size_t>(out + 1) * 4);
  const auto sources = read_file(options, "sources", static_cast<size_t>(samples) * 4);
  const auto entries = read_file(options, "entries", static_cast<size_t>(samples) * 4);
  const auto spectrum =
      read_file(options, "spectrum", n == 0 ? 0 : static_cast<size_t>((n - 1) * stride + 1) * sizeof(float));
  const auto rows = read_file(options, "rows", static_cast<size_t>(n) * 4);
  const auto cols = read_file(options, "cols", static_cast<size_t>(n) * 4);
  const Plan plan = checked_plan(tokens, in, out, x ? n : 0, number(options, "max_shared", kMaxShared), 132);
  const int64_t groups = number(options, "groups", plan.groups), blocks = number(options, "blocks", groups);
  const Tables tables[2] = {make_tables(static_cast<int>(in)), make_tables(static_cast<int>(out))};
  const std::span shared = std::as_writable_bytes(std::span(shared_memory));

  std::string first_y, first_sums;
  for (int64_t seed = 0; seed < number(options, "seeds", 4); ++seed) {
    std::optional<Buffer> y;
    if (options.contains("y")) y.emplace(matrix_bytes(out), offset);
    // In place where there is a base: as the operators call it.
    if (y && base) std::memcpy(y->as<char>(), data_of<char>(base), matrix_bytes(out));
    const Buffer kept(static_cast<size_t>(blocks * n) * sizeof(float4), 0);
    const Buffer partials(static_cast<size_t>(groups * n) * sizeof(float), 0);
    const Buffer scratch(static_cast<size_t>(blocks * plan.scratch) * sizeof(float2), 0);
    const Buffer sums(static_cast<size_t>(n) * sizeof(float), 0);
    Arguments args{
        .tokens = tokens,
        .scale = std::stof(options.at("scale")),
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
    const std::string y_bits = y ? y->bits() : "", sums_bits = sums.bits();
    if (seed == 0) first_y = y_bits, first_sums = sums_bits;
    if (y_bits != first_y || sums_bits != first_sums) {
      fail("the order of the threads changes the result, seed " + std::to_string(seed));
    }
  }
  write_file(options, "y", first_y);
  write_file(options, "sums", first_sums);
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
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "plan" && argc == 8) {
    int64_t numbers[6];
    for (int i = 0; i < 6; ++i) numbers[i] = std::stoll(argv[2 + i]);
    std::apply(print_plan, std::to_array(numbers));
    return 0;
  }
  if (mode != "run" || argc < 3) fail("see the top of run_fourierft.cpp");
  Options options;
  for (int i = 3; i < argc; ++i) {
    const std::string option = argv[i];
    const size_t middle = option.find('=');
    if (middle == std::string::npos) fail("no value in " + option);
    options[option.substr(0, middle)] = option.substr(middle + 1);
  }
  const std::string dtype = argv[2];
  if (dtype == "float32") {
    run<float>(options);
  } else if (dtype == "float16") {
    run<__half>(options);
  } else if (dtype == "bfloat16") {
    run<__nv_bfloat16>(options);
  } else {
    fail("unknown dtype " + dtype);
  }
}
