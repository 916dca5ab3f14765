// Runs the kernel of csrc/cuda/low_rank_many.cuh on the CPU, launched as its plan says.
// tests/test_cuda_low_rank_many.py builds and calls it:
//
//   run_low_rank_many plan tokens in out shard_bytes processors
//       prints the plan
//   run_low_rank_many run dtype shard_dtype key=value ...
//       runs the kernel once for every seed, checks that what lies between the rows of y stays as it is, and that every
//       seed gives the same bits, and writes them
//
// Numbers: tokens, in, out, per_row, count_A, count_B, r_max, count, processors, seeds; x_stride and y_stride between
// rows; x_offset, y_offset, A_offset and B_offset, elements from a 16-byte boundary. Files: x, y, arena_A, index_A,
// arena_B, index_B, rank, scaling, rows and slots; result is written. The buffers have no byte
// more than the tensors, except that rows of y far apart are in memory that is only touched where there are rows.
#include "cuda/low_rank_many.cuh"
#include "program.h"

namespace fastpeft::many {

__shared__ float4 shared_memory[(48 << 10) / sizeof(float4)];

namespace {

using namespace cuda_host;

template <typename T, typename S>
void run(const Options& options) {
  const size_t tokens = options.size("tokens"), in = options.size("in"), out = options.size("out");
  const size_t per_row = options.size("per_row"), r_max = options.size("r_max"), count = options.size("count");
  const size_t count_a = options.size("count_A"), count_b = options.size("count_B");
  const size_t x_stride = options.size("x_stride"), y_stride = options.size("y_stride");

  const Matrix x(options.content("x", tokens * in * sizeof(T)), in * sizeof(T), x_stride * sizeof(T),
                 options.size("x_offset") * sizeof(T));
  const std::string y_before = options.content("y", tokens * out * sizeof(T));
  const Buffer a = options.file("arena_A", count_a * in / per_row * sizeof(S), options.size("A_offset") * sizeof(S));
  const Buffer b = options.file("arena_B", count_b * out / per_row * sizeof(S), options.size("B_offset") * sizeof(S));
  const Buffer index_a = options.file("index_A", count * r_max * per_row * sizeof(int));
  const Buffer index_b = options.file("index_B", count * r_max * per_row * sizeof(int));
  const Buffer rank = options.file("rank", count * sizeof(int));
  const Buffer scaling = options.file("scaling", count * sizeof(float));
  const Buffer rows = options.file("rows", tokens * sizeof(int));
  const Buffer slots = options.file("slots", tokens * sizeof(int));

  const auto shards = [&](const Buffer& data, const Buffer& index, size_t shards, size_t features) {
    return Shards{
        .shards = data.as(),
        .index = index.as<int>(),
        .count = static_cast<int>(shards),
        .width = static_cast<int>(features / per_row),
        .per_row = static_cast<int>(per_row),
        .packed = shards_are_packed(data.as(), static_cast<int64_t>(features / per_row), sizeof(S)),
    };
  };
  const Plan plan = plan_low_rank_many(static_cast<int64_t>(tokens), static_cast<int64_t>(in),
                                       static_cast<int64_t>(out), sizeof(S), options.number("processors"));
  if (plan.error) fail(plan.error);
  Arguments args{
      .element = kElement<T>,
      .x = x.data(),
      .y = nullptr,
      .x_row_stride = static_cast<int64_t>(x_stride),
      .y_row_stride = static_cast<int64_t>(y_stride),
      .in = static_cast<int>(in),
      .out = static_cast<int>(out),
      .a = shards(a, index_a, count_a, in),
      .b = shards(b, index_b, count_b, out),
      .rank = rank.as<int>(),
      .scaling = scaling.as<float>(),
      .row_numbers = rows.as<int>(),
      .slot_numbers = slots.as<int>(),
      .tokens = static_cast<int>(tokens),
      .slots = static_cast<int>(count),
      .r_max = static_cast<int>(r_max),
      .ranges = plan.ranges,
      .outputs = plan.outputs,
      .front_floats = plan.front_floats,
  };
  std::string first_bits;
  for (unsigned seed = 0; seed < options.size("seeds"); ++seed) {
    const Matrix y(y_before, out * sizeof(T), y_stride * sizeof(T), options.size("y_offset") * sizeof(T));
    args.y = y.data();
    cuda_host::launch(plan.grid, plan.block, std::as_writable_bytes(std::span(shared_memory)),
                      static_cast<size_t>(plan.shared_bytes), seed, [&] { low_rank_many_kernel<S>(args); });
    check_same(y.rows(), first_bits, seed);
  }
  write_file(options.text("result"), first_bits);
}

}  // namespace
}  // namespace fastpeft::many

int main(int argc, char** argv) {
  using namespace fastpeft::many;
  using namespace cuda_host;
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "plan" && argc == 7) {
    const Plan plan = plan_low_rank_many(std::stoll(argv[2]), std::stoll(argv[3]), std::stoll(argv[4]),
                                         std::stoi(argv[5]), std::stoll(argv[6]));
    if (plan.error) fail(plan.error);
    std::cout << "{\"grid\": " << plan.grid.x << ", \"threads\": " << plan.block.x
              << ", \"shared_bytes\": " << plan.shared_bytes << ", \"ranges\": " << plan.ranges
              << ", \"outputs\": " << plan.outputs << "}\n";
    return 0;
  }
  if (mode != "run" || argc < 4) fail("see the top of run_low_rank_many.cpp");
  const Options options(argc - 4, argv + 4);
  with_dtype(argv[2], [&]<typename T>() { with_dtype(argv[3], [&]<typename S>() { run<T, S>(options); }); });
}
