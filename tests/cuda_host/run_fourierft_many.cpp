// Runs the kernel of csrc/cuda/fourierft_many.cuh on the CPU, launched as its plan says.
// tests/test_cuda_fourierft_many.py builds and calls it:
//
//   run_fourierft_many plan tokens in out n max_shared multiprocessors
//       prints the plan
//   run_fourierft_many run dtype key=value ...
//       runs the kernel once for every seed, checks that what lies between the rows of y stays as it is, and that every
//       seed gives the same bits, and writes them
//
// Numbers: tokens, in, out, n, spectra and sets of places (how many there are), count (of slots), max_shared, seeds;
// x_stride and y_stride between rows; x_offset and y_offset, elements from a 16-byte boundary; maybe multiprocessors,
// which are as many as split signals have blocks. Files: x, y, arena_spectrum, row_spectrum, places, place, scaling,
// rows and slots; result is written. The buffers have no byte more than the tensors, except that rows of y far apart
// are in memory that is only touched where there are rows.
#include "cuda/fourierft_many.cuh"
#include "program.h"

namespace fastpeft::fourier {

__shared__ float4 shared_memory[(227 << 10) / sizeof(float4)];  // of a thread block on sm_90

namespace {

using namespace cuda_host;

ManyPlan checked_plan(int64_t tokens, int64_t in, int64_t out, int64_t n, int64_t max_shared, int64_t processors) {
  const ManyPlan plan = plan_fourier_many(tokens, in, out, n, max_shared, processors);
  if (plan.error) fail(plan.error);
  return plan;
}

template <typename T>
void run(const Options& options) {
  const size_t tokens = options.size("tokens"), in = options.size("in"), out = options.size("out");
  const size_t n = options.size("n"), spectra = options.size("spectra"), sets = options.size("sets");
  const size_t count = options.size("count");

  const Matrix x(options.content("x", tokens * in * sizeof(T)), in * sizeof(T), options.size("x_stride") * sizeof(T),
                 options.size("x_offset") * sizeof(T));
  const std::string y_before = options.content("y", tokens * out * sizeof(T));
  const Buffer arena = options.file("arena_spectrum", spectra * n * sizeof(float));
  const Buffer row_spectrum = options.file("row_spectrum", count * sizeof(int));
  const Buffer places = options.file("places", sets * 2 * n * sizeof(int));
  const Buffer place = options.file("place", count * sizeof(int));
  const Buffer scaling = options.file("scaling", count * sizeof(float));
  const Buffer rows = options.file("rows", tokens * sizeof(int));
  const Buffer slots = options.file("slots", tokens * sizeof(int));
  const ManyPlan plan = checked_plan(options.number("tokens"), options.number("in"), options.number("out"),
                                     options.number("n"), options.number("max_shared"),
                                     options.has("multiprocessors") ? options.number("multiprocessors") : 132);
  const Buffer scratch(static_cast<size_t>(plan.scratch * plan.grid.x) * sizeof(float2), 0);

  const Tables tables[2] = {make_tables(static_cast<int>(in)), make_tables(static_cast<int>(out))};
  ManyArguments args{
      .transform = {tables[0].transform, tables[1].transform},
      .x = x.data(),
      .y = nullptr,
      .x_row_stride = options.number("x_stride"),
      .y_row_stride = options.number("y_stride"),
      .spectra = arena.as<float>(),
      .row_spectrum = row_spectrum.as<int>(),
      .places = places.as<int>(),
      .place = place.as<int>(),
      .scaling = scaling.as<float>(),
      .row_numbers = rows.as<int>(),
      .slot_numbers = slots.as<int>(),
      .spectrum_count = static_cast<int>(spectra),
      .place_count = static_cast<int>(sets),
      .n = static_cast<int>(n),
      .tokens = static_cast<int>(tokens),
      .slots = static_cast<int>(count),
      .inverse = static_cast<float>(1.0 / static_cast<double>(in * out)),
      .buffer = plan.buffer,
      .listed = plan.listed,
      .claims = plan.claims,
      .scratch = scratch.as<float2>(),
      .room = plan.room,
  };
  for (int i = 0; i < 2; ++i) {
    args.transform[i].table = tables[i].table.data();
    args.transform[i].position = tables[i].position.data();
  }
  std::string first_bits;
  for (int64_t seed = 0; seed < options.number("seeds"); ++seed) {
    const Matrix y(y_before, out * sizeof(T), options.size("y_stride") * sizeof(T),
                   options.size("y_offset") * sizeof(T));
    args.y = y.data();
    cuda_host::launch(plan.grid, plan.block, std::as_writable_bytes(std::span(shared_memory)),
                      static_cast<size_t>(plan.shared_bytes), static_cast<unsigned>(seed), [&] {
                        if (plan.split) {
                          fourier_many_kernel<T, SplitRow>(args);
                        } else {
                          fourier_many_kernel<T, WholeRow>(args);
                        }
                      });
    check_same(y.rows(), first_bits, seed);
  }
  write_file(options.text("result"), first_bits);
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
    const auto [tokens, in, out, n, max_shared, processors] = numbers;
    const ManyPlan plan = checked_plan(tokens, in, out, n, max_shared, processors);
    std::cout << "{\"split\": " << (plan.split ? "true" : "false") << ", \"grid\": " << plan.grid.x
              << ", \"threads\": " << plan.block.x << ", \"shared_bytes\": " << plan.shared_bytes
              << ", \"listed\": " << plan.listed << ", \"claims\": " << plan.claims << ", \"room\": " << plan.room
              << ", \"scratch\": " << plan.scratch << "}\n";
    return 0;
  }
  if (mode != "run" || argc < 3) fail("see the top of run_fourierft_many.cpp");
  const Options options(argc - 3, argv + 3);
  with_dtype(argv[2], [&]<typename T>() { run<T>(options); });
}
