// FourierFT (Gao et al., ICML 2024, arXiv 2405.03003): the delta of a tile of tokens and its gradients.
//
// A real matrix acts on the two parts of a complex signal separately, so two tokens travel as one signal z. With
// H[u, v] = 1/2 (S[u, v] + S[-u, -v]), which is Hermitian,
//
//   delta(z) = scale * F1 (H F2 z),     scale = alpha / (d1 d2), F1 and F2 the transforms of length d1 and d2
//
// because both of the paper's inverse transforms become forward ones when u and v run backwards. The gradient of x is
// the same with H transposed, and with G = F1 g, X = F2 x
//
//   dL/dc_k = scale * 1/2 Re sum (G[u] conj X[-v] + conj G[-u] X[v])
//
// where the sum over signals is one over tokens: products of different tokens cancel.
//
// Cost for 2 lanes tokens: two transforms (cpu/fft.h), 4 n multiply-adds and 4 n loads of vectors for the mix, and a
// transposition on the way in and out. The tiles of both spectra stay in the second-level cache.
#include "cpu/fourierft_loops.h"

#include "cpu/fft.h"
#include "cpu/tile.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

// A tile's real parts are the first kLanes tokens, its imaginary parts the next.
void load_signals(Scalar scalar, Rows x, int64_t tokens, int64_t features, float* tile) {
  with_scalar(scalar, [&]<typename T>(T) {
    Vector* parts = reinterpret_cast<Vector*>(tile);
    load_tile<T>(x, tokens, features, parts, 2);
    if (tokens > kLanes) {
      load_tile<T>({static_cast<const T*>(x.data) + kLanes * x.stride, x.stride}, tokens - kLanes, features, parts + 1,
                   2);
    } else {
      for (int64_t j = 0; j < features; ++j) parts[2 * j + 1] = Vector{};
    }
  });
}

void add_signals(Scalar scalar, const float* tile, int64_t tokens, int64_t features, MutableRows y) {
  with_scalar(scalar, [&]<typename T>(T) {
    const Vector* parts = reinterpret_cast<const Vector*>(tile);
    store_tile<T, true>(parts, 2, tokens, features, y);
    if (tokens > kLanes) {
      store_tile<T, true>(parts + 1, 2, tokens - kLanes, features,
                          {static_cast<T*>(y.data) + kLanes * y.stride, y.stride});
    }
  });
}

void mix_bins(const FourierMix& mix, const float* source, float* target) {
  const int32_t* from = mix.source->position;
  for (int64_t k = 0; k < mix.target->length; ++k) {
    ComplexVector sum = {};
    for (int32_t s = mix.offsets[k]; s < mix.offsets[k + 1]; ++s) {
      const ComplexVector bin = load_row(source + from[mix.sources[s]] * kRow);
      const float c = mix.coefficients[s];
      sum = {sum.re + c * bin.re, sum.im + c * bin.im};
    }
    store_row(target + mix.target->position[k] * kRow, sum);
  }
}

void add_products(const FourierPlaces& places, const FftPlan& out, const float* grad, const FftPlan& in, const float* x,
                  float* products) {
  for (int64_t k = 0; k < places.count; ++k) {
    const int32_t u = places.rows[k], v = places.cols[k];
    const ComplexVector g = load_row(grad + out.position[u] * kRow);
    const ComplexVector g_mirrored = load_row(grad + out.position[u ? out.length - u : 0] * kRow);
    const ComplexVector f = load_row(x + in.position[v] * kRow);
    const ComplexVector f_mirrored = load_row(x + in.position[v ? in.length - v : 0] * kRow);
    const Vector one = g.re * f_mirrored.re + g.im * f_mirrored.im, other = g_mirrored.re * f.re + g_mirrored.im * f.im;
    products[k] += 0.5f * sum_of(one + other);
  }
}

void load_spectrum(const FftPlan& plan, Scalar scalar, int64_t tokens, Rows x, float* tile, float* spare) {
  load_signals(scalar, x, tokens, plan.length, tile);
  fft_decimate(plan, tile, spare);
}

void add_synthesis(const FftPlan& plan, Scalar scalar, int64_t tokens, float* tile, MutableRows y, float* spare) {
  fft_combine(plan, tile, spare);
  add_signals(scalar, tile, tokens, plan.length, y);
}

int64_t scratch_floats(const FftPlan& one, const FftPlan& other) {
  const int64_t spare = fft_spare_rows(one) > fft_spare_rows(other) ? fft_spare_rows(one) : fft_spare_rows(other);
  return (one.length + other.length + spare) * kRow;
}

void fwd(const FourierMix& mix, Scalar scalar, int64_t tokens, Rows x, MutableRows y, float* scratch) {
  float* target = scratch + mix.source->length * kRow;
  float* spare = target + mix.target->length * kRow;
  load_spectrum(*mix.source, scalar, tokens, x, scratch, spare);
  mix_bins(mix, scratch, target);
  add_synthesis(*mix.target, scalar, tokens, target, y, spare);
}

void bwd(const FourierMix& mix, Scalar scalar, int64_t tokens, Rows grad, MutableRows dx, Rows x,
         const FourierPlaces& places, float* products, float* scratch) {
  float* other = scratch + mix.source->length * kRow;
  float* spare = other + mix.target->length * kRow;
  load_spectrum(*mix.source, scalar, tokens, grad, scratch, spare);
  if (x.data != nullptr) {
    load_spectrum(*mix.target, scalar, tokens, x, other, spare);
    add_products(places, *mix.source, scratch, *mix.target, other, products);
  }
  if (dx.data != nullptr) {
    mix_bins(mix, scratch, other);
    add_synthesis(*mix.target, scalar, tokens, other, dx, spare);
  }
}

}  // namespace

const FourierLoops fourier = {kLanes, scratch_floats, fwd, bwd};

}  // namespace fastpeft::FASTPEFT_ISA
