#pragma once

#include "adam_arrays.h"
#include "rules/adam.h"

namespace lowrank::cpu {

void adam_moments(const AdamArrays& arrays, const AdamRule& rule, int threads);

// The instruction set that the loops run with on this machine.
const char* cpu_capability();

}  // namespace lowrank::cpu
