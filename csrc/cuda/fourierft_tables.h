// Tables of FourierFT's transforms on the device, which all of its operators share.
#pragma once

#include "cuda/fourierft_plan.cuh"

namespace fastpeft::fourier {

// The transform of a length on the current device; the caller has a plan for it. The first call for a length uploads
// its tables and waits for that.
//
// Raises where they would be uploaded while a CUDA graph is captured.
Transform transform_of(int64_t length, int device, cudaStream_t stream);

}  // namespace fastpeft::fourier
