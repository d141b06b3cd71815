#include "cpu/adam_moments.h"

#include <algorithm>

// One wheel for every x86-64: the loader picks the widest version of each marked loop. It needs the
// ifunc relocations of ELF and glibc, and the marked functions may not hold an OpenMP region (the
// outlined body would be compiled for the baseline), so the regions below only call them.
#if defined(LOWRANK_CPU_DISPATCH) && defined(__x86_64__) && defined(__ELF__) && \
    defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define LOWRANK_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef LOWRANK_CLONES
#define LOWRANK_CLONES
#define LOWRANK_NO_CLONES
#endif

namespace lowrank::cpu {
namespace {

// A sum is taken in blocks of 16 float terms, and over the blocks in double: its error is that of
// 16 terms however long the channel. Lanes, blocks and tree are fixed, hence the same bits for any
// number of threads and any ISA.
constexpr int64_t kBlock = 16;
constexpr int kLanes = 16;

// Four arrays of this many floats stay in L1 or close to it between the update and the sums.
constexpr int64_t kChunk = 2048;

// Below this many elements a thread costs more to wake than it saves.
constexpr int64_t kElementsPerThread = 16384;

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

// Element j of each row goes to lane j % 16.
LOWRANK_CLONES
void row_square_sums(const float* __restrict__ x, float* __restrict__ sums, int64_t rows,
                     int64_t cols) {
  for (int64_t row = 0; row < rows; ++row, x += cols) {
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
void accumulate_squares(const float* __restrict__ x, float* __restrict__ sums, int64_t count) {
  for (int64_t j = 0; j < count; ++j) sums[j] += x[j] * x[j];
}

LOWRANK_CLONES
void accumulate(const float* __restrict__ x, double* __restrict__ sums, int64_t count) {
  for (int64_t j = 0; j < count; ++j) sums[j] += x[j];
}

void update(const AdamArrays& a, const AdamRule& rule, int64_t offset, int64_t count) {
  update(rule, a.projected + offset, a.exp_avg + offset, a.exp_avg_sq + offset,
         a.direction + offset, count);
}

void row_sums(const AdamArrays& a, int64_t row, int64_t rows) {
  row_square_sums(a.direction + row * a.cols, a.direction_sq + row, rows, a.cols);
  row_square_sums(a.projected + row * a.cols, a.projected_sq + row, rows, a.cols);
}

void update_and_sum_rows(const AdamArrays& a, const AdamRule& rule, int64_t begin, int64_t end) {
  const int64_t step = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, a.cols));
  for (int64_t row = begin; row < end; row += step) {
    const int64_t count = std::min(step, end - row);
    update(a, rule, row * a.cols, count * a.cols);
    row_sums(a, row, count);
  }
}

// Down the rows in ascending order, a tile of columns at a time so that its sums stay in cache.
// Without a rule the update is already done.
void sum_columns(const AdamArrays& a, const AdamRule* rule, int64_t begin, int64_t end) {
  for (int64_t col = begin; col < end; col += kChunk) {
    const int64_t count = std::min(kChunk, end - col);
    double direction_sq[kChunk] = {};
    double projected_sq[kChunk] = {};
    for (int64_t block = 0; block < a.rows; block += kBlock) {
      float block_direction_sq[kChunk] = {};
      float block_projected_sq[kChunk] = {};
      for (int64_t row = block; row < std::min(block + kBlock, a.rows); ++row) {
        const int64_t offset = row * a.cols + col;
        if (rule) update(a, *rule, offset, count);
        accumulate_squares(a.direction + offset, block_direction_sq, count);
        accumulate_squares(a.projected + offset, block_projected_sq, count);
      }
      accumulate(block_direction_sq, direction_sq, count);
      accumulate(block_projected_sq, projected_sq, count);
    }
    std::copy_n(direction_sq, count, a.direction_sq + col);
    std::copy_n(projected_sq, count, a.projected_sq + col);
  }
}

// Calls work(begin, end) on equal ranges of [0, count), a thread each, cut at multiples of `grain`.
template <typename Work>
void split(int64_t count, int64_t grain, int threads, const Work& work) {
  const int64_t grains = (count + grain - 1) / grain;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t begin = std::min(count, grains * thread / threads * grain);
    const int64_t end = std::min(count, grains * (thread + 1) / threads * grain);
    if (begin < end) work(begin, end);
  }
}

}  // namespace

void adam_moments(const AdamArrays& a, const AdamRule& rule, int threads) {
  const int64_t elements = a.rows * a.cols;
  const int64_t channels = a.channels_are_rows ? a.rows : a.cols;
  // Columns are cut at whole cache lines of the sums.
  const int64_t grain = a.channels_are_rows ? 1 : kLanes;
  threads = static_cast<int>(std::clamp<int64_t>(elements / kElementsPerThread, 1, threads));

  // Too few channels to occupy the threads: the update is then split over elements in a pass of its
  // own, and only the sums, whose order is fixed, are left to one thread a channel.
  const bool separate = threads > 1 && channels < 2 * grain * threads;
  if (separate) {
    split(elements, kLanes, threads,
          [&](int64_t begin, int64_t end) { update(a, rule, begin, end - begin); });
  }
  split(channels, separate ? 1 : grain, threads, [&](int64_t begin, int64_t end) {
    if (!a.channels_are_rows) {
      sum_columns(a, separate ? nullptr : &rule, begin, end);
    } else if (separate) {
      row_sums(a, begin, end - begin);
    } else {
      update_and_sum_rows(a, rule, begin, end);
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
