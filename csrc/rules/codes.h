// Moments in 8 bits; ops/codes.py defines them. Products, a division, a root and integers, none of
// which is followed by an addition, so that a backend which contracts has the same bits, too.
#pragma once

#include <cmath>
#include <cstdint>

#include "rules/host_device.h"

namespace lowrank {

// Elements that share a scale: channels of one direction of a projected parameter, and elements of
// another one.
constexpr int64_t kChannelsAScale = 64;
constexpr int64_t kElementsAScale = 256;

// The last may be short.
LOWRANK_HOST_DEVICE int64_t groups_of(int64_t size, int64_t a_group) {
  return (size + a_group - 1) / a_group;
}

constexpr float kSignedCodes = 127.0f;
constexpr float kUnsignedCodes = 255.0f;

// Codes are rounded as multiples of 2^-16, by what is added before the lower bits are dropped.
constexpr float kCodeUnit = 65536.0f;
constexpr uint32_t kNearestCode = 0x8000;

// M, by the scale of its group.
LOWRANK_HOST_DEVICE float decode_average(int32_t code, float scale) {
  const float share = static_cast<float>(code) * (1.0f / kSignedCodes);
  return share * fabsf(share) * scale;
}

// The root of V.
LOWRANK_HOST_DEVICE float decode_root(int32_t code, float scale) {
  const float share = static_cast<float>(code) * (1.0f / kUnsignedCodes);
  return share * share * scale;
}

// What the elements of a group are divided by: its largest, which is its scale.
LOWRANK_HOST_DEVICE float code_divisor(float scale) { return scale > 0.0f ? scale : 1.0f; }

LOWRANK_HOST_DEVICE int32_t encode_average(float value, float divisor) {
  const float place = sqrtf(fabsf(value) / divisor) * (kSignedCodes * kCodeUnit);
  const int32_t code = (static_cast<int32_t>(place) + static_cast<int32_t>(kNearestCode)) >> 16;
  return value < 0.0f ? -code : code;
}

// `bits`, below 2^16, decide how it is rounded. A root above 0 stays above it.
LOWRANK_HOST_DEVICE int32_t encode_root(float root, float divisor, uint32_t bits) {
  const float place = sqrtf(root / divisor) * (kUnsignedCodes * kCodeUnit);
  const int32_t code = (static_cast<int32_t>(place) + static_cast<int32_t>(bits)) >> 16;
  const int32_t kept = code > 1 ? code : 1;
  return root > 0.0f ? kept : 0;
}

}  // namespace lowrank
