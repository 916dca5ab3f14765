// The vector type of the loops, its loads and stores in every dtype, and the transposition of a square block. Part of
// the loops that include it: everything here is compiled per instruction set (see cpu/isa.h).
#pragma once

#include <stdint.h>

#include <utility>

#include "common/half.h"
#include "cpu/isa.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

// Elements of a row side by side, unaligned.
template <typename T>
inline Vector load_vector(const T* from) {
  Vector value;
  if constexpr (sizeof(T) == sizeof(float)) {
    __builtin_memcpy(&value, from, sizeof(value));
  } else {
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = to_float(from[lane]);
  }
  return value;
}

template <typename T>
inline void store_vector(T* to, Vector value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    __builtin_memcpy(to, &value, sizeof(value));
  } else {
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = from_float<T>(value[lane]);
  }
}

// The first count < kLanes elements; the others are zero, or stay as they are in memory.
template <typename T>
inline Vector load_some(const T* from, int64_t count) {
  Vector value = {};
  for (int64_t lane = 0; lane < count; ++lane) value[lane] = to_float(from[lane]);
  return value;
}

template <typename T>
inline void store_some(T* to, Vector value, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = from_float<T>(value[lane]);
}

template <int kStep, int... kLane>
inline Vector folded(Vector value, std::integer_sequence<int, kLane...>) {
  return value + __builtin_shufflevector(value, value, (kLane ^ kStep)...);
}

// The sum of all lanes, in pairs.
template <int kStep = kLanes / 2>
inline float sum_of(Vector value) {
  value = folded<kStep>(value, std::make_integer_sequence<int, kLanes>{});
  if constexpr (kStep > 1) return sum_of<kStep / 2>(value);
  return value[0];
}

// Blocks of kStep rows and lanes off the diagonal change places.
template <int kStep, int... kLane>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, kLane...>) {
  const Vector upper = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane : kLane + kStep)...);
  a = upper;
}

// kLanes rows become columns.
template <int kStep = kLanes / 2>
inline void transpose(Vector* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>{});
  }
  if constexpr (kStep > 1) transpose<kStep / 2>(rows);
}

// Calls call(T{}) with the element type that a Scalar names.
template <typename Call>
inline void with_scalar(Scalar scalar, Call call) {
  switch (scalar) {
    case Scalar::float32:
      return call(float{});
    case Scalar::bfloat16:
      return call(BFloat16{});
    case Scalar::float16:
      return call(Float16{});
  }
}

}  // namespace
}  // namespace fastpeft::FASTPEFT_ISA
