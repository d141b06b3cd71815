// Adjacent elements of any dtype as float32, in accesses of up to 16 bytes.
#pragma once

#include "arguments.h"
#include "rules/convert.h"

namespace lowrank::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return from_bfloat16(x.bits); }
__device__ __forceinline__ float to_float(Float16 x) { return from_float16(x.bits); }
__device__ __forceinline__ void assign(float& to, float x) { to = x; }
__device__ __forceinline__ void assign(BFloat16& to, float x) { to.bits = to_bfloat16(x); }
__device__ __forceinline__ void assign(Float16& to, float x) { to.bits = to_float16(x); }

// Calls f with a value of the type that stands for the dtype.
template <typename F>
void visit(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T) < 16 ? kWidth * sizeof(T) : 16) Pack {
  T values[kWidth];
};

template <int kWidth, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[kWidth]) {
  const auto pack = *reinterpret_cast<const Pack<T, kWidth>*>(from);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to[i] = to_float(pack.values[i]);
}

template <int kWidth, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[kWidth]) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) assign(pack.values[i], from[i]);
  *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
}

inline bool is_aligned(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

// Whether each row of the matrix can be read in packs.
inline bool has_packs(const Matrices& matrices, std::size_t matrix, int width) {
  return is_aligned(matrices.data[matrix]) && matrices.stride % width == 0;
}

}  // namespace lowrank::cuda
