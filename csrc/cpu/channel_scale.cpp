#include <cmath>

#include "cpu/passes.h"
#include "cpu/split.h"
#include "rules/channel.h"

namespace lowrank::cpu {
namespace {

void scale(const ChannelScale& p, std::size_t matrix) {
  float* factor = p.factor[matrix];
  double norm_sq = 0.0;
  double ordinary_sq = 0.0;
  for (int64_t i = 0; i < p.group.rows; ++i) {
    const ChannelFactor out = channel_factor(p.direction_sq[matrix][i], p.projected_sq[matrix][i],
                                             p.residual_sq[matrix][i]);
    factor[i] = out.phi;
    norm_sq += out.scaled_sq;
    ordinary_sq += out.ordinary_sq;
  }
  float& limiter_norm = *p.limiter_norm[matrix];
  const Limit limiter = limit(static_cast<float>(std::sqrt(norm_sq)), limiter_norm,
                              static_cast<float>(std::sqrt(ordinary_sq)));
  limiter_norm = limiter.stored_norm;
  for (int64_t i = 0; i < p.group.rows; ++i) factor[i] *= limiter.factor;
}

}  // namespace

void channel_scale(const ChannelScale& p, int threads) {
  threads = useful_threads(static_cast<int64_t>(p.group.count) * p.group.rows, threads);
  split(p.group.count, 1, 1, threads,
        [&](std::size_t matrix, int64_t, int64_t) { scale(p, matrix); });
}

}  // namespace lowrank::cpu
