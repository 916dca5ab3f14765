// FourierFT on CUDA: how signals come from global memory and results go there, at the ends of a transform.
#pragma once

#include "cuda/fourierft_passes.cuh"

namespace fastpeft::fourier {

// A signal into a buffer, with the first pass where ends_in_registers.
template <typename Signal, typename Buffer>
__device__ __forceinline__ void load_signal(const Signal& signal, const Transform& transform, const Buffer& buffer) {
  if (ends_in_registers(transform)) {
    const int parts = transform.pass[0].parts;
    const float2* twiddles = transform.table + transform.pass[0].twiddles;
#pragma unroll 1
    for (int j = threadIdx.x; j < parts; j += blockDim.x) {
      float2 a[16];
#pragma unroll
      for (int q = 0; q < 16; ++q) a[q] = signal[j + q * parts];
      twiddled_butterfly<16, true>(a, twiddles + j, parts);
#pragma unroll
      for (int s = 0; s < 16; ++s) buffer[j + s * parts] = a[slot_of<16>(s)];
    }
    return;
  }
  const float2* chirp = transform.table + transform.chirp;
  for (int i = threadIdx.x; i < transform.size; i += blockDim.x) {
    float2 value = make_float2(0.0f, 0.0f);
    if (i < transform.length) value = signal[i];
    if (transform.chirp && i < transform.length) value = times(value, __ldg(chirp + i));
    buffer[i] = value;
  }
}

// The last pass where ends_in_registers, and the sum with what is there.
template <typename Result, typename Buffer>
__device__ __forceinline__ void store_result(const Result& result, const Transform& transform, const Buffer& buffer) {
  if (ends_in_registers(transform)) {
    const int parts = transform.pass[0].parts;
    const float2* twiddles = transform.table + transform.pass[0].twiddles;
#pragma unroll 1
    for (int j = threadIdx.x; j < parts; j += blockDim.x) {
      float2 a[16];
#pragma unroll
      for (int s = 0; s < 16; ++s) a[slot_of<16>(s)] = buffer[j + s * parts];
      twiddled_butterfly<16, false>(a, twiddles + j, parts);
      // Reads of what is there do not pass writes, which may be to the same place: some at once, as registers allow.
      constexpr int kReadAtOnce = Result::kReadAtOnce;
#pragma unroll
      for (int first = 0; first < 16; first += kReadAtOnce) {
        typename Result::Raw base[kReadAtOnce];
#pragma unroll
        for (int i = 0; i < kReadAtOnce; ++i) base[i] = result.read(j + (first + i) * parts);
#pragma unroll
        for (int i = 0; i < kReadAtOnce; ++i) result.add(j + (first + i) * parts, base[i], a[first + i]);
      }
    }
    return;
  }
  for (int i = threadIdx.x; i < transform.length; i += blockDim.x) {
    result.add(i, result.read(i), buffer[i]);
  }
}

}  // namespace fastpeft::fourier
