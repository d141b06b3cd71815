// Adam's step of moments in any format. Of M and V there is no float32 copy but in L1.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arguments.h"

namespace lowrank::cpu {

// Adjacent elements, and columns of rows, that are taken at a time at most where moments are not
// float32.
constexpr int64_t kStretch = kElementsAScale;
constexpr int64_t kColumns = 64;

// Whose noise the first element has. From one to the next either the channel or the place goes up.
struct Draws {
  int64_t channel, place;
  bool up_channels;
};

// Elements from `begin` of the matrix on. R arrives as `projected`, N leaves as `direction`:
// float32, of these elements. Codes are a group, whose scales are the matrix' number `scale`.
void step_stretch(const AdamRule& rule, const Moments& moments, std::size_t matrix, int64_t begin,
                  int64_t scale, const Draws& draws, float* projected, float* direction,
                  int64_t count);

// Codes: at most kChannelsAScale rows, `stride` apart, whose columns have scales from number
// `scale` on. Channels go up from row to row.
void step_columns(const AdamRule& rule, const Moments& moments, std::size_t matrix, int64_t begin,
                  int64_t scale, const Draws& draws, float* projected, float* direction,
                  int64_t rows, int64_t cols, int64_t stride);

}  // namespace lowrank::cpu
