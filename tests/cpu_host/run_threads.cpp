// The CPU loops from several threads at once, as torch's parallel_for calls them. tests/test_cpu_loops.py builds it
// with ThreadSanitizer and calls it:
//
//   run_threads           every function on tiles of shared inputs and outputs, the plans of transforms, the scratch;
//                         threads must not change a bit of a result
//   run_threads overlap   plants a fault: tiles of tokens that share a row
#include <barrier>
#include <cstdio>
#include <thread>

#include "check.h"
#include "common/boft_reflectors.h"
#include "cpu/scratch.h"
#include "loops.h"

namespace fastpeft::check {
namespace {

constexpr int kThreads = 4;

// Calls run(thread) on that many threads at the same time.
void on_threads(int threads, const std::function<void(int)>& run) {
  std::barrier start(threads);
  std::vector<std::thread> all;
  for (int thread = 0; thread < threads; ++thread) {
    all.emplace_back([&, thread] {
      start.arrive_and_wait();
      run(thread);
    });
  }
  for (std::thread& thread : all) thread.join();
}

// Calls run(task) for tasks [0, count), neighbours on one thread.
void parallel(int threads, int64_t count, const std::function<void(int64_t)>& run) {
  on_threads(threads, [&](int thread) {
    for (int64_t task = count * thread / threads; task < count * (thread + 1) / threads; ++task) run(task);
  });
}

// Calls run(first, size) for tiles of [0, count).
void parallel_tiles(int threads, int64_t count, int64_t tile, const std::function<void(int64_t, int64_t)>& run) {
  parallel(threads, (count + tile - 1) / tile,
           [&](int64_t task) { run(task * tile, std::min(tile, count - task * tile)); });
}

// run(threads) returns the bits of its results.
void check_threads(const char* name, const std::function<std::string(int)>& run) {
  now = name;
  if (run(1) != run(kThreads)) fail("threads change the result");
}

void run_butterfly(Scalar scalar, int64_t shared_rows) {
  const int64_t tokens = 67, features = 48, block = 8, factors = 2;
  const ButterflyShape shape{features, block, factors, scalar};
  Buffer x("x", scalar, tokens, features), grad("grad", scalar, tokens, features);
  Buffer blocks = Buffer::floats("blocks", factors * features * block);
  x.fill(), grad.fill(), blocks.fill();
  check_threads("butterfly.fwd", [&](int threads) {
    const Buffer y("y", scalar, tokens, features);
    for (const ButterflyRange range : {ButterflyRange{0, 16}, ButterflyRange{16, 32}}) {
      parallel_tiles(threads, tokens, 9, [&](int64_t first, int64_t count) {
        Scratch scratch(butterfly_scratch_floats(shape, range, false));
        count = std::min(count + shared_rows, tokens - first);
        loops.butterfly.fwd(shape, range, count, x.rows(first), blocks.floats(), y.mutable_rows(first), scratch.data());
      });
    }
    return y.bits();
  });
  check_threads("butterfly.bwd", [&](int threads) {
    const Buffer dx("dx", scalar, tokens, features);
    Buffer dblocks = Buffer::floats("dblocks", factors * features * block);
    dblocks.set([](int64_t, int64_t) { return 0.0; });
    parallel_tiles(threads, features, 16, [&](int64_t first, int64_t count) {
      const ButterflyRange range{first, count};
      Scratch scratch(butterfly_scratch_floats(shape, range, true));
      loops.butterfly.bwd(shape, range, tokens, grad.rows(), x.rows(), blocks.floats(), dx.mutable_rows(),
                          dblocks.floats(), scratch.data());
    });
    return dx.bits() + dblocks.bits();
  });
}

void run_scale(Scalar scalar) {
  const int64_t tokens = 33, features = 2 * kScaleColumns + 5;
  Buffer y0("y0", scalar, tokens, features), grad("grad", scalar, tokens, features), bias("bias", scalar, 1, features);
  Buffer s = Buffer::floats("s", features);
  y0.fill(), grad.fill(), bias.fill(), s.fill();
  check_threads("scale_fwd", [&](int threads) {
    const Buffer y("y", scalar, tokens, features);
    parallel_tiles(threads, tokens, 3, [&](int64_t first, int64_t count) {
      loops.butterfly.scale_fwd(scalar, count, features, y0.rows(first), bias.data(), s.floats(),
                                y.mutable_rows(first));
    });
    return y.bits();
  });
  check_threads("scale_bwd", [&](int threads) {
    const Buffer scaled("scaled", scalar, tokens, features);
    const Buffer ds = Buffer::floats("ds", features);
    parallel_tiles(threads, features, kScaleColumns, [&](int64_t first, int64_t count) {
      loops.butterfly.scale_bwd(scalar, tokens, first, first + count, grad.rows(), y0.rows(), bias.data(), s.floats(),
                                scaled.mutable_rows(), ds.floats());
    });
    return scaled.bits() + ds.bits();
  });
}

void run_butterfly_many(Scalar scalar) {
  const int64_t tokens = 67, features = 48, block = 8, factors = 2;
  const ReflectorShape shape{features, block, factors, strip_features(features, block, factors), scalar};
  Buffer x("x", scalar, tokens, features);
  Buffer reflectors = Buffer::floats("reflectors", factors * (features / block) * reflector_numbers(block));
  x.fill(), reflectors.fill();
  check_threads("butterfly_many", [&](int threads) {
    const Buffer z("z", scalar, tokens, features);
    parallel_tiles(threads, tokens, 9, [&](int64_t first, int64_t count) {
      Scratch scratch(loops.butterfly_many.scratch_floats(shape));
      loops.butterfly_many.rotate(shape, count, x.rows(first), reflectors.floats(), z.mutable_rows(first),
                                  scratch.data());
    });
    return z.bits();
  });
}

void run_cayley() {
  const int64_t count = 37, block = 5, lanes = loops.cayley.lanes;
  Buffer r("r", Scalar::float32, count, block * block), grad("grad", Scalar::float32, count, block * block);
  r.fill(), grad.fill();
  check_threads("cayley", [&](int threads) {
    const Buffer q("q", Scalar::float32, count, block * block), dr("dr", Scalar::float32, count, block * block);
    const Buffer numbers("numbers", Scalar::float32, reflector_numbers(block), count);
    parallel_tiles(threads, count, lanes, [&](int64_t first, int64_t size) {
      Scratch scratch(loops.cayley.scratch_floats(block));
      const int64_t offset = first * block * block;
      loops.cayley.fwd(r.floats() + offset, size, block, q.floats() + offset, scratch.data());
      loops.cayley.bwd(grad.floats() + offset, q.floats() + offset, size, block, dr.floats() + offset, scratch.data());
      loops.cayley.reflectors(r.floats() + offset, block * block, size, block, numbers.floats() + first, count,
                              scratch.data());
    });
    return q.bits() + dr.bits() + numbers.bits();
  });
}

void run_lora(Scalar scalar, int64_t per_row, int64_t width) {
  const int64_t tokens = 71, rank = 5, features = per_row * width;
  Buffer x("x", scalar, tokens, features), start("start", scalar, tokens, features);
  Buffer pool("pool", Scalar::float32, rank * per_row, width), h("h", Scalar::float32, tokens, rank);
  x.fill(), start.fill(), pool.fill(), h.fill();
  // Every second place has a shard that another place has as well.
  const auto shards_of = [&](const Buffer& from) {
    std::vector<const float*> table;
    for (int64_t place = 0; place < rank * per_row; ++place) {
      table.push_back(from.floats() + place / 2 * 2 * width);
    }
    return table;
  };
  const std::vector<const float*> table = shards_of(pool);
  const Shards m{table.data(), rank, per_row, width};
  check_threads("lora.project, lora.expand", [&](int threads) {
    const Buffer products("products", Scalar::float32, tokens, rank);
    const Buffer y("y", scalar, tokens, features);
    std::copy_n(static_cast<char*>(start.data()), start.bits().size(), static_cast<char*>(y.data()));
    parallel_tiles(threads, tokens, 7, [&](int64_t first, int64_t count) {
      float* tile = products.floats() + first * rank;
      loops.lora.project(scalar, x.rows(first), m, count, 0.5f, tile);
      loops.lora.expand(scalar, tile, m, count, y.mutable_rows(first));
    });
    return products.bits() + y.bits();
  });
  check_threads("lora.correlate", [&](int threads) {
    Buffer sums("sums", Scalar::float32, rank * per_row, width);
    sums.set([](int64_t, int64_t) { return 0.0; });
    const std::vector<const float*> into = shards_of(sums);
    parallel_tiles(threads, width, 6, [&](int64_t first, int64_t count) {
      loops.lora.correlate(scalar, h.floats(), x.rows(), tokens, 0.5f, {into.data(), rank, per_row, width}, first,
                           first + count, true);
    });
    return sums.bits();
  });
}

// The mix that leaves bins as they are; keeps the plan.
struct Identity {
  std::shared_ptr<const FftPlan> plan;
  std::vector<int32_t> numbers;
  std::vector<float> ones;

  explicit Identity(int64_t length) : plan(fft_plan(length)), ones(size_t(length), 1.0f) {
    for (int64_t k = 0; k <= length; ++k) numbers.push_back(int32_t(k));
  }
  FourierMix view() const { return {plan.get(), plan.get(), numbers.data(), numbers.data(), ones.data()}; }
};

void run_fourier(Scalar scalar, int64_t features) {
  const int64_t tile = 2 * loops.fourier.lanes, tokens = 8 * tile + 3;
  Buffer x("x", scalar, tokens, features), start("start", scalar, tokens, features);
  x.fill(), start.fill();
  const Identity mix(features);
  const FourierPlaces places{features, mix.numbers.data(), mix.numbers.data()};
  const int64_t groups = 5;
  check_threads("fourier", [&](int threads) {
    const Buffer y("y", scalar, tokens, features);
    std::copy_n(static_cast<char*>(start.data()), start.bits().size(), static_cast<char*>(y.data()));
    Buffer sums("sums", Scalar::float32, groups, features);
    sums.set([](int64_t, int64_t) { return 0.0; });
    parallel_tiles(threads, tokens, tile, [&](int64_t first, int64_t count) {
      Scratch scratch(loops.fourier.scratch_floats(*mix.plan, *mix.plan));
      loops.fourier.fwd(mix.view(), scalar, count, x.rows(first), y.mutable_rows(first), scratch.data());
    });
    parallel(threads, groups, [&](int64_t group) {
      Scratch scratch(loops.fourier.scratch_floats(*mix.plan, *mix.plan));
      for (int64_t first = group * tile; first < tokens; first += groups * tile) {
        loops.fourier.bwd(mix.view(), scalar, std::min(tile, tokens - first), x.rows(first), y.mutable_rows(first),
                          start.rows(first), places, sums.floats() + group * features, scratch.data());
      }
    });
    return y.bits() + sums.bits();
  });
}

// More lengths than are kept, asked for in different orders, so that plans are built, thrown away and used at once.
void run_plans() {
  std::vector<int64_t> lengths;
  for (int64_t length = 1; length <= 70; ++length) lengths.push_back(length);
  for (const int64_t length : {131, 137, 254, 257, 262, 509, 768, 1021}) lengths.push_back(length);
  Buffer x("x", Scalar::float32, 3, 1021);
  x.fill();
  const auto transformed = [&](int64_t length) {
    const Identity mix(length);
    std::this_thread::yield();
    const Buffer y("y", Scalar::float32, 3, length);
    std::fill_n(y.floats(), 3 * length, 0.0f);
    Scratch scratch(loops.fourier.scratch_floats(*mix.plan, *mix.plan));
    loops.fourier.fwd(mix.view(), Scalar::float32, 3, x.rows(), y.mutable_rows(), scratch.data());
    return y.bits();
  };
  now = "fft_plan";
  std::vector<std::string> wanted;
  for (const int64_t length : lengths) wanted.push_back(transformed(length));
  std::vector<int64_t> wrong(kThreads);
  on_threads(kThreads, [&](int thread) {
    const size_t count = lengths.size();
    for (size_t i = 0; i < 3 * count; ++i) {
      const size_t forwards = (i + count * size_t(thread) / kThreads) % count;
      const size_t which = thread % 2 ? count - 1 - forwards : forwards;
      if (transformed(lengths[which]) != wanted[which]) wrong[size_t(thread)] = lengths[which];
    }
  });
  for (const int64_t length : wrong) {
    if (length) fail("length " + std::to_string(length) + " is transformed differently");
  }
}

// Each thread writes to what it holds and finds it there later.
void run_scratch() {
  now = "scratch";
  std::vector<int> wrong(kThreads);
  on_threads(kThreads, [&](int thread) {
    for (int64_t round = 0; round < 50; ++round) {
      const int64_t size = 1 + (round * 37 + thread * 11) % 500;
      Scratch outer(size);
      std::fill_n(outer.data(), size, float(thread));
      Scratch inner(2 * size);
      std::fill_n(inner.data(), 2 * size, -1.0f);
      wrong[size_t(thread)] += std::count(outer.data(), outer.data() + size, float(thread)) != size;
    }
  });
  if (std::count(wrong.begin(), wrong.end(), 0) != kThreads) fail("memory that two hold");
}

}  // namespace
}  // namespace fastpeft::check

int main(int argc, char** argv) {
  using namespace fastpeft;
  using namespace fastpeft::check;
  if (argc > 2 || (argc == 2 && std::string(argv[1]) != "overlap")) return 2;
  if (argc == 2) {
    run_butterfly(Scalar::bfloat16, 1);
    return 0;
  }
  for (const Scalar scalar : kScalars) {
    run_butterfly(scalar, 0);
    run_butterfly_many(scalar);
    run_scale(scalar);
    run_lora(scalar, 1, 37);
    run_lora(scalar, 3, 19);
    run_fourier(scalar, 35);
    run_fourier(scalar, 131);
  }
  run_cayley();
  run_plans();
  run_scratch();
  std::printf("%s: no mistake\n", loops.isa);
}
