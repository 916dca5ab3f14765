// What Fourier transforms of one length need to know: their passes, their twiddle factors, the order of their bins.
#pragma once

#include <stdint.h>

#include <memory>

namespace fastpeft {

constexpr int kMaxPasses = 31;      // lengths stay below 2^31
constexpr int64_t kMaxRadix = 127;  // larger primes become convolutions (Bluestein), which are cheaper from there on

// One pass splits every transform of `length` into `radix` transforms of length / radix, decimating in frequency.
struct FftPass {
  int64_t radix;
  int64_t length;
  const float* twiddles;  // [length / radix, radix - 1, 2]: w^(j s) for s = 1 ... radix - 1, w = exp(-2 pi i / length)
  const float* roots;     // [radix, 2]: exp(-2 pi i k / radix)
};

// Plain data, so that the loops can read it without inline code of the standard library (see cpu/isa.h).
struct FftPlan {
  int64_t length;
  int passes;
  FftPass pass[kMaxPasses];
  const int32_t* position;  // [length]: the row in which the passes leave bin k
  // What the passes cannot split, 1 in most lengths, is transformed as a convolution with a chirp:
  // X[k] = c[k] sum_j (x[j] c[j]) conj(c[k - j]), c[j] = exp(-pi i j^2 / leaf).
  int64_t leaf;
  const FftPlan* convolution;  // of a length of at least 2 leaf - 1 with small factors only; null if leaf is 1
  const float* chirp;          // [leaf, 2]: c
  const float* filter;         // [convolution->length, 2]: the transform of conj(c), in the order of its rows, scaled
};

// The plan of a length in [1, 2^30). Plans are built once and shared by everybody who asks, from any thread; the most
// recently used ones are kept.
std::shared_ptr<const FftPlan> fft_plan(int64_t length);

// Of real signals, half of whose bins say all. A level splits a signal of `length`, a multiple of four, into the
// complex signal of its bins 4 k + 1, whose conjugates are the bins 4 k + 3, and the real one of its even bins:
//
//   (x[j] - x[j + n/2] - i (x[j + n/4] - x[j + 3 n/4])) w^j  and  x[j] + x[j + n/2],  w = exp(-2 pi i / n)
//
// So there is no pass that untangles two halves, and lengths that are no multiple of four need no way of their own.
struct RealFftLevel {
  int64_t length;
  int64_t first_row;      // of its complex signal's in a tile
  const FftPlan* plan;    // of length / 4
  const float* twiddles;  // [length / 4, 2]: w^j
};

struct RealFftPlan {
  int64_t length;
  int64_t rows;  // of a tile that holds the bins
  int levels;
  RealFftLevel level[kMaxPasses];
  RealFftLevel last;        // what is left, transformed as it is: no twiddle factors, a plan of its whole length
  const int32_t* position;  // [length]: the row of bin k, or ~row of bin length - k, of which it is the conjugate
};

// As fft_plan.
std::shared_ptr<const RealFftPlan> real_fft_plan(int64_t length);

}  // namespace fastpeft
