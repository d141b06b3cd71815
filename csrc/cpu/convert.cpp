#include "cpu/convert.h"

#include <algorithm>

#include "cpu/clones.h"
#include "rules/convert.h"

namespace lowrank::cpu {
namespace {

LOWRANK_CLONES
void load_bfloat16(const uint16_t* __restrict__ source, float* __restrict__ target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = from_bfloat16(source[i]);
}

LOWRANK_CLONES
void load_float16(const uint16_t* __restrict__ source, float* __restrict__ target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = from_float16(source[i]);
}

LOWRANK_CLONES
void store_bfloat16(const float* __restrict__ source, uint16_t* __restrict__ target,
                    int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = to_bfloat16(source[i]);
}

LOWRANK_CLONES
void store_float16(const float* __restrict__ source, uint16_t* __restrict__ target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = to_float16(source[i]);
}

}  // namespace

void load(DType dtype, const char* source, float* target, int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      std::copy_n(reinterpret_cast<const float*>(source), count, target);
      break;
    case DType::kBFloat16:
      load_bfloat16(reinterpret_cast<const uint16_t*>(source), target, count);
      break;
    case DType::kFloat16:
      load_float16(reinterpret_cast<const uint16_t*>(source), target, count);
      break;
  }
}

void store(DType dtype, const float* source, char* target, int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      std::copy_n(source, count, reinterpret_cast<float*>(target));
      break;
    case DType::kBFloat16:
      store_bfloat16(source, reinterpret_cast<uint16_t*>(target), count);
      break;
    case DType::kFloat16:
      store_float16(source, reinterpret_cast<uint16_t*>(target), count);
      break;
  }
}

}  // namespace lowrank::cpu
