// Adjacent integers of 8 or 16 bits as such of 32, and back. A loop over both has half as wide
// vectors as one over 32 bits alone, so what is computed is computed before or after.
#pragma once

#include <cstdint>

namespace lowrank::cpu {

template <typename From, typename To>
[[gnu::always_inline]] inline void resize(const From* __restrict__ from, To* __restrict__ to,
                                          int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

}  // namespace lowrank::cpu
