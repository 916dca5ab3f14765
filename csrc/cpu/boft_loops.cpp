// The butterfly product of BOFT (Liu et al., ICLR 2024, arXiv 2311.06243), forward and backward; cpu/boft_places.h says
// which features a factor brings together.
//
// Cost: m * b multiply-adds a feature forward, three times that backward with the intermediates recomputed, and a
// transposition of every tile on its way in and out: a tile holds one token per lane, so that all of it is whole vector
// operations whatever the block size. x and y cross memory once. Below kFewTokens the lanes would be empty, and blocks
// work on rows (cpu/boft_rows.h).
#include "cpu/boft_loops.h"

#include "cpu/boft_places.h"
#include "cpu/boft_rows.h"
#include "cpu/boft_sizes.h"
#include "cpu/tile.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

constexpr int64_t kFewTokens = 6;
constexpr int64_t kVectors = kButterflyTokens / kLanes;  // of one feature in a tile
constexpr int kSums = kLanes == 16 ? 16 : 8;             // vectors of sums that fit the registers

// A tile: the features of a range, kVectors vectors of tokens each, of which the first `used` hold something.
struct Tile {
  Vector* data;
  int used;

  Vector* entry(int64_t feature) const { return data + feature * kVectors; }
};

// out[c] = sum_a in[a] q[a, c] for one block (or q[c, a]), all tokens. in and out may be the same tile. `entries` holds
// b vectors.
template <int B, bool kTransposed>
inline void multiply_block(Tile in, Tile out, Place at, int64_t block, const float* q, Vector* entries) {
  const int64_t b = B ? B : block;
  constexpr int kGroup = B && B < kSums ? B : kSums;
  Vector fixed[B ? B : 1];
  Vector* z = B ? fixed : entries;
  for (int v = 0; v < in.used; ++v) {
#pragma GCC unroll 32
    for (int64_t a = 0; a < b; ++a) z[a] = in.entry(feature(at, b / 2, a))[v];
    int64_t c = 0;
    for (; c + kGroup <= b; c += kGroup) {
      Vector sums[kGroup] = {};
#pragma GCC unroll 8
      for (int64_t a = 0; a < b; ++a) {
#pragma GCC unroll 16
        for (int i = 0; i < kGroup; ++i) sums[i] += z[a] * (kTransposed ? q[(c + i) * b + a] : q[a * b + c + i]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kGroup; ++i) out.entry(feature(at, b / 2, c + i))[v] = sums[i];
    }
    for (; c < b; ++c) {
      Vector sum = {};
      for (int64_t a = 0; a < b; ++a) sum += z[a] * (kTransposed ? q[c * b + a] : q[a * b + c]);
      out.entry(feature(at, b / 2, c))[v] = sum;
    }
  }
}

// dq[a, c] += sum_t in[t, a] g[t, c] for one block: kSums sums at a time stay in registers.
template <int B>
inline void correlate_block(Tile in, Tile g, Place at, float* dq) {
  constexpr int kWidth = B < kSums ? B : kSums, kHeight = kSums / kWidth < B ? kSums / kWidth : B;
  constexpr int kPart = kHeight * kWidth;
  for (int a = 0; a < B; a += kHeight) {
    for (int c = 0; c < B; c += kWidth) {
      Vector part[kPart] = {};
      for (int v = 0; v < g.used; ++v) {
        Vector right[kWidth];
#pragma GCC unroll 16
        for (int j = 0; j < kWidth; ++j) right[j] = g.entry(feature(at, B / 2, c + j))[v];
#pragma GCC unroll 16
        for (int i = 0; i < kHeight; ++i) {
          const Vector left = in.entry(feature(at, B / 2, a + i))[v];
#pragma GCC unroll 16
          for (int j = 0; j < kWidth; ++j) part[i * kWidth + j] += left * right[j];
        }
      }
      float* to = dq + a * B + c;  // kPart numbers side by side: a part is some whole rows or a piece of one
      if constexpr (kPart % kLanes == 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kPart; i += kLanes) {
          sum_rows(part + i);
          store_vector(to + i, load_vector(to + i) + part[i]);
        }
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kPart; ++i) to[i] += sum_of(part[i]);
      }
    }
  }
}

// The same for any block size.
inline void correlate_any(Tile in, Tile g, Place at, int64_t block, float* dq) {
  for (int64_t a = 0; a < block; ++a) {
    for (int64_t c = 0; c < block; ++c) {
      Vector sum = {};
      for (int v = 0; v < g.used; ++v) {
        sum += in.entry(feature(at, block / 2, a))[v] * g.entry(feature(at, block / 2, c))[v];
      }
      dq[a * block + c] += sum_of(sum);
    }
  }
}

template <typename T>
void load_tokens(Rows x, int64_t first_token, int64_t tokens, ButterflyRange range, Tile tile) {
  x.data = static_cast<const T*>(x.data) + first_token * x.stride + range.first;
  for (int v = 0; v < tile.used; ++v) {
    load_tile<T>(x, tokens - v * kLanes, range.count, tile.data + v, kVectors);
    x.data = static_cast<const T*>(x.data) + kLanes * x.stride;
  }
}

template <typename T>
void store_tokens(Tile tile, int64_t first_token, int64_t tokens, ButterflyRange range, MutableRows y) {
  y.data = static_cast<T*>(y.data) + first_token * y.stride + range.first;
  for (int v = 0; v < tile.used; ++v) {
    store_tile<T, false>(tile.data + v, kVectors, tokens - v * kLanes, range.count, y);
    y.data = static_cast<T*>(y.data) + kLanes * y.stride;
  }
}

inline int vectors_of(int64_t tokens) {
  return int((tokens < kButterflyTokens ? tokens + kLanes - 1 : kButterflyTokens) / kLanes);
}

template <typename T, int B>
void fwd_tiles(const ButterflyShape& shape, ButterflyRange range, int64_t tokens, Rows x, const float* blocks,
               MutableRows y, float* scratch) {
  Vector* entries = reinterpret_cast<Vector*>(scratch);
  for (int64_t first = 0; first < tokens; first += kButterflyTokens) {
    const Tile tile{entries + shape.block, vectors_of(tokens - first)};
    load_tokens<T>(x, first, tokens - first, range, tile);
    for (int64_t f = shape.factors - 1; f >= 0; --f) {
      for_each_block(range, shape.block, f, [&](Place at) {
        multiply_block<B, false>(tile, tile, at, shape.block, blocks + block_offset(shape, f, at), entries);
      });
    }
    store_tokens<T>(tile, first, tokens - first, range, y);
  }
}

template <typename T, int B>
void bwd_tiles(const ButterflyShape& shape, ButterflyRange range, int64_t tokens, Rows grad, Rows x,
               const float* blocks, MutableRows dx, float* dblocks, float* scratch) {
  const int64_t page = kVectors * range.count;
  Vector* entries = reinterpret_cast<Vector*>(scratch);
  for (int64_t first = 0; first < tokens; first += kButterflyTokens) {
    const int64_t left = tokens - first;
    const Tile g{entries + shape.block, vectors_of(left)};
    const auto input = [&](int64_t f) { return Tile{g.data + (f + 1) * page, g.used}; };  // of factor f
    load_tokens<T>(grad, first, left, range, g);
    if (dblocks != nullptr) {
      load_tokens<T>(x, first, left, range, input(shape.factors - 1));
      for (int64_t f = shape.factors - 1; f > 0; --f) {
        for_each_block(range, shape.block, f, [&](Place at) {
          const float* q = blocks + block_offset(shape, f, at);
          multiply_block<B, false>(input(f), input(f - 1), at, shape.block, q, entries);
        });
      }
    }
    // With z the input of factor f: dQ += z^T g for each block, then g = g Q^T.
    for (int64_t f = 0; f < shape.factors; ++f) {
      for_each_block(range, shape.block, f, [&](Place at) {
        const int64_t offset = block_offset(shape, f, at);
        if (dblocks != nullptr) {
          if constexpr (B > 0) {
            correlate_block<B>(input(f), g, at, dblocks + offset);
          } else {
            correlate_any(input(f), g, at, shape.block, dblocks + offset);
          }
        }
        multiply_block<B, true>(g, g, at, shape.block, blocks + offset, entries);
      });
    }
    if (dx.data != nullptr) store_tokens<T>(g, first, left, range, dx);
  }
}

// Picks the specialisation for the element type and the block size.
template <typename Call>
inline void dispatch(const ButterflyShape& shape, Call call) {
  with_scalar(shape.scalar,
              [&]<typename T>(T) { with_block_size(shape.block, [&]<int B>() { call.template operator()<T, B>(); }); });
}

void fwd(const ButterflyShape& shape, ButterflyRange range, int64_t tokens, Rows x, const float* blocks, MutableRows y,
         float* scratch) {
  dispatch(shape, [&]<typename T, int B>() {
    if (tokens < kFewTokens) {
      fwd_rows<T, B>(shape, range, tokens, x.data, x.stride, blocks, y.data, y.stride, scratch);
    } else {
      fwd_tiles<T, B>(shape, range, tokens, x, blocks, y, scratch);
    }
  });
}

void bwd(const ButterflyShape& shape, ButterflyRange range, int64_t tokens, Rows grad, Rows x, const float* blocks,
         MutableRows dx, float* dblocks, float* scratch) {
  dispatch(shape, [&]<typename T, int B>() {
    if (tokens < kFewTokens) {
      bwd_rows<T, B>(shape, range, tokens, grad.data, grad.stride, x.data, x.stride, blocks, dx.data, dx.stride,
                     dblocks, scratch);
    } else {
      bwd_tiles<T, B>(shape, range, tokens, grad, x, blocks, dx, dblocks, scratch);
    }
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
