// bfloat16 and float16, held as bits, to and from float32: nearest, ties to even; subnormals, Inf
// and NaN are kept. Integer operations and selects only, so that the CPU loops vectorize, and no
// subnormal float32 is an operand, so that flushing those to zero changes nothing.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules/host_device.h"

namespace lowrank {

LOWRANK_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

LOWRANK_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

constexpr uint32_t kFloatInf = 0x7f800000;

LOWRANK_HOST_DEVICE float from_bfloat16(uint16_t half) { return float_of(uint32_t{half} << 16); }

// A carry out of the mantissa raises the exponent, up to Inf, which is what rounding asks for. In
// 32 bits for loops over such alone, whose vectors are the widest.
LOWRANK_HOST_DEVICE uint32_t wide_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  const bool nan = (bits & 0x7fffffff) > kFloatInf;
  return (nan ? bits | 0x400000 : rounded) >> 16;
}

LOWRANK_HOST_DEVICE uint16_t to_bfloat16(float value) {
  return static_cast<uint16_t>(wide_bfloat16(value));
}

// One unit in the last place of 0.5f is 2^-24, which is the unit of float16's subnormals: adding
// 0.5 moves such a number into the low bits, rounded, and subtracting it brings it back.
constexpr uint32_t kHalfBits = 0x3f000000;
constexpr uint32_t kExponentShift = (127 - 15) << 23;

LOWRANK_HOST_DEVICE float from_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t subnormal = bits_of(float_of(kHalfBits | magnitude) - 0.5f);
  const uint32_t normal = (magnitude << 13) + kExponentShift;
  const uint32_t special = magnitude << 13 | kFloatInf;
  const uint32_t finite = magnitude < 0x0400 ? subnormal : normal;
  return float_of(sign | (magnitude < 0x7c00 ? finite : special));
}

LOWRANK_HOST_DEVICE uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - kHalfBits;
  const uint32_t normal = (magnitude - kExponentShift + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t nan = 0x7e00 | (magnitude >> 13 & 0x3ff);
  const uint32_t special = magnitude > kFloatInf ? nan : 0x7c00;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;               // 2^-14
  return static_cast<uint16_t>(sign | (magnitude < 0x47800000 ? finite : special));  // 2^16
}

}  // namespace lowrank
