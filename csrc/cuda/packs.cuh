// Adjacent elements of any dtype as float32, in accesses of up to 16 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

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

// What one access moves of a pack of kBytes.
template <std::size_t kBytes>
using Access = std::conditional_t<
    kBytes == 2, uint16_t,
    std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>>;

// In PTX where nvcc would take a vector apart: it forgets how pointers in a loop are aligned, and
// stores element by element.
template <typename T>
__device__ __forceinline__ void store_access(T* to, T value) {
  *to = value;
}
__device__ __forceinline__ void store_access(uint2* to, uint2 value) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x),
               "r"(value.y)
               : "memory");
}
__device__ __forceinline__ void store_access(uint4* to, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

template <typename T, int kWidth>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, kWidth>& pack) {
  using Type = Access<sizeof(pack)>;
  constexpr int kAccesses = sizeof(pack) / sizeof(Type);
  Type parts[kAccesses];
  memcpy(parts, &pack, sizeof(pack));
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) store_access(reinterpret_cast<Type*>(to) + i, parts[i]);
}

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
  store_pack(to, pack);
}

inline bool is_aligned(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

// Whether each row of the matrix can be read in packs.
inline bool has_packs(const Matrices& matrices, std::size_t matrix, int width) {
  return is_aligned(matrices.data[matrix]) && matrices.stride % width == 0;
}

}  // namespace lowrank::cuda
