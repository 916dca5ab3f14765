// LoRA's and MoS's loops on raw pointers, compiled per instruction set (see cpu/isa.h): products with a short side r.
#pragma once

#include <stdint.h>

#include "common/half.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace fastpeft {

// A matrix of `rank` rows, A or B transposed, whose row r is the shards[r * per_row + k] side by side, `width` floats
// each. LoRA's rows are one shard.
struct Shards {
  const float* const* shards;
  int64_t rank, per_row, width;

  int64_t features() const { return per_row * width; }
};

struct LoraLoops {
  // h[t, r] = scale * sum_j x[t, j] m[r, j]
  void (*project)(Scalar scalar, Rows x, const Shards& m, int64_t tokens, float scale, float* h);  // h: [tokens, rank]

  // y[t, j] += sum_r h[t, r] m[r, j]
  void (*expand)(Scalar scalar, const float* h, const Shards& m, int64_t tokens, MutableRows y);

  // m[r, j] = scale * sum_t h[t, r] x[t, j], or m[r, j] += where `add` is set, m's floats being writable, for the
  // columns [first, last) of every shard: a shard may stand in several places, but no two such ranges meet.
  void (*correlate)(Scalar scalar, const float* h, Rows x, int64_t tokens, float scale, const Shards& m, int64_t first,
                    int64_t last, bool add);

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
