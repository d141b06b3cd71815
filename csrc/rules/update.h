// What moves a weight: the two elementwise halves of operation 3, before and after the product, and
// AdamW. GaLore is phi = 0.
#pragma once

#include "rules/host_device.h"

namespace lowrank {

// B = scale N - rho kappa phi R.
class CombineRule {
 public:
  CombineRule(double scale, double rho_kappa)
      : scale_(static_cast<float>(scale)), rho_kappa_(static_cast<float>(rho_kappa)) {}

  LOWRANK_HOST_DEVICE float operator()(float direction, float projected, float phi) const {
    return scale_ * direction - rho_kappa_ * phi * projected;
  }

 private:
  float scale_;
  float rho_kappa_;
};

// W <- (1 - decay) (W - step_size (T + rho phi G)), T the product.
class UpdateRule {
 public:
  UpdateRule(double step_size, double decay, double rho)
      : step_size_(static_cast<float>(step_size)),
        keep_(static_cast<float>(1.0 - decay)),
        rho_(static_cast<float>(rho)) {}

  // A channel that was left out has phi = 0, and 0 * NaN would still be NaN.
  LOWRANK_HOST_DEVICE float operator()(float weight, float product, float grad, float phi) const {
    const float usable = phi != 0.0f ? grad : 0.0f;
    return keep_ * (weight - step_size_ * (product + rho_ * phi * usable));
  }

 private:
  float step_size_;
  float keep_;
  float rho_;
};

// W <- (1 - decay) W - step_size N.
class StepRule {
 public:
  StepRule(double step_size, double decay)
      : step_size_(static_cast<float>(step_size)), keep_(static_cast<float>(1.0 - decay)) {}

  LOWRANK_HOST_DEVICE float operator()(float weight, float direction) const {
    return keep_ * weight - step_size_ * direction;
  }

 private:
  float step_size_;
  float keep_;
};

}  // namespace lowrank
