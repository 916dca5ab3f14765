// Tiny kernels with one mistake each, and some without: what cuda_runtime.h must notice, and must do. Called by
// tests/test_cuda_emulator.py as `faults name seed`; prints the 64 results of each of two blocks of 64 threads.
#include <cuda_runtime.h>

#include <iostream>
#include <map>
#include <string>

namespace faults {

constexpr unsigned kThreads = 64, kBlocks = 2;
__shared__ float shared_memory[1024];

__device__ unsigned place() { return blockIdx.x * kThreads + threadIdx.x; }

// out[i] = in[63 - i], through shared memory.
template <bool kBarrier, bool kWriteAll, int kShift>
void reverse_kernel(const float* in, float* out) {
  extern __shared__ float shared_memory[];
  const unsigned i = threadIdx.x;
  if (kWriteAll || i != 5) shared_memory[i] = in[i];
  if (kBarrier) __syncthreads();
  out[place()] = shared_memory[kThreads - 1 - i + kShift];
}

// The same through static shared memory; block 1 writes nothing, and must not find what block 0 has left.
template <int kShift>
void static_kernel(const float* in, float* out) {
  __shared__ float tile[kThreads];
  const unsigned i = threadIdx.x;
  if (blockIdx.x == 0) tile[i] = in[i];
  __syncthreads();
  out[place()] = tile[kThreads - 1 - i + kShift];
}

// Lane 0 waits for its warp, the others for the whole block.
void diverging_kernel(const float*, float*) {
  if (threadIdx.x == 0) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Every thread waits, but not at the same place.
void split_kernel(const float*, float*) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// Threads of the second half have left when the others wait, which is allowed.
void early_exit_kernel(const float* in, float* out) {
  if (threadIdx.x >= kThreads / 2) return;
  __syncthreads();
  out[place()] = in[threadIdx.x];
}

// Every thread exchanges with the lane whose number differs in the last two bits, and then takes from the next lane and
// the first.
void shuffle_kernel(const float* in, float* out) {
  const float across = __shfl_xor_sync(~0u, in[threadIdx.x], 3);
  out[place()] = __shfl_down_sync(~0u, across, 1) + __shfl_sync(~0u, across, 0);
}

// Thread 5 has left when its neighbour asks for its value.
void absent_lane_kernel(const float* in, float* out) {
  if (threadIdx.x == 5) return;
  out[place()] = __shfl_xor_sync(~0u, in[threadIdx.x], 1);
}

void partial_mask_kernel(const float* in, float* out) { out[place()] = __shfl_xor_sync(0xffff, in[threadIdx.x], 1); }

// Even lanes vote yes, and the last warp's all do: ballot, any and all, and whether any votes for what nobody does.
void vote_kernel(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  const bool yes = i / 32 == 1 || static_cast<int>(in[i]) % 2 == 0;
  const unsigned votes = __ballot_sync(~0u, yes);
  out[place()] = static_cast<float>((votes & 255) + (__any_sync(~0u, yes) ? 256 : 0) +
                                    (__all_sync(~0u, yes) ? 512 : 0) + (__any_sync(~0u, i > 99) ? 1024 : 0));
}

// Whether any thread asks for more than it has, of those that are still there.
void block_vote_kernel(const float* in, float* out) {
  const int i = static_cast<int>(threadIdx.x);
  if (i == 63) return;
  float turns = 0.0f;
  while (__syncthreads_or(in[i] > turns)) turns += 1.0f;
  out[place()] = turns;
}

// Sums over the block of i, in four types, how many came before, the last of them 63, and the highest of i ^ 5.
void atomic_kernel(const float* in, float* out) {
  __shared__ float sum;
  __shared__ double wide_sum;
  __shared__ int count, highest;
  __shared__ unsigned last;
  const unsigned i = threadIdx.x;
  if (i == 0) sum = 0.0f, wide_sum = 0.0, count = 0, highest = -1, last = 0;
  __syncthreads();
  atomicAdd(&sum, in[i]);
  atomicAdd(&wide_sum, in[i]);
  const int before = atomicAdd(&count, 1);
  if (before == kThreads - 1) atomicAdd(&last, static_cast<unsigned>(before));
  atomicMax(&highest, static_cast<int>(i ^ 5));
  __syncthreads();
  const float results[] = {sum, static_cast<float>(wide_sum), static_cast<float>(count), static_cast<float>(last),
                           static_cast<float>(highest)};
  out[place()] = results[i % 5];
}

void absent_voter_kernel(const float* in, float* out) {
  if (threadIdx.x == 5) return;
  out[place()] = static_cast<float>(__ballot_sync(~0u, in[threadIdx.x] > 3));
}

}  // namespace faults

int main(int argc, char** argv) {
  using namespace faults;
  if (argc != 3) return 2;
  const std::string name = argv[1];
  const std::map<std::string, void (*)(const float*, float*)> kernels = {
      {"none", reverse_kernel<true, true, 0>},
      {"missing_barrier", reverse_kernel<false, true, 0>},
      {"unwritten_shared", reverse_kernel<true, false, 0>},
      {"beyond_shared", reverse_kernel<true, true, 1>},
      {"static", static_kernel<0>},
      {"beyond_static", static_kernel<1>},
      {"beyond_global", reverse_kernel<true, true, 0>},  // of an input that is too short
      {"diverging_barriers", diverging_kernel},
      {"split_barrier", split_kernel},
      {"early_exit", early_exit_kernel},
      {"shuffle", shuffle_kernel},
      {"vote", vote_kernel},
      {"block_vote", block_vote_kernel},
      {"atomic", atomic_kernel},
      {"absent_lane", absent_lane_kernel},
      {"absent_voter", absent_voter_kernel},
      {"partial_mask", partial_mask_kernel},
  };
  const auto kernel = kernels.at(name);
  const size_t in_count = name == "beyond_global" ? kThreads - 1 : kThreads;
  const std::unique_ptr<float[]> in(new float[in_count]);
  std::vector<float> out(kBlocks * kThreads, -1.0f);
  std::iota(in.get(), in.get() + in_count, 0.0f);
  cuda_host::launch(kBlocks, kThreads, std::as_writable_bytes(std::span(shared_memory)), kThreads * sizeof(float),
                    static_cast<unsigned>(std::stoul(argv[2])), [&] { kernel(in.get(), out.data()); });
  for (float value : out) std::cout << value << " ";
  std::cout << "\n";
}
