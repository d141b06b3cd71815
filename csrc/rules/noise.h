// Random bits from a counter, and stochastic rounding to bfloat16 by them: ops/noise.py has both.
#pragma once

#include "rules/convert.h"

namespace lowrank {

// A bijection that spreads each bit over all others: lowbias32, C. Wellons, "Prospecting for hash
// functions".
LOWRANK_HOST_DEVICE uint32_t mix(uint32_t value) {
  value = (value ^ value >> 16) * 0x7feb352du;
  value = (value ^ value >> 15) * 0x846ca68bu;
  return value ^ value >> 16;
}

// `random` is below 2^16; what is finite stays so, and Inf and NaN stay.
LOWRANK_HOST_DEVICE uint32_t wide_bfloat16(float value, uint32_t random) {
  const uint32_t bits = bits_of(value);
  const bool finite = (bits & kFloatInf) != kFloatInf;
  const uint32_t rounded = (bits + random) >> 16;
  const bool beyond = (rounded & 0x7fff) == kFloatInf >> 16;
  return finite ? rounded - beyond : wide_bfloat16(value);
}

// Of a channel, which many elements have in common.
class ChannelNoise {
 public:
  LOWRANK_HOST_DEVICE explicit ChannelNoise(uint32_t key) : key_(key) {}

  LOWRANK_HOST_DEVICE uint32_t operator()(uint32_t place) const {
    return mix(key_ + place) & 0xffff;
  }

 private:
  uint32_t key_;
};

// One matrix at one step; channels and places wrap at 2^32 as the definition's counters do.
class NoiseRule {
 public:
  NoiseRule() = default;
  LOWRANK_HOST_DEVICE NoiseRule(uint32_t salt, uint32_t step) : key_(mix(salt + mix(step))) {}

  // 16 random bits.
  LOWRANK_HOST_DEVICE uint32_t operator()(uint32_t channel, uint32_t place) const {
    return of_channel(channel)(place);
  }

  LOWRANK_HOST_DEVICE ChannelNoise of_channel(uint32_t channel) const {
    return ChannelNoise(mix(key_ + channel));
  }

  LOWRANK_HOST_DEVICE uint16_t round(float value, uint32_t channel, uint32_t place) const {
    return static_cast<uint16_t>(wide_bfloat16(value, (*this)(channel, place)));
  }

 private:
  uint32_t key_ = 0;
};

}  // namespace lowrank
