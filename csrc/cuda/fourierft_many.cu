// The operator fastpeft::fourier_many_ on CUDA tensors. Schema and fake: fastpeft/ops/fourierft_many.py; maths:
// fourierft_many.cuh.
#include <optional>

#include "cuda/fourierft_many.cuh"
#include "cuda/fourierft_tables.h"
#include "cuda/many.h"

namespace fastpeft::fourier {
namespace {

constexpr char kOp[] = "fourier_many";

// Checks what a shape can tell; numbers that lead outside of the tensors are nobody's or the last one's.
void fourier_many(Tensor y, const Tensor& x, const Tensor& arena_spectrum, const Tensor& row_spectrum,
                  const Tensor& places, const Tensor& place, const Tensor& scaling, const Tensor& rows,
                  const Tensor& slots) {
  many::check_rows(y, kOp, "y");
  many::check_rows(x, kOp, "x");
  check_device(x, kOp, "x", y, "y");
  const Element element = element_of(y, kOp, "y");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type() && x.size(0) == y.size(0), kOp, ": x must be ", y.scalar_type(),
                  " and have ", y.size(0), " rows as y has, got ", x.scalar_type(), " and ", x.size(0), " rows");
  many::check_table(places, kOp, "places", ScalarType::Int, 3, y, "y");
  many::check_table(arena_spectrum, kOp, "arena_spectrum", ScalarType::Float, 2, y, "y");
  const int64_t tokens = y.size(0), in = x.size(1), out = y.size(1), n = places.size(2), count = row_spectrum.numel();
  STD_TORCH_CHECK(places.size(1) == 2 && arena_spectrum.size(1) == n, kOp,
                  ": places must have shape (P, 2, n) and arena_spectrum (rows, n), got (P, ", places.size(1), ", ", n,
                  ") and (rows, ", arena_spectrum.size(1), ")");
  many::check_table(row_spectrum, kOp, "row_spectrum", ScalarType::Int, 1, y, "y");
  many::check_table(place, kOp, "place", ScalarType::Int, 1, y, "y");
  many::check_table(scaling, kOp, "scaling", ScalarType::Float, 1, y, "y");
  STD_TORCH_CHECK(place.size(0) == count && scaling.size(0) == count, kOp, ": place and scaling must have ", count,
                  " entries, one for each slot, got ", place.size(0), " and ", scaling.size(0));
  many::check_plan(rows, slots, kOp, y, "y");
  if (y.numel() == 0 || x.numel() == 0 || arena_spectrum.numel() == 0 || places.size(0) == 0 || count == 0) return;

  const int device = y.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const ManyPlan plan =
      plan_fourier_many(tokens, in, out, n, device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                        device_attribute(cudaDevAttrMultiProcessorCount, device));
  STD_TORCH_CHECK(plan.error == nullptr, kOp, ": ", tokens, " rows from ", in, " to ", out, " features: ", plan.error);
  // Of PyTorch's caching allocator, and so of this stream alone until the launch is over.
  std::optional<Tensor> scratch;
  if (plan.split) {
    scratch = torch::stable::new_empty(arena_spectrum, {2 * plan.scratch * int64_t{plan.grid.x}}, ScalarType::Float);
  }
  const ManyArguments args{
      .transform = {transform_of(in, device, stream), transform_of(out, device, stream)},
      .x = x.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .x_row_stride = x.stride(0),
      .y_row_stride = y.stride(0),
      .spectra = static_cast<const float*>(arena_spectrum.const_data_ptr()),
      .row_spectrum = many::numbers_of(row_spectrum),
      .places = many::numbers_of(places),
      .place = many::numbers_of(place),
      .scaling = static_cast<const float*>(scaling.const_data_ptr()),
      .row_numbers = many::numbers_of(rows),
      .slot_numbers = many::numbers_of(slots),
      .spectrum_count = static_cast<int>(arena_spectrum.size(0)),
      .place_count = static_cast<int>(places.size(0)),
      .n = static_cast<int>(n),
      .tokens = static_cast<int>(tokens),
      .slots = static_cast<int>(count),
      .inverse = static_cast<float>(1.0 / (static_cast<double>(in) * static_cast<double>(out))),
      .buffer = plan.buffer,
      .listed = plan.listed,
      .claims = plan.claims,
      .scratch = scratch ? static_cast<float2*>(scratch->mutable_data_ptr()) : nullptr,
      .room = plan.room,
  };
  with_type(element, [&]<typename T>() {
    const auto kernel = plan.split ? fourier_many_kernel<T, SplitRow> : fourier_many_kernel<T, WholeRow>;
    launch_kernel(kernel, plan, stream, args);
  });
}

}  // namespace
}  // namespace fastpeft::fourier

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) { m.impl("fourier_many_", TORCH_BOX(&fastpeft::fourier::fourier_many)); }
