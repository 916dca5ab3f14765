// The elements kernels read and write, and float32 in between.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace fastpeft {

enum class Element : int { kFloat32, kFloat16, kBFloat16 };

constexpr int bytes_of(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// Calls f with the type as a template argument.
template <typename F>
__device__ __forceinline__ void with_element(Element element, F&& f) {
  if (element == Element::kFloat32) {
    f.template operator()<float>();
  } else if (element == Element::kFloat16) {
    f.template operator()<__half>();
  } else {
    f.template operator()<__nv_bfloat16>();
  }
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T round_to(float value);
template <>
__device__ __forceinline__ float round_to<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half round_to<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// 1, 2 or 4 neighbouring floats.
__device__ __forceinline__ float pack(const float (&in)[1]) { return in[0]; }
__device__ __forceinline__ float2 pack(const float (&in)[2]) { return make_float2(in[0], in[1]); }
__device__ __forceinline__ float4 pack(const float (&in)[4]) { return make_float4(in[0], in[1], in[2], in[3]); }
__device__ __forceinline__ void unpack(float in, float (&out)[1]) { out[0] = in; }
__device__ __forceinline__ void unpack(float2 in, float (&out)[2]) { out[0] = in.x, out[1] = in.y; }
__device__ __forceinline__ void unpack(float4 in, float (&out)[4]) {
  out[0] = in.x, out[1] = in.y, out[2] = in.z, out[3] = in.w;
}

}  // namespace fastpeft
