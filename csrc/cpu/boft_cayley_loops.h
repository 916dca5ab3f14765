// The Cayley transform of BOFT's blocks on raw pointers, compiled per instruction set (see cpu/isa.h).
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace fastpeft {

struct CayleyLoops {
  int64_t lanes;  // blocks that one call transforms at most

  // Floats of scratch for either function; 64-byte aligned.
  int64_t (*scratch_floats)(int64_t block);

  // q = (I - S) (I + S)^-1 with S = (r - r^T) / 2, for count <= lanes blocks.
  void (*fwd)(const float* r, int64_t count, int64_t block, float* q, float* scratch);  // [count, block, block]

  // The reflections of q (fastpeft/ops/boft_many.py) for blocks of r `apart` floats from each other: number n of block
  // `lane` at numbers[n * lanes + lane].
  void (*reflectors)(const float* r, int64_t apart, int64_t count, int64_t block, float* numbers, int64_t lanes,
                     float* scratch);

  // dr = (dS - dS^T) / 2 with dS = -1/2 (Q + I)^T grad (Q + I)^T.
  void (*bwd)(const float* grad, const float* q, int64_t count, int64_t block, float* dr, float* scratch);
};

#define FASTPEFT_DECLARE(isa)      \
  namespace isa {                  \
  extern const CayleyLoops cayley; \
  }
FASTPEFT_FOR_EACH_ISA(FASTPEFT_DECLARE)
#undef FASTPEFT_DECLARE

}  // namespace fastpeft
