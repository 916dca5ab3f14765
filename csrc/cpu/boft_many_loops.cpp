// The butterfly product where a block is reflections (fastpeft/ops/boft_many.py): strips of features are lanes.
//
// Cost: 2 (b (b + 1) / 2 - 1) operations for the b features of a block in each lane, and a transposition of the row on
// its way in and out. Numbers are read in the order in which they lie.
#include "cpu/boft_many_loops.h"

#include "common/boft_reflectors.h"
#include "cpu/boft_places.h"
#include "cpu/boft_sizes.h"
#include "cpu/tile.h"

namespace fastpeft::FASTPEFT_ISA {
namespace {

constexpr int kTogether = 2;  // tokens for which numbers are read once, where their blocks fit the registers

template <int B>
constexpr int kTokens = B > 0 && B <= 8 ? kTogether : 1;

// They are read once, in order, and come from far away. What the processor fetches by itself ends with a page, so one
// is asked for a page ahead.
inline void ask_ahead(const float* from) { __builtin_prefetch(from + 1024); }

// Numbers of one kind for a vector's lanes, or for what is left of the strips.
struct WholeVector {
  Vector operator()(const float* from) const {
    ask_ahead(from);
    return load_vector(from);
  }
};
struct SomeLanes {
  int64_t count;
  Vector operator()(const float* from) const {
    ask_ahead(from);
    return load_some(from, count);
  }
};

// Reflection J of a block: s = tau (z . v), z -= s v, for every token in the same order of sums. The sign of D comes
// with what is finished.
template <int B, int J, int T, typename Load>
inline const float* reflect(Vector (&z)[T][B], const float* numbers, int64_t lanes, Load load) {
  Vector v[B], even[T], odd[T] = {};  // two sums, so that one need not wait for itself
  const Vector tau = load(numbers);
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) even[t] = z[t][J];
#pragma GCC unroll 32
  for (int a = J + 1; a < B; ++a) {
    v[a] = load(numbers += lanes);
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) ((a - J) % 2 ? odd : even)[t] += z[t][a] * v[a];
  }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    const Vector step = (even[t] + odd[t]) * tau;
    z[t][J] = step - z[t][J];
#pragma GCC unroll 32
    for (int a = J + 1; a < B; ++a) z[t][a] -= step * v[a];
  }
  return numbers + lanes;
}

template <int B, int T, typename Load, int... kReflection>
inline void reflect_all(Vector (&z)[T][B], const float* numbers, int64_t lanes, Load load,
                        std::integer_sequence<int, kReflection...>) {
  ((numbers = reflect<B, kReflection>(z, numbers, lanes, load)), ...);
}

// z Q for the block of every lane, whose halves start at `low` and `high` of a tile; token t's tile is `apart` vectors
// after the one before. Not inline: compilers would keep an address for each number, in memory.
template <int B, int T, typename Load>
__attribute__((noinline)) void rotate_block(Vector* low, Vector* high, int64_t apart, const float* numbers,
                                            int64_t lanes, Load load) {
  Vector z[T][B];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 32
    for (int a = 0; a < B; ++a) z[t][a] = (a < B / 2 ? low + a : high + a - B / 2)[t * apart];
  }
  reflect_all(z, numbers, lanes, load, std::make_integer_sequence<int, B - 1>{});
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 32
    for (int a = 0; a < B; ++a) (a < B / 2 ? low + a : high + a - B / 2)[t * apart] = z[t][a];
  }
}

// The same for a block size that is known only at run time. An odd one has a single factor, and high = low + b / 2.
template <typename Load>
inline void rotate_any(Vector* low, Vector* high, int64_t b, const float* numbers, int64_t lanes, Load load) {
  const auto entry = [&](int64_t a) -> Vector& { return a < b / 2 ? low[a] : high[a - b / 2]; };
  for (int64_t j = 0; j + 1 < b; numbers += (b - j) * lanes, ++j) {
    Vector even = entry(j), odd = {};
    for (int64_t a = j + 1; a < b; ++a) ((a - j) % 2 ? odd : even) += entry(a) * load(numbers + (a - j) * lanes);
    const Vector step = (even + odd) * load(numbers);
    entry(j) = step - entry(j);
    for (int64_t a = j + 1; a < b; ++a) entry(a) -= step * load(numbers + (a - j) * lanes);
  }
}

// T tokens that lie in tiles: a strip in each lane, and the vectors of the next strips behind those of the first.
template <int B, int T>
void rotate_tiles(const ReflectorShape& shape, Vector* tiles, int64_t apart, const float* reflectors) {
  const int64_t b = B > 0 ? B : shape.block, lanes = shape.features / shape.strip;
  const int64_t places = shape.strip / b, numbers = reflector_numbers(b) * lanes, whole = lanes / kLanes * kLanes;
  const auto rotate = [&](Place at, int64_t lane, const float* own, auto load) {
    Vector* const tile = tiles + lane / kLanes * shape.strip;
    if constexpr (B > 0) {
      rotate_block<B, T>(tile + at.low, tile + at.high, apart, own + lane, lanes, load);
    } else {
      rotate_any(tile + at.low, tile + at.high, b, own + lane, lanes, load);
    }
  };
  for (int64_t factor = shape.factors - 1; factor >= 0; --factor) {
    const float* own = reflectors + factor * places * numbers;
    for_each_block({0, shape.strip}, b, factor, [&](Place at) {
      for (int64_t lane = 0; lane < whole; lane += kLanes) rotate(at, lane, own, WholeVector{});
      if (whole < lanes) rotate(at, whole, own, SomeLanes{lanes - whole});
      own += numbers;
    });
  }
}

// Vectors of one token.
int64_t tile_vectors(const ReflectorShape& shape) {
  return (shape.features / shape.strip + kLanes - 1) / kLanes * shape.strip;
}

int64_t scratch_floats(const ReflectorShape& shape) { return kTogether * kLanes * tile_vectors(shape); }

template <typename T, int B, int kCount>
void rotate_tokens(const ReflectorShape& shape, int64_t first, Rows x, const float* reflectors, MutableRows z,
                   Vector* tiles) {
  const int64_t lanes = shape.features / shape.strip, apart = tile_vectors(shape);
  for (int64_t t = 0; t < kCount; ++t) {
    const T* row = static_cast<const T*>(x.data) + (first + t) * x.stride;
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      load_tile<T>({row + lane * shape.strip, shape.strip}, lanes - lane, shape.strip,
                   tiles + t * apart + lane / kLanes * shape.strip, 1);
    }
  }
  rotate_tiles<B, kCount>(shape, tiles, apart, reflectors);
  for (int64_t t = 0; t < kCount; ++t) {
    T* row = static_cast<T*>(z.data) + (first + t) * z.stride;
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      store_tile<T, false>(tiles + t * apart + lane / kLanes * shape.strip, 1, lanes - lane, shape.strip,
                           {row + lane * shape.strip, shape.strip});
    }
  }
}

void rotate(const ReflectorShape& shape, int64_t tokens, Rows x, const float* reflectors, MutableRows z,
            float* scratch) {
  const auto run = [&]<typename T, int B>() {
    Vector* const tiles = reinterpret_cast<Vector*>(scratch);
    int64_t t = 0;
    for (; t + kTokens<B> <= tokens; t += kTokens<B>) {
      rotate_tokens<T, B, kTokens<B>>(shape, t, x, reflectors, z, tiles);
    }
    for (; t < tokens; ++t) rotate_tokens<T, B, 1>(shape, t, x, reflectors, z, tiles);
  };
  with_scalar(shape.scalar,
              [&]<typename T>(T) { with_block_size(shape.block, [&]<int B>() { run.template operator()<T, B>(); }); });
}

}  // namespace

const ButterflyManyLoops butterfly_many = {scratch_floats, rotate};

}  // namespace fastpeft::FASTPEFT_ISA
