// FourierFT's loops on raw pointers, compiled per instruction set (see cpu/isa.h).
#pragma once

#include <stdint.h>

#include "common/half.h"
#include "cpu/fft_plan.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace fastpeft {

// target[k] = sum over samples s in [offsets[k], offsets[k + 1]) of coefficients[s] * source[sources[s]], bins in
// natural order.
struct FourierMix {
  const FftPlan* source;
  const FftPlan* target;
  const int32_t* offsets;     // [target->length + 1]
  const int32_t* sources;     // [samples]
  const float* coefficients;  // [samples]
};

struct FourierPlaces {
  int64_t count;
  const int32_t* rows;  // [count], bins of the output
  const int32_t* cols;  // [count], bins of the input
};

struct FourierLoops {
  int64_t lanes;  // a tile holds twice as many tokens: one as the real part of a signal, one as the imaginary part

  // Floats of scratch for fwd, or for bwd with the same mix; 64-byte aligned.
  int64_t (*scratch_floats)(const FftPlan& one, const FftPlan& other);

  // y += the transform of the mixed transform of x, for at most one tile of tokens.
  void (*fwd)(const FourierMix& mix, Scalar scalar, int64_t tokens, Rows x, MutableRows y, float* scratch);

  // dx += the same of grad, by the mix for the way back; dx.data may be null. Where x.data is not null,
  // products[k] += Re sum over tokens of transform(grad)[rows[k]] * transform(x)[cols[k]].
  void (*bwd)(const FourierMix& mix, Scalar scalar, int64_t tokens, Rows grad, MutableRows dx, Rows x,
              const FourierPlaces& places, float* products, float* scratch);
};

#define FASTPEFT_DECLARE(isa)        \
  namespace isa {                    \
  extern const FourierLoops fourier; \
  }
FASTPEFT_FOR_EACH_ISA(FASTPEFT_DECLARE)
#undef FASTPEFT_DECLARE

}  // namespace fastpeft
