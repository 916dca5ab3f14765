// BOFT's Cayley transform (Liu et al., ICLR 2024, arXiv 2311.06243, section 4) and its derivative, one block per lane.
//
// Q (I + S) = I - S is solved by elimination without pivoting: the symmetric part of I + S is the identity, so no pivot
// is below one and none of its factors grows. Cost: 4/3 b^3 multiply-adds forward, 2 b^3 back, of whole vectors.
#include "cpu/boft_cayley_loops.h"

#include "cpu/simd.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

// A matrix of vectors: entry (i, j) of every lane's block.
struct Matrix {
  Vector* data;
  int64_t size;

  Vector& operator()(int64_t i, int64_t j) const { return data[i * size + j]; }
};

// Missing blocks are zeros.
void load_blocks(const float* blocks, int64_t count, Matrix to) {
  const int64_t entries = to.size * to.size;
  for (int64_t e = 0; e < entries; e += kLanes) {
    const int64_t width = entries - e < kLanes ? entries - e : kLanes;
    Vector rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float* from = blocks + lane * entries + e;
      rows[lane] = lane >= count ? Vector{} : width == kLanes ? load_vector(from) : load_some(from, width);
    }
    transpose(rows);
    for (int64_t i = 0; i < width; ++i) to.data[e + i] = rows[i];
  }
}

void store_blocks(Matrix from, int64_t count, float* blocks) {
  const int64_t entries = from.size * from.size;
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
void take_skew_part(Matrix m) {
  for (int64_t i = 0; i < m.size; ++i) {
    m(i, i) = Vector{};
    for (int64_t j = 0; j < i; ++j) {
      const Vector skew = 0.5f * (m(i, j) - m(j, i));
      m(i, j) = skew;
      m(j, i) = -skew;
    }
  }
}

int64_t scratch_floats(int64_t block) { return 3 * block * block * kLanes; }

void fwd(const float* r, int64_t count, int64_t block, float* q, float* scratch) {
  const Matrix lu{reinterpret_cast<Vector*>(scratch), block}, result{lu.data + block * block, block};
  load_blocks(r, count, lu);
  take_skew_part(lu);
  for (int64_t i = 0; i < block; ++i) {
    for (int64_t j = 0; j < block; ++j) result(i, j) = -lu(i, j);
    result(i, i) = lu(i, i) = Vector{} + 1.0f;
  }
  // I + S = L U with ones on the diagonal of L; the diagonal of U is kept inverted.
  for (int64_t i = 0; i < block; ++i) {
    for (int64_t j = 0; j < block; ++j) {
      Vector sum = lu(i, j);
      for (int64_t k = 0; k < (i < j ? i : j); ++k) sum -= lu(i, k) * lu(k, j);
      lu(i, j) = j < i ? sum * lu(j, j) : sum;
    }
    lu(i, i) = 1.0f / lu(i, i);
  }
  // Q L U = I - S, row by row: first by U from the left, then by L from the right.
  for (int64_t i = 0; i < block; ++i) {
    for (int64_t j = 0; j < block; ++j) {
      Vector sum = result(i, j);
      for (int64_t k = 0; k < j; ++k) sum -= result(i, k) * lu(k, j);
      result(i, j) = sum * lu(j, j);
    }
    for (int64_t j = block - 2; j >= 0; --j) {
      Vector sum = result(i, j);
      for (int64_t k = j + 1; k < block; ++k) sum -= result(i, k) * lu(k, j);
      result(i, j) = sum;
    }
  }
  store_blocks(result, count, q);
}

void bwd(const float* grad, const float* q, int64_t count, int64_t block, float* dr, float* scratch) {
  const Matrix g{reinterpret_cast<Vector*>(scratch), block}, p{g.data + block * block, block},
      product{p.data + block * block, block};
  load_blocks(grad, count, g);
  load_blocks(q, count, p);
  for (int64_t i = 0; i < block; ++i) p(i, i) += 1.0f;
  for (int64_t i = 0; i < block; ++i) {  // P^T G
    for (int64_t j = 0; j < block; ++j) {
      Vector sum = {};
      for (int64_t k = 0; k < block; ++k) sum += p(k, i) * g(k, j);
      product(i, j) = -0.5f * sum;
    }
  }
  for (int64_t i = 0; i < block; ++i) {  // (P^T G) P^T
    for (int64_t j = 0; j < block; ++j) {
      Vector sum = {};
      for (int64_t k = 0; k < block; ++k) sum += product(i, k) * p(j, k);
      g(i, j) = sum;
    }
  }
  take_skew_part(g);
  store_blocks(g, count, dr);
}

}  // namespace

const CayleyLoops cayley = {kLanes, scratch_floats, fwd, bwd};

}  // namespace fastpeft::FASTPEFT_ISA
