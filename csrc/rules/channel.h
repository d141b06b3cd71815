// Fira's factor of a channel and its norm-growth limiter; `reference.channel_scale` defines them.
#pragma once

#include <cfloat>
#include <cmath>

#include "rules/host_device.h"

namespace lowrank {

constexpr float kLimiterGrowth = 1.01f;
constexpr float kNormEps = 1e-8f;
constexpr float kStorableShare = 0x1p-6f;
constexpr float kNothingStored = -1.0f;

// |e|^2 = |g|^2 - share |r|^2 with share = 2 kappa - kappa^2. Rounding can leave a channel in the
// span a little below 0; NaN stays, for `channel_factor` to leave the channel out.
LOWRANK_HOST_DEVICE float residual_energy(float grad_sq, float projected_sq, float share) {
  const float energy = grad_sq - share * projected_sq;
  return energy < 0.0f ? 0.0f : energy;
}

// `ordinary_sq` is what |phi e|^2 is compared with: |phi r|^2, at least one entry's ordinary step;
// 0 of a channel that does not move.
struct ChannelFactor {
  float phi;
  float scaled_sq;
  float ordinary_sq;
};

LOWRANK_HOST_DEVICE ChannelFactor channel_factor(float direction_sq, float projected_sq,
                                                 float residual_sq) {
  const float phi = sqrtf(direction_sq) / (sqrtf(projected_sq) + kNormEps);
  const float scaled_sq = phi * phi * residual_sq;
  const bool finite = fabsf(scaled_sq) <= FLT_MAX;
  const float moved_sq = phi * phi * projected_sq;
  const float ordinary_sq = moved_sq > 1.0f && moved_sq <= FLT_MAX ? moved_sq : 1.0f;
  const bool moves = finite && phi > 0.0f;
  return {finite ? phi : 0.0f, finite ? scaled_sq : 0.0f, moves ? ordinary_sq : 0.0f};
}

struct Limit {
  float factor;
  float stored_norm;
};

LOWRANK_HOST_DEVICE Limit limit(float norm, float previous, float ordinary_norm) {
  const float ratio = norm / (previous + kNormEps);
  const float growth = (ratio > kLimiterGrowth ? ratio : kLimiterGrowth) / kLimiterGrowth;
  const float bounded = norm > ordinary_norm ? ordinary_norm / norm : 1.0f;
  const float factor = previous > 0.0f ? 1.0f / growth : previous < 0.0f ? bounded : 1.0f;
  const float limited = factor * norm;
  const bool storable =
      norm > kStorableShare * ordinary_norm && limited > 0.0f && limited <= FLT_MAX;
  const float kept = previous == 0.0f && ordinary_norm > 0.0f ? kNothingStored : previous;
  return {factor, storable ? limited : kept};
}

}  // namespace lowrank
