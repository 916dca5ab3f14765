// The operator fastpeft::fourier_many_ on CPU tensors: FourierFT, every row of x with an adapter of its own. Schema and
// fake: fastpeft/ops/fourierft_many.py.
//
// Floor, for a tile of 16 rows: the transforms' 3.5 (in log2 in + out log2 out) vector operations, 72 thousand at 1024
// features, and 7 vector loads and stores for each place. Bytes are few: n coefficients for each row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "cpu/fourierft_many_loops.h"
#include "cpu/many.h"
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

void fourier_many(Tensor y, const Tensor& x, const Tensor& arena_spectrum, const Tensor& row_spectrum,
                  const Tensor& places, const Tensor& place, const Tensor& scaling, const Tensor& rows,
                  const Tensor& slots) {
  check_activation(y, "y", -1);
  check_activation(x, "x", y.size(0));
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "x must have the dtype of y");
  check_table(places, "places", ScalarType::Int, {-1, 2, -1});
  const int64_t n = places.size(2), in = x.size(1), out = y.size(1);
  check_table(arena_spectrum, "arena_spectrum", ScalarType::Float, {-1, n});
  check_table(row_spectrum, "row_spectrum", ScalarType::Int, {-1});
  const int64_t count = row_spectrum.size(0);
  check_table(place, "place", ScalarType::Int, {count});
  check_table(scaling, "scaling", ScalarType::Float, {count});
  STD_TORCH_CHECK(in < int64_t(1) << 30 && out < int64_t(1) << 30, "x and y must have fewer than 2^30 features");
  const int32_t *spectra = data_of<int32_t>(row_spectrum), *which = data_of<int32_t>(place);
  const BatchPlan plan(rows, slots, y.size(0), count, [&](int64_t slot) { return spectra[slot] != -1; });
  if (plan.segments.empty() || in == 0 || out == 0 || n == 0) return;

  struct Token {
    int64_t row, slot, place;
    const float* spectrum;
  };
  std::vector<Token> tokens;
  for (const Segment& segment : plan.segments) {
    const int64_t p = which[segment.slot];
    STD_TORCH_CHECK(p >= 0 && p < places.size(0), "place must hold numbers in [0, ", places.size(0), "), got ", p);
    const float* spectrum = arena_row(arena_spectrum, spectra[segment.slot], "row_spectrum");
    for (int64_t t = 0; t < segment.count; ++t) {
      tokens.push_back({segment.first + t * segment.step, segment.slot, p, spectrum});
    }
  }
  // Tokens whose places are the same travel together.
  std::stable_sort(tokens.begin(), tokens.end(), [](const Token& a, const Token& b) { return a.place < b.place; });
  const int32_t* numbers = data_of<int32_t>(places);
  for (size_t t = 0; t < tokens.size(); ++t) {
    if (t > 0 && tokens[t].place == tokens[t - 1].place) continue;
    check_places(numbers + tokens[t].place * 2 * n, n, out);
    check_places(numbers + (tokens[t].place * 2 + 1) * n, n, in);
  }

  const auto source = fft_plan(in), target = fft_plan(out);
  const Scalar scalar = scalar_of(x, "x");
  const int64_t lanes = loops().lanes, total = int64_t(tokens.size());
  torch::stable::parallel_for(0, (total + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(loops().scratch_floats(*source, *target, n));
    for (int64_t first = begin * lanes; first < std::min(end * lanes, total); first += lanes) {
      FourierTile tile{};
      tile.count = std::min(lanes, total - first);
      tile.n = n;
      for (int64_t t = 0; t < tile.count; ++t) {
        const Token& token = tokens[first + t];
        tile.x[t] = rows_from(x, token.row).data;
        tile.y[t] = rows_into(y, token.row).data;
        tile.spectrum[t] = token.spectrum;
        tile.places[t] = numbers + token.place * 2 * n;
        tile.scale[t] = float(double(data_of<float>(scaling)[token.slot]) / (double(in) * double(out)));
      }
      loops().fwd(*source, *target, scalar, tile, scratch.data());
    }
  });
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("fourier_many_", TORCH_BOX(&fastpeft::fourier_many)); }
