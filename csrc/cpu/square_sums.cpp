#include "cpu/square_sums.h"

#include <algorithm>

#include "cpu/clones.h"

namespace lowrank::cpu {

LOWRANK_CLONES
void row_square_sums(const float* __restrict__ x, int64_t stride, float* __restrict__ sums,
                     int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row, x += stride) {
    double total[kLanes] = {};
    for (int64_t begin = 0; begin < cols; begin += kBlock * kLanes) {
      const int64_t end = std::min(begin + kBlock * kLanes, cols);
      float lane[kLanes] = {};
      int64_t j = begin;
      for (; j + kLanes <= end; j += kLanes)
        for (int k = 0; k < kLanes; ++k) lane[k] += x[j + k] * x[j + k];
      for (int k = 0; j + k < end; ++k) lane[k] += x[j + k] * x[j + k];
      for (int k = 0; k < kLanes; ++k) total[k] += lane[k];
    }
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int k = 0; k < width; ++k) total[k] += total[k + width];
    sums[row] = static_cast<float>(total[0]);
  }
}

LOWRANK_CLONES
void accumulate_squares(const float* __restrict__ x, float* __restrict__ block, int64_t count) {
  for (int64_t j = 0; j < count; ++j) block[j] += x[j] * x[j];
}

LOWRANK_CLONES
void accumulate(const float* __restrict__ block, double* __restrict__ sums, int64_t count) {
  for (int64_t j = 0; j < count; ++j) sums[j] += block[j];
}

}  // namespace lowrank::cpu
