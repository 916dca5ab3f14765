// FourierFT's loops for tokens with different adapters, on raw pointers, compiled per instruction set (see cpu/isa.h).
#pragma once

#include <stdint.h>

#include "common/half.h"
#include "cpu/fft_plan.h"
#include "cpu/isa.h"

namespace fastpeft {

constexpr int kMostFourierLanes = 16;

// Tokens that travel together: only the transforms are shared, so none of them sees what the others hold.
struct FourierTile {
  int64_t count;                             // of tokens, at most `lanes`
  const void* x[kMostFourierLanes];          // [source->length]
  void* y[kMostFourierLanes];                // [target->length]
  const float* spectrum[kMostFourierLanes];  // [n]
  const int32_t* places[kMostFourierLanes];  // [2, n]: bins of the target, bins of the source
  float scale[kMostFourierLanes];
  int64_t n;
};

struct FourierManyLoops {
  int64_t lanes;

  // Floats of scratch, 64-byte aligned.
  int64_t (*scratch_floats)(const RealFftPlan& source, const RealFftPlan& target);

  // y += scale * Re F1 (S F2 x), S[rows[k], cols[k]] = spectrum[k], for every token of the tile.
  void (*fwd)(const RealFftPlan& source, const RealFftPlan& target, Scalar scalar, const FourierTile& tile,
              float* scratch);
};

#define FASTPEFT_DECLARE(isa)                 \
  namespace isa {                             \
  extern const FourierManyLoops fourier_many; \
  }
FASTPEFT_FOR_EACH_ISA(FASTPEFT_DECLARE)
#undef FASTPEFT_DECLARE

}  // namespace fastpeft
