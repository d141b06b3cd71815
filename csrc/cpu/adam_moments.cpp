#include <algorithm>

#include "cpu/clones.h"
#include "cpu/convert.h"
#include "cpu/moments.h"
#include "cpu/passes.h"
#include "cpu/split.h"
#include "cpu/square_sums.h"

namespace lowrank::cpu {
namespace {

// Four arrays of this many floats stay in L1 or close to it between the update and the sums.
constexpr int64_t kChunk = 2048;

// What one call of `update` takes at most, cut where no scale is shared: whole groups of channels.
struct Tile {
  int64_t rows, cols;
};

Tile tile_of(const AdamMoments& p) {
  if (p.moments.format == Format::kCodes && p.group.channels_are_rows)
    return {kChannelsAScale, kColumns};
  const int64_t cols = std::clamp<int64_t>(p.group.cols, 1, kChunk);
  return {kChunk / cols, cols};
}

// Of a row: float32 has no stretches.
void update_row(const AdamMoments& p, std::size_t matrix, int64_t row, int64_t col, int64_t cols) {
  const bool right = p.group.channels_are_rows, coded = p.moments.format == Format::kCodes;
  const int64_t stretch = coded ? kChannelsAScale : kStretch;
  const int64_t first_scale = row * groups_of(p.group.cols, kChannelsAScale);
  for (int64_t begin = col; begin < col + cols; begin += stretch) {
    const int64_t i = row * p.group.cols + begin;
    const Draws draws = right ? Draws{row, begin, false} : Draws{begin, row, true};
    step_stretch(p.rule, p.moments, matrix, i, first_scale + begin / kChannelsAScale, draws,
                 p.projected[matrix] + i, p.direction[matrix] + i,
                 std::min(stretch, col + cols - begin));
  }
}

// A tile, or less of it.
void update(const AdamMoments& p, std::size_t matrix, int64_t row, int64_t rows, int64_t col,
            int64_t cols) {
  const int64_t stride = p.group.cols, begin = row * stride + col;
  float* projected = p.projected[matrix] + begin;
  for (int64_t i = 0; i < rows; ++i) {
    const char* product = p.product.at(matrix, row + i, col);
    if (product != reinterpret_cast<const char*>(projected + i * stride))
      load(p.product.dtype, product, projected + i * stride, cols);
  }
  float* direction = p.direction[matrix] + begin;
  if (p.moments.format == Format::kFloat32) {
    // A tile has whole rows, or one.
    step_stretch(p.rule, p.moments, matrix, begin, 0, {}, projected, direction, rows * cols);
  } else if (p.moments.format == Format::kCodes && p.group.channels_are_rows) {
    const int64_t scale = row / kChannelsAScale * stride + col;
    step_columns(p.rule, p.moments, matrix, begin, scale, {row, col, false}, projected, direction,
                 rows, cols, stride);
  } else {
    for (int64_t i = row; i < row + rows; ++i) update_row(p, matrix, i, col, cols);
  }
}

void sum_rows(const AdamMoments& p, std::size_t matrix, int64_t row, int64_t rows) {
  const int64_t cols = p.group.cols;
  row_square_sums(p.direction[matrix] + row * cols, cols, p.direction_sq[matrix] + row, rows, cols);
  row_square_sums(p.projected[matrix] + row * cols, cols, p.projected_sq[matrix] + row, rows, cols);
}

void update_and_sum_rows(const AdamMoments& p, std::size_t matrix, int64_t begin, int64_t end) {
  const Tile tile = tile_of(p);
  for (int64_t row = begin; row < end; row += tile.rows) {
    const int64_t rows = std::min(tile.rows, end - row);
    for (int64_t col = 0; col < p.group.cols; col += tile.cols)
      update(p, matrix, row, rows, col, std::min(tile.cols, p.group.cols - col));
    sum_rows(p, matrix, row, rows);
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
        if (with_update) update(p, matrix, row, 1, col, count);
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
  const Tile tile = tile_of(p);
  // Cut at whole groups of scales, and columns at whole cache lines of the sums.
  const bool coded = p.moments.format == Format::kCodes;
  const int64_t grain = coded ? kChannelsAScale : group.channels_are_rows ? 1 : kLanes;
  const auto count = static_cast<int64_t>(group.count);
  threads = useful_threads(count * group.elements(), threads);

  // Too few channels to occupy the threads: the update is then split over tiles in a pass of its
  // own, and only the sums, whose order is fixed, are left to one thread a channel.
  const bool summed = !p.direction_sq.empty();
  const bool separate = !summed || (threads > 1 && count * group.channels() < 2 * grain * threads);
  if (separate) {
    const int64_t down = groups_of(group.rows, tile.rows),
                  across = groups_of(group.cols, tile.cols);
    split(group.count, down * across, 1, threads,
          [&](std::size_t matrix, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
              const int64_t row = i / across * tile.rows, col = i % across * tile.cols;
              update(p, matrix, row, std::min(tile.rows, group.rows - row), col,
                     std::min(tile.cols, group.cols - col));
            }
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
