#pragma once

#include <cuda_runtime_api.h>

#include "adam_arrays.h"
#include "rules/adam.h"

namespace lowrank::cuda {

// Enqueues on `stream` of `device` and returns at once; the caller's device is left as it was.
cudaError_t adam_moments(const AdamArrays& arrays, const AdamRule& rule, int device,
                         cudaStream_t stream);

}  // namespace lowrank::cuda
