// The butterfly product's loops on raw pointers, compiled per instruction set (see cpu/isa.h).
#pragma once

#include <stdint.h>

#include "common/half.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace fastpeft {

// Tokens that one pass of the loops holds in scratch. The order in which block gradients are added up depends on it.
constexpr int64_t kButterflyTokens = 64;
constexpr int64_t kScaleColumns = 256;

struct ButterflyShape {
  int64_t features;  // d
  int64_t block;     // b
  int64_t factors;   // m
  Scalar scalar;     // of x, y and their gradients; blocks and their gradients are float32
};

// Features [first, first + count) make up whole windows of b * 2^(m-1) features: nothing crosses their border.
struct ButterflyRange {
  int64_t first;
  int64_t count;
};

// Floats of scratch, 64-byte aligned, for fwd or bwd.
static inline int64_t butterfly_scratch_floats(const ButterflyShape& shape, ButterflyRange range, bool backward) {
  constexpr int64_t kMostLanes = 16;
  const int64_t pages = backward ? shape.factors + 1 : 1;
  return shape.block * kMostLanes + pages * kButterflyTokens * range.count;
}

struct ButterflyLoops {
  // y[t, range] = (x R)[t, range] for the given tokens.
  void (*fwd)(const ButterflyShape& shape, ButterflyRange range, int64_t tokens, Rows x,
              const float* blocks,  // [m, d/b, b, b]
              MutableRows y, float* scratch);
  // dx (whose data may be null) and, added up over the tokens, dblocks (or null). x is read for dblocks alone.
  void (*bwd)(const ButterflyShape& shape, ButterflyRange range, int64_t tokens, Rows grad, Rows x,
              const float* blocks,  // [m, d/b, b, b]
              MutableRows dx,
              float* dblocks,  // [m, d/b, b, b], zeros at the start
              float* scratch);

  // y = y0 + (y0 - bias) (s - 1), which is (y0 - bias) s + bias and leaves y0 as it is, to the last bit, where s is 1.
  // bias may be null. y may be y0.
  void (*scale_fwd)(Scalar scalar, int64_t tokens, int64_t features, Rows y0, const void* bias, const float* s,
                    MutableRows y);
  // For columns [first, last), at most kScaleColumns: scaled = grad s (or null), ds[j] = sum_t grad (y0 - bias) (or
  // null).
  void (*scale_bwd)(Scalar scalar, int64_t tokens, int64_t first, int64_t last, Rows grad, Rows y0, const void* bias,
                    const float* s, MutableRows scaled, float* ds);
};

#define FASTPEFT_DECLARE(isa)            \
  namespace isa {                        \
  extern const ButterflyLoops butterfly; \
  }
FASTPEFT_FOR_EACH_ISA(FASTPEFT_DECLARE)
#undef FASTPEFT_DECLARE

}  // namespace fastpeft
