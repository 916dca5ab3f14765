#pragma once

#include <cuda_runtime.h>

namespace fastpeft {

// Asks for the line of an address without waiting for it.
__device__ __forceinline__ void prefetch(const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  static_cast<void>(*static_cast<const volatile char*>(address));
#endif
}

}  // namespace fastpeft
