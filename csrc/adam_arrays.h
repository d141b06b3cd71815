#pragma once

#include <cstdint>

namespace lowrank {

// The float32 arrays of one matrix. All but the sums are dense row-major, rows x cols; the sums
// have an element a channel, and a channel is a row or a column of the matrix.
struct AdamArrays {
  float* projected;
  float* exp_avg;
  float* exp_avg_sq;
  float* direction;
  float* direction_sq;
  float* projected_sq;
  int64_t rows;
  int64_t cols;
  bool channels_are_rows;
};

}  // namespace lowrank
