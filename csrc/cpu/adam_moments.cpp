#include <algorithm>

#include "cpu/clones.h"
#include "cpu/convert.h"
#include "cpu/passes.h"
#include "cpu/split.h"
#include "cpu/square_sums.h"

namespace lowrank::cpu {
namespace {

// Four arrays of this many floats stay in L1 or close to it between the update and the sums.
constexpr int64_t kChunk = 2048;

LOWRANK_CLONES
void update(const AdamRule& shared_rule, float* __restrict__ projected, float* __restrict__ exp_avg,
            float* __restrict__ exp_avg_sq, float* __restrict__ direction, int64_t count) {
  const AdamRule rule = shared_rule;
  for (int64_t i = 0; i < count; ++i) {
    const AdamElement out = rule(projected[i], exp_avg[i], exp_avg_sq[i]);
    projected[i] = out.projected;
    exp_avg[i] = out.exp_avg;
    exp_avg_sq[i] = out.exp_avg_sq;
    direction[i] = out.direction;
  }
}

// `count` elements from `begin` on, counted row by row.
void update(const AdamMoments& p, std::size_t matrix, int64_t begin, int64_t count) {
  const int64_t end = begin + count;
  float* projected = p.projected[matrix];
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / p.group.cols;
    const int64_t next = std::min(end, (row + 1) * p.group.cols);
    const char* product = p.product.at(matrix, row, i - row * p.group.cols);
    if (product != reinterpret_cast<const char*>(projected + i))
      load(p.product.dtype, product, projected + i, next - i);
    i = next;
  }
  update(p.rule, projected + begin, p.exp_avg[matrix] + begin, p.exp_avg_sq[matrix] + begin,
         p.direction[matrix] + begin, count);
}

void sum_rows(const AdamMoments& p, std::size_t matrix, int64_t row, int64_t rows) {
  const int64_t cols = p.group.cols;
  row_square_sums(p.direction[matrix] + row * cols, cols, p.direction_sq[matrix] + row, rows, cols);
  row_square_sums(p.projected[matrix] + row * cols, cols, p.projected_sq[matrix] + row, rows, cols);
}

void update_and_sum_rows(const AdamMoments& p, std::size_t matrix, int64_t begin, int64_t end) {
  const int64_t cols = p.group.cols;
  const int64_t step = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, cols));
  for (int64_t row = begin; row < end; row += step) {
    const int64_t count = std::min(step, end - row);
    update(p, matrix, row * cols, count * cols);
    sum_rows(p, matrix, row, count);
  }
}

// Down the rows in ascending order, a tile of columns at a time so that its sums stay in cache.
void sum_columns(const AdamMoments& p, std::size_t matrix, int64_t begin, int64_t end,
                 bool with_update) {
  const int64_t rows = p.group.rows;
  for (int64_t col = begin; col < end; col += kChunk) {
    const int64_t count = std::min(kChunk, end - col);
    double direction_sq[kChunk] = {};
    double projected_sq[kChunk] = {};
    for (int64_t block = 0; block < rows; block += kBlock) {
      float block_direction_sq[kChunk] = {};
      float block_projected_sq[kChunk] = {};
      for (int64_t row = block; row < std::min(block + kBlock, rows); ++row) {
        const int64_t offset = row * p.group.cols + col;
        if (with_update) update(p, matrix, offset, count);
        accumulate_squares(p.direction[matrix] + offset, block_direction_sq, count);
        accumulate_squares(p.projected[matrix] + offset, block_projected_sq, count);
      }
      accumulate(block_direction_sq, direction_sq, count);
      accumulate(block_projected_sq, projected_sq, count);
    }
    std::copy_n(direction_sq, count, p.direction_sq[matrix] + col);
    std::copy_n(projected_sq, count, p.projected_sq[matrix] + col);
  }
}

}  // namespace

void adam_moments(const AdamMoments& p, int threads) {
  const Group& group = p.group;
  // Columns are cut at whole cache lines of the sums.
  const int64_t grain = group.channels_are_rows ? 1 : kLanes;
  const auto count = static_cast<int64_t>(group.count);
  threads = useful_threads(count * group.elements(), threads);

  // Too few channels to occupy the threads: the update is then split over elements in a pass of its
  // own, and only the sums, whose order is fixed, are left to one thread a channel.
  const bool summed = !p.direction_sq.empty();
  const bool separate = !summed || (threads > 1 && count * group.channels() < 2 * grain * threads);
  if (separate) {
    split(group.count, group.elements(), kLanes, threads,
          [&](std::size_t matrix, int64_t begin, int64_t end) {
            update(p, matrix, begin, end - begin);
          });
  }
  if (!summed) return;
  split(group.count, group.channels(), separate ? 1 : grain, threads,
        [&](std::size_t matrix, int64_t begin, int64_t end) {
          if (!group.channels_are_rows) {
            sum_columns(p, matrix, begin, end, !separate);
          } else if (separate) {
            sum_rows(p, matrix, begin, end - begin);
          } else {
            update_and_sum_rows(p, matrix, begin, end);
          }
        });
}

const char* cpu_capability() {
#if !defined(LOWRANK_NO_CLONES)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return "avx512";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "default";
}

}  // namespace lowrank::cpu
