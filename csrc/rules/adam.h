// Adam's moments and direction for one element: the only place with this arithmetic. The CPU and
// the CUDA half compile this same source, without contraction into FMA, so their elements agree bit
// for bit and what the CPU tests check is what the GPU runs.
#pragma once

#include <cfloat>
#include <cmath>

#include "rules/host_device.h"

namespace lowrank {

struct AdamElement {
  float projected;
  float exp_avg;
  float exp_avg_sq;
  float direction;
};

class AdamRule {
 public:
  // 1 - beta in float32 is wrong in the fifth digit at beta = 0.999, hence double until the end.
  // Dividing once here leaves two multiplications, not two divisions, for each element.
  AdamRule(double beta1, double beta2, double eps, double bias_correction1, double bias_correction2)
      : beta1_(static_cast<float>(beta1)),
        one_minus_beta1_(static_cast<float>(1.0 - beta1)),
        beta2_(static_cast<float>(beta2)),
        one_minus_beta2_(static_cast<float>(1.0 - beta2)),
        eps_(static_cast<float>(eps)),
        inverse_correction1_(static_cast<float>(1.0 / bias_correction1)),
        inverse_correction2_(static_cast<float>(1.0 / bias_correction2)) {}

  // An element whose square is not finite is dropped rather than stored: one NaN or Inf in a moment
  // would stay there for ever. Selects in place of branches, so that the CPU loop vectorizes.
  LOWRANK_HOST_DEVICE AdamElement operator()(float projected, float exp_avg,
                                             float exp_avg_sq) const {
    const bool finite = projected * projected <= FLT_MAX;
    const float r = finite ? projected : 0.0f;
    const float m = beta1_ * exp_avg + one_minus_beta1_ * r;
    const float v = beta2_ * exp_avg_sq + one_minus_beta2_ * (r * r);
    const float n = (m * inverse_correction1_) / (sqrtf(v * inverse_correction2_) + eps_);
    return {r, finite ? m : exp_avg, finite ? v : exp_avg_sq, finite ? n : 0.0f};
  }

 private:
  float beta1_;
  float one_minus_beta1_;
  float beta2_;
  float one_minus_beta2_;
  float eps_;
  float inverse_correction1_;
  float inverse_correction2_;
};

}  // namespace lowrank
