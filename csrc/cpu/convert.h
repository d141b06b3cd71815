#pragma once

#include "arguments.h"

namespace lowrank::cpu {

// To and from float32, `count` adjacent elements.
void load(DType dtype, const char* source, float* target, int64_t count);
void store(DType dtype, const float* source, char* target, int64_t count);

}  // namespace lowrank::cpu
