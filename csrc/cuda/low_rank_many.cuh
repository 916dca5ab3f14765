// Decoding with many low-rank adapters in one batch: y[t] += s[a] B_a (A_a x[t]), a the slot of row t, or nothing.
//
// LoRA (arXiv 2106.09685) and MoS (arXiv 2410.00938) alike: row j of a slot's A, and of its B transposed, is per_row
// shards of an arena side by side, found by index[slot, j]. The first rank[slot] rows count, so ranks differ and
// nothing but indices is padded. That every row of a batch looks its adapter up in one launch is the idea of Punica
// (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285).
//
// A thread block has one row t, named by the plan, and a range of outputs. It computes all of h = s A x[t], which stays
// in shared memory, then y += h B^T for its outputs: every range of a row streams A again, which costs less than a
// second launch, or a wait for other thread blocks, while ranks are small. Sums are float32 in an order that only the
// plan decides.
//
// Raw pointers only, no allocation, no synchronisation with the host. tests/cuda_host compiles this file for a CPU.
#pragma once

#include <type_traits>

#include "cuda/element.cuh"
#include "cuda/prefetch.cuh"

namespace fastpeft::many {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kSlice = 256;    // rows of A whose h is in shared memory at a time
constexpr int kChunk = 8192;   // features of x that are there as float32
constexpr int kBatchA = 4;     // vectors that a lane reads of each of two rows of A at the same time
constexpr int kBatchB = 8;     // rows of B of which a thread reads a vector at the same time
constexpr int kSmallPart = 8;  // a block's bytes of A by those of B beyond which narrower ranges gain nothing

// Rows made of shards; row j of a slot is number slot * r_max + j. `packed` says that 16 bytes of a shard can be read
// at once, everywhere.
struct Shards {
  const void* shards;  // [count, width]
  const int* index;    // [slots, r_max, per_row]
  int count, width, per_row;
  bool packed;
};

struct Arguments {
  Element element;  // of x and y
  const void* x;    // [tokens, in], rows x_row_stride elements apart
  void* y;          // [tokens, out], likewise
  int64_t x_row_stride, y_row_stride;
  int in, out;
  Shards a, b;
  const int* rank;          // [slots]
  const float* scaling;     // [slots]
  const int* row_numbers;   // [tokens]
  const int* slot_numbers;  // [tokens]
  int tokens, slots, r_max;
  int ranges, outputs;  // of a row of y, and of a range; the blocks of the grid go through the ranges first
  int front_floats;
};

inline bool shards_are_packed(const void* shards, int64_t width, int element_bytes) {
  return reinterpret_cast<uintptr_t>(shards) % 16 == 0 && width * element_bytes % 16 == 0;
}

// Floats of shared memory in front of the slice's sums: for x, and later for the sums of the threads' outputs. x is in
// whole eights for the sake of its two planes, see `stage`.
inline int front_floats(int in, int shard_bytes) {
  const int x = ((in < kChunk ? in : kChunk) + 7) / 8 * 8, sums = kThreads * 16 / shard_bytes;
  return x > sums ? x : sums;
}

struct Plan {
  const char* error;  // nullptr, or why there is no plan
  dim3 grid;
  dim3 block;
  int64_t shared_bytes;
  int ranges, outputs, front_floats;  // see Arguments
};

// The launch for `tokens` rows on a GPU of so many multiprocessors.
//
// A range streams rank * in * size bytes of A from the second-level cache and rank * outputs * size of B: at rank 16,
// 4096 -> 4096 and 2 bytes, 128 KiB and, of eight ranges, 16 KiB. One multiprocessor gets some 80 GB/s from there (64
// KiB on their way, 0.8 us), 1.6 us for that A and as much for that B. So more ranges make a row faster as long as they
// run beside each other, tokens * ranges <= processors, and B's share is not small already: kSmallPart * out / in of
// them. Once the processors are taken, another range would add a whole A to save a part of B. T = 1 gives 8 ranges
// here, 16 gives 8 (128 blocks on 132 processors), 64 gives 2. A thread has 16 bytes of a row of B, which sets the
// fewest.
inline Plan plan_low_rank_many(int64_t tokens, int64_t in, int64_t out, int shard_bytes, int64_t processors) {
  Plan plan{};
  const int64_t width = 16 / shard_bytes, most = kThreads * width, least = 32 * width;
  const int64_t fewest = (out + most - 1) / most;
  int64_t ranges = (kSmallPart * out + in - 1) / in;
  if (ranges > processors / tokens) ranges = processors / tokens;
  if (ranges < fewest) ranges = fewest;
  // Whole warps of vectors: a range begins at a multiple of 512 bytes of B.
  const int64_t outputs = ((out + ranges - 1) / ranges + least - 1) / least * least;
  ranges = (out + outputs - 1) / outputs;
  if (tokens * ranges > INT32_MAX) {
    plan.error = "more thread blocks than a grid can have";
    return plan;
  }
  plan.grid = dim3(static_cast<unsigned>(tokens * ranges));
  plan.block = dim3(kThreads);
  plan.ranges = static_cast<int>(ranges), plan.outputs = static_cast<int>(outputs);
  plan.front_floats = front_floats(static_cast<int>(in), shard_bytes);
  plan.shared_bytes = (plan.front_floats + 2 * kSlice) * int64_t{sizeof(float)};
  return plan;
}

// How shards are read: one element, or 16 bytes.
template <typename S, bool kPacked>
struct Vector {
  using Raw = S;
  static constexpr int kWidth = 1, kPlanes = 1;
};
template <typename S>
struct Vector<S, true> {
  using Raw = uint4;
  static constexpr int kWidth = 16 / sizeof(S), kPlanes = kWidth / 4;
};

// The shard that stands there in a row.
__device__ __forceinline__ int shard_number(const Shards& m, int row, int shard) {
  const int number = __ldg(m.index + int64_t{row} * m.per_row + shard);
  // The tables were checked when they were made; memory that is not theirs stays out of reach whatever they hold.
  return static_cast<int>(min(static_cast<unsigned>(number), static_cast<unsigned>(m.count - 1)));
}
template <typename S, typename Raw>
__device__ __forceinline__ Raw load(const Shards& m, int number, int offset) {
  return __ldg(reinterpret_cast<const Raw*>(static_cast<const S*>(m.shards) + int64_t{number} * m.width + offset));
}

// Here and below nothing comes between the loads of a batch, and no branch between them and their use, behind which
// nvcc would move them: all are on their way before the first one is waited for. Where the last batch is not full, what
// it began with is read again, and counted for nothing.

// x[t, first_feature ...] as float32, and as lanes read it beside vectors of A: eight elements are two float4s, and
// each has a plane of its own, so that neighbouring lanes read neighbouring float4s.
template <typename T, bool kPacked>
__device__ __forceinline__ void stage(const T* x, float* staged, int count, int planes) {
  using Raw = typename Vector<T, kPacked>::Raw;
  constexpr int kWidth = Vector<T, kPacked>::kWidth, kBatch = 4;
  const int plane_floats = (count + 7) / 8 * 4;
  for (int begin = static_cast<int>(threadIdx.x); begin < count / kWidth; begin += kBatch * kThreads) {
    const auto vector = [&](int i) {
      const int at = begin + i * kThreads;
      return at < count / kWidth ? at : begin;
    };
    Raw raw[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) raw[i] = __ldg(reinterpret_cast<const Raw*>(x) + vector(i));
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = vector(i) * kWidth;
      T values[kWidth];
      memcpy(values, &raw[i], sizeof(values));
      const auto place = [&](int j) { return planes == 1 ? j : (j >> 2 & 1) * plane_floats + (j >> 3) * 4 + (j & 3); };
      if constexpr (kPacked) {
#pragma unroll
        for (int e = 0; e < kWidth; e += 4) {
          reinterpret_cast<float4*>(staged)[place(at + e) / 4] = make_float4(
              to_float(values[e]), to_float(values[e + 1]), to_float(values[e + 2]), to_float(values[e + 3]));
        }
      } else {
        staged[place(at)] = to_float(values[0]);
      }
    }
  }
}

// The lane's part of two rows of A times the staged x: the vectors lane, lane + step, ... of a chunk.
template <typename S, bool kPacked>
__device__ __forceinline__ float2 project(const Shards& a, const float* staged, int row, int next_row,
                                          int first_feature, int count, int vector, int step) {
  using Raw = typename Vector<S, kPacked>::Raw;
  constexpr int kWidth = Vector<S, kPacked>::kWidth, kPlanes = Vector<S, kPacked>::kPlanes;
  const int vectors = count / kWidth, plane_vectors = (count + 7) / 8;
  // Where in the row it is, divided once.
  int shard = (first_feature + vector * kWidth) / a.width, offset = (first_feature + vector * kWidth) % a.width;
  const int step_shards = step * kWidth / a.width, step_offset = step * kWidth % a.width;

  const int whole[2] = {shard_number(a, row, 0), shard_number(a, next_row, 0)};

  float2 sum = make_float2(0.0f, 0.0f);
  for (; vector < vectors; vector += kBatchA * step) {
    int offsets[kBatchA], numbers[kBatchA][2];
    if (a.per_row > 1) {
#pragma unroll
      for (int i = 0; i < kBatchA; ++i) {
        const bool there = vector + i * step < vectors;
        offsets[i] = there ? offset : offsets[0];
        numbers[i][0] = there ? shard_number(a, row, shard) : numbers[0][0];
        numbers[i][1] = there ? shard_number(a, next_row, shard) : numbers[0][1];
        shard += step_shards, offset += step_offset;
        if (offset >= a.width) ++shard, offset -= a.width;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBatchA; ++i) {
        const bool there = vector + i * step < vectors;
        offsets[i] = first_feature + (there ? vector + i * step : vector) * kWidth;
        numbers[i][0] = whole[0], numbers[i][1] = whole[1];
      }
    }
    Raw raw[kBatchA][2];
#pragma unroll
    for (int i = 0; i < kBatchA; ++i) {
      raw[i][0] = load<S, Raw>(a, numbers[i][0], offsets[i]), raw[i][1] = load<S, Raw>(a, numbers[i][1], offsets[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatchA; ++i) {
      const bool there = vector + i * step < vectors;
      const int at = there ? vector + i * step : vector;
      S values[2][kWidth];
      memcpy(values, raw[i], sizeof(values));
      const S(&one)[kWidth] = values[0], (&other)[kWidth] = values[1];
      float2 part = make_float2(0.0f, 0.0f);
      if constexpr (kPacked) {
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          const float4 x = reinterpret_cast<const float4*>(staged)[plane * plane_vectors + at];
          part.x += x.x * to_float(one[4 * plane]) + x.y * to_float(one[4 * plane + 1]) +
                    x.z * to_float(one[4 * plane + 2]) + x.w * to_float(one[4 * plane + 3]);
          part.y += x.x * to_float(other[4 * plane]) + x.y * to_float(other[4 * plane + 1]) +
                    x.z * to_float(other[4 * plane + 2]) + x.w * to_float(other[4 * plane + 3]);
        }
      } else {
        part = make_float2(staged[at] * to_float(one[0]), staged[at] * to_float(other[0]));
      }
      sum.x += there ? part.x : 0.0f, sum.y += there ? part.y : 0.0f;
    }
  }
  return sum;
}

// Segments of x that warps share a pair of rows over, where there are fewer pairs than warps.
__device__ __forceinline__ int segments_of(int pairs) {
  int segments = 1;
  while (2 * segments * pairs <= kWarps) segments *= 2;
  return segments;
}

// sums[segment, i] = or += the segment's part of A[first + i] x, for the `rows` of a slice. A warp has two rows at a
// time, which share what it reads of x.
template <typename S, bool kPacked>
__device__ __forceinline__ void project_slice(const Shards& a, const float* staged, float* sums, int first, int rows,
                                              int first_feature, int count) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int pairs = (rows + 1) / 2, segments = segments_of(pairs);
  const int segment = warp % segments;
  for (int pair = warp / segments; pair < pairs; pair += kWarps / segments) {
    const int row = 2 * pair, next_row = min(row + 1, rows - 1);  // an odd one out is read twice and written once
    const float2 sum = project<S, kPacked>(a, staged, first + row, first + next_row, first_feature, count,
                                           segment * 32 + lane, segments * 32);
    // The first exchange leaves one row to each half of the warp.
    const bool upper = lane >= 16;
    float mine = upper ? sum.y : sum.x;
    mine += __shfl_xor_sync(~0u, upper ? sum.x : sum.y, 16);
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) mine += __shfl_xor_sync(~0u, mine, distance);
    const int i = row + (upper ? 1 : 0);
    if (lane % 16 == 0 && i < rows) {
      float& place = sums[segment * rows + i];
      place = first_feature == 0 ? mine : place + mine;
    }
  }
}

// acc += h B^T for the thread's outputs, over the rows part, part + parts, ... of a slice: kOutputs in a row where
// vectors are read, else kOutputs of them `columns` apart.
template <typename S, bool kPacked, int kOutputs>
__device__ __forceinline__ void expand(const Shards& b, const float* h, int first, int rows, int part, int parts,
                                       int output, int columns, int end, float (&acc)[kOutputs]) {
  using Raw = typename Vector<S, kPacked>::Raw;
  if constexpr (kPacked) {
    if (output >= end) return;
    const int shard = output / b.width, offset = output % b.width;
    for (int j = part; j < rows; j += kBatchB * parts) {
      int numbers[kBatchB];
#pragma unroll
      for (int i = 0; i < kBatchB; ++i) numbers[i] = first + (j + i * parts < rows ? j + i * parts : j);
#pragma unroll
      for (int i = 0; i < kBatchB; ++i) numbers[i] = shard_number(b, numbers[i], shard);
      Raw raw[kBatchB];
#pragma unroll
      for (int i = 0; i < kBatchB; ++i) raw[i] = load<S, Raw>(b, numbers[i], offset);
#pragma unroll
      for (int i = 0; i < kBatchB; ++i) {
        const bool there = j + i * parts < rows;
        const float scale = there ? h[j + i * parts] : 0.0f;
        if (!there) raw[i] = {};  // what is read again may be infinite
        S values[kOutputs];
        memcpy(values, &raw[i], sizeof(values));
#pragma unroll
        for (int e = 0; e < kOutputs; ++e) acc[e] += scale * to_float(values[e]);
      }
    }
  } else {
    int shard[kOutputs], offset[kOutputs];
#pragma unroll
    for (int e = 0; e < kOutputs; ++e) {
      const int at = min(output + e * columns, end - 1);
      shard[e] = at / b.width, offset[e] = at % b.width;
    }
    for (int j = part; j < rows; j += parts) {
      int numbers[kOutputs];
#pragma unroll
      for (int e = 0; e < kOutputs; ++e) numbers[e] = shard_number(b, first + j, shard[e]);
      Raw raw[kOutputs];
#pragma unroll
      for (int e = 0; e < kOutputs; ++e) raw[e] = load<S, Raw>(b, numbers[e], offset[e]);
#pragma unroll
      for (int e = 0; e < kOutputs; ++e) acc[e] += h[j] * to_float(raw[e]);  // beyond the end nobody asks for the sum
    }
  }
}

// y[output ...] += sum over the parts, for a range: four outputs to a thread, rounded once.
template <typename T>
__device__ __forceinline__ void update(T* y, const float* sums, int count, int parts, int part_floats, bool packed) {
  constexpr int kFour = 4;
  using Four = std::conditional_t<sizeof(T) == 4, float4, float2>;
  for (int i = static_cast<int>(threadIdx.x) * kFour; i < count; i += kThreads * kFour) {
    const bool whole = packed && i + kFour <= count;
    T values[kFour] = {};
    if (whole) {
      const Four raw = *reinterpret_cast<const Four*>(y + i);
      memcpy(values, &raw, sizeof(values));
    } else {
#pragma unroll
      for (int e = 0; e < kFour; ++e) {
        if (i + e < count) values[e] = y[i + e];
      }
    }
    float4 sum = reinterpret_cast<const float4*>(sums)[i / kFour];
    for (int part = 1; part < parts; ++part) {
      const float4 next = reinterpret_cast<const float4*>(sums)[(part * part_floats + i) / kFour];
      sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
    }
    values[0] = round_to<T>(to_float(values[0]) + sum.x), values[1] = round_to<T>(to_float(values[1]) + sum.y);
    values[2] = round_to<T>(to_float(values[2]) + sum.z), values[3] = round_to<T>(to_float(values[3]) + sum.w);
    if (whole) {
      Four raw;
      memcpy(&raw, values, sizeof(values));
      *reinterpret_cast<Four*>(y + i) = raw;
    } else {
#pragma unroll
      for (int e = 0; e < kFour; ++e) {
        if (i + e < count) y[i + e] = values[e];
      }
    }
  }
}

// Floor, for a row of rank r and shards of s bytes. Bytes: r s (in + out), once from memory where no other row has the
// adapter, and r s in again from the second-level cache for each further range; x and y beside them. Operations:
// 2 r (in + out), which with widening and addresses are some 46 instructions for 16 bytes of bfloat16: at rank 16 and
// 4096 features A takes 12 thousand warp instructions, 1.7 us of a multiprocessor, as long as its 128 KiB take to come.
//
// Occupancy. 512 threads with 8 vectors each on their way are 64 KiB, about what the path to the second-level cache
// holds (80 GB/s at 0.8 us), so one thread block keeps a multiprocessor busy, and the plan has no more than one where
// it can choose. They may have 128 registers each, all that there are; at 64, for two thread blocks, the batches spill.
// Shared memory, at most 34 KiB, limits nothing.
template <typename S>
__global__ void __launch_bounds__(kThreads, 1) low_rank_many_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ float4 shared_memory[];
  const int64_t position = blockIdx.x / static_cast<unsigned>(args.ranges);
  const int begin = static_cast<int>(blockIdx.x % static_cast<unsigned>(args.ranges)) * args.outputs;
  const int count = min(args.outputs, args.out - begin);
  const int slot = args.slot_numbers[position];
  const int64_t t = args.row_numbers[position];
  if (slot < 0 || slot >= args.slots || t < 0 || t >= args.tokens) return;
  const int first = slot * args.r_max, rank = min(args.rank[slot], args.r_max);
  if (rank <= 0) return;
  const float scaling = args.scaling[slot];

  constexpr int kOutputs = Vector<S, true>::kWidth;
  float* const front = reinterpret_cast<float*>(shared_memory);
  float* const sums = front + args.front_floats;
  float* const h = sums + kSlice;
  // Threads of a part have a vector of every output of the range; parts take turns with the rows of B.
  int parts = 1;
  while (2 * parts * args.outputs <= kThreads * kOutputs) parts *= 2;
  const int columns = kThreads / parts;
  const int part = static_cast<int>(threadIdx.x) / columns, column = static_cast<int>(threadIdx.x) % columns;
  float acc[kOutputs] = {};

  if (args.b.per_row == 1) {
    // B comes nearer while A is read. Of shards there would be more indices to wait for than lines to ask for.
    constexpr int kLine = 128 / sizeof(S);
    const int lines = (count + kLine - 1) / kLine, wanted = min(rank, kSlice) * lines;
    for (int i = static_cast<int>(threadIdx.x); i < wanted; i += kThreads) {
      const int64_t row = shard_number(args.b, first + i / lines, 0);
      prefetch(static_cast<const S*>(args.b.shards) + row * args.b.width + begin + i % lines * kLine);
    }
  }

  for (int slice = 0; slice < rank; slice += kSlice) {
    const int rows = min(kSlice, rank - slice);
    for (int chunk = 0; chunk < args.in; chunk += kChunk) {
      const int features = min(kChunk, args.in - chunk);
      if (slice == 0 || args.in > kChunk) {
        if (slice > 0 || chunk > 0) __syncthreads();  // the chunk before has been read
        with_element(args.element, [&]<typename T>() {
          const T* const x = static_cast<const T*>(args.x) + t * args.x_row_stride + chunk;
          const int planes = args.a.packed ? Vector<S, true>::kPlanes : 1;
          if (reinterpret_cast<uintptr_t>(x) % 16 == 0 && features * sizeof(T) % 16 == 0) {
            stage<T, true>(x, front, features, planes);
          } else {
            stage<T, false>(x, front, features, planes);
          }
        });
      }
      __syncthreads();
      if (args.a.packed) {
        project_slice<S, true>(args.a, front, sums, first + slice, rows, chunk, features);
      } else {
        project_slice<S, false>(args.a, front, sums, first + slice, rows, chunk, features);
      }
    }
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(rows)) {
      const int segments = segments_of((rows + 1) / 2);
      float sum = sums[threadIdx.x];
      for (int segment = 1; segment < segments; ++segment) sum += sums[segment * rows + threadIdx.x];
      h[threadIdx.x] = scaling * sum;
    }
    __syncthreads();
    if (args.b.packed) {
      expand<S, true, kOutputs>(args.b, h, first + slice, rows, part, parts, begin + column * kOutputs, 0,
                                begin + count, acc);
    } else {
      expand<S, false, kOutputs>(args.b, h, first + slice, rows, part, parts, begin + column, columns, begin + count,
                                 acc);
    }
  }

  // x has been read: since the last time there were barriers.
#pragma unroll
  for (int e = 0; e < kOutputs; ++e) {
    front[part * columns * kOutputs + (args.b.packed ? column * kOutputs + e : e * columns + column)] = acc[e];
  }
  __syncthreads();
  with_element(args.element, [&]<typename T>() {
    T* const y = static_cast<T*>(args.y) + t * args.y_row_stride;
    const bool packed = reinterpret_cast<uintptr_t>(y) % (4 * sizeof(T)) == 0;
    update(y + begin, front, count, parts, columns * kOutputs, packed);
  });
}

}  // namespace fastpeft::many
