// Squared norms of rows and columns of float32.
//
// A sum is taken in blocks of 16 float terms, and over the blocks in double: its error is that of
// 16 terms however long the channel. Lanes, blocks and tree are fixed, hence the same bits for any
// number of threads and any instruction set.
#pragma once

#include <cstdint>

namespace lowrank::cpu {

constexpr int64_t kBlock = 16;
constexpr int kLanes = 16;

// Element j of each row goes to lane j % 16; rows are `stride` apart.
void row_square_sums(const float* x, int64_t stride, float* sums, int64_t rows, int64_t cols);

// Down the columns the caller walks, in blocks of 16 rows: squares into a block, blocks into sums.
void accumulate_squares(const float* x, float* block, int64_t count);
void accumulate(const float* block, double* sums, int64_t count);

}  // namespace lowrank::cpu
