// Fourier transforms of many complex signals at once, one signal per SIMD lane: part of the loops that include it.
//
// A tile holds n rows of two vectors, the real and the imaginary parts of entry j of every signal. Each butterfly is
// then made of whole vector operations, whatever the length. `fft_decimate` leaves bin k in row plan.position[k];
// `fft_combine` takes its input in that order and leaves the result in natural order: it is the transpose of the other,
// and the matrix of a Fourier transform is symmetric. So a transform, some work on bins and a transform back need no
// permutation of rows.
//
// Cost: a radix-4 pass has 28 vector operations and 16 vector loads and stores for four rows, so about
// 3.5 n log2 n operations for lanes signals. Passes go depth first: once a part fits the first-level cache it is
// transformed to the end before the next is touched.
#pragma once

#include "cpu/fft_plan.h"
#include "cpu/simd.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

constexpr int64_t kRow = 2 * kLanes;                      // floats in a row of a tile
constexpr int64_t kCachedRows = (16 << 10) / (kRow * 4);  // half of a small first-level cache

struct ComplexVector {
  Vector re, im;
};

inline ComplexVector load_row(const float* row) {
  const Vector* parts = reinterpret_cast<const Vector*>(row);
  return {parts[0], parts[1]};
}

inline void store_row(float* row, ComplexVector value) {
  Vector* parts = reinterpret_cast<Vector*>(row);
  parts[0] = value.re;
  parts[1] = value.im;
}

inline ComplexVector operator+(ComplexVector a, ComplexVector b) { return {a.re + b.re, a.im + b.im}; }
inline ComplexVector operator-(ComplexVector a, ComplexVector b) { return {a.re - b.re, a.im - b.im}; }

inline ComplexVector times(ComplexVector a, const float* w) {
  return {a.re * w[0] - a.im * w[1], a.im * w[0] + a.re * w[1]};
}

inline ComplexVector conjugate(ComplexVector a) { return {a.re, -a.im}; }

// a -> its transform, in place. roots as in FftPass.
template <int64_t kRadix>
inline void butterfly(ComplexVector* a, int64_t, const float* roots) {
  if constexpr (kRadix == 2) {
    const ComplexVector sum = a[0] + a[1];
    a[1] = a[0] - a[1];
    a[0] = sum;
  } else if constexpr (kRadix == 4) {
    const ComplexVector even = a[0] + a[2], even_difference = a[0] - a[2];
    const ComplexVector odd = a[1] + a[3], odd_difference = a[1] - a[3];
    a[0] = even + odd;
    a[2] = even - odd;
    a[1] = {even_difference.re + odd_difference.im, even_difference.im - odd_difference.re};
    a[3] = {even_difference.re - odd_difference.im, even_difference.im + odd_difference.re};
  } else {
    // Entries q and radix - q enter outputs s and radix - s by their sum and their difference alone.
    constexpr int64_t kHalf = kRadix / 2;
    ComplexVector sum[kHalf + 1], difference[kHalf + 1];
    ComplexVector total = a[0];
#pragma GCC unroll 8
    for (int64_t q = 1; q <= kHalf; ++q) {
      sum[q] = a[q] + a[kRadix - q];
      difference[q] = a[q] - a[kRadix - q];
      total = total + sum[q];
    }
    const ComplexVector first = a[0];
    a[0] = total;
#pragma GCC unroll 8
    for (int64_t s = 1; s <= kHalf; ++s) {
      ComplexVector even = first, odd = {};
#pragma GCC unroll 8
      for (int64_t q = 1; q <= kHalf; ++q) {
        const float* w = roots + 2 * (s * q % kRadix);
        even = {even.re + w[0] * sum[q].re, even.im + w[0] * sum[q].im};
        odd = {odd.re - w[1] * difference[q].im, odd.im + w[1] * difference[q].re};
      }
      a[s] = even + odd;
      a[kRadix - s] = even - odd;
    }
  }
}

// The same for an odd radix known at run time only.
template <>
inline void butterfly<0>(ComplexVector* a, int64_t radix, const float* roots) {
  if (radix < 3 || radix > kMaxRadix) __builtin_unreachable();
  const int64_t half = radix / 2;
  ComplexVector total = a[0];
  for (int64_t q = 1; q <= half; ++q) {  // sums in the lower half, differences in the upper
    const ComplexVector sum = a[q] + a[radix - q];
    a[radix - q] = a[q] - a[radix - q];
    a[q] = sum;
    total = total + sum;
  }
  ComplexVector even[kMaxRadix / 2 + 1], odd[kMaxRadix / 2 + 1];
  for (int64_t s = 1; s <= half; ++s) {
    even[s] = a[0];
    odd[s] = ComplexVector{};
    int64_t turn = 0;  // s q mod radix
    for (int64_t q = 1; q <= half; ++q) {
      turn += s;
      if (turn >= radix) turn -= radix;
      const float cosine = roots[2 * turn], sine = roots[2 * turn + 1];
      even[s] = {even[s].re + cosine * a[q].re, even[s].im + cosine * a[q].im};
      odd[s] = {odd[s].re - sine * a[radix - q].im, odd[s].im + sine * a[radix - q].re};
    }
  }
  a[0] = total;
  for (int64_t s = 1; s <= half; ++s) {
    a[s] = even[s] + odd[s];
    a[radix - s] = even[s] - odd[s];
  }
}

// One pass over neighbouring transforms of pass.length: butterflies, with the twiddle factors after them
// (decimating) or before them (combining).
template <int64_t kRadix, bool kDecimate>
inline void run_pass(const FftPass& pass, float* tile, int64_t blocks) {
  const int64_t radix = kRadix ? kRadix : pass.radix;
  const int64_t parts = pass.length / radix;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t j = 0; j < parts; ++j) {
      float* row = tile + (block * pass.length + j) * kRow;
      const float* twiddles = pass.twiddles + 2 * j * (radix - 1);
      ComplexVector a[kRadix ? kRadix : kMaxRadix];
#pragma GCC unroll 8
      for (int64_t s = 0; s < radix; ++s) {
        a[s] = load_row(row + s * parts * kRow);
        if (!kDecimate && s > 0 && parts > 1) a[s] = times(a[s], twiddles + 2 * (s - 1));
      }
      butterfly<kRadix>(a, radix, pass.roots);
#pragma GCC unroll 8
      for (int64_t s = 0; s < radix; ++s) {
        if (kDecimate && s > 0 && parts > 1) a[s] = times(a[s], twiddles + 2 * (s - 1));
        store_row(row + s * parts * kRow, a[s]);
      }
    }
  }
}

template <bool kDecimate>
void run_pass(const FftPass& pass, float* tile, int64_t blocks) {
  switch (pass.radix) {
    case 2:
      return run_pass<2, kDecimate>(pass, tile, blocks);
    case 3:
      return run_pass<3, kDecimate>(pass, tile, blocks);
    case 4:
      return run_pass<4, kDecimate>(pass, tile, blocks);
    case 5:
      return run_pass<5, kDecimate>(pass, tile, blocks);
    case 7:
      return run_pass<7, kDecimate>(pass, tile, blocks);
    default:
      return run_pass<0, kDecimate>(pass, tile, blocks);
  }
}

// Rows of scratch that a transform needs beside its tile.
inline int64_t fft_spare_rows(const FftPlan& plan) { return plan.leaf > 1 ? plan.convolution->length : 0; }

template <bool kDecimate>
void run_passes(const FftPlan& plan, int first, float* tile, float* spare);

// Bluestein's convolution, see FftPlan. Rows stay in natural order.
inline void convolve(const FftPlan& plan, float* tile, float* spare) {
  const FftPlan& inner = *plan.convolution;
  for (int64_t j = 0; j < plan.leaf; ++j)
    store_row(spare + j * kRow, times(load_row(tile + j * kRow), plan.chirp + 2 * j));
  for (int64_t j = plan.leaf; j < inner.length; ++j) store_row(spare + j * kRow, ComplexVector{});
  run_passes<true>(inner, 0, spare, nullptr);
  // The way back is a forward transform between two conjugations.
  for (int64_t j = 0; j < inner.length; ++j) {
    float* row = spare + j * kRow;
    store_row(row, conjugate(times(load_row(row), plan.filter + 2 * j)));
  }
  run_passes<false>(inner, 0, spare, nullptr);
  for (int64_t j = 0; j < plan.leaf; ++j) {
    store_row(tile + j * kRow, times(conjugate(load_row(spare + j * kRow)), plan.chirp + 2 * j));
  }
}

// All passes from `first` on, over one transform of that pass's length.
template <bool kDecimate>
void run_passes(const FftPlan& plan, int first, float* tile, float* spare) {
  if (first == plan.passes) {
    if (plan.leaf > 1) convolve(plan, tile, spare);
    return;
  }
  const FftPass& pass = plan.pass[first];
  if (pass.length <= kCachedRows && plan.leaf == 1) {
    for (int step = 0; step < plan.passes - first; ++step) {
      const FftPass& inner = plan.pass[kDecimate ? first + step : plan.passes - 1 - step];
      run_pass<kDecimate>(inner, tile, pass.length / inner.length);
    }
    return;
  }
  if (kDecimate) run_pass<true>(pass, tile, 1);
  const int64_t parts = pass.length / pass.radix;
  for (int64_t s = 0; s < pass.radix; ++s) run_passes<kDecimate>(plan, first + 1, tile + s * parts * kRow, spare);
  if (!kDecimate) run_pass<false>(pass, tile, 1);
}

// Natural order in, plan.position order out.
inline void fft_decimate(const FftPlan& plan, float* tile, float* spare) { run_passes<true>(plan, 0, tile, spare); }

// plan.position order in, natural order out.
inline void fft_combine(const FftPlan& plan, float* tile, float* spare) { run_passes<false>(plan, 0, tile, spare); }

inline int64_t real_fft_spare_rows(const RealFftPlan& plan) {
  int64_t most = fft_spare_rows(*plan.last.plan);
  for (int n = 0; n < plan.levels; ++n) {
    const int64_t rows = fft_spare_rows(*plan.level[n].plan);
    most = rows > most ? rows : most;
  }
  return most;
}

// The bins of a real signal, one vector for each entry of all lanes', which is lost: rows as plan.position says.
inline void real_fft_decimate(const RealFftPlan& plan, Vector* signal, float* tile, float* spare) {
  for (int n = 0; n < plan.levels; ++n) {
    const RealFftLevel& level = plan.level[n];
    const int64_t quarter = level.length / 4;
    float* rows = tile + level.first_row * kRow;
    for (int64_t j = 0; j < quarter; ++j) {
      const Vector a = signal[j], b = signal[j + quarter], c = signal[j + 2 * quarter], d = signal[j + 3 * quarter];
      signal[j] = a + c;
      signal[j + quarter] = b + d;
      store_row(rows + j * kRow, times({a - c, d - b}, level.twiddles + 2 * j));
    }
    fft_decimate(*level.plan, rows, spare);
  }
  float* rows = tile + plan.last.first_row * kRow;
  for (int64_t j = 0; j < plan.last.length; ++j) store_row(rows + j * kRow, {signal[j], Vector{}});
  fft_decimate(*plan.last.plan, rows, spare);
}

// The real part of the transform of bins: its transpose. A bin whose row is another one's is entered conjugated.
inline void real_fft_combine(const RealFftPlan& plan, float* tile, Vector* signal, float* spare) {
  float* rows = tile + plan.last.first_row * kRow;
  fft_combine(*plan.last.plan, rows, spare);
  for (int64_t j = 0; j < plan.last.length; ++j) signal[j] = load_row(rows + j * kRow).re;
  for (int n = plan.levels - 1; n >= 0; --n) {
    const RealFftLevel& level = plan.level[n];
    const int64_t quarter = level.length / 4;
    rows = tile + level.first_row * kRow;
    fft_combine(*level.plan, rows, spare);
    for (int64_t j = 0; j < quarter; ++j) {
      const ComplexVector odd = times(load_row(rows + j * kRow), level.twiddles + 2 * j);
      const Vector even = signal[j], other = signal[j + quarter];
      signal[j] = even + odd.re;
      signal[j + quarter] = other + odd.im;
      signal[j + 2 * quarter] = even - odd.re;
      signal[j + 3 * quarter] = other - odd.im;
    }
  }
}

}  // namespace
}  // namespace fastpeft::FASTPEFT_ISA
