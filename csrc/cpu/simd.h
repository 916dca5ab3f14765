// The vector type of the loops, its loads and stores in every dtype, and the transposition of a square block. Part of
// the loops that include it: everything here is compiled per instruction set (see cpu/isa.h).
#pragma once

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <utility>

#include "common/half.h"
#include "cpu/isa.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

// A loops file may ask for narrower vectors than the instruction set has.
#if !defined(FASTPEFT_MOST_LANES)
#define FASTPEFT_MOST_LANES 16
#endif
#if defined(__AVX512F__) && FASTPEFT_MOST_LANES >= 16
#define FASTPEFT_LANES 16
#elif defined(__AVX2__)
#define FASTPEFT_LANES 8
#else
#define FASTPEFT_LANES 4
#endif
constexpr int kLanes = FASTPEFT_LANES;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

// The conversions of common/half.h on vectors. Written out, because compilers do not vectorise them by themselves.
inline Vector widen(Bits half, BFloat16) { return reinterpret_cast<Vector>(half << 16); }

inline Vector widen(Bits half, Float16) {
  const Bits magnitude = (half & 0x7fffu) << 13;
  const Bits finite = reinterpret_cast<Bits>(reinterpret_cast<Vector>(magnitude) * 0x1p112f);
  const Bits bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
  return reinterpret_cast<Vector>(bits | (half & 0x8000u) << 16);
}

inline Halves narrow(Vector value, BFloat16) {
#if defined(__AVX512BF16__) && FASTPEFT_LANES == 16
  // One instruction for seven. It takes subnormals, below 2^-126, for zero.
  return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(value)));
#else
  const Bits bits = reinterpret_cast<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16 | 0x40u) : rounded, Halves);
#endif
}

inline Halves narrow(Vector value, Float16) {
  const Bits bits = reinterpret_cast<Bits>(value);
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits subnormal = reinterpret_cast<Bits>(reinterpret_cast<Vector>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits infinite = Bits{} + 0x7c00u, nan = Bits{} + 0x7e00u;
  const Bits special = magnitude > 0x7f800000u ? nan : infinite;
  const Bits half = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
  return __builtin_convertvector(half | (bits >> 16 & 0x8000u), Halves);
}

// Elements of a row side by side, unaligned.
template <typename T>
inline Vector load_vector(const T* from) {
  if constexpr (sizeof(T) == sizeof(float)) {
    Vector value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  } else {
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof(halves));
    return widen(__builtin_convertvector(halves, Bits), T{});
  }
}

template <typename T>
inline void store_vector(T* to, Vector value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    __builtin_memcpy(to, &value, sizeof(value));
  } else {
    const Halves halves = narrow(value, T{});
    __builtin_memcpy(to, &halves, sizeof(halves));
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

// AddressSanitizer does not look at masked accesses, so it is shown the last element.
inline void show_last(const float* data, int64_t count) {
#if defined(__SANITIZE_ADDRESS__)
  if (count > 0) (void)*static_cast<const volatile float*>(data + count - 1);
#endif
}

// Lane by lane they cost thirty times a whole vector, and a low rank is seldom a whole vector.
#if FASTPEFT_LANES == 16
inline Vector load_some(const float* from, int64_t count) {
  show_last(from, count);
  return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
}
inline void store_some(float* to, Vector value, int64_t count) {
  show_last(to, count);
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), value);
}
#elif FASTPEFT_LANES == 8
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vector load_some(const float* from, int64_t count) {
  show_last(from, count);
  return _mm256_maskload_ps(from, first_lanes(count));
}
inline void store_some(float* to, Vector value, int64_t count) {
  show_last(to, count);
  _mm256_maskstore_ps(to, first_lanes(count), value);
}
#endif

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

// Lane i of rows[0] becomes the sum of rows[i]: a third of the operations of kLanes single sums. All rows are changed.
template <int kStep = kLanes / 2>
inline void sum_rows(Vector* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kStep; ++i) {
    exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>{});
    rows[i] += rows[i + kStep];
  }
  if constexpr (kStep > 1) sum_rows<kStep / 2>(rows);
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
