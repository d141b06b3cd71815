// What marks the rules: functions that the CPU and the CUDA half compile from the same source.
#pragma once

#if defined(__CUDACC__)
#define LOWRANK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LOWRANK_HOST_DEVICE inline
#endif
