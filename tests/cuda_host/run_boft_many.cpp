// Runs the kernels of csrc/cuda/boft_many.cuh and boft_scale_many.cuh on the CPU, launched as their plans say.
// tests/test_cuda_boft_many.py builds and calls it:
//
//   run_boft_many plan_rotate|plan_scale dtype key=value ...
//       prints the plan
//   run_boft_many rotate|scale dtype key=value ...
//       runs the kernel once for every seed, checks that what lies between the rows of y stays as it is, and that every
//       seed gives the same bits, and writes them
//
// Numbers: tokens, features, processors; b, factors and max_shared of a rotation, packed of a scale's plan. To run,
// also arena_rows, count of slots, seeds; stride between rows of what is read or changed; offset and arena_offset,
// elements from a 16-byte boundary. Files: x (of a scale: y before), arena, table, rows and slots; bias where there is
// one; result is written. The buffers have no byte more than the tensors, except that rows far apart are in memory that
// is only touched where there are rows.
#include <sys/mman.h>

#include "cuda/boft_many.cuh"
#include "cuda/boft_scale_many.cuh"
#include "program.h"

namespace fastpeft::many {

constexpr int64_t kMaxShared = 227 << 10;  // of a thread block on sm_90
__shared__ float4 shared_memory[kMaxShared / sizeof(float4)];

namespace {

using namespace cuda_host;

// Rows of `row_bytes`, `stride` bytes apart, which end where their memory ends.
class Spread {
 public:
  Spread(const std::string& rows, size_t row_bytes, size_t stride, size_t offset)
      : bytes_((rows.size() / row_bytes - 1) * stride + row_bytes),
        near_(is_far() ? 0 : bytes_, offset),
        row_bytes_(row_bytes),
        stride_(stride),
        count_(rows.size() / row_bytes),
        data_(near_.as()) {
    if (is_far()) {
      void* const map =
          mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (map == MAP_FAILED) fail("no memory for rows so far apart");
      data_ = static_cast<char*>(map);
    }
    for (size_t row = 0; row < count_; ++row) {
      std::memcpy(data_ + row * stride_, rows.data() + row * row_bytes_, row_bytes_);
    }
  }
  Spread(const Spread&) = delete;
  ~Spread() {
    if (is_far()) munmap(data_, bytes_);
  }
  char* data() const { return data_; }
  // All rows; fails if what is between them has changed.
  std::string content() const {
    std::string bits;
    for (size_t row = 0; row < count_; ++row) {
      const char* const begin = data_ + row * stride_;
      bits.append(begin, row_bytes_);
      const size_t gap = row + 1 < count_ && !is_far() && stride_ > row_bytes_ ? stride_ - row_bytes_ : 0;
      if (std::string(begin + row_bytes_, gap) != std::string(gap, '\xff')) fail("wrote between rows");
    }
    return bits;
  }

 private:
  bool is_far() const { return bytes_ > size_t{1} << 30; }

  size_t bytes_;
  Buffer near_;
  size_t row_bytes_, stride_, count_;
  char* data_;
};

RotatePlan rotate_plan(const Options& options) {
  const RotatePlan plan =
      plan_rotate_many(options.number("tokens"), options.number("features"), options.number("b"),
                       options.number("factors"), options.number("max_shared"), options.number("processors"));
  if (plan.error) fail(plan.error);
  return plan;
}

template <typename T>
ScaleManyPlan scale_plan(const Options& options, bool packed) {
  const ScaleManyPlan plan = plan_scale_many(options.number("tokens"), options.number("features"), sizeof(T),
                                             options.number("processors"), packed);
  if (plan.error) fail(plan.error);
  return plan;
}

template <typename T>
void run(const std::string& mode, const Options& options) {
  const bool rotates = mode == "rotate";
  const size_t tokens = options.size("tokens"), features = options.size("features");
  const size_t row_bytes = features * sizeof(T), stride = options.size("stride"), offset = options.size("offset");
  const size_t width = rotates ? options.size("factors") * features / options.size("b") *
                                     static_cast<size_t>(reflector_numbers(options.number("b")))
                               : features;
  const std::string before = options.content("x", tokens * row_bytes);
  const Buffer arena = options.file("arena", options.size("arena_rows") * width * sizeof(float),
                                    options.size("arena_offset") * sizeof(float));
  const Buffer table = options.file("table", options.size("count") * sizeof(int));
  const Buffer rows = options.file("rows", tokens * sizeof(int));
  const Buffer slots = options.file("slots", tokens * sizeof(int));
  const Buffer bias = options.has("bias") ? options.file("bias", row_bytes, offset * sizeof(T)) : Buffer(0, 0);
  const std::span shared = std::as_writable_bytes(std::span(shared_memory));

  std::string first_bits;
  for (unsigned seed = 0; seed < options.size("seeds"); ++seed) {
    const Spread x(before, row_bytes, stride * sizeof(T), offset * sizeof(T));
    const Buffer z(rotates ? before.size() : 0, 0);
    if (rotates) {
      const int64_t b = options.number("b"), factors = options.number("factors");
      const RotatePlan plan = rotate_plan(options);
      const RotateArguments args{
          .element = kElement<T>,
          .x = x.data(),
          .x_row_stride = static_cast<int64_t>(stride),
          .z = z.as(),
          .arena = arena.as<float>(),
          .arena_rows = options.number("arena_rows"),
          .row_reflectors = table.as<int>(),
          .row_numbers = rows.as<int>(),
          .slot_numbers = slots.as<int>(),
          .tokens = static_cast<int>(tokens),
          .slots = static_cast<int>(options.number("count")),
          .features = static_cast<int>(features),
          .factors = static_cast<int>(factors),
          .block_size = static_cast<int>(b),
          .strip = static_cast<int>(strip_features(static_cast<int64_t>(features), b, factors)),
          .tile = plan.tile,
      };
      with_boft_kernel_size(boft_kernel_size(b), [&]<int B>() {
        launch(plan.grid, plan.block, shared, static_cast<size_t>(plan.shared_bytes), seed,
               [&] { boft_rotate_many_kernel<B>(args); });
      });
      check_same(std::string(z.as(), before.size()), first_bits, seed);
    } else {
      const void* const b = options.has("bias") ? bias.as() : nullptr;
      const bool packed = scale_many_is_packed(static_cast<int64_t>(features), sizeof(T), x.data(),
                                               static_cast<int64_t>(stride), b, arena.as());
      const ScaleManyPlan plan = scale_plan<T>(options, packed);
      const ScaleManyArguments args{
          .y = x.data(),
          .y_row_stride = static_cast<int64_t>(stride),
          .bias = b,
          .arena = arena.as<float>(),
          .arena_rows = options.number("arena_rows"),
          .row_scale = table.as<int>(),
          .row_numbers = rows.as<int>(),
          .slot_numbers = slots.as<int>(),
          .tokens = static_cast<int>(tokens),
          .slots = static_cast<int>(options.number("count")),
          .features = static_cast<int>(features),
          .positions = plan.positions,
          .across = plan.across,
          .packed = packed,
      };
      launch(plan.grid, plan.block, shared, static_cast<size_t>(plan.shared_bytes), seed,
             [&] { boft_scale_many_kernel<T>(args); });
      check_same(x.content(), first_bits, seed);
    }
    if (rotates && x.content() != before) fail("wrote to x");
  }
  write_file(options.text("result"), first_bits);
}

template <typename T>
void print_plan(const std::string& mode, const Options& options) {
  if (mode == "plan_rotate") {
    const RotatePlan plan = rotate_plan(options);
    std::cout << "{\"grid\": " << plan.grid.x << ", \"block\": [" << plan.block.x << ", " << plan.block.y
              << "], \"shared_bytes\": " << plan.shared_bytes << ", \"positions\": " << plan.tile.positions
              << ", \"strips\": " << plan.tile.strips << ", \"across\": " << plan.tile.across << "}\n";
  } else {
    const ScaleManyPlan plan = scale_plan<T>(options, options.number("packed") != 0);
    std::cout << "{\"grid\": " << plan.grid.x << ", \"positions\": " << plan.positions
              << ", \"across\": " << plan.across << "}\n";
  }
}

}  // namespace
}  // namespace fastpeft::many

int main(int argc, char** argv) {
  using namespace fastpeft::many;
  using namespace cuda_host;
  if (argc < 3) fail("see the top of run_boft_many.cpp");
  const std::string mode = argv[1];
  const Options options(argc - 3, argv + 3);
  with_dtype(argv[2], [&]<typename T>() {
    if (mode == "rotate" || mode == "scale") {
      run<T>(mode, options);
    } else if (mode == "plan_rotate" || mode == "plan_scale") {
      print_plan<T>(mode, options);
    } else {
      fail("unknown mode " + mode);
    }
  });
}
