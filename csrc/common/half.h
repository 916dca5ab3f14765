// Conversions between float32 and the two 16-bit floats, rounding to nearest even, written as bit operations so
// that every compiler vectorises them. All functions are static: see cpu/isa.h on why loops share no inline code.
#pragma once

#include <stdint.h>

namespace fastpeft {

enum class Scalar : int { float32, bfloat16, float16 };

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline float to_float(Float16 value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  // The exponent field now stands 112 too low; a product corrects it and normalises subnormals on the way.
  const uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
  return bits_to_float(bits | uint32_t(value.bits & 0x8000u) << 16);
}

template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;  // keep it quiet: rounding could carry a NaN into infinity
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <>
inline Float16 from_float<Float16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 places the last bit of a subnormal half at the last bit of the float, which rounds it.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
  return {uint16_t(half | (bits >> 16 & 0x8000u))};
}

}  // namespace
}  // namespace fastpeft
