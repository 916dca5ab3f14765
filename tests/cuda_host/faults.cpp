// Tiny kernels with one mistake each, and one without: what cuda_runtime.h must notice. Called by
// tests/test_cuda_boft.py as `faults name seed`; prints the 64 results of one block of 64 threads.
#include <cuda_runtime.h>

#include <iostream>
#include <map>
#include <string>

namespace {

constexpr unsigned kThreads = 64;
float shared_memory[1024];

// out[i] = in[63 - i], through shared memory.
template <bool kBarrier, bool kWriteAll, int kShift>
void reverse_kernel(const float* in, float* out) {
  extern __shared__ float shared_memory[];
  const unsigned i = threadIdx.x;
  if (kWriteAll || i != 5) shared_memory[i] = in[i];
  if (kBarrier) __syncthreads();
  out[i] = shared_memory[kThreads - 1 - i + kShift];
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
  out[threadIdx.x] = in[threadIdx.x];
}

// Every thread exchanges with the lane whose number differs in the last two bits, and then takes from the next lane and
// the first.
void shuffle_kernel(const float* in, float* out) {
  const float across = __shfl_xor_sync(~0u, in[threadIdx.x], 3);
  out[threadIdx.x] = __shfl_down_sync(~0u, across, 1) + __shfl_sync(~0u, across, 0);
}

// Thread 5 has left when its neighbour asks for its value.
void absent_lane_kernel(const float* in, float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, in[threadIdx.x], 1);
}

void partial_mask_kernel(const float* in, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffff, in[threadIdx.x], 1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string name = argv[1];
  const std::map<std::string, void (*)(const float*, float*)> kernels = {
      {"none", reverse_kernel<true, true, 0>},
      {"missing_barrier", reverse_kernel<false, true, 0>},
      {"unwritten_shared", reverse_kernel<true, false, 0>},
      {"beyond_shared", reverse_kernel<true, true, 1>},
      {"beyond_global", reverse_kernel<true, true, 0>},  // of an input that is too short
      {"diverging_barriers", diverging_kernel},
      {"split_barrier", split_kernel},
      {"early_exit", early_exit_kernel},
      {"shuffle", shuffle_kernel},
      {"absent_lane", absent_lane_kernel},
      {"partial_mask", partial_mask_kernel},
  };
  const auto kernel = kernels.at(name);
  const size_t in_count = name == "beyond_global" ? kThreads - 1 : kThreads;
  const std::unique_ptr<float[]> in(new float[in_count]);
  std::vector<float> out(kThreads, -1.0f);
  std::iota(in.get(), in.get() + in_count, 0.0f);
  cuda_host::launch(1, kThreads, std::as_writable_bytes(std::span(shared_memory)), kThreads * sizeof(float),
                    static_cast<unsigned>(std::stoul(argv[2])), [&] { kernel(in.get(), out.data()); });
  for (float value : out) std::cout << value << " ";
  std::cout << "\n";
}
