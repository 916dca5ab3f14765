// The butterfly product of BOFT (Liu et al., ICLR 2024, arXiv 2311.06243), forward and backward.
//
//   y = x R,  R = B_{m-1} ... B_0,  B_f = P_f diag(Q_f) P_f^T
//
// P_f only says which features meet. In a window of 2^f blocks, that is 2H half-blocks of b/2 features with
// H = 2^f, block s takes half-blocks s and s + H and writes its result back to the same two places. So a factor
// works in place, and R as a whole never crosses a window of b * 2^(m-1) features.
//
// Cost: m * b multiply-adds a feature forward, three times that backward with the intermediates recomputed. One
// row of a block is one vector, so a multiply-add handles b features at once; x and y cross memory once.
#include "cpu/boft_loops.h"

#include "cpu/simd.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

constexpr int64_t kTokens = kButterflyTokens;

template <int B>
struct Row {
  typedef float type __attribute__((vector_size(B * sizeof(float)), aligned(4)));
};

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

template <int B>
inline typename Row<B>::type load_row(const float* row, Place at) {
  typename Row<B>::type value;
  __builtin_memcpy(&value, row + at.low, B / 2 * sizeof(float));
  __builtin_memcpy(reinterpret_cast<char*>(&value) + B / 2 * sizeof(float), row + at.high, B / 2 * sizeof(float));
  return value;
}

template <int B>
inline void store_row(float* row, Place at, typename Row<B>::type value) {
  __builtin_memcpy(row + at.low, &value, B / 2 * sizeof(float));
  __builtin_memcpy(row + at.high, reinterpret_cast<char*>(&value) + B / 2 * sizeof(float), B / 2 * sizeof(float));
}

inline int64_t feature(Place at, int64_t half, int64_t a) { return a < half ? at.low + a : at.high + (a - half); }

// out[t] = in[t] Q for one block. in and out may be the same rows.
template <int B>
inline void multiply_block(const float* in, float* out, int64_t ld, int64_t tokens, Place at, const float* q) {
  typename Row<B>::type rows[B];
  __builtin_memcpy(rows, q, sizeof(rows));
  for (int64_t t = 0; t < tokens; ++t) {
    const float* source = in + t * ld;
    typename Row<B>::type sum = rows[0] * source[at.low];
#pragma GCC unroll 32
    for (int a = 1; a < B; ++a) sum += rows[a] * source[a < B / 2 ? at.low + a : at.high + a - B / 2];
    store_row<B>(out + t * ld, at, sum);
  }
}

// dq += in^T g, then g = g Q^T in place, for one block.
template <int B>
inline void differentiate_block(const float* in, float* g, int64_t ld, int64_t tokens, Place at, const float* q,
                                float* dq) {
  if (dq != nullptr) {
    typename Row<B>::type sums[B] = {};
    for (int64_t t = 0; t < tokens; ++t) {
      const typename Row<B>::type gradient = load_row<B>(g + t * ld, at);
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

struct Chunk {
  const ButterflyShape& shape;
  ButterflyRange range;
  int64_t tokens;
  float* spare;  // b floats for block sizes that are not specialised

  int64_t offset(int64_t factor, Place at) const {
    return (factor * (shape.features / shape.block) + at.index) * shape.block * shape.block;
  }

  template <int B>
  void multiply(const float* in, float* out, const float* blocks, int64_t factor) const {
    for_each_block(range, shape.block, factor, [&](Place at) {
      const float* q = blocks + offset(factor, at);
      if constexpr (B > 0) {
        multiply_block<B>(in, out, range.count, tokens, at, q);
      } else {
        multiply_any(in, out, range.count, tokens, at, shape.block, q, shape.block, 1, spare);
      }
    });
  }

  template <int B>
  void differentiate(const float* in, float* g, const float* blocks, float* dblocks, int64_t factor) const {
    for_each_block(range, shape.block, factor, [&](Place at) {
      const float* q = blocks + offset(factor, at);
      float* dq = dblocks == nullptr ? nullptr : dblocks + offset(factor, at);
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
void load_rows(const void* x, int64_t stride, int64_t first_token, const Chunk& chunk, float* out) {
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    const T* row = static_cast<const T*>(x) + (first_token + t) * stride + chunk.range.first;
    float* to = out + t * chunk.range.count;
    for (int64_t i = 0; i < chunk.range.count; ++i) to[i] = to_float(row[i]);
  }
}

template <typename T>
void store_rows(const float* in, const Chunk& chunk, int64_t first_token, void* y, int64_t stride) {
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    T* row = static_cast<T*>(y) + (first_token + t) * stride + chunk.range.first;
    const float* from = in + t * chunk.range.count;
    for (int64_t i = 0; i < chunk.range.count; ++i) row[i] = from_float<T>(from[i]);
  }
}

template <typename T, int B>
void fwd_tokens(const ButterflyShape& shape, ButterflyRange range, int64_t tokens, const void* x, int64_t x_stride,
                const float* blocks, void* y, int64_t y_stride, float* scratch) {
  float* rows = scratch + shape.block;
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const Chunk chunk{shape, range, tokens - first < kTokens ? tokens - first : kTokens, scratch};
    load_rows<T>(x, x_stride, first, chunk, rows);
    for (int64_t f = shape.factors - 1; f >= 0; --f) chunk.template multiply<B>(rows, rows, blocks, f);
    store_rows<T>(rows, chunk, first, y, y_stride);
  }
}

template <typename T, int B>
void bwd_tokens(const ButterflyShape& shape, ButterflyRange range, int64_t tokens, const void* grad,
                int64_t grad_stride, const void* x, int64_t x_stride, const float* blocks, void* dx, int64_t dx_stride,
                float* dblocks, float* scratch) {
  const int64_t page = kTokens * range.count;
  float* g = scratch + shape.block;
  float* inputs = g + page;  // page f holds the input of factor f
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const Chunk chunk{shape, range, tokens - first < kTokens ? tokens - first : kTokens, scratch};
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

// Picks the specialisation for the element type and the block size.
template <typename Call>
inline void dispatch(const ButterflyShape& shape, Call call) {
  const auto with_block = [&]<typename T>(T) {
    switch (shape.block) {
      case 2:
        return call.template operator()<T, 2>();
      case 4:
        return call.template operator()<T, 4>();
      case 8:
        return call.template operator()<T, 8>();
      case 16:
        return call.template operator()<T, 16>();
      case 32:
        return call.template operator()<T, 32>();
      default:
        return call.template operator()<T, 0>();
    }
  };
  with_scalar(shape.scalar, with_block);
}

void fwd(const ButterflyShape& shape, ButterflyRange range, int64_t tokens, const void* x, int64_t x_stride,
         const float* blocks, void* y, int64_t y_stride, float* scratch) {
  dispatch(shape, [&]<typename T, int B>() {
    fwd_tokens<T, B>(shape, range, tokens, x, x_stride, blocks, y, y_stride, scratch);
  });
}

void bwd(const ButterflyShape& shape, ButterflyRange range, int64_t tokens, const void* grad, int64_t grad_stride,
         const void* x, int64_t x_stride, const float* blocks, void* dx, int64_t dx_stride, float* dblocks,
         float* scratch) {
  dispatch(shape, [&]<typename T, int B>() {
    bwd_tokens<T, B>(shape, range, tokens, grad, grad_stride, x, x_stride, blocks, dx, dx_stride, dblocks, scratch);
  });
}

// Runs call(j, load, store) over columns [first, last) by whole vectors and what is left.
template <typename T, typename Call>
inline void for_each_vector(int64_t first, int64_t last, Call call) {
  int64_t j = first;
  for (; j + kLanes <= last; j += kLanes) {
    call(j, [](const auto* from) { return load_vector(from); }, [](T* to, Vector value) { store_vector(to, value); });
  }
  if (const int64_t rest = last - j; rest > 0) {
    call(
        j, [rest](const auto* from) { return load_some(from, rest); },
        [rest](T* to, Vector value) { store_some(to, value, rest); });
  }
}

void scale_fwd(Scalar scalar, int64_t tokens, int64_t features, Rows y0, const void* bias, const float* s,
               MutableRows y) {
  with_scalar(scalar, [&]<typename T>(T) {
    const T* b = static_cast<const T*>(bias);
    for (int64_t t = 0; t < tokens; ++t) {
      const T* from = static_cast<const T*>(y0.data) + t * y0.stride;
      T* to = static_cast<T*>(y.data) + t * y.stride;
      for_each_vector<T>(0, features, [&](int64_t j, auto load, auto store) {
        const Vector value = load(from + j);
        const Vector product = b == nullptr ? value : value - load(b + j);
        store(to + j, value + product * (load(s + j) - 1.0f));
      });
    }
  });
}

void scale_bwd(Scalar scalar, int64_t tokens, int64_t first, int64_t last, Rows grad, Rows y0, const void* bias,
               const float* s, MutableRows scaled, float* ds) {
  constexpr int64_t kPartialTokens = 64;  // sums of partial sums lose fewer digits
  with_scalar(scalar, [&]<typename T>(T) {
    const T* b = static_cast<const T*>(bias);
    Vector totals[kScaleColumns / kLanes + 1] = {};
    for (int64_t chunk = 0; chunk < tokens; chunk += kPartialTokens) {
      Vector sums[kScaleColumns / kLanes + 1] = {};
      for (int64_t t = chunk; t < tokens && t < chunk + kPartialTokens; ++t) {
        const T* g = static_cast<const T*>(grad.data) + t * grad.stride;
        for_each_vector<T>(first, last, [&](int64_t j, auto load, auto store) {
          const Vector value = load(g + j);
          if (ds != nullptr) {
            const Vector y = load(static_cast<const T*>(y0.data) + t * y0.stride + j);
            sums[(j - first) / kLanes] += value * (b == nullptr ? y : y - load(b + j));
          }
          if (scaled.data != nullptr) store(static_cast<T*>(scaled.data) + t * scaled.stride + j, value * load(s + j));
        });
      }
      for (int64_t i = 0; i <= (last - first) / kLanes; ++i) totals[i] += sums[i];
    }
    if (ds == nullptr) return;
    for (int64_t j = first; j < last; ++j) ds[j] = totals[(j - first) / kLanes][(j - first) % kLanes];
  });
}

}  // namespace

const ButterflyLoops butterfly = {fwd, bwd, scale_fwd, scale_bwd};

}  // namespace fastpeft::FASTPEFT_ISA
