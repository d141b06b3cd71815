#pragma once

#include "arguments.h"

namespace lowrank::cpu {

// The bits of each depend on the matrix alone, not on threads, instruction set or group.
void adam_moments(const AdamMoments& pass, int threads);
void residual_sums(const ResidualSums& pass, int threads);
void channel_scale(const ChannelScale& pass, int threads);
void combine(const Combine& pass, int threads);
void update(const Update& pass, int threads);
void adamw(const AdamW& pass, int threads);

// The instruction set that the loops run with on this machine.
const char* cpu_capability();

}  // namespace lowrank::cpu
