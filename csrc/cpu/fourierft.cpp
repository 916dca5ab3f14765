// The operators fastpeft::fourier_fwd and fourier_bwd on CPU tensors. Schemas and fakes: fastpeft/ops/fourierft.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/fourierft_loops.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tokens that would leave most lanes of a tile empty take narrower ones.
const FourierLoops& loops(int64_t tokens) {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512 && tokens <= 2 * avx2::fourier.lanes) return avx2::fourier;
#endif
  return FASTPEFT_ACTIVE(fourier);
}

// (..., features) as rows with their elements side by side.
Tensor rows_of(const Tensor& x_any, const char* name) {
  const Tensor x = with_contiguous_rows(as_rows(x_any, name));
  STD_TORCH_CHECK(x.size(1) < int64_t(1) << 30, "fourier: ", name, " has ", x.size(1), " features, at most 2^30 work");
  scalar_of(x, name);
  return x;
}

// An index table as contiguous int32 numbers that all lie in [0, limit).
const int32_t* check_table(const Tensor& table, const char* name, int64_t size, int64_t limit) {
  check_cpu(table, name);
  STD_TORCH_CHECK(table.dim() == 1 && table.scalar_type() == ScalarType::Int && table.is_contiguous(),
                  "fourier: ", name, " must be a contiguous int32 vector");
  STD_TORCH_CHECK(table.size(0) == size, "fourier: ", name, " must have ", size, " entries, got ", table.size(0));
  const int32_t* values = static_cast<const int32_t*>(table.const_data_ptr());
  // One bit for all of them, which compilers vectorise: a comparison each takes as long as a transform.
  int32_t signs = 0;
  for (int64_t i = 0; i < size; ++i) signs |= values[i] | int32_t(uint32_t(limit - 1) - uint32_t(values[i]));
  STD_TORCH_CHECK(signs >= 0, "fourier: ", name, " must lie in [0, ", limit, ")");
  return values;
}

void check_spectrum(const Tensor& spectrum) {
  check_cpu(spectrum, "spectrum");
  STD_TORCH_CHECK(spectrum.dim() == 1 && spectrum.scalar_type() == ScalarType::Float,
                  "fourier: spectrum must be a float32 vector");
}

void check_weight(const std::optional<Tensor>& weight, const Tensor& x, int64_t out_features, int64_t in_features) {
  if (!weight) return;
  check_cpu(*weight, "weight");
  STD_TORCH_CHECK(weight->dim() == 2 && weight->size(0) == out_features && weight->size(1) == in_features &&
                      weight->scalar_type() == x.scalar_type(),
                  "fourier: weight must have shape (", out_features, ", ", in_features,
                  ") and the dtype of the activations");
}

// The mix of one direction; keeps its plans and coefficients alive.
struct Mix {
  std::shared_ptr<const FftPlan> source, target;
  std::vector<float> coefficients;
  FourierMix view;

  Mix(int64_t source_length, int64_t target_length, const Tensor& spectrum, const Tensor& offsets,
      const Tensor& sources, const Tensor& entries, double scale)
      : source(fft_plan(source_length)), target(fft_plan(target_length)), coefficients(sources.numel()) {
    const int64_t samples = sources.numel(), stride = spectrum.stride(0);
    const int32_t* from = check_table(sources, "sources", samples, source_length);
    const int32_t* which = check_table(entries, "entries", samples, spectrum.size(0));
    const int32_t* starts = check_table(offsets, "offsets", target_length + 1, samples + 1);
    int32_t steps = 0;
    for (int64_t k = 0; k < target_length; ++k) steps |= starts[k + 1] - starts[k];
    STD_TORCH_CHECK(starts[0] == 0 && starts[target_length] == samples && steps >= 0,
                    "fourier: offsets must rise from 0 to ", samples);
    const float* c = static_cast<const float*>(spectrum.const_data_ptr());
    for (int64_t s = 0; s < samples; ++s) coefficients[s] = float(scale * c[which[s] * stride]);
    view = {source.get(), target.get(), starts, from, coefficients.data()};
  }
};

// y = x W^T + b + delta(x). The mix takes bins of x to bins of y; scale is alpha / (d1 d2).
Tensor fourier_fwd(const Tensor& x_any, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                   const Tensor& spectrum, const Tensor& offsets, const Tensor& sources, const Tensor& entries,
                   double scale) {
  const Tensor x = rows_of(x_any, "x");
  check_spectrum(spectrum);
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0, "fourier: offsets must be a vector of out + 1 entries");
  const int64_t tokens = x.size(0), in_features = x.size(1), out_features = offsets.size(0) - 1;
  check_weight(weight, x, out_features, in_features);
  const Tensor y = base_product(x, weight, bias, out_features);
  if (tokens == 0 || out_features == 0 || in_features == 0) return like_rows(y, x_any);
  const Mix mix(in_features, out_features, spectrum, offsets, sources, entries, scale / 2);
  const Scalar scalar = scalar_of(x, "x");
  const FourierLoops& run = loops(tokens);
  const int64_t tile = 2 * run.lanes;
  torch::stable::parallel_for(0, (tokens + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(run.scratch_floats(*mix.source, *mix.target));
    for (int64_t first = begin * tile; first < std::min(end * tile, tokens); first += tile) {
      run.fwd(mix.view, scalar, std::min(tile, tokens - first), rows_from(x, first), rows_into(y, first),
              scratch.data());
    }
  });
  return like_rows(y, x_any);
}

// Tokens are added up in groups that depend on the sizes alone, so that the sum does not depend on the number of
// threads; a group has a partial sum of its own.
int64_t group_count(int64_t tiles, int64_t places) {
  constexpr int64_t kPartialFloats = 1 << 20;
  return std::clamp<int64_t>(kPartialFloats / std::max<int64_t>(places, 1), 1, std::min<int64_t>(tiles, 64));
}

// Gradients of x and, if x is given, of the spectrum; one that is not asked for comes back empty. The mix takes bins of
// grad to bins of dx.
std::tuple<Tensor, Tensor> fourier_bwd(const Tensor& grad_any, const std::optional<Tensor>& x_any,
                                       const std::optional<Tensor>& weight, const Tensor& spectrum, const Tensor& rows,
                                       const Tensor& cols, const Tensor& offsets, const Tensor& sources,
                                       const Tensor& entries, double scale, bool need_x) {
  const Tensor grad = rows_of(grad_any, "grad");
  check_spectrum(spectrum);
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0, "fourier: offsets must be a vector of in + 1 entries");
  const int64_t tokens = grad.size(0), out_features = grad.size(1), in_features = offsets.size(0) - 1;
  check_weight(weight, grad, out_features, in_features);
  std::optional<Tensor> x;
  if (x_any) {
    x = rows_of(*x_any, "x");
    STD_TORCH_CHECK(x->size(0) == tokens && x->size(1) == in_features && x->scalar_type() == grad.scalar_type(),
                    "fourier: x must have shape (..., ", in_features, "), and the tokens and the dtype of grad");
  }
  const int64_t count = x ? spectrum.size(0) : 0;
  const Tensor dx = need_x ? base_gradient(grad, weight, in_features) : allocate(grad, {0, in_features});
  Tensor dspectrum = allocate_zeros(spectrum, {count});
  const std::tuple<Tensor, Tensor> result{need_x ? like_rows(dx, grad_any) : dx, dspectrum};
  if (tokens == 0 || out_features == 0 || in_features == 0 || (!need_x && !x)) return result;

  const Mix mix(out_features, in_features, spectrum, offsets, sources, entries, scale / 2);
  const FourierPlaces places{count, check_table(rows, "rows", spectrum.size(0), out_features),
                             check_table(cols, "cols", spectrum.size(0), in_features)};
  const Scalar scalar = scalar_of(grad, "grad");
  const FourierLoops& run = loops(tokens);
  const int64_t tile = 2 * run.lanes, tiles = (tokens + tile - 1) / tile, groups = group_count(tiles, count);
  std::vector<float> partial(groups * count, 0.0f);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(run.scratch_floats(*mix.source, *mix.target));
    for (int64_t group = begin; group < end; ++group) {
      const int64_t last = std::min((group + 1) * tiles / groups * tile, tokens);
      for (int64_t first = group * tiles / groups * tile; first < last; first += tile) {
        run.bwd(mix.view, scalar, std::min(tile, tokens - first), rows_from(grad, first),
                need_x ? rows_into(dx, first) : MutableRows{}, x ? rows_from(*x, first) : Rows{}, places,
                partial.data() + group * count, scratch.data());
      }
    }
  });
  float* sums = static_cast<float*>(dspectrum.mutable_data_ptr());
  for (int64_t k = 0; k < count; ++k) {
    double sum = 0.0;
    for (int64_t group = 0; group < groups; ++group) sum += partial[group * count + k];
    sums[k] = float(scale * sum);
  }
  return result;
}

}  // namespace
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("fourier_fwd", TORCH_BOX(&fastpeft::fourier_fwd));
  m.impl("fourier_bwd", TORCH_BOX(&fastpeft::fourier_bwd));
}
