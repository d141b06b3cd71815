#include <algorithm>
#include <vector>

#include "cpu/convert.h"
#include "cpu/passes.h"
#include "cpu/split.h"
#include "cpu/square_sums.h"
#include "rules/channel.h"

namespace lowrank::cpu {
namespace {

// The sums and one converted row of a tile of columns stay in L1.
constexpr int64_t kChunk = 1024;

// The row as float32, converted into `buffer` where it is not.
const float* as_float(const ResidualSums& p, std::size_t matrix, int64_t row, int64_t col,
                      float* buffer, int64_t count) {
  const char* data = p.matrix.at(matrix, row, col);
  if (p.matrix.dtype == DType::kFloat32) return reinterpret_cast<const float*>(data);
  load(p.matrix.dtype, data, buffer, count);
  return buffer;
}

void sum_rows(const ResidualSums& p, std::size_t matrix, int64_t begin, int64_t end) {
  const int64_t cols = p.group.cols;
  std::vector<float> buffer(p.matrix.dtype == DType::kFloat32 ? 0 : cols);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = as_float(p, matrix, row, 0, buffer.data(), cols);
    row_square_sums(x, cols, p.residual_sq[matrix] + row, 1, cols);
  }
}

void sum_columns(const ResidualSums& p, std::size_t matrix, int64_t begin, int64_t end) {
  const int64_t rows = p.group.rows;
  for (int64_t col = begin; col < end; col += kChunk) {
    const int64_t count = std::min(kChunk, end - col);
    float buffer[kChunk];
    double sums[kChunk] = {};
    for (int64_t first = 0; first < rows; first += kBlock) {
      float block[kChunk] = {};
      for (int64_t row = first; row < std::min(first + kBlock, rows); ++row)
        accumulate_squares(as_float(p, matrix, row, col, buffer, count), block, count);
      accumulate(block, sums, count);
    }
    std::copy_n(sums, count, p.residual_sq[matrix] + col);
  }
}

}  // namespace

void residual_sums(const ResidualSums& p, int threads) {
  const Group& group = p.group;
  const int64_t grain = group.channels_are_rows ? 1 : kLanes;
  threads = useful_threads(static_cast<int64_t>(group.count) * group.elements(), threads);
  split(group.count, group.channels(), grain, threads,
        [&](std::size_t matrix, int64_t begin, int64_t end) {
          group.channels_are_rows ? sum_rows(p, matrix, begin, end)
                                  : sum_columns(p, matrix, begin, end);
          if (p.projected_sq.empty()) return;
          float* residual_sq = p.residual_sq[matrix];
          for (int64_t i = begin; i < end; ++i)
            residual_sq[i] = residual_energy(residual_sq[i], p.projected_sq[matrix][i], p.share);
        });
}

}  // namespace lowrank::cpu
