#pragma once

#include "arguments.h"

namespace lowrank::cuda {

// Each enqueues on `stream` of `device` and returns at once, with the caller's device as it was: a
// text if that failed, else null. The bits depend on the matrix and its alignment, not on the
// group.
const char* adam_moments(const AdamMoments& pass, int device, std::uintptr_t stream);
// Of moments that are not float32; `adam_moments` goes on to it.
const char* low_bit_moments(const AdamMoments& pass, int device, std::uintptr_t stream);
const char* residual_sums(const ResidualSums& pass, int device, std::uintptr_t stream);
const char* channel_scale(const ChannelScale& pass, int device, std::uintptr_t stream);
const char* combine(const Combine& pass, int device, std::uintptr_t stream);
const char* update(const Update& pass, int device, std::uintptr_t stream);

}  // namespace lowrank::cuda
