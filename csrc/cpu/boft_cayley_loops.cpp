// BOFT's Cayley transform (Liu et al., ICLR 2024, arXiv 2311.06243, section 4) and its derivative, one block per lane.
//
// Q (I + S) = I - S is solved by elimination without pivoting: the symmetric part of I + S is the identity, so no pivot
// is below one. But factors grow with S, and lose digits: where an entry of S is above one a step of refinement gives
// them back. Cost: 4/3 b^3 multiply-adds forward, 2 b^3 more to refine, 2/3 b^3 more for reflections, 2 b^3 back, of
// whole vectors.
#include "cpu/boft_cayley_loops.h"

#include "cpu/boft_sizes.h"
#include "cpu/simd.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

// A matrix of vectors: entry (i, j) of every lane's block. Its size is known to the compiler, or kSize is 0.
template <int64_t kSize>
struct Matrix {
  Vector* data;
  int64_t runtime_size;

  int64_t size() const { return kSize ? kSize : runtime_size; }
  Vector& operator()(int64_t i, int64_t j) const { return data[i * size() + j]; }
};

// Rows or columns that are worked on side by side, so that a sum need not wait for itself.
template <int64_t kSize>
constexpr int64_t kTogether = kSize == 0  ? 1
                              : kSize < 8 ? kSize
                                          : 8;

// Blocks `apart` floats from each other; missing ones are zeros.
template <int64_t kSize>
void load_blocks(const float* blocks, int64_t apart, int64_t count, Matrix<kSize> to) {
  const int64_t entries = to.size() * to.size();
  for (int64_t e = 0; e < entries; e += kLanes) {
    const int64_t width = entries - e < kLanes ? entries - e : kLanes;
    Vector rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float* from = blocks + lane * apart + e;
      rows[lane] = lane >= count ? Vector{} : width == kLanes ? load_vector(from) : load_some(from, width);
    }
    transpose(rows);
    for (int64_t i = 0; i < width; ++i) to.data[e + i] = rows[i];
  }
}

template <int64_t kSize>
void store_blocks(Matrix<kSize> from, int64_t count, float* blocks) {
  const int64_t entries = from.size() * from.size();
  for (int64_t e = 0; e < entries; e += kLanes) {
    const int64_t width = entries - e < kLanes ? entries - e : kLanes;
    Vector rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = i < width ? from.data[e + i] : Vector{};
    transpose(rows);
    for (int64_t lane = 0; lane < count; ++lane) {
      float* to = blocks + lane * entries + e;
      if (width == kLanes) {
        store_vector(to, rows[lane]);
      } else {
        store_some(to, rows[lane], width);
      }
    }
  }
}

// m = m - m^T, halved.
template <int64_t kSize>
void take_skew_part(Matrix<kSize> m) {
  for (int64_t i = 0; i < m.size(); ++i) {
    m(i, i) = Vector{};
    for (int64_t j = 0; j < i; ++j) {
      const Vector skew = 0.5f * (m(i, j) - m(j, i));
      m(i, j) = skew;
      m(j, i) = -skew;
    }
  }
}

int64_t scratch_floats(int64_t block) { return 4 * block * block * kLanes; }

// m U^-1 L^-1 in place of m, some rows at a time, which do not wait for each other: by U from the left, then by L from
// the right.
template <int64_t kSize>
void solve(Matrix<kSize> lu, Matrix<kSize> m) {
  const int64_t block = m.size();
  constexpr int64_t kRows = kTogether<kSize>;
  for (int64_t i = 0; i < block; i += kRows) {
    const auto eliminate = [&](int64_t j, int64_t first, int64_t last, Vector scale) {
      Vector sums[kRows];
#pragma GCC unroll 8
      for (int n = 0; n < kRows; ++n) sums[n] = m(i + n, j);
      for (int64_t k = first; k < last; ++k) {
#pragma GCC unroll 8
        for (int n = 0; n < kRows; ++n) sums[n] -= m(i + n, k) * lu(k, j);
      }
#pragma GCC unroll 8
      for (int n = 0; n < kRows; ++n) m(i + n, j) = sums[n] * scale;
    };
    for (int64_t j = 0; j < block; ++j) eliminate(j, 0, j, lu(j, j));
    for (int64_t j = block - 2; j >= 0; --j) eliminate(j, j + 1, block, Vector{} + 1.0f);
  }
}

// Whether an entry of any lane is above one.
template <int64_t kSize>
bool is_large(Matrix<kSize> m) {
  Bits large = {};
  for (int64_t e = 0; e < m.size() * m.size(); ++e) large |= reinterpret_cast<Bits>(m.data[e] * m.data[e] > 1.0f);
  uint32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= large[lane];
  return any != 0;
}

// Q in scratch, one block per lane.
template <int64_t kSize>
Matrix<kSize> transform(const float* r, int64_t apart, int64_t count, int64_t runtime_block, float* scratch) {
  const int64_t block = kSize ? kSize : runtime_block, entries = block * block;
  const Matrix<kSize> lu{reinterpret_cast<Vector*>(scratch), block}, result{lu.data + entries, block};
  load_blocks(r, apart, count, lu);
  take_skew_part(lu);
  const bool refine = is_large(lu);
  for (int64_t i = 0; i < block; ++i) {
    for (int64_t j = 0; j < block; ++j) result(i, j) = -lu(i, j);
    result(i, i) = lu(i, i) = Vector{} + 1.0f;
  }
  // I + S = L U with ones on the diagonal of L; the diagonal of U is kept inverted.
  for (int64_t k = 0; k < block; ++k) {
    lu(k, k) = 1.0f / lu(k, k);
    for (int64_t i = k + 1; i < block; ++i) {
      const Vector factor = lu(i, k) = lu(i, k) * lu(k, k);
      for (int64_t j = k + 1; j < block; ++j) lu(i, j) -= factor * lu(k, j);
    }
  }
  solve(lu, result);
  if (refine) {
    const Matrix<kSize> s{result.data + entries, block}, rest{s.data + entries, block};
    load_blocks(r, apart, count, s);
    take_skew_part(s);
    for (int64_t i = 0; i < block; ++i) {  // I - S - Q (I + S)
      for (int64_t j = 0; j < block; ++j) {
        Vector sum = (i == j ? 1.0f - result(i, j) : -result(i, j)) - s(i, j);
        for (int64_t k = 0; k < block; ++k) sum -= result(i, k) * s(k, j);
        rest(i, j) = sum;
      }
    }
    solve(lu, rest);
    for (int64_t e = 0; e < entries; ++e) result.data[e] += rest.data[e];
  }
  return result;
}

// Householder's QR of orthogonal blocks, as reference.boft.reflectors has it. store(n, number) is called for the
// numbers of a block in their order.
template <int64_t kSize, typename Store>
void factor_into_reflections(Matrix<kSize> q, Store store) {
  constexpr float kRounding = 0x1p-46f;  // of float32, squared
  const int64_t block = q.size();
  int64_t n = 0;
  for (int64_t j = 0; j + 1 < block; ++j) {
    const auto length = [&] {  // of the column below the diagonal, squared
      Vector sum = {};
      for (int64_t i = j + 1; i < block; ++i) sum += q(i, j) * q(i, j);
      return sum;
    };
    const Vector first = q(j, j), below = length();
    const auto negative = first < 0.0f;
    // 1 + first, where that cancels from what the column's length is known to be. Half a turn, which has no such v,
    // becomes one of a little less.
    q(j + 1, j) = negative && below < kRounding * kRounding ? Vector{} + kRounding : q(j + 1, j);
    const Vector height = negative ? length() / (1.0f - first) : 1.0f + first;
    for (int64_t i = j + 1; i < block; ++i) q(i, j) /= height;
    const Vector tau = 2.0f / (1.0f + length());
    store(n++, tau);
    for (int64_t i = j + 1; i < block; ++i) store(n++, q(i, j));
    for (int64_t c = j + 1; c < block; ++c) {
      Vector sum = q(j, c);
      for (int64_t i = j + 1; i < block; ++i) sum += q(i, j) * q(i, c);
      const Vector step = tau * sum;
      for (int64_t i = j + 1; i < block; ++i) q(i, c) -= q(i, j) * step;
    }
  }
}

template <int64_t kSize>
void bwd_size(const float* grad, const float* q, int64_t count, int64_t runtime_block, float* dr, float* scratch) {
  const int64_t block = kSize ? kSize : runtime_block;
  const Matrix<kSize> g{reinterpret_cast<Vector*>(scratch), block}, p{g.data + block * block, block},
      product{p.data + block * block, block};
  load_blocks(grad, block * block, count, g);
  load_blocks(q, block * block, count, p);
  for (int64_t i = 0; i < block; ++i) p(i, i) += 1.0f;
  constexpr int64_t kColumns = kTogether<kSize>;
  for (int64_t i = 0; i < block; ++i) {  // P^T G
    for (int64_t j = 0; j < block; j += kColumns) {
      Vector sums[kColumns] = {};
      for (int64_t k = 0; k < block; ++k) {
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) sums[n] += p(k, i) * g(k, j + n);
      }
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) product(i, j + n) = -0.5f * sums[n];
    }
  }
  for (int64_t i = 0; i < block; ++i) {  // (P^T G) P^T
    for (int64_t j = 0; j < block; j += kColumns) {
      Vector sums[kColumns] = {};
      for (int64_t k = 0; k < block; ++k) {
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) sums[n] += product(i, k) * p(j + n, k);
      }
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) g(i, j + n) = sums[n];
    }
  }
  take_skew_part(g);
  store_blocks(g, count, dr);
}

void fwd(const float* r, int64_t count, int64_t block, float* q, float* scratch) {
  with_block_size(block, [&]<int64_t kSize>() {
    store_blocks(transform<kSize>(r, block * block, count, block, scratch), count, q);
  });
}

void reflectors(const float* r, int64_t apart, int64_t count, int64_t block, float* numbers, int64_t lanes,
                float* scratch) {
  with_block_size(block, [&]<int64_t kSize>() {
    factor_into_reflections(transform<kSize>(r, apart, count, block, scratch), [&](int64_t n, Vector number) {
      if (count == kLanes) {
        store_vector(numbers + n * lanes, number);
      } else {
        store_some(numbers + n * lanes, number, count);
      }
    });
  });
}

void bwd(const float* grad, const float* q, int64_t count, int64_t block, float* dr, float* scratch) {
  with_block_size(block, [&]<int64_t kSize>() { bwd_size<kSize>(grad, q, count, block, dr, scratch); });
}

}  // namespace

const CayleyLoops cayley = {kLanes, scratch_floats, fwd, reflectors, bwd};

}  // namespace fastpeft::FASTPEFT_ISA
