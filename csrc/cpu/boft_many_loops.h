// The butterfly product by reflections, on raw pointers, compiled per instruction set (see cpu/isa.h).
#pragma once

#include <stdint.h>

#include "common/half.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace fastpeft {

struct ReflectorShape {
  int64_t features;  // d
  int64_t block;     // b
  int64_t factors;   // m
  int64_t strip;     // S
  Scalar scalar;     // of x and z; reflectors are float32
};

struct ButterflyManyLoops {
  int64_t (*scratch_floats)(const ReflectorShape& shape);  // 64-byte aligned

  // z = x R for so many tokens. What a token gets does not depend on the others.
  void (*rotate)(const ReflectorShape& shape, int64_t tokens, Rows x,
                 const float* reflectors,  // [m, S/b, b (b + 1) / 2 - 1, d/S]
                 MutableRows z, float* scratch);
};

#define FASTPEFT_DECLARE(isa)                     \
  namespace isa {                                 \
  extern const ButterflyManyLoops butterfly_many; \
  }
FASTPEFT_FOR_EACH_ISA(FASTPEFT_DECLARE)
#undef FASTPEFT_DECLARE

}  // namespace fastpeft
