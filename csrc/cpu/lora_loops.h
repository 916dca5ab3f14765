// LoRA's loops on raw pointers, compiled per instruction set (see cpu/isa.h): three products with a short side r.
#pragma once

#include <stdint.h>

#include "common/half.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace fastpeft {

// Adapter matrices are float32 rows side by side, [rank, features]: A, and B transposed.
struct LoraLoops {
  // h[t, r] = scale * sum_j x[t, j] m[r, j]
  void (*project)(Scalar scalar, Rows x, const float* m, int64_t tokens, int64_t features, int64_t rank, float scale,
                  float* h);  // [tokens, rank]

  // y[t, j] += sum_r h[t, r] m[r, j]
  void (*expand)(Scalar scalar, const float* h, const float* m, int64_t tokens, int64_t features, int64_t rank,
                 MutableRows y);

  // out[r, j] = sum_t h[t, r] x[t, j] for j in [first, last)
  void (*correlate)(Scalar scalar, const float* h, Rows x, int64_t tokens, int64_t rank, int64_t first, int64_t last,
                    float* out, int64_t out_stride);

  // out[j, i] = in[i, j]
  void (*transpose)(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride);
};

#define FASTPEFT_DECLARE(isa)  \
  namespace isa {              \
  extern const LoraLoops lora; \
  }
FASTPEFT_FOR_EACH_ISA(FASTPEFT_DECLARE)
#undef FASTPEFT_DECLARE

}  // namespace fastpeft
