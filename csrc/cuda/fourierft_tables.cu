// Tables of FourierFT's transforms on the device, built on first use and kept.
#include <algorithm>
#include <list>
#include <mutex>

#include "cuda/fourierft_tables.h"
#include "cuda/tensor.h"

namespace fastpeft::fourier {
namespace {

struct DeviceTables {
  int device, length;
  Transform transform;
  void* memory;
  bool captured;  // a CUDA graph has these pointers
};

// Copies a length's tables to the current device; waits for that.
DeviceTables upload(int device, int length, cudaStream_t stream) {
  Tables tables = make_tables(length);
  const size_t table_bytes = tables.table.size() * sizeof(float2);
  const size_t position_bytes = tables.position.size() * sizeof(int);
  void* memory = nullptr;
  STD_CUDA_CHECK(cudaMalloc(&memory, table_bytes + position_bytes));
  int* position = reinterpret_cast<int*>(static_cast<char*>(memory) + table_bytes);
  cudaError_t error = cudaMemcpyAsync(memory, tables.table.data(), table_bytes, cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(position, tables.position.data(), position_bytes, cudaMemcpyHostToDevice, stream);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) cudaFree(memory);
  STD_CUDA_CHECK(error);
  tables.transform.table = static_cast<const float2*>(memory);
  tables.transform.position = position;
  return {device, length, tables.transform, memory, false};
}

}  // namespace

// Nothing is uploaded while a CUDA graph is captured, and what graphs have is never freed.
Transform transform_of(int64_t length, int device, cudaStream_t stream) {
  constexpr size_t kKept = 64;  // some 20 bytes for each unit of length
  static std::mutex mutex;
  static auto* const known = new std::list<DeviceTables>;  // most recently used first; CUDA ends before destructors run
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  const bool capturing = capture != cudaStreamCaptureStatusNone;
  const std::lock_guard lock(mutex);
  const auto found = std::find_if(known->begin(), known->end(), [&](const DeviceTables& tables) {
    return tables.device == device && tables.length == length;
  });
  if (found != known->end()) {
    known->splice(known->begin(), *known, found);
  } else {
    STD_TORCH_CHECK(!capturing, "fourier: the first call with ", length,
                    " features on a GPU has tables to upload: call it once before the CUDA graph is captured");
    known->push_front(upload(device, static_cast<int>(length), stream));
    auto oldest = known->end();
    while (known->size() > kKept && --oldest != known->begin()) {
      if (oldest->captured) continue;
      STD_CUDA_CHECK(cudaFree(oldest->memory));  // waits for kernels that read it
      oldest = known->erase(oldest);
    }
  }
  known->front().captured |= capturing;
  return known->front().transform;
}

}  // namespace fastpeft::fourier
