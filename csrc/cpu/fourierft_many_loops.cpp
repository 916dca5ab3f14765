// FourierFT for tokens with different adapters: see cpu/fourierft_loops.cpp for the formula. A lane has one token, a
// real signal: two that shared a complex one would share a spectrum. What is wanted is the real part of a transform, so
// S need not be made Hermitian: a bin and its mirror image add to one row.
//
// Cost for lanes tokens: two real transforms (cpu/fft.h), a transposition on the way in and out and of the
// coefficients, and for each of n places 2 multiply-adds and 7 loads and stores of vectors. Eight tokens at a time,
// also where vectors have room for sixteen: a tile of them stays in the first-level cache up to 750 features, and the
// few tokens of a decoding batch fill it. Sixteen are no faster than two times eight.
#define FASTPEFT_MOST_LANES 8

#include "cpu/fourierft_many_loops.h"

#include "cpu/fft.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

// out[j] = entry j of every row, zeros in lanes that have none.
template <typename T>
inline void load_lanes(const void* const* rows, int64_t count, int64_t length, Vector* out) {
  int64_t j = 0;
  for (; j + kLanes <= length; j += kLanes) {
    Vector block[kLanes];
#pragma GCC unroll 16
    for (int64_t t = 0; t < kLanes; ++t) {
      block[t] = t < count ? load_vector(static_cast<const T*>(rows[t]) + j) : Vector{};
    }
    transpose(block);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) out[j + i] = block[i];
  }
  for (; j < length; ++j) {
    Vector values = {};
    for (int64_t t = 0; t < count; ++t) values[t] = to_float(static_cast<const T*>(rows[t])[j]);
    out[j] = values;
  }
}

// Adds scale times entry j of `tile` to entry j of every row.
template <typename T>
inline void add_lanes(const Vector* tile, int64_t length, const FourierTile& tokens) {
  int64_t j = 0;
  for (; j + kLanes <= length; j += kLanes) {
    Vector block[kLanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) block[i] = tile[j + i];
    transpose(block);
    for (int64_t t = 0; t < tokens.count; ++t) {
      T* to = static_cast<T*>(tokens.y[t]) + j;
      store_vector(to, load_vector(to) + tokens.scale[t] * block[t]);
    }
  }
  for (; j < length; ++j) {
    for (int64_t t = 0; t < tokens.count; ++t) {
      T* to = static_cast<T*>(tokens.y[t]) + j;
      *to = from_float<T>(to_float(*to) + tokens.scale[t] * tile[j][t]);
    }
  }
}

// Vector i holds coefficient k + i of every token, zeros where there is none.
inline void load_coefficients(const FourierTile& tile, int64_t k, Vector* block) {
  const int64_t rest = tile.n - k;
#pragma GCC unroll 16
  for (int64_t t = 0; t < kLanes; ++t) {
    block[t] = t >= tile.count  ? Vector{}
               : rest >= kLanes ? load_vector(tile.spectrum[t] + k)
                                : load_some(tile.spectrum[t] + k, rest);
  }
  transpose(block);
}

// target[rows[k]] += coefficients[k] * source[cols[k]] in the lanes that `mine` names.
template <bool kAll>
inline void mix_places(const FourierTile& tile, const int32_t* places, Bits mine, const RealFftPlan& source,
                       const float* from, const RealFftPlan& target, float* to) {
  for (int64_t first = 0; first < tile.n; first += kLanes) {
    Vector coefficients[kLanes];
    load_coefficients(tile, first, coefficients);
    const int64_t count = tile.n - first < kLanes ? tile.n - first : kLanes;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = first + i;
      const int32_t read = source.position[places[tile.n + k]], written = target.position[places[k]];
      // All bits set where a row holds the conjugate.
      const int32_t read_mirrored = read >> 31, written_mirrored = written >> 31;
      const ComplexVector bin = load_row(from + int64_t(read ^ read_mirrored) * kRow);
      float* row = to + int64_t(written ^ written_mirrored) * kRow;
      const ComplexVector old = load_row(row);
      const Vector c = coefficients[i];
      ComplexVector sum = {old.re + c * bin.re,
                           old.im + c * float(1 + 2 * (read_mirrored ^ written_mirrored)) * bin.im};
      // Not a coefficient of zero: it would take what is not a number from one lane's x to where the lane has no place.
      if (!kAll) sum = {mine ? sum.re : old.re, mine ? sum.im : old.im};
      store_row(row, sum);
    }
  }
}

void mix(const FourierTile& tile, const RealFftPlan& source, const float* from, const RealFftPlan& target, float* to) {
  for (int64_t j = 0; j < target.rows; ++j) store_row(to + j * kRow, ComplexVector{});
  for (int64_t first = 0; first < tile.count; ++first) {
    Bits mine = {};
    bool seen = false, all = true;
    for (int64_t t = 0; t < tile.count; ++t) {
      const bool same = tile.places[t] == tile.places[first];
      seen |= same && t < first;
      all &= same;
      mine[t] = same ? ~0u : 0u;
    }
    if (seen) continue;
    if (all) {
      mix_places<true>(tile, tile.places[first], mine, source, from, target, to);
    } else {
      mix_places<false>(tile, tile.places[first], mine, source, from, target, to);
    }
  }
}

int64_t longest(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t scratch_floats(const RealFftPlan& source, const RealFftPlan& target) {
  const int64_t spare = longest(real_fft_spare_rows(source), real_fft_spare_rows(target));
  return longest(source.length, target.length) * kLanes + (source.rows + target.rows + spare) * kRow;
}

void fwd(const RealFftPlan& source, const RealFftPlan& target, Scalar scalar, const FourierTile& tile, float* scratch) {
  Vector* signal = reinterpret_cast<Vector*>(scratch);
  float* from = scratch + longest(source.length, target.length) * kLanes;
  float* to = from + source.rows * kRow;
  float* spare = to + target.rows * kRow;
  with_scalar(scalar, [&]<typename T>(T) {
    load_lanes<T>(tile.x, tile.count, source.length, signal);
    real_fft_decimate(source, signal, from, spare);
    mix(tile, source, from, target, to);
    real_fft_combine(target, to, signal, spare);
    add_lanes<T>(signal, target.length, tile);
  });
}

}  // namespace

const FourierManyLoops fourier_many = {kLanes, scratch_floats, fwd};

}  // namespace fastpeft::FASTPEFT_ISA
