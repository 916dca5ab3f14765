// Orthogonal blocks as reflections, and how they lie in a row of an arena: fastpeft/ops/boft_many.py says it.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FASTPEFT_EVERYWHERE __host__ __device__
#else
#define FASTPEFT_EVERYWHERE
#endif

namespace fastpeft {

// Numbers of a block of size b: for each of b - 1 reflections tau, and what follows the one of v.
FASTPEFT_EVERYWHERE constexpr int64_t reflector_numbers(int64_t b) { return b * (b + 1) / 2 - 1; }

// Features of a strip: whole windows, and whole vectors of 16 where the features allow it.
FASTPEFT_EVERYWHERE constexpr int64_t strip_features(int64_t features, int64_t b, int64_t factors) {
  int64_t strip = b << (factors - 1);
  while (strip % 16 != 0 && features % (2 * strip) == 0) strip *= 2;
  return strip;
}

}  // namespace fastpeft
