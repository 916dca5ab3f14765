// The operators fastpeft::fourier_fwd and fourier_bwd on CUDA tensors. Schemas and fakes: fastpeft/ops/fourierft.py;
// maths: fourierft.cuh.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/fourierft.cuh"
#include "cuda/fourierft_tables.h"
#include "cuda/tensor.h"

namespace fastpeft::fourier {
namespace {

constexpr const char* kName = "fourier";

// ---------------------------------------------------------------------------------------------------------------------
// Launches.

using Kernel = void (*)(Arguments);

template <typename T>
Kernel kernel_for(Kind kind) {
  return kind == Kind::kShort  ? fourier_kernel<T, ShortSignals>
         : kind == Kind::kLong ? fourier_kernel<T, LongSignals>
                               : fourier_kernel<T, SplitSignals>;
}

Kernel kernel_for(ScalarType type, Kind kind) {
  return type == ScalarType::Float      ? kernel_for<float>(kind)
         : type == ScalarType::BFloat16 ? kernel_for<__nv_bfloat16>(kind)
                                        : kernel_for<__half>(kind);
}

// A kernel and its launch, with everything that does not depend on tensors in its arguments. n is the number of
// coefficients whose gradient is wanted.
struct Launch {
  int device;
  cudaStream_t stream;
  Plan plan;
  Kernel kernel;
  Arguments args{};
  std::optional<Tensor> scratch, kept, partials;

  Launch(const Tensor& like, int64_t tokens, int64_t source_length, int64_t target_length, int64_t n, double scale)
      : device(like.get_device_index()), stream(current_stream(device)) {
    plan = plan_fourier(tokens, source_length, target_length, n,
                        device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                        device_attribute(cudaDevAttrMultiProcessorCount, device));
    STD_TORCH_CHECK(plan.error == nullptr, "fourier: ", tokens, " tokens from ", source_length, " to ", target_length,
                    " features: ", plan.error);
    kernel = kernel_for(like.scalar_type(), plan.kind);
    args.tokens = tokens;
    args.scale = static_cast<float>(scale);
    args.transform[0] = transform_of(source_length, device, stream);
    args.transform[1] = transform_of(target_length, device, stream);
    args.groups = static_cast<unsigned>(plan.groups);
    args.n = static_cast<int>(n);
    args.room = plan.room;
    if (plan.scratch > 0) args.scratch = static_cast<float2*>(floats(scratch, like, 2 * plan.scratch * plan.blocks));
    if (n > 0) {
      args.kept = static_cast<float4*>(floats(kept, like, 4 * n * plan.blocks));
      args.partials = static_cast<float*>(floats(partials, like, n * plan.groups));
    }
  }

  // Of PyTorch's caching allocator, and so of this stream alone until the launch is over.
  static void* floats(std::optional<Tensor>& tensor, const Tensor& like, int64_t size) {
    tensor = torch::stable::new_empty(like, {size}, ScalarType::Float);
    return tensor->mutable_data_ptr();
  }

  void run() const {
    const struct {
      unsigned grid, block;
      int64_t shared_bytes;
    } shape{static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.threads), plan.shared_bytes};
    launch_kernel(kernel, shape, stream, args);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// What the operators ask of their tensors.

Tensor reshaped(const Tensor& tensor, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  AtenTensorHandle view;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), int64_t(sizes.size()), sizes.data(), strides.data(), 0, &view));
  return Tensor(view);
}

// (..., features) as rows of elements that kernels take.
Tensor rows_of(const Tensor& x, const char* name) {
  const Tensor rows = as_rows(x, kName, name);
  element_of(rows, kName, name);
  return rows;
}

// Contiguous (tokens, features) with the leading sizes of x.
Tensor like_rows(const Tensor& y, const Tensor& x) {
  const int64_t dims = x.dim();
  if (dims == 2) return y;
  std::vector<int64_t> sizes(dims, y.size(1)), strides(dims, 1);
  for (int64_t i = dims - 2; i >= 0; --i) {
    sizes[i] = x.size(i);
    strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  }
  return reshaped(y, sizes, strides);
}

// An index table. That its numbers lie within bounds is its maker's to check: to look would be to wait for the GPU.
const int* checked_table(const Tensor& table, const char* name, int64_t size, const Tensor& like) {
  check_device(table, kName, name, like, "spectrum");
  STD_TORCH_CHECK(table.dim() == 1 && table.scalar_type() == ScalarType::Int && table.is_contiguous(),
                  "fourier: ", name, " must be a contiguous int32 vector");
  STD_TORCH_CHECK(table.size(0) == size, "fourier: ", name, " must have ", size, " entries, got ", table.size(0));
  return static_cast<const int*>(table.const_data_ptr());
}

void check_mix(const Tensor& spectrum, const Tensor& offsets, const Tensor& like) {
  check_device(spectrum, kName, "spectrum", like, "x");
  STD_TORCH_CHECK(spectrum.dim() == 1 && spectrum.scalar_type() == ScalarType::Float && spectrum.size(0) < 1 << 30,
                  "fourier: spectrum must be a float32 vector of less than 2^30 numbers");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0, "fourier: offsets must have an entry more than bins");
}

void check_weight(const std::optional<Tensor>& weight, const Tensor& x, int64_t out_features, int64_t in_features) {
  if (!weight) return;
  check_device(*weight, kName, "weight", x, "x");
  STD_TORCH_CHECK(weight->dim() == 2 && weight->size(0) == out_features && weight->size(1) == in_features &&
                      weight->scalar_type() == x.scalar_type(),
                  "fourier: weight must have shape (", out_features, ", ", in_features, ") and the dtype of x");
}

void set_mix(Arguments& args, const Tensor& spectrum, const Tensor& offsets, const Tensor& sources,
             const Tensor& entries) {
  const int64_t samples = sources.numel();
  args.offsets = checked_table(offsets, "offsets", offsets.size(0), spectrum);
  args.sources = checked_table(sources, "sources", samples, spectrum);
  args.entries = checked_table(entries, "entries", samples, spectrum);
  args.spectrum = static_cast<const float*>(spectrum.const_data_ptr());
  args.spectrum_stride = spectrum.stride(0);
}

Rows rows_from(const Tensor& x) { return {x.const_data_ptr(), x.stride(0)}; }

// ---------------------------------------------------------------------------------------------------------------------
// The operators.

// y = x W^T + b + delta(x). The mix takes bins of x to bins of y; scale is alpha / (d1 d2).
Tensor fourier_fwd(const Tensor& x_any, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                   const Tensor& spectrum, const Tensor& offsets, const Tensor& sources, const Tensor& entries,
                   double scale) {
  const Tensor x = rows_of(x_any, "x");
  check_mix(spectrum, offsets, x);
  const int64_t tokens = x.size(0), in_features = x.size(1), out_features = offsets.size(0) - 1;
  check_weight(weight, x, out_features, in_features);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const bool empty = tokens == 0 || out_features == 0 || in_features == 0 || spectrum.size(0) == 0;
  const Tensor y = empty && !weight ? torch::stable::new_zeros(x, {tokens, out_features})
                                    : torch::stable::new_empty(x, {tokens, out_features});
  if (weight) {
    const Tensor by = reshaped(*weight, {in_features, out_features}, {weight->stride(1), weight->stride(0)});
    if (bias) {
      check_device(*bias, kName, "bias", x, "x");
      STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features && bias->scalar_type() == x.scalar_type(),
                      "fourier: bias must be a vector of ", out_features, " entries in the dtype of x");
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(y.get(), bias->get(), x.get(), by.get(), 1.0, 1.0));
    } else {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(y.get(), x.get(), by.get()));
    }
  }
  if (!empty) {
    Launch launch(x, tokens, in_features, out_features, 0, scale);
    set_mix(launch.args, spectrum, offsets, sources, entries);
    launch.args.source = rows_from(x);
    if (weight) launch.args.base = rows_from(y);
    launch.args.y = y.mutable_data_ptr();
    launch.args.y_stride = out_features;
    launch.run();
  }
  return like_rows(y, x_any);
}

// Gradients of x and, if x is given, of the spectrum; one that is not asked for comes back empty. The mix takes bins of
// grad to bins of dx.
std::tuple<Tensor, Tensor> fourier_bwd(const Tensor& grad_any, const std::optional<Tensor>& x_any,
                                       const std::optional<Tensor>& weight, const Tensor& spectrum, const Tensor& rows,
                                       const Tensor& cols, const Tensor& offsets, const Tensor& sources,
                                       const Tensor& entries, double scale, bool need_x) {
  const Tensor grad = rows_of(grad_any, "grad");
  check_mix(spectrum, offsets, grad);
  const int64_t tokens = grad.size(0), out_features = grad.size(1), in_features = offsets.size(0) - 1;
  const int64_t n = spectrum.size(0);
  check_weight(weight, grad, out_features, in_features);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  std::optional<Tensor> x;
  if (x_any) {
    x = rows_of(*x_any, "x");
    check_device(*x, kName, "x", grad, "grad");
    STD_TORCH_CHECK(x->size(0) == tokens && x->size(1) == in_features && x->scalar_type() == grad.scalar_type(),
                    "fourier: x must have shape (..., ", in_features, "), and the tokens and the dtype of grad");
  }
  const bool empty = tokens == 0 || out_features == 0 || in_features == 0 || n == 0;
  const std::vector<int64_t> dx_sizes{need_x ? tokens : 0, in_features}, sum_sizes{x ? n : 0};
  const Tensor dx =
      empty && !weight ? torch::stable::new_zeros(grad, dx_sizes) : torch::stable::new_empty(grad, dx_sizes);
  const Tensor sums =
      empty ? torch::stable::new_zeros(spectrum, sum_sizes) : torch::stable::new_empty(spectrum, sum_sizes);
  if (need_x && weight) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(dx.get(), grad.get(), weight->get()));
  }
  const std::tuple<Tensor, Tensor> result{need_x ? like_rows(dx, grad_any) : dx, sums};
  if (empty || (!need_x && !x)) return result;

  Launch launch(grad, tokens, out_features, in_features, x ? n : 0, scale);
  Arguments& args = launch.args;
  set_mix(args, spectrum, offsets, sources, entries);
  args.source = rows_from(grad);
  if (need_x) {
    if (weight) args.base = rows_from(dx);
    args.y = dx.mutable_data_ptr();
    args.y_stride = in_features;
  }
  if (!x) {
    launch.run();
    return result;
  }
  args.x = rows_from(*x);
  args.rows = checked_table(rows, "rows", n, grad);
  args.cols = checked_table(cols, "cols", n, grad);
  launch.run();
  sum_partials_kernel<<<static_cast<unsigned>((n + kSumLanes - 1) / kSumLanes), dim3(kSumLanes, kSumSlices),
                        kSumSharedBytes, launch.stream>>>(args.partials, static_cast<float*>(sums.mutable_data_ptr()),
                                                          launch.plan.groups, args.n, args.scale);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

// W + delta, rounded once. The mix takes bins of the rows of W to bins of its columns, as that of the gradient of x.
Tensor fourier_merge(const Tensor& weight_any, const Tensor& spectrum, const Tensor& offsets, const Tensor& sources,
                     const Tensor& entries, double scale) {
  STD_TORCH_CHECK(weight_any.dim() == 2, "fourier: weight must have two dimensions, got ", weight_any.dim());
  const Tensor weight = rows_of(weight_any, "weight");
  check_mix(spectrum, offsets, weight);
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  STD_TORCH_CHECK(offsets.size(0) == in_features + 1, "fourier: offsets must have ", in_features + 1, " entries, got ",
                  offsets.size(0));
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const Tensor merged = torch::stable::new_empty(weight, {out_features, in_features});
  if (merged.numel() == 0) return merged;
  Launch launch(weight, out_features, out_features, in_features, 0, scale);
  set_mix(launch.args, spectrum, offsets, sources, entries);
  launch.args.base = rows_from(weight);
  launch.args.y = merged.mutable_data_ptr();
  launch.args.y_stride = in_features;
  launch.run();
  return merged;
}

}  // namespace
}  // namespace fastpeft::fourier

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) {
  m.impl("fourier_fwd", TORCH_BOX(&fastpeft::fourier::fourier_fwd));
  m.impl("fourier_bwd", TORCH_BOX(&fastpeft::fourier::fourier_bwd));
  m.impl("fourier_merge", TORCH_BOX(&fastpeft::fourier::fourier_merge));
}
