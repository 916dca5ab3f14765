// Where the blocks of a butterfly factor lie: part of the loops that include it.
//
//   y = x R,  R = B_{m-1} ... B_0,  B_f = P_f diag(Q_f) P_f^T
//
// P_f only says which features meet. In a window of 2^f blocks, that is 2H half-blocks of b/2 features with
// H = 2^f, block s takes half-blocks s and s + H and writes its result back to the same two places. So a factor
// works in place, and R as a whole never crosses a window of b * 2^(m-1) features.
#pragma once

#include "cpu/boft_loops.h"
#include "cpu/simd.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

// Block k of factor f: where its two halves start in a row of the window group, and its place in Q.
struct Place {
  int64_t low, high;  // first feature of each half, relative to the range
  int64_t index;      // k
};

// Calls visit(Place) for the blocks of one factor that lie in the range, in order of k.
template <typename Visit>
inline void for_each_block(ButterflyRange range, int64_t block, int64_t factor, Visit visit) {
  const int64_t half = block / 2;
  const int64_t stride = int64_t(1) << factor;  // H: half-blocks between the two that meet
  const int64_t window = stride * block;
  int64_t index = range.first / block;
  for (int64_t base = 0; base < range.count; base += window) {
    for (int64_t s = 0; s < stride; ++s, ++index) {
      const int64_t low = base + s * half;
      visit(Place{low, low + stride * half, index});
    }
  }
}

inline int64_t feature(Place at, int64_t half, int64_t a) { return a < half ? at.low + a : at.high + (a - half); }

// Where block `at` of a factor starts among all blocks.
inline int64_t block_offset(const ButterflyShape& shape, int64_t factor, Place at) {
  return (factor * (shape.features / shape.block) + at.index) * shape.block * shape.block;
}

}  // namespace
}  // namespace fastpeft::FASTPEFT_ISA
