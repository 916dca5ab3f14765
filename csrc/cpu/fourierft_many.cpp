// The operator fastpeft::fourier_many_ on CPU tensors: FourierFT, every row of x with an adapter of its own. Schema and
// fake: fastpeft/ops/fourierft_many.py.
//
// Floor, for a tile of 8 rows: the real transforms' 1.7 (in log2 in + out log2 out) vector operations, 36 thousand at
// 1024 features, and 7 vector loads and stores for each place. Bytes are few: n coefficients for each row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/fourierft_many_loops.h"
#include "cpu/many_tensors.h"
#include "cpu/scratch.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const FourierManyLoops& loops() { return FASTPEFT_ACTIVE(fourier_many); }

void check_places(const int32_t* numbers, int64_t n, int64_t limit) {
  // One bit for all of them, which compilers vectorise: a comparison each takes as long as a transform.
  int32_t signs = 0;
  for (int64_t k = 0; k < n; ++k) signs |= numbers[k] | int32_t(uint32_t(limit - 1) - uint32_t(numbers[k]));
  STD_TORCH_CHECK(signs >= 0, "places must hold numbers in [0, ", limit, ")");
}

class FourierWork : public Work {
 public:
  FourierWork(const FourierTables& tables, const Batch& batch, const Matrix& x, const Matrix& y, int64_t in,
              int64_t out)
      : tables_(tables), x_(x), y_(y) {
    const int64_t n = tables.spectrum.width;
    STD_TORCH_CHECK(in < int64_t(1) << 30 && out < int64_t(1) << 30, "x and y must have fewer than 2^30 features");
    for (const Segment& segment : batch.segments(tables.slots, [&](int64_t slot) { return tables.row[slot] != -1; })) {
      const int64_t p = tables.place[segment.slot];
      STD_TORCH_CHECK(p >= 0 && p < tables.kinds, "place must hold numbers in [0, ", tables.kinds, "), got ", p);
      const float* spectrum = tables.spectrum.row(tables.row[segment.slot], "row_spectrum");
      const float scale = float(double(tables.scaling[segment.slot]) / (double(in) * double(out)));
      for (int64_t t = 0; t < segment.count; ++t) {
        tokens_.push_back({segment.first + t * segment.step, tables.places + p * 2 * n, spectrum, scale});
      }
    }
    if (tokens_.empty()) return;
    // Tokens whose places are the same travel together.
    std::stable_sort(tokens_.begin(), tokens_.end(),
                     [](const Token& a, const Token& b) { return a.places < b.places; });
    for (size_t t = 0; t < tokens_.size(); ++t) {
      if (t > 0 && tokens_[t].places == tokens_[t - 1].places) continue;
      check_places(tokens_[t].places, n, out);
      check_places(tokens_[t].places + n, n, in);
    }
    source_ = real_fft_plan(in), target_ = real_fft_plan(out);
    tasks = (int64_t(tokens_.size()) + loops().lanes - 1) / loops().lanes;
    size = 1 << 16;
  }

  void run(int64_t task) const override {
    const int64_t lanes = loops().lanes, first = task * lanes, n = tables_.spectrum.width;
    Scratch scratch(loops().scratch_floats(*source_, *target_));
    FourierTile tile{};
    tile.count = std::min(lanes, int64_t(tokens_.size()) - first);
    tile.n = n;
    for (int64_t t = 0; t < tile.count; ++t) {
      const Token& token = tokens_[first + t];
      tile.x[t] = x_.row(token.row);
      tile.y[t] = y_.row(token.row);
      tile.spectrum[t] = token.spectrum;
      tile.places[t] = token.places;
      tile.scale[t] = token.scale;
    }
    loops().fwd(*source_, *target_, x_.scalar, tile, scratch.data());
  }

 private:
  struct Token {
    int64_t row;
    const int32_t* places;
    const float* spectrum;
    float scale;
  };

  FourierTables tables_;
  Matrix x_, y_;
  std::vector<Token> tokens_;
  std::shared_ptr<const RealFftPlan> source_, target_;
};

void fourier_many(Tensor y, const Tensor& x, const Tensor& arena_spectrum, const Tensor& row_spectrum,
                  const Tensor& places, const Tensor& place, const Tensor& scaling, const Tensor& rows,
                  const Tensor& slots) {
  const Matrix target = matrix_of(y, "y"), source = matrix_of(x, "x", y.size(0));
  STD_TORCH_CHECK(source.scalar == target.scalar, "x must have the dtype of y");
  check_table(places, "places", ScalarType::Int, {-1, 2, -1});
  const Arena arena = arena_of(arena_spectrum, "arena_spectrum", places.size(2));
  check_table(row_spectrum, "row_spectrum", ScalarType::Int, {-1});
  const int64_t count = row_spectrum.size(0);
  check_table(place, "place", ScalarType::Int, {count});
  check_table(scaling, "scaling", ScalarType::Float, {count});
  std::vector<char> named(y.size(0));
  const Batch batch = batch_of(rows, slots, named);
  if (x.numel() == 0 || y.numel() == 0 || arena.width == 0) return;
  const FourierTables tables{arena,
                             data_of<int32_t>(row_spectrum),
                             data_of<int32_t>(places),
                             data_of<int32_t>(place),
                             data_of<float>(scaling),
                             count,
                             places.size(0)};
  run_alone(fourier_work(tables, batch, source, target, x.size(1), y.size(1)));
}

}  // namespace

std::unique_ptr<Work> fourier_work(const FourierTables& tables, const Batch& batch, const Matrix& x, const Matrix& y,
                                   int64_t in_features, int64_t out_features) {
  return std::make_unique<FourierWork>(tables, batch, x, y, in_features, out_features);
}

}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("fourier_many_", TORCH_BOX(&fastpeft::fourier_many)); }
