// FourierFT (arXiv 2405.03003) on CUDA where every row has its own adapter: y[t] += the delta of slot a, the slot of
// row t, or nothing. With the a's coefficients c and places (u, v), and scale = alpha / (out in),
//
//   y[t] += scale * Re F1 S,     S[u_k] += c_k (F2 x[t])[v_k],     F1 and F2 the transforms of length out and in
//
// because both of the paper's inverse transforms become forward ones when u and v run backwards, which the real part of
// a real S does not see.
//
// A row has a thread block and a signal of its own, with nothing beside it. Two rows in one signal, as in
// fourierft.cuh, would round each other's numbers, and a row's bits are its adapter's alone. In a signal of half the
// length the row could lie folded; batches of few rows, one for each multiprocessor, wait for barriers and loads, of
// which that has as many.
//
// Places stand in any order, and some bins have several of them. So that these are summed in the order of k, they take
// turns: each pending place claims its bin's entry in a table, the lowest k gets it, adds what it has, and the others
// try again. Of 1000 places drawn for 4096 bins, at most 4 or 5 meet. Sorting them first would take 55 barriers, and
// lists that are kept beside the places would have to be made again with each of them. Integer maxima alone are atomic,
// so that the order of the threads changes nothing. The worst case, all places in one bin, has a turn for each.
//
// Raw pointers only, no allocation on the device, no synchronisation with the host. tests/cuda_host compiles this file
// for a CPU.
#pragma once

#include "cuda/element.cuh"
#include "cuda/fourierft_signal.cuh"
#include "cuda/prefetch.cuh"

namespace fastpeft::fourier {

// Whole: the source and the target lie in one buffer in shared memory. Split: they are in global memory, at places of
// their own, and so any number of places goes through the list bit by bit.
struct WholeRow {
  static constexpr bool kSplit = false;
  static constexpr int kThreads = 640;
};
struct SplitRow {
  static constexpr bool kSplit = true;
  static constexpr int kThreads = 512;
};

constexpr int kPlacesAtOnce = 4;   // that a thread looks up at the same time
constexpr int kMostListed = 4096;  // of split signals
constexpr int kMostClaims = 4096;  // bins beyond share an entry: whose places meet take turns as well

struct ManyArguments {
  Transform transform[2];  // of the source and of the target
  const void* x;           // [tokens, in], rows x_row_stride elements apart
  void* y;                 // [tokens, out], likewise
  int64_t x_row_stride, y_row_stride;
  const float* spectra;     // [spectrum_count, n]
  const int* row_spectrum;  // [slots]
  const int* places;        // [place_count, 2, n]
  const int* place;         // [slots]
  const float* scaling;     // [slots]
  const int* row_numbers;   // [tokens]
  const int* slot_numbers;  // [tokens]
  int spectrum_count, place_count, n, tokens, slots;
  float inverse;    // 1 / (out in)
  int buffer;       // float2s of shared memory in front of the list
  int listed;       // places that are in shared memory at a time: all n, or part of them where signals are split
  int claims;       // entries of the table, a power of two
  float2* scratch;  // of split signals: [blocks, sizes of the two transforms]
  int room;         // of split signals: entries that are in shared memory at a time
};

struct ManyPlan {
  const char* error;  // nullptr, or why there is no plan
  bool split;
  dim3 grid;
  dim3 block;
  int64_t shared_bytes;
  int buffer, listed, claims, room;  // see ManyArguments
  int64_t scratch;                   // of split signals: float2s in global memory for each block
};

// The launch for rows from one length to another. Threads: one for each butterfly of radix 16, and one for as many
// places as it looks up at the same time. Blocks: one for each row. What does not fit in shared memory is split, as in
// plan_fourier: its rows have memory in each block, so that there is one for each multiprocessor. A row's sums have one
// order in all of these, whatever the number of rows, threads and blocks.
inline ManyPlan plan_fourier_many(int64_t tokens, int64_t in, int64_t out, int64_t n, int64_t max_shared_bytes,
                                  int64_t multiprocessors) {
  constexpr int64_t kMostScratch = 1 << 26;  // 8 bytes each
  ManyPlan plan{};
  if (std::max(in, out) > kMostBins) plan.error = "more than 2^27 features";
  if (n >= 1 << 30) plan.error = "2^30 places or more";
  if (tokens > INT32_MAX) plan.error = "more rows than a grid has blocks";
  if (plan.error) return plan;
  const int64_t source_size = size_of_transform(in), target_size = size_of_transform(out);
  const int64_t entries = std::max(source_size, target_size);
  plan.claims = 32;
  while (plan.claims < std::min<int64_t>(out, kMostClaims)) plan.claims *= 2;
  const auto set_shared = [&](int64_t in_buffer, int64_t places) {
    plan.listed = int(places);
    plan.buffer = int(bytes_in_shared_memory(in_buffer) / int64_t(sizeof(float2)));
    plan.shared_bytes = 8 * int64_t{plan.buffer} + 12 * places + 4 * int64_t{plan.claims};
  };
  const auto threads = [&](auto row) {
    const int64_t wanted = std::max((entries + 15) / 16, (n + kPlacesAtOnce - 1) / kPlacesAtOnce);
    return dim3(unsigned(std::min<int64_t>((wanted + 31) / 32 * 32, row.kThreads)));
  };
  set_shared(entries, n);
  plan.split = plan.shared_bytes > max_shared_bytes;
  if (!plan.split) {
    plan.grid = dim3(unsigned(tokens)), plan.block = threads(WholeRow{});
    return plan;
  }
  const int64_t listed = std::min<int64_t>(n, kMostListed), left = max_shared_bytes - 12 * listed - 4 * plan.claims;
  plan.room = int(std::min<int64_t>({left / 8 * 256 / 273, 16 * SplitRow::kThreads, entries}));  // see plan_fourier
  set_shared(plan.room, listed);
  plan.scratch = source_size + target_size;
  plan.grid = dim3(unsigned(std::min({tokens, multiprocessors, std::max<int64_t>(kMostScratch / plan.scratch, 1)})));
  plan.block = threads(SplitRow{});
  return plan;
}

// One row as the real part of a signal.
template <typename T>
struct RealSignal {
  const T* x;
  __device__ __forceinline__ float2 operator[](int i) const { return make_float2(to_float(__ldg(x + i)), 0.0f); }
};

// y + the real part, rounded once; read and added to in two steps, as `store_result` asks for them.
template <typename T>
struct RealResult {
  using Raw = T;
  static constexpr int kReadAtOnce = 4;
  T* y;
  __device__ __forceinline__ T read(int i) const { return y[i]; }
  __device__ __forceinline__ void add(int i, T raw, float2 value) const { y[i] = round_to<T>(to_float(raw) + value.x); }
};

// Tables were checked when they were made; memory that is not theirs stays out of reach whatever they hold.
__device__ __forceinline__ int inside(int number, int count) {
  return static_cast<int>(min(static_cast<unsigned>(number), static_cast<unsigned>(count - 1)));
}

// What a row's slot says.
struct Adapter {
  const float* spectrum;   // [n]
  const int *rows, *cols;  // [n], bins of the target and of the source
  float scale;
  __device__ __forceinline__ Adapter(const ManyArguments& args, int slot)
      : spectrum(args.spectra + int64_t{args.n} * inside(args.row_spectrum[slot], args.spectrum_count)),
        rows(args.places + 2 * int64_t{args.n} * inside(args.place[slot], args.place_count)),
        cols(rows + args.n),
        scale(args.inverse * args.scaling[slot]) {}
};

// Shared memory behind the buffer.
struct List {
  float2* products;  // [args.listed]
  int* places;       // [args.listed], in the target; -1: had its turn
  int* claims;       // [args.claims]
  __device__ __forceinline__ List(const ManyArguments& args, float4* shared_memory)
      : products(reinterpret_cast<float2*>(shared_memory) + args.buffer),
        places(reinterpret_cast<int*>(products + args.listed)),
        claims(places + args.listed) {}
};

// From a whole buffer to a whole buffer; they are one unless signals are split. An entry of the list is one thread's.
// In a turn, the claims of places are higher than in the turn before, and those of lower k than those of higher k:
// nothing is cleared in between.
template <typename Row, typename Buffer>
__device__ __forceinline__ void mix_places(const ManyArguments& args, const Adapter& adapter, const Buffer& from,
                                           const Buffer& to, const List& list) {
  const Transform &source = args.transform[0], &target = args.transform[1];
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
#pragma unroll 1
  for (int start = 0; start < args.n; start += args.listed) {  // once, unless signals are split
    const int count = min(args.n - start, args.listed);
    int left = 0;  // of this thread
#pragma unroll 1
    for (int first = thread; first < count; first += kPlacesAtOnce * threads) {
      int u[kPlacesAtOnce], v[kPlacesAtOnce];
      float c[kPlacesAtOnce];
#pragma unroll
      for (int b = 0; b < kPlacesAtOnce; ++b) {
        const int k = start + min(first + b * threads, count - 1);
        u[b] = inside(__ldg(adapter.rows + k), target.length);
        v[b] = inside(__ldg(adapter.cols + k), source.length);
        c[b] = adapter.scale * __ldg(adapter.spectrum + k);
      }
      int place[kPlacesAtOnce];
#pragma unroll
      for (int b = 0; b < kPlacesAtOnce; ++b) {
        v[b] = __ldg(source.position + v[b]), place[b] = __ldg(target.position + u[b]);
      }
#pragma unroll
      for (int b = 0; b < kPlacesAtOnce; ++b) {
        const int i = first + b * threads;
        if (i >= count) break;
        const float2 bin = from[v[b]];
        float2 product = make_float2(c[b] * bin.x, c[b] * bin.y);
        if (target.chirp) product = times(product, __ldg(target.table + target.chirp + u[b]));
        list.products[i] = product;
        list.places[i] = place[b];
        ++left;
      }
    }
    if (!Row::kSplit) __syncthreads();  // all of the source has been read
    if (start == 0) {
      for (int k = thread; k < target.size; k += threads) to[k] = make_float2(0.0f, 0.0f);
    }
    for (int i = thread; i < args.claims; i += threads) list.claims[i] = 0;
#pragma unroll 1
    for (int highest = count; __syncthreads_or(left > 0); highest += count) {  // at most count^2, below 2^31
      const auto for_pending = [&](auto take) {
        if (left == 0) return;
#pragma unroll 1
        for (int i = thread; i < count; i += threads) {
          if (const int place = list.places[i]; place >= 0) take(i, place, list.claims + (place & (args.claims - 1)));
        }
      };
      for_pending([&](int i, int, int* claim) { atomicMax(claim, highest - i); });
      __syncthreads();
      for_pending([&](int i, int place, const int* claim) {
        if (*claim != highest - i) return;
        to[place] = plus(to[place], list.products[i]);
        list.places[i] = -1;
        --left;
      });
    }
  }
}

// Floor, for each row of elements of e bytes: e (in + 2 out) bytes, and 12 for each place, of which 4 come from memory
// where no other row has the adapter: places are most often the same for all. From L2 or L1: 12 bytes of tables for
// each unit of length. Operations: 5 L log2 L for each transform, 3 for a place. 4096 by 4096 in bfloat16 with 1000
// places moves 24 KiB and some 352 KiB in shared memory as a pair of rows does in fourierft.cuh, and waits for the same
// instructions: 400 for a butterfly of 16 numbers; beside these some 60 for a place, and two barriers for a turn.
//
// Occupancy: up to 96 registers for each of 640 threads, or two blocks of 256 on a multiprocessor, which at 4096
// features have 62 KiB of shared memory each. With 80 for 768 threads, sm_100 spills.
template <typename T, typename Row>
__global__ void __launch_bounds__(Row::kThreads) fourier_many_kernel(const __grid_constant__ ManyArguments args) {
  extern __shared__ float4 shared_memory[];
  const auto buffer_of = [&](int which) {
    const Tile tile{reinterpret_cast<float2*>(shared_memory)};
    if constexpr (Row::kSplit) {
      const int sizes[2] = {args.transform[0].size, args.transform[1].size};
      float2* scratch = args.scratch + static_cast<int64_t>(blockIdx.x) * (int64_t{sizes[0]} + sizes[1]);
      return Scratch{scratch + (which ? sizes[0] : 0), tile, args.room};
    } else {
      return tile;
    }
  };
  unsigned position = blockIdx.x;
  // Looked up again where they are needed: over a transform there are no registers to keep them in.
  const auto slot = [&] { return args.slot_numbers[position]; };
  const auto row = [&] { return args.row_numbers[position]; };
  do {
    if (slot() < 0 || slot() >= args.slots || row() < 0 || row() >= args.tokens) continue;
    if (args.row_spectrum[slot()] == -1) continue;
    // Coefficients come nearer while x is transformed.
    const float* const spectrum = Adapter(args, slot()).spectrum;
    for (unsigned k = 32 * threadIdx.x; k < static_cast<unsigned>(args.n); k += 32 * blockDim.x) prefetch(spectrum + k);

    // One loop, because each transform's code is long.
#pragma unroll 1
    for (int step = 0; step < 2; ++step) {
      const Transform& transform = args.transform[step];
      const auto buffer = buffer_of(step);
      if (step == 0) {
        load_signal(RealSignal<T>{static_cast<const T*>(args.x) + row() * args.x_row_stride}, transform, buffer);
        __syncthreads();
      } else {
        const List list(args, shared_memory);
        mix_places<Row>(args, Adapter(args, slot()), buffer_of(0), buffer, list);  // ends with a barrier
      }
      run_transform(transform, step == 0, buffer);
    }
    store_result(RealResult<T>{static_cast<T*>(args.y) + row() * args.y_row_stride}, args.transform[1], buffer_of(1));
    if (Row::kSplit) __syncthreads();  // the next row comes over this one
  } while (Row::kSplit && (position += gridDim.x) < static_cast<unsigned>(args.tokens));
}

}  // namespace fastpeft::fourier
