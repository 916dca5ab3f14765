// The butterfly product of few tokens: one row of a block is one vector. Part of the loops that include it.
#pragma once

#include "cpu/boft_places.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

constexpr int64_t kRowTokens = 8;  // that scratch holds at a time

template <int B>
struct Row {
  typedef float type __attribute__((vector_size(B * sizeof(float)), aligned(4)));
};

// Put together in registers: written to memory in halves and read back whole, a row would have to wait for the stores.
template <int B, int... kEntry>
inline typename Row<B>::type join(typename Row<B / 2>::type low, typename Row<B / 2>::type high,
                                  std::integer_sequence<int, kEntry...>) {
  return __builtin_shufflevector(low, high, kEntry...);
}

template <int B>
inline typename Row<B>::type load_row(const float* first, const float* second) {
  typename Row<B / 2>::type low, high;
  __builtin_memcpy(&low, first, sizeof(low));
  __builtin_memcpy(&high, second, sizeof(high));
  return join<B>(low, high, std::make_integer_sequence<int, B>{});
}

template <int B, int... kEntry>
inline void store_row(float* row, Place at, typename Row<B>::type value, std::integer_sequence<int, kEntry...>) {
  const typename Row<B / 2>::type low = __builtin_shufflevector(value, value, kEntry...);
  const typename Row<B / 2>::type high = __builtin_shufflevector(value, value, (B / 2 + kEntry)...);
  __builtin_memcpy(row + at.low, &low, sizeof(low));
  __builtin_memcpy(row + at.high, &high, sizeof(high));
}

template <int B>
struct Block {
  typename Row<B>::type rows[B];

  // Row by row: a block that is copied as a whole goes by way of the stack.
  explicit Block(const float* q) {
#pragma GCC unroll 32
    for (int a = 0; a < B; ++a) __builtin_memcpy(&rows[a], q + a * B, sizeof(rows[a]));
  }

  // Entry c is sum_a z[a] q[a, c], z the features of two halves; in one order for all who ask.
  typename Row<B>::type times(const float* low, const float* high) const {
    typename Row<B>::type sum = {};  // from zero: that leaves no choice of what is fused with what
#pragma GCC unroll 32
    for (int a = 0; a < B; ++a) sum += rows[a] * (a < B / 2 ? low[a] : high[a - B / 2]);
    return sum;
  }
};

// out[t] = in[t] Q for one block. in and out may be the same rows.
template <int B>
inline void multiply_block(const float* in, float* out, int64_t ld, int64_t tokens, Place at, const float* q) {
  const Block<B> block(q);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* source = in + t * ld;
    store_row<B>(out + t * ld, at, block.times(source + at.low, source + at.high),
                 std::make_integer_sequence<int, B / 2>{});
  }
}

// All blocks of a factor for kTokens tokens. A loop of its own, since what leads from block to block would cost more
// than the product.
template <int B, int kTokens>
inline void multiply_blocks(const float* in, float* out, int64_t ld, int64_t blocks, int64_t factor, const float* q) {
  const int64_t others = (int64_t(1) << factor) - 1, apart = int64_t(B / 2) << factor;
  for (int64_t k = 0; k < blocks; ++k, q += B * B) {
    // Blocks are read once and come from far away: asked for half a page ahead they come sooner.
    for (int i = 0; i < B * B; i += 16) __builtin_prefetch(q + i + 512);
    const int64_t low = (k & ~others) * B + (k & others) * (B / 2);
    const Block<B> block(q);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const float* source = in + t * ld;
      store_row<B>(out + t * ld, {low, low + apart, k}, block.times(source + low, source + low + apart),
                   std::make_integer_sequence<int, B / 2>{});
    }
  }
}

// dq += in^T g, then g = g Q^T in place, for one block.
template <int B>
inline void differentiate_block(const float* in, float* g, int64_t ld, int64_t tokens, Place at, const float* q,
                                float* dq) {
  if (dq != nullptr) {
    typename Row<B>::type sums[B] = {};
    for (int64_t t = 0; t < tokens; ++t) {
      const typename Row<B>::type gradient = load_row<B>(g + t * ld + at.low, g + t * ld + at.high);
      const float* source = in + t * ld;
#pragma GCC unroll 32
      for (int a = 0; a < B; ++a) {
        sums[a] += gradient * source[a < B / 2 ? at.low + a : at.high + a - B / 2];
      }
    }
    typename Row<B>::type total[B];
    __builtin_memcpy(total, dq, sizeof(total));
    for (int a = 0; a < B; ++a) total[a] += sums[a];
    __builtin_memcpy(dq, total, sizeof(total));
  }
  float transposed[B * B];
  for (int a = 0; a < B; ++a) {
    for (int c = 0; c < B; ++c) transposed[c * B + a] = q[a * B + c];
  }
  multiply_block<B>(g, g, ld, tokens, at, transposed);
}

// The same for a block size known only at run time (and the odd ones, which have a single factor).
inline void multiply_any(const float* in, float* out, int64_t ld, int64_t tokens, Place at, int64_t b, const float* q,
                         int64_t row_step, int64_t column_step, float* result) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < b; ++c) result[c] = 0.0f;
    for (int64_t a = 0; a < b; ++a) {
      const float value = in[t * ld + feature(at, b / 2, a)];
      for (int64_t c = 0; c < b; ++c) result[c] += value * q[a * row_step + c * column_step];
    }
    for (int64_t c = 0; c < b; ++c) out[t * ld + feature(at, b / 2, c)] = result[c];
  }
}

inline void add_outer_any(const float* in, const float* g, int64_t ld, int64_t tokens, Place at, int64_t b, float* dq) {
  for (int64_t a = 0; a < b; ++a) {
    for (int64_t c = 0; c < b; ++c) {
      float sum = 0.0f;
      for (int64_t t = 0; t < tokens; ++t) {
        sum += in[t * ld + feature(at, b / 2, a)] * g[t * ld + feature(at, b / 2, c)];
      }
      dq[a * b + c] += sum;
    }
  }
}

struct RowChunk {
  const ButterflyShape& shape;
  ButterflyRange range;
  int64_t tokens;
  float* spare;  // b floats for block sizes that are not specialised

  template <int B>
  void multiply(const float* in, float* out, const float* blocks, int64_t factor) const {
    if constexpr (B > 0) {
      const float* q = blocks + block_offset(shape, factor, {0, 0, range.first / shape.block});
      const int64_t ld = range.count, count = range.count / B;
      int64_t t = 0;
      for (; t + 4 <= tokens; t += 4) multiply_blocks<B, 4>(in + t * ld, out + t * ld, ld, count, factor, q);
      for (; t < tokens; ++t) multiply_blocks<B, 1>(in + t * ld, out + t * ld, ld, count, factor, q);
    } else {
      for_each_block(range, shape.block, factor, [&](Place at) {
        const float* q = blocks + block_offset(shape, factor, at);
        multiply_any(in, out, range.count, tokens, at, shape.block, q, shape.block, 1, spare);
      });
    }
  }

  template <int B>
  void differentiate(const float* in, float* g, const float* blocks, float* dblocks, int64_t factor) const {
    for_each_block(range, shape.block, factor, [&](Place at) {
      const float* q = blocks + block_offset(shape, factor, at);
      float* dq = dblocks == nullptr ? nullptr : dblocks + block_offset(shape, factor, at);
      if constexpr (B > 0) {
        differentiate_block<B>(in, g, range.count, tokens, at, q, dq);
      } else {
        if (dq != nullptr) add_outer_any(in, g, range.count, tokens, at, shape.block, dq);
        multiply_any(g, g, range.count, tokens, at, shape.block, q, 1, shape.block, spare);
      }
    });
  }
};

template <typename T>
void load_rows(const void* x, int64_t stride, int64_t first_token, const RowChunk& chunk, float* out) {
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    const T* row = static_cast<const T*>(x) + (first_token + t) * stride + chunk.range.first;
    float* to = out + t * chunk.range.count;
    for (int64_t i = 0; i < chunk.range.count; ++i) to[i] = to_float(row[i]);
  }
}

template <typename T>
void store_rows(const float* in, const RowChunk& chunk, int64_t first_token, void* y, int64_t stride) {
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    T* row = static_cast<T*>(y) + (first_token + t) * stride + chunk.range.first;
    const float* from = in + t * chunk.range.count;
    for (int64_t i = 0; i < chunk.range.count; ++i) row[i] = from_float<T>(from[i]);
  }
}

template <typename T, int B>
void fwd_rows(const ButterflyShape& shape, ButterflyRange range, int64_t tokens, const void* x, int64_t x_stride,
              const float* blocks, void* y, int64_t y_stride, float* scratch) {
  float* rows = scratch + shape.block;
  for (int64_t first = 0; first < tokens; first += kRowTokens) {
    const RowChunk chunk{shape, range, tokens - first < kRowTokens ? tokens - first : kRowTokens, scratch};
    load_rows<T>(x, x_stride, first, chunk, rows);
    for (int64_t f = shape.factors - 1; f >= 0; --f) chunk.template multiply<B>(rows, rows, blocks, f);
    store_rows<T>(rows, chunk, first, y, y_stride);
  }
}

template <typename T, int B>
void bwd_rows(const ButterflyShape& shape, ButterflyRange range, int64_t tokens, const void* grad, int64_t grad_stride,
              const void* x, int64_t x_stride, const float* blocks, void* dx, int64_t dx_stride, float* dblocks,
              float* scratch) {
  const int64_t page = kRowTokens * range.count;
  float* g = scratch + shape.block;
  float* inputs = g + page;  // page f holds the input of factor f
  for (int64_t first = 0; first < tokens; first += kRowTokens) {
    const RowChunk chunk{shape, range, tokens - first < kRowTokens ? tokens - first : kRowTokens, scratch};
    load_rows<T>(grad, grad_stride, first, chunk, g);
    if (dblocks != nullptr) {
      load_rows<T>(x, x_stride, first, chunk, inputs + (shape.factors - 1) * page);
      for (int64_t f = shape.factors - 1; f > 0; --f) {
        chunk.template multiply<B>(inputs + f * page, inputs + (f - 1) * page, blocks, f);
      }
    }
    for (int64_t f = 0; f < shape.factors; ++f) {
      chunk.template differentiate<B>(inputs + f * page, g, blocks, dblocks, f);
    }
    if (dx != nullptr) store_rows<T>(g, chunk, first, dx, dx_stride);
  }
}

}  // namespace
}  // namespace fastpeft::FASTPEFT_ISA
