#include <algorithm>
#include <vector>

#include "cpu/clones.h"
#include "cpu/convert.h"
#include "cpu/passes.h"
#include "cpu/split.h"
#include "cpu/square_sums.h"
#include "rules/channel.h"
#include "rules/convert.h"

namespace lowrank::cpu {
namespace {

// The sums of a tile of columns stay in L1.
constexpr int64_t kChunk = 1024;

// 16 bits as a value of their own type.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float square(float value) { return value * value; }
inline float square(BFloat16 value) { return square(from_bfloat16(value.bits)); }
inline float square(Float16 value) { return square(from_float16(value.bits)); }

// The row as float32, converted into `buffer` where it is not.
const float* as_float(const ResidualSums& p, std::size_t matrix, int64_t row, float* buffer) {
  const char* data = p.matrix.at(matrix, row, 0);
  if (p.matrix.dtype == DType::kFloat32) return reinterpret_cast<const float*>(data);
  load(p.matrix.dtype, data, buffer, p.group.cols);
  return buffer;
}

void sum_rows(const ResidualSums& p, std::size_t matrix, int64_t begin, int64_t end) {
  const int64_t cols = p.group.cols;
  std::vector<float> buffer(p.matrix.dtype == DType::kFloat32 ? 0 : cols);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = as_float(p, matrix, row, buffer.data());
    row_square_sums(x, cols, p.residual_sq[matrix] + row, 1, cols);
  }
}

// The squares of up to kBlock rows, added from top to bottom as `accumulate_squares` adds them,
// with the sums of kWidth columns in registers.
template <typename T>
[[gnu::always_inline]] inline void sum_block(const T* __restrict__ x, int64_t stride, int64_t rows,
                                             float* __restrict__ block, int64_t count) {
  constexpr int64_t kWidth = 4 * kLanes;
  for (int64_t first = 0; first < count; first += kWidth) {
    const int64_t width = std::min(kWidth, count - first);
    float sums[kWidth] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const T* values = x + row * stride + first;
      if (width == kWidth) {
        for (int64_t j = 0; j < kWidth; ++j) sums[j] += square(values[j]);
      } else {
        for (int64_t j = 0; j < width; ++j) sums[j] += square(values[j]);
      }
    }
    std::copy_n(sums, width, block + first);
  }
}

LOWRANK_CLONES
void sum_block_of(DType dtype, const char* x, int64_t stride, int64_t rows, float* block,
                  int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      return sum_block(reinterpret_cast<const float*>(x), stride, rows, block, count);
    case DType::kBFloat16:
      return sum_block(reinterpret_cast<const BFloat16*>(x), stride, rows, block, count);
    case DType::kFloat16:
      return sum_block(reinterpret_cast<const Float16*>(x), stride, rows, block, count);
  }
}

void sum_columns(const ResidualSums& p, std::size_t matrix, int64_t begin, int64_t end) {
  const int64_t rows = p.group.rows;
  for (int64_t col = begin; col < end; col += kChunk) {
    const int64_t count = std::min(kChunk, end - col);
    double sums[kChunk] = {};
    for (int64_t first = 0; first < rows; first += kBlock) {
      float block[kChunk];
      sum_block_of(p.matrix.dtype, p.matrix.at(matrix, first, col), p.matrix.stride,
                   std::min<int64_t>(kBlock, rows - first), block, count);
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
